"""Where the numbers of the recipes come from: for each field that a recipe sets, the source, the range, the reason."""

import re
from dataclasses import dataclass
from typing import Any

from .catalog import Recipe

MEGATRON_BRIDGE = "Megatron-Bridge 0.6.2, recipes of gpt-oss"
MEGATRON_BRIDGE_32K = "Megatron-Bridge, August 2026, gpt-oss at 32,768 tokens"
INTERNVL = "InternVL3.5-GPT-OSS-20B, training scripts"
LLAVA = "LLaVA-NeXT and LLaVA-OneVision, training scripts"
ONEVISION = "LLaVA-OneVision-1.5, training scripts"
QWEN = "Qwen3-VL, fine-tuning scripts"
AUTOMODEL = "NeMo Automodel, gpt-oss 20B"
SWIFT = "ms-swift, defaults"
AXOLOTL = "axolotl, examples of gpt-oss"
GPT_OSS = "gpt-oss, config.json"
MEASURED = "measured on the digits"
ESTIMATE = "the estimate of memory"
NONE = "no source"


@dataclass(frozen=True, slots=True)
class Source:
    """Why a field of some recipes has its value.

    Attributes:
        where: pattern in the name of a recipe.
        field: of the configuration.
        value: that these recipes set.
        source: one of the names above, or several.
        range: what sources have where they differ; empty where they agree.
        reason: one line.
    """

    where: str
    field: str
    value: Any
    source: str
    range: str
    reason: str


REAL, TRAINED = "(20b|120b)", "(20b|120b)_(pretrain|sft|long_context)"
WEIGHT_DECAY = ("optimizer.weight_decay", "scheduler.start_weight_decay", "scheduler.end_weight_decay")
PARTS = "optimizer_config_override_provider."

ROWS: tuple[Source, ...] = (
    # --- learning rate
    Source("b_pretrain", "optimizer.lr", 2e-5, INTERNVL, "1e-5 … 2e-5 (LLaVA-OneVision-1.5)", "the closest relative"),
    Source("b_pretrain", "optimizer.min_lr", 2e-6, MEGATRON_BRIDGE, "0 (InternVL) … 0.1 of the highest", "a tenth"),
    Source("b_align", "optimizer.lr", 1e-3, f"{INTERNVL}; {LLAVA}", "1e-4 (LLaVA-OneVision-1.5) … 1e-3", "new weights"),
    Source("b_align", "optimizer.min_lr", 1e-4, MEGATRON_BRIDGE, "0 … 0.1 of the highest", "a tenth"),
    Source(
        "b_sft",
        "optimizer.lr",
        1e-5,
        f"{LLAVA}; {QWEN}; {AUTOMODEL}; {SWIFT}",
        "5e-6 (Megatron-Bridge), 2e-5 (axolotl), 8e-5 (InternVL)",
        "the value of most",
    ),
    Source("b_sft", "optimizer.min_lr", 1e-6, MEGATRON_BRIDGE, "0 … 0.1 of the highest", "a tenth"),
    Source(
        "b_lora",
        "optimizer.lr",
        1e-4,
        f"{MEGATRON_BRIDGE}; {AUTOMODEL}; {SWIFT}",
        "1e-4 … 2e-4 (axolotl)",
        "adapters start at zero and take ten times the rate of weights",
    ),
    Source("b_lora", "optimizer.min_lr", 1e-5, MEGATRON_BRIDGE, "0 … 0.1 of the highest", "a tenth"),
    Source("b_long_context", "optimizer.lr", 1e-6, MEGATRON_BRIDGE_32K, "", "the model can do the task already"),
    Source("b_long_context", "optimizer.min_lr", 1e-7, MEGATRON_BRIDGE, "0 … 0.1 of the highest", "a tenth"),
    Source(
        "b_(sft|long_context)",
        PARTS + "vision_model",
        0.2,
        LLAVA,
        "0 (Qwen3-VL freezes it), 0.1 (its README), 0.2 (LLaVA-OneVision), 1 (InternVL)",
        "the tower is trained already; 2e-6 beside 1e-5",
    ),
    Source(
        "b_lora",
        PARTS + "vision_projection",
        0.1,
        LLAVA,
        "0 (ms-swift freezes it) … 0.1",
        "the rate of full fine-tuning, 1e-5, as the projector has full weights",
    ),
    Source(
        "b_(pretrain|sft|long_context)",
        PARTS + "vision_bias",
        10.0,
        NONE,
        "",
        "Adam moves a number by the rate in a step, and a bias on logits has to move by tenths to change a choice",
    ),
    # --- schedule and optimizer
    Source(
        REAL,
        "scheduler.lr_warmup_fraction",
        0.03,
        f"{INTERNVL}; {LLAVA}; {QWEN}; {AXOLOTL}",
        "0.2 % (LLaVA-OneVision-1.5), 1 % (InternVL's alignment), 3 %",
        "the value of most",
    ),
    Source("", "scheduler.lr_decay_style", "cosine", f"{MEGATRON_BRIDGE}; {INTERNVL}; {LLAVA}", "", "all agree"),
    Source("", "optimizer.adam_beta2", 0.95, MEGATRON_BRIDGE, "0.95 … 0.999 (InternVL)", "noise of large batches"),
    *(
        Source(
            "^(?!.*tiny_sft)",
            field,
            0.033,
            MEGATRON_BRIDGE,
            "0 (Automodel), 0.01 (LLaVA-OneVision-1.5), 0.033, 0.05 (InternVL)",
            "what its recipes train with, whatever their optimizer.weight_decay says",
        )
        for field in WEIGHT_DECAY
    ),
    # --- batch, length, steps
    Source("b_pretrain", "train.global_batch_size", 512, f"{INTERNVL}; {MEGATRON_BRIDGE}", "16 … 1,280", "both agree"),
    Source("b_align", "train.global_batch_size", 256, INTERNVL, "8 packs (LLaVA-OneVision-1.5) … 256", "as there"),
    Source("b_sft", "train.global_batch_size", 256, LLAVA, "128 (Megatron-Bridge) … 512 (InternVL)", "the middle"),
    Source("b_lora", "train.global_batch_size", 128, MEGATRON_BRIDGE, "8 (axolotl) … 128", "as there"),
    Source(
        "long_context_.*_32k", "train.global_batch_size", 32, MEGATRON_BRIDGE_32K, "4 (120B) … 32 (20B)", "as its 20B"
    ),
    Source(
        "b_long_context_[^_]*_[^_]*_bf16$",
        "train.global_batch_size",
        8,
        MEGATRON_BRIDGE_32K,
        "",
        "as many tokens in a step as 32 rows of 32,768",
    ),
    Source("b_.*_h100", "train.micro_batch_size", 1, MEGATRON_BRIDGE, "", "memory; as there"),
    Source("lora_1gpu_h200", "train.micro_batch_size", 2, ESTIMATE, "", "fits, and gives the experts larger products"),
    Source(
        "b_(pretrain|align|sft)",
        "dataset.seq_length",
        8192,
        QWEN,
        "2,048 (Megatron-Bridge) … 32,768 (InternVL, packed)",
        "31 images and their text in a row",
    ),
    Source("b_lora", "dataset.seq_length", 4096, AXOLOTL, "2,048 (Megatron-Bridge) … 4,096", "fits one GPU"),
    Source("_32k", "dataset.seq_length", 32_768, MEGATRON_BRIDGE_32K, "", "as there"),
    Source("b_long_context_[^_]*_[^_]*_bf16$", "dataset.seq_length", 131_072, GPT_OSS, "", "what its YaRN reaches"),
    Source(
        "b_pretrain",
        "train.train_iters",
        15_000,
        INTERNVL,
        "15,000 of 512 packs of 32,768 (InternVL); 64B tokens (LLaVA-OneVision-1.5)",
        "63B tokens at this length",
    ),
    Source("b_align", "train.train_iters", 2500, ONEVISION, "2,180 (LLaVA: 558K rows) … 5,000 (InternVL)", "640K rows"),
    Source("b_sft", "train.train_iters", 3500, ONEVISION, "1,000 (Megatron-Bridge) … 8,000 (InternVL)", "900K rows"),
    Source("b_lora", "train.train_iters", 1000, MEGATRON_BRIDGE, "one epoch (axolotl)", "own data: train.epochs"),
    Source("b_long_context", "train.train_iters", 1000, MEGATRON_BRIDGE, "", "a billion tokens"),
    # --- adapters, frozen parts
    Source("b_lora", "peft.dim", 32, MEGATRON_BRIDGE, "8 (axolotl, Automodel) … 32", "as there"),
    Source("b_lora", "peft.alpha", 32, MEGATRON_BRIDGE, "16 (axolotl) … 32", "as there"),
    Source(
        "b_lora",
        "peft.share_expert_adapters",
        True,
        MEGATRON_BRIDGE,
        "",
        "its default; one for each expert would be 16 times as many parameters on one GPU",
    ),
    Source(
        "lora",
        "peft.full_weights",
        ["vision_projection", "vision_bias"],
        NONE,
        "frozen (ms-swift) … full (LLaVA)",
        "they are new: adapters on random weights would have to undo these",
    ),
    *(
        Source("align", f"model.freeze_{group}", True, f"{INTERNVL}; {LLAVA}; {ONEVISION}", "", "all agree")
        for group in ("language_model", "vision_model")
    ),
    # --- layout
    *(
        Source(where, f"model.{field}_model_parallel_size", value, source, "", reason)
        for where, field, value, source, reason in (
            ("^20b_sft_8gpu", "tensor", 2, ESTIMATE, "halves the logits and the activations"),
            ("^20b_(pretrain|sft)_16gpu", "pipeline", 2, ESTIMATE, "a stage per node of 8"),
            ("^20b_(pretrain|align|sft|long)", "expert", 8, MEGATRON_BRIDGE, "experts stay within a node of 8"),
            ("120b_(pretrain|sft)", "tensor", 2, MEGATRON_BRIDGE, "as there"),
            ("120b_(pretrain|align|sft|long)", "pipeline", 4, MEGATRON_BRIDGE, "as there"),
            ("120b_(pretrain|align|sft|long)", "expert", 16, MEGATRON_BRIDGE, "as there; with 8, 10 GiB more"),
            ("120b_lora", "expert", 8, MEGATRON_BRIDGE, "as there"),
            ("^20b_long_context_8gpu", "tensor", 4, MEGATRON_BRIDGE_32K, "as there"),
            ("^20b_long_context_16gpu|120b_long", "tensor", 2, ESTIMATE, "with context parallelism, a node of 8"),
            ("^20b_long_context_16gpu", "pipeline", 2, ESTIMATE, "a stage per node of 8"),
        )
    ),
    Source("^20b_long_context_8gpu", "model.context_parallel_size", 2, MEGATRON_BRIDGE_32K, "", "as there"),
    Source(
        "^20b_long_context_16gpu|120b_long",
        "model.context_parallel_size",
        4,
        f"{MEGATRON_BRIDGE_32K}; {ESTIMATE}",
        "",
        "as its 120B; with tensor parallelism all 8 key/value groups",
    ),
    *(
        Source("^20b_(sft_8gpu|long)|120b_long.*bf16$", f"model.recompute_{part}", value, ESTIMATE, "", "fits only so")
        for part, value in (("granularity", "full"), ("method", "uniform"), ("num_layers", 1))
    ),
    Source(
        "^20b_(pretrain|sft)_16gpu|120b_long.*bf16$",
        "model.vision_recompute",
        True,
        ESTIMATE,
        "",
        "rows full of images fit only so",
    ),
    Source(
        "b_long", "model.cross_entropy_loss_fusion", False, MEGATRON_BRIDGE_32K, "", "one fp32 copy of the logits less"
    ),
    # --- tiny
    Source("tiny_(pretrain|align|sft|long)", "optimizer.lr", 3e-3, MEASURED, "", "small weights take large steps"),
    Source("tiny_(pretrain|align|sft|long)", "optimizer.min_lr", 3e-5, MEASURED, "", "a hundredth settles the answers"),
    *(
        Source("tiny_sft", field, 3.0, MEASURED, "0.033 … 6 tried", "12 epochs of 1,500 images need regularisation")
        for field in WEIGHT_DECAY
    ),
    Source(
        "tiny",
        "model.init_method_std",
        0.15,
        MEASURED,
        "0.02 … 0.2 tried",
        "Megatron-Core divides it by √(2 · layers) in output layers, which transformers does not",
    ),
    Source("tiny_lora", "optimizer.lr", 5e-3, MEASURED, "3e-3 … 1e-2 tried", "the best of these"),
    Source("tiny_lora", "optimizer.min_lr", 5e-5, MEASURED, "", "a hundredth settles the answers"),
    Source("tiny", "scheduler.lr_warmup_fraction", 0.1, MEASURED, "", "few steps"),
    Source("tiny_(pretrain|align|sft|lora)", "train.global_batch_size", 64, MEASURED, "", "26 steps are an epoch"),
    Source("tiny_long", "train.global_batch_size", 16, MEASURED, "", "minutes on two cores"),
    Source("tiny_(pretrain|align|sft|lora)", "train.micro_batch_size", 16, MEASURED, "", "divides for 4 ranks too"),
    Source("tiny_long", "train.micro_batch_size", 4, MEASURED, "", "divides for 4 ranks too"),
    Source("tiny_(pretrain|align|sft|lora)", "dataset.seq_length", 32, MEASURED, "", "the longest question fits"),
    Source("tiny_long", "dataset.seq_length", 512, MEASURED, "", "what the model's YaRN reaches"),
    Source("tiny_(pretrain|sft)", "train.train_iters", 300, MEASURED, "", "98 % of the digits"),
    Source("tiny_align", "train.train_iters", 100, MEASURED, "", "the loss stops falling"),
    Source("tiny_lora", "train.train_iters", 200, MEASURED, "", "98 % of the digits after align and sft"),
    Source("tiny_long", "train.train_iters", 50, MEASURED, "", "minutes on two cores"),
    Source("tiny_lora", "peft.dim", 16, MEASURED, "", "a quarter of the hidden size"),
    Source("tiny_lora", "peft.alpha", 32, MEASURED, "", "twice the rank"),
    Source("tiny_lora", "peft.share_expert_adapters", True, MEASURED, "", "as the large recipes"),
)

PLUMBING = {
    "model.params_dtype": "follows from mixed_precision",
    "model.bf16": "follows from mixed_precision",
    "optimizer.bf16": "follows from mixed_precision",
    "mixed_precision": "bf16 with fp32 gradients, moments and main weights, as Megatron-Bridge's recipes",
    "model.seq_length": "that of the data",
    "optimizer.use_distributed_optimizer": "shards the optimizer's states",
    "ddp.use_distributed_optimizer": "shards the optimizer's states",
    "ddp.grad_reduce_in_fp32": "follows from mixed_precision",
    "ddp.overlap_grad_reduce": "speed",
    "ddp.overlap_param_gather": "speed",
    "ddp.check_for_nan_in_grad": "stops a run that is lost",
    "scheduler.override_opt_param_scheduler": "a changed learning rate counts when a run continues",
    "scheduler.lr_wsd_decay_style": "of another schedule",
    "train.manual_gc": "all ranks collect garbage in the same step",
    "train.manual_gc_interval": "all ranks collect garbage in the same step",
    "validation.eval_interval": "as often as a checkpoint",
    "validation.eval_iters": "enough rows for a steady mean",
    "checkpoint.save_interval": "the work that a failure costs",
    "checkpoint.most_recent_k": "space on the disk",
    "checkpoint.dist_ckpt_optim_fully_reshardable": "a run continues at another layout",
    "logger.log_interval": "lines of the log",
    "rng.seed": "of weights and dropout",
    "tokenizer.tokenizer_type": "the processor of the data has the tokenizer",
    "tokenizer.vocab_size": "that of the model",
    "dataset.seed": "of the order of the rows",
    "dataset.num_workers": "loading the digits takes no time",
    "dataset.persistent_workers": "loading the digits takes no time",
    "env_vars": "those of Megatron-Bridge's recipes",
}
"""Fields that recipes set and that are no hyper-parameters, with what they are for."""


def why(recipe: Recipe) -> tuple[Source, ...]:
    """The sources of what a recipe sets, in the order of `ROWS`."""
    name = recipe.name.removeprefix("gpt_oss_vision_")
    return tuple(row for row in ROWS if re.search(row.where, name))
