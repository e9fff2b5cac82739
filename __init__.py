"""GPT-OSS-Vision for NVIDIA Megatron-Bridge.

Importing this package loads neither torch nor transformers nor Megatron: public names are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
    from .bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
    from .bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM, GPTOSSVisionModel
    from .bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
    from .bridge.hf.tokenization_gpt_oss_vision import GPTOSSVisionTokenizer
    from .bridge.mcore.bridge import GPTOSSVisionBridge
    from .bridge.mcore.provider import GPTOSSVisionProvider

__version__ = "0.1.0"

_HOME = {
    "GPTOSSVisionConfig": ".bridge.hf.configuration_gpt_oss_vision",
    "GPTOSSVisionModel": ".bridge.hf.modeling_gpt_oss_vision",
    "GPTOSSVisionForCausalLM": ".bridge.hf.modeling_gpt_oss_vision",
    "GPTOSSVisionProcessor": ".bridge.hf.processing_gpt_oss_vision",
    "GPTOSSVisionImageProcessor": ".bridge.hf.image_processing_gpt_oss_vision",
    "GPTOSSVisionTokenizer": ".bridge.hf.tokenization_gpt_oss_vision",
    "GPTOSSVisionProvider": ".bridge.mcore.provider",
    "GPTOSSVisionBridge": ".bridge.mcore.bridge",
}

__all__ = [
    "GPTOSSVisionBridge",
    "GPTOSSVisionConfig",
    "GPTOSSVisionForCausalLM",
    "GPTOSSVisionImageProcessor",
    "GPTOSSVisionModel",
    "GPTOSSVisionProcessor",
    "GPTOSSVisionProvider",
    "GPTOSSVisionTokenizer",
    "__version__",
    "register",
]


def register() -> None:
    """Make transformers and Megatron-Bridge know this model, and transformers `attn_implementation="sink_sdpa"`.

    The recipes become attributes of `megatron.bridge.recipes`.

    Calling it again changes nothing. Megatron-Bridge takes ten seconds and more to import. A process that only uses
    transformers can call `gpt_oss_vision.bridge.hf.register_auto_classes` and
    `gpt_oss_vision.bridge.hf_attention.register_attention` instead; one that loads plug-ins by module name imports
    `gpt_oss_vision.bridge.plugin`.
    """
    import_module(".bridge.plugin", __name__)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
