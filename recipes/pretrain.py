"""Vision-language pretraining: all parameters, on images with text and text alone."""

from .base import ConfigContainer, recompute_tower, set_learning_rate, sized_config


def gpt_oss_vision_20b_pretrain_16gpu_h100_bf16_config() -> ConfigContainer:
    """20B on 16 H100: a pipeline stage per node of 8, whose GPUs share the experts; the tower is recomputed."""
    config = _pretrain("20b")
    config.model.pipeline_model_parallel_size = 2
    config.model.expert_model_parallel_size = 8
    recompute_tower(config.model)
    return config


def gpt_oss_vision_120b_pretrain_64gpu_h100_bf16_config() -> ConfigContainer:
    """120B on 64 H100, in the layout of Megatron-Bridge's recipe for the text model."""
    config = _pretrain("120b")
    config.model.tensor_model_parallel_size = 2
    config.model.pipeline_model_parallel_size = 4
    config.model.expert_model_parallel_size = 16
    return config


def _pretrain(size: str) -> ConfigContainer:
    config = sized_config(size, seq_length=8192)
    config.train.train_iters, config.train.global_batch_size = 15_000, 512
    set_learning_rate(config, 2e-5, lowest=2e-6)
    config.optimizer_config_override_provider.vision_bias = 10.0
    return config
