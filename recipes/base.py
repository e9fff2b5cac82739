"""The `ConfigContainer` that every recipe starts from; a recipe sets what differs, and no path, which only users know.

The only file that uses the helpers of Megatron-Bridge's own recipes.
"""

from ..bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from typing import Any

from megatron.bridge.recipes.utils.environment_utils import COMMON_RECIPE_ENV_VARS
from megatron.bridge.recipes.utils.optimizer_utils import distributed_fused_adam_with_cosine_annealing
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    RNGConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)

from ..bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from ..bridge.mcore.param_groups import LearningRateFactors
from ..bridge.mcore.provider import GPTOSSVisionProvider, provider_from_config
from .data.megatron import ChatDatasetProvider

SIZES: dict[str, dict[str, Any]] = {
    "20b": {"num_hidden_layers": 24, "num_local_experts": 32},
    "120b": {"num_hidden_layers": 36, "num_local_experts": 128},
}
"""What differs between the two sizes of gpt-oss."""

WEIGHT_DECAY = 0.033
"""Of matrices; the value that Megatron-Bridge's schedules train with."""


def sized_config(size: str, seq_length: int) -> ConfigContainer:
    """The base of a recipe for a size of gpt-oss, with NoPE layers and a ViT-L/14 at 224 pixels, in bf16.

    Args:
        size: a key of `SIZES`.
        seq_length: of model and data.
    """
    model = GPTOSSVisionConfig(use_nope=True, dtype="bfloat16", **SIZES[size])
    config = base_config(provider_from_config(model, seq_length=seq_length), ChatDatasetProvider(seq_length=seq_length))
    config.mixed_precision = "bf16_mixed"
    config.optimizer.bf16 = True
    config.env_vars = dict(COMMON_RECIPE_ENV_VARS)
    return config


def base_config(model: GPTOSSVisionProvider, dataset: ChatDatasetProvider) -> ConfigContainer:
    """Training in fp32 with AdamW, a warm-up and a cosine schedule, both of which follow from ``train.train_iters``.

    Args:
        model: the provider, of one rank.
        dataset: of chats, whose length is the model's.
    """
    optimizer, scheduler = distributed_fused_adam_with_cosine_annealing(
        lr_warmup_iters=0,
        weight_decay=WEIGHT_DECAY,
        start_weight_decay=WEIGHT_DECAY,
        end_weight_decay=WEIGHT_DECAY,
        precision="32",
    )
    scheduler.lr_warmup_fraction = 0.03
    return ConfigContainer(
        model=model,
        train=TrainingConfig(micro_batch_size=1, manual_gc=True, manual_gc_interval=100),
        validation=ValidationConfig(eval_interval=500, eval_iters=32),
        optimizer=optimizer,
        optimizer_config_override_provider=LearningRateFactors(),
        scheduler=scheduler,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            check_for_nan_in_grad=True,
            average_in_collective=False,  # the loss is a mean over all predicted tokens
        ),
        dataset=dataset,
        logger=LoggerConfig(log_interval=10),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=model.vocab_size - 1),
        # Saving waits for the last byte, so that a run which has saved on a signal can end at once. The optimizer's
        # states are in the format that another layout and the other back end can load.
        checkpoint=CheckpointConfig(save_interval=500, most_recent_k=3, dist_ckpt_optim_fully_reshardable=True),
        rng=RNGConfig(seed=1234),
        dist=DistributedInitConfig(),
        mixed_precision=None,
    )


def set_learning_rate(config: ConfigContainer, highest: float, lowest: float) -> None:
    """Set the learning rate after the warm-up, and that of the last step."""
    config.optimizer.lr, config.optimizer.min_lr = highest, lowest


def set_weight_decay(config: ConfigContainer, value: float) -> None:
    """Set the weight decay of matrices, which Megatron's scheduler applies in every step."""
    config.optimizer.weight_decay = value
    config.scheduler.start_weight_decay = config.scheduler.end_weight_decay = value


def recompute_tower(model: GPTOSSVisionProvider) -> None:
    """Keep the pixels of the images alone, and compute the tower again in the backward pass."""
    model.vision_recompute = True


def recompute_layers(model: GPTOSSVisionProvider) -> None:
    """Keep the input of each layer alone, and compute the rest again in the backward pass."""
    model.recompute_granularity, model.recompute_method, model.recompute_num_layers = "full", "uniform", 1
