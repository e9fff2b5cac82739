"""Supervised fine-tuning of all parameters on chats, the tower at a lower learning rate than the rest."""

from .base import ConfigContainer, recompute_layers, recompute_tower, set_learning_rate, sized_config


def gpt_oss_vision_20b_sft_8gpu_h100_bf16_config() -> ConfigContainer:
    """20B on 8 H100, which share the experts. The weights leave room for recomputed activations only."""
    config = _sft("20b")
    config.model.tensor_model_parallel_size = 2
    config.model.expert_model_parallel_size = 8
    recompute_layers(config.model)
    return config


def gpt_oss_vision_20b_sft_16gpu_h100_bf16_config() -> ConfigContainer:
    """20B on 16 H100: a pipeline stage per node of 8, whose GPUs share the experts; the tower is recomputed."""
    config = _sft("20b")
    config.model.pipeline_model_parallel_size = 2
    config.model.expert_model_parallel_size = 8
    recompute_tower(config.model)
    return config


def gpt_oss_vision_120b_sft_64gpu_h100_bf16_config() -> ConfigContainer:
    """120B on 64 H100."""
    config = _sft("120b")
    config.model.tensor_model_parallel_size = 2
    config.model.pipeline_model_parallel_size = 4
    config.model.expert_model_parallel_size = 16
    return config


def _sft(size: str) -> ConfigContainer:
    config = sized_config(size, seq_length=8192)
    config.train.train_iters, config.train.global_batch_size = 3500, 256
    set_learning_rate(config, 1e-5, lowest=1e-6)
    config.optimizer_config_override_provider.vision_model = 0.2
    config.optimizer_config_override_provider.vision_bias = 10.0
    return config
