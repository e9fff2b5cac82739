"""The recipes of every task at toy size, on the handwritten digits: each runs on a CPU within minutes, in fp32."""

from ..bridge.mcore.provider import provider_from_config
from .base import ConfigContainer, base_config, set_learning_rate, set_weight_decay
from .data.megatron import DigitsDatasetProvider
from .data.tiny import tiny_config
from .training.peft import GPTOSSVisionLoRA


def gpt_oss_vision_tiny_pretrain_1cpu_fp32_config() -> ConfigContainer:
    """All parameters from random weights."""
    return _tiny(steps=300)


def gpt_oss_vision_tiny_align_1cpu_fp32_config() -> ConfigContainer:
    """Projector, pool token and vision bias; tower and language model are frozen."""
    config = _tiny(steps=100)
    config.model.freeze_language_model = config.model.freeze_vision_model = True
    return config


def gpt_oss_vision_tiny_sft_1cpu_fp32_config() -> ConfigContainer:
    """All parameters; enough steps to learn the digits from random weights."""
    config = _tiny(steps=300)
    set_weight_decay(config, 3.0)
    return config


def gpt_oss_vision_tiny_lora_1cpu_fp32_config() -> ConfigContainer:
    """Adapters on attention and experts; projector, pool token and vision bias as full weights."""
    config = _tiny(steps=200)
    config.peft = GPTOSSVisionLoRA(dim=16, alpha=32, share_expert_adapters=True)
    set_learning_rate(config, 5e-3, lowest=5e-5)
    return config


def gpt_oss_vision_tiny_long_context_1cpu_fp32_config() -> ConfigContainer:
    """All parameters on rows of 512 tokens, all that the model's YaRN reaches."""
    config = _tiny(steps=50, seq_length=512)
    config.train.global_batch_size, config.train.micro_batch_size = 16, 4
    return config


def _tiny(steps: int, seq_length: int = 32) -> ConfigContainer:
    dataset = DigitsDatasetProvider(seq_length=seq_length, seed=0, num_workers=0, persistent_workers=False)
    model = provider_from_config(tiny_config(), seq_length=seq_length, init_method_std=0.15)
    config = base_config(model, dataset)
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = steps, 64, 16
    config.validation.eval_interval, config.validation.eval_iters = 100, 4
    config.checkpoint.save_interval = 100
    config.scheduler.lr_warmup_fraction = 0.1
    set_learning_rate(config, 3e-3, lowest=3e-5)
    config.rng.seed = 1
    return config
