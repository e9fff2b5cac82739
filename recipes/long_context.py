"""Training on long sequences, by context parallelism: 131,072 tokens, the reach of gpt-oss's YaRN, and 32,768.

Tensor and context parallelism together divide the 8 key/value groups. The loss is not fused: the fused one needs a
second fp32 copy of the logits.
"""

from .base import ConfigContainer, recompute_layers, recompute_tower, set_learning_rate, sized_config


def gpt_oss_vision_20b_long_context_16gpu_h100_bf16_config() -> ConfigContainer:
    """20B at 131,072 tokens on 16 H100: each node of 8 is a pipeline stage that shares a sequence and the experts."""
    config = _long_context("20b", seq_length=131_072)
    config.model.tensor_model_parallel_size, config.model.context_parallel_size = 2, 4
    config.model.pipeline_model_parallel_size = 2
    config.model.expert_model_parallel_size = 8
    recompute_layers(config.model)
    return config


def gpt_oss_vision_20b_long_context_8gpu_h100_bf16_32k_config() -> ConfigContainer:
    """20B at 32,768 tokens on 8 H100, which share a sequence and the experts."""
    config = _long_context("20b", seq_length=32_768)
    config.model.tensor_model_parallel_size, config.model.context_parallel_size = 4, 2
    config.model.expert_model_parallel_size = 8
    recompute_layers(config.model)
    return config


def gpt_oss_vision_120b_long_context_64gpu_h100_bf16_config() -> ConfigContainer:
    """120B at 131,072 tokens on 64 H100."""
    config = _long_context("120b", seq_length=131_072)
    _spread_over_64_gpus(config)
    recompute_layers(config.model)
    recompute_tower(config.model)
    return config


def gpt_oss_vision_120b_long_context_64gpu_h100_bf16_32k_config() -> ConfigContainer:
    """120B at 32,768 tokens on 64 H100; nothing is recomputed."""
    config = _long_context("120b", seq_length=32_768)
    _spread_over_64_gpus(config)
    return config


def _spread_over_64_gpus(config: ConfigContainer) -> None:
    config.model.tensor_model_parallel_size, config.model.context_parallel_size = 2, 4
    config.model.pipeline_model_parallel_size = 4
    config.model.expert_model_parallel_size = 16


def _long_context(size: str, seq_length: int) -> ConfigContainer:
    config = sized_config(size, seq_length)
    config.model.cross_entropy_loss_fusion = False
    config.train.train_iters, config.train.global_batch_size = 1000, 32 * 32_768 // seq_length
    set_learning_rate(config, 1e-6, lowest=1e-7)
    config.optimizer_config_override_provider.vision_model = 0.2
    config.optimizer_config_override_provider.vision_bias = 10.0
    return config
