"""The `ConfigContainer` that every recipe starts from; a recipe changes what differs."""

from ..bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from pathlib import Path
from typing import Any

from megatron.bridge.data import DatasetProvider
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

from ..bridge.mcore.provider import GPTOSSVisionProvider

WEIGHT_DECAY = 0.033
"""Of matrices; the value of Megatron-Bridge's schedules."""


def base_config(
    provider: GPTOSSVisionProvider,
    dataset: DatasetProvider,
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    **batch_sizes: Any,
) -> ConfigContainer:
    """Training in fp32 with AdamW and a cosine schedule, after a warm-up of a tenth of the steps.

    Args:
        provider: the model with its parallel layout.
        dataset: of chats, whose length is the provider's.
        folder: where TensorBoard's logs (`tensorboard`) and checkpoints (`megatron`, after the last step) go.
        steps: optimizer steps.
        learning_rate: the highest; it falls to a hundredth.
        seed: of dropout and initial weights.
        **batch_sizes: ``global_batch_size`` and ``micro_batch_size``.
    """
    optimizer, scheduler = distributed_fused_adam_with_cosine_annealing(
        lr_warmup_iters=steps // 10,
        lr_decay_iters=steps,
        max_lr=learning_rate,
        min_lr=learning_rate / 100,
        weight_decay=WEIGHT_DECAY,
        precision="32",
    )
    scheduler.start_weight_decay = scheduler.end_weight_decay = WEIGHT_DECAY
    return ConfigContainer(
        model=provider,
        train=TrainingConfig(train_iters=steps, **batch_sizes),
        validation=ValidationConfig(eval_iters=0, eval_interval=None),
        optimizer=optimizer,
        scheduler=scheduler,
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True),
        dataset=dataset,
        logger=LoggerConfig(log_interval=10, tensorboard_dir=str(folder / "tensorboard")),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=provider.vocab_size - 1),
        checkpoint=CheckpointConfig(save=str(folder / "megatron"), save_interval=steps),
        rng=RNGConfig(seed=seed),
        dist=DistributedInitConfig(),
        mixed_precision=None,
    )
