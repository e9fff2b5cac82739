"""Alignment, the first stage after `assemble`: projector, pool token and vision bias learn, on images with captions.

The tower and the language model are frozen.
"""

from .base import ConfigContainer, set_learning_rate, sized_config


def gpt_oss_vision_20b_align_8gpu_h100_bf16_config() -> ConfigContainer:
    """20B on 8 H100, which share the experts."""
    config = _align("20b")
    config.model.expert_model_parallel_size = 8
    return config


def gpt_oss_vision_120b_align_64gpu_h100_bf16_config() -> ConfigContainer:
    """120B on 64 H100: four pipeline stages, each with its experts on 8 or 16 GPUs."""
    config = _align("120b")
    config.model.pipeline_model_parallel_size = 4
    config.model.expert_model_parallel_size = 16
    return config


def _align(size: str) -> ConfigContainer:
    config = sized_config(size, seq_length=8192)
    config.model.freeze_language_model = config.model.freeze_vision_model = True
    config.train.train_iters, config.train.global_batch_size = 2500, 256
    set_learning_rate(config, 1e-3, lowest=1e-4)
    return config
