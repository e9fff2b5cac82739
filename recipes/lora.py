"""Fine-tuning by adapters on attention and experts; projector, pool token and vision bias are trained as full weights.

The experts of a rank share one adapter: with one for each, a 20B on one GPU would have 16 times as many parameters to
train, 365 million.
"""

from .base import ConfigContainer, set_learning_rate, sized_config
from .training.peft import GPTOSSVisionLoRA


def gpt_oss_vision_20b_lora_1gpu_h100_bf16_config() -> ConfigContainer:
    """20B on one H100."""
    return _lora("20b")


def gpt_oss_vision_20b_lora_1gpu_h200_bf16_config() -> ConfigContainer:
    """20B on one H200, two rows at once."""
    config = _lora("20b")
    config.train.micro_batch_size = 2
    return config


def gpt_oss_vision_120b_lora_8gpu_h100_bf16_config() -> ConfigContainer:
    """120B on 8 H100, which share the experts."""
    config = _lora("120b")
    config.model.expert_model_parallel_size = 8
    return config


def _lora(size: str) -> ConfigContainer:
    config = sized_config(size, seq_length=4096)
    config.peft = GPTOSSVisionLoRA(dim=32, alpha=32, share_expert_adapters=True)
    config.train.train_iters, config.train.global_batch_size = 1000, 128
    set_learning_rate(config, 1e-4, lowest=1e-5)
    config.optimizer_config_override_provider.vision_projection = 0.1
    return config
