# Copyright 2026 the authors of gpt-oss-vision. SPDX-License-Identifier: Apache-2.0
"""The configuration of GPT-OSS-Vision: gpt-oss's own, plus a vision tower, NoPE layers and a placeholder token."""

import os
import shutil
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, GptOssConfig, PreTrainedConfig, SiglipVisionConfig, ViTConfig


@dataclass(frozen=True, kw_only=True)
class Tower:
    """
    One kind of vision tower. Parameters that reach only a pooled output are not built: they would never get a gradient.

    Args:
        config (`type[PreTrainedConfig]`): Its configuration class.
        model (`str`): Its model class in transformers. `last_hidden_state` is `(n, [CLS +] patches, hidden_size)`.
        linears (`tuple[str, ...]`): Last parts of the names of its linear layers.
        has_cls (`bool`): Whether a CLS token precedes the patches.
        image_mean, image_std (`float` or `list[float]`): The normalisation it was pretrained with; a list is for RGB.
        arguments (`dict`): Arguments of the model class.
        fields (`dict`): Configuration fields that are always set.
        unused (`tuple[str, ...]`): Modules replaced by an identity.
        outer (`str`, *optional*): `model_type` of the checkpoints that have this tower as their `vision_config`.
    """

    config: type[PreTrainedConfig]
    model: str
    linears: tuple[str, ...]
    has_cls: bool = True
    image_mean: float | list[float] = 0.5  # one number for every channel also fits grey
    image_std: float | list[float] = 0.5
    arguments: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    outer: str | None = None


# Key: `vision_config.model_type`. A new tower is a row here, its semantics in tests/oracle.py, and a page of docs.
TOWERS = {
    "vit": Tower(
        config=ViTConfig,
        model="ViTModel",
        linears=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        arguments={"add_pooling_layer": False},
    ),
    "clip_vision_model": Tower(
        config=CLIPVisionConfig,
        model="CLIPVisionModel",
        linears=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        unused=("post_layernorm",),
        outer="clip",
    ),
    "siglip_vision_model": Tower(
        config=SiglipVisionConfig,
        model="SiglipVisionModel",
        linears=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        has_cls=False,
        fields={"vision_use_head": False},
        outer="siglip",
    ),
}


def tower_config(vision_config: dict[str, Any]) -> PreTrainedConfig:
    """
    The configuration of a tower from its fields; without `model_type` it is a ViT.

    Raises:
        ValueError: when `model_type` is not in `TOWERS`.
    """
    model_type = vision_config.get("model_type", ViTConfig.model_type)
    if model_type not in TOWERS:
        raise ValueError(f"`{model_type}` is not a supported vision tower; use one of {', '.join(TOWERS)}.")
    return TOWERS[model_type].config(**vision_config | TOWERS[model_type].fields)


def build_tower(config: PreTrainedConfig) -> Any:
    """The model of a tower's configuration, with random weights."""
    from torch.nn import Identity

    config._experts_implementation = None  # transformers sets the decoder's; a tower has no experts
    tower = TOWERS[config.model_type]
    model_class = getattr(transformers, tower.model)
    if hasattr(sys.modules[model_class.__module__], "ViTEncoder"):
        model_class = _vit_of_transformers_5_8()
    model = model_class(config, **tower.arguments)
    for name in tower.unused:
        setattr(model, name, Identity())
    return model


@cache
def _vit_of_transformers_5_8() -> Any:
    """
    For transformers < 5.9, and to be removed with them: their ViT, under the parameter names of later versions. Every
    checkpoint, of Hugging Face and of Megatron, has these names, and LoRA and INT8 name the linear layers by them.
    What these versions lack is the table for files with a ViT's names of transformers 4, which are refused.
    """
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.models.siglip.modeling_siglip import SiglipMLP
    from transformers.models.vit import modeling_vit

    class ViTAttention(modeling_vit.ViTSelfAttention):
        query, key, value = (property(lambda self, name=name: getattr(self, f"{name}_proj")) for name in "qkv")

        def __init__(self, config: ViTConfig):
            super().__init__(config)
            for name in ("query", "key", "value"):
                setattr(self, f"{name[0]}_proj", self._modules.pop(name))
            self.o_proj = nn.Linear(self.all_head_size, config.hidden_size)

        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            attended, probabilities = super().forward(hidden_states, **kwargs)
            return self.o_proj(attended), probabilities

    class ViTLayer(modeling_vit.ViTLayer):
        def __init__(self, config: ViTConfig):
            super().__init__(config)
            del self.intermediate, self.output
            self.attention, self.mlp = ViTAttention(config), SiglipMLP(config)
            self.dropout = nn.Dropout(config.hidden_dropout_prob)

        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            attended, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
            hidden_states = hidden_states + self.dropout(attended)
            return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))

    class ViTModel(modeling_vit.ViTModel):
        def __init__(self, config: ViTConfig, **kwargs: Any):
            super().__init__(config, **kwargs)
            del self._modules["encoder"]
            self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_hidden_layers)])
            self.post_init()

        def encoder(self, hidden_states: Any, **kwargs: Any) -> BaseModelOutput:
            for layer in self.layers:
                hidden_states = layer(hidden_states, **kwargs)
            return BaseModelOutput(last_hidden_state=hidden_states)

    return ViTModel


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images of a tower's configuration."""
    return config.num_channels, *_height_width(config.image_size)


def tower_tokens(config: PreTrainedConfig) -> int:
    """Tokens of an image that the tower of a configuration returns: the patches, and CLS if it has one."""
    (height, width), (patch_height, patch_width) = _height_width(config.image_size), _height_width(config.patch_size)
    return (height // patch_height) * (width // patch_width) + (1 if TOWERS[config.model_type].has_cls else 0)


# The flat arguments of the original model, and the field of the vision config that each one names.
FLAT_VISION_ARGUMENTS = {
    "vision_embed_dim": ("hidden_size", 1024),
    "vision_patch_size": ("patch_size", 14),
    "vision_num_channels": ("num_channels", 3),
    "vision_num_layers": ("num_hidden_layers", 24),
    "vision_num_heads": ("num_attention_heads", 16),
    "vision_image_size": ("image_size", 224),
}

# The `auto_map` of every checkpoint: the file beside this one, and the class in it, that an Auto class loads where this
# package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt_oss_vision.GPTOSSVisionConfig",
    "AutoModel": "modeling_gpt_oss_vision.GPTOSSVisionModel",
    "AutoModelForCausalLM": "modeling_gpt_oss_vision.GPTOSSVisionForCausalLM",
    "AutoModelForImageTextToText": "modeling_gpt_oss_vision.GPTOSSVisionForCausalLM",
    "AutoModelForMultimodalLM": "modeling_gpt_oss_vision.GPTOSSVisionForCausalLM",
}

# A stock gpt-oss checkpoint loads as a GPT-OSS-Vision checkpoint without the added weights.
LOADABLE_MODEL_TYPES = ("gpt_oss_vision", GptOssConfig.model_type)


def _vision_field(name: str) -> property:
    """A property that reads and writes a field of `vision_config`, so that each value is stored once."""

    def read(self: "GPTOSSVisionConfig") -> Any:
        return getattr(self.vision_config, name)

    def write(self: "GPTOSSVisionConfig", value: Any) -> None:
        setattr(self.vision_config, name, value)

    return property(read, write, doc=f"`vision_config.{name}`")


def _height_width(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@strict
class GPTOSSVisionConfig(GptOssConfig):
    r"""
    Configuration of [`GPTOSSVisionModel`]. Every argument of [`~transformers.GptOssConfig`] is accepted and means the
    same; rotary parameters under either name (`rope_parameters`, or `rope_scaling` with `rope_theta`). The defaults
    have the shape of gpt-oss-120b with a ViT-L/14 at 224 pixels.

    Args:
        use_vision (`bool`, *optional*, defaults to `True`):
            Whether the model has a vision adapter. Without it, `image_token_id` is an ordinary token.
        vision_pool_token (`bool`, *optional*, defaults to `True`):
            Whether each image starts with one learned token, ahead of the tower's own.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The tower: a `vit`, `clip_vision_model` or `siglip_vision_model` configuration. A dictionary without
            `model_type` is a `vit`. Without it, a `vit` is built from the flat arguments below; with it, they are
            ignored. Either way they stay readable and writable as attributes, as views of `vision_config`.
        vision_embed_dim (`int`, *optional*, defaults to 1024): Width of the tower; its MLP is four times as wide.
        vision_patch_size (`int`, *optional*, defaults to 14): Side of a patch, in pixels.
        vision_num_channels (`int`, *optional*, defaults to 3): Channels of an image, 1 or 3.
        vision_num_layers (`int`, *optional*, defaults to 24): Layers of the tower.
        vision_num_heads (`int`, *optional*, defaults to 16): Attention heads of the tower.
        vision_image_size (`int`, *optional*, defaults to 224): Side of an image, in pixels.
        image_token_id (`int`, *optional*, defaults to 200013):
            The placeholder token that image features replace, `<|reserved_200013|>` in gpt-oss's vocabulary.
        use_nope (`bool`, *optional*, defaults to `False`):
            Whether every `nope_stride`-th layer has no positional embedding. May be set on an existing configuration.
        nope_stride (`int`, *optional*, defaults to 4):
            Layer `i`, from 0, skips rotation when `(i + 1) % nope_stride == 0`.
        swiglu_limit (`float`, *optional*, defaults to 7.0):
            Where the experts clamp both halves of their gated activation; gpt-oss's own field.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the load-balancing loss, taken when `output_router_logits` is set.
        router_aux_loss_per_modality (`bool`, *optional*, defaults to `False`):
            Whether that loss balances visual and text tokens apart, each weighted by its share of the tokens.

    Raises:
        ValueError: when fields contradict each other; the sentence names both values.

    Example:

    ```python
    >>> config = GPTOSSVisionConfig(num_hidden_layers=8)
    >>> config.use_nope = True
    >>> config.nope_layers
    [0, 0, 0, 1, 0, 0, 0, 1]
    >>> config.num_image_tokens
    258
    ```"""

    model_type = "gpt_oss_vision"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig}

    use_vision: bool = True
    vision_pool_token: bool = True
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 200013
    use_nope: bool = False
    nope_stride: int = 4
    swiglu_limit: float = 7.0
    router_aux_loss_coef: float = 0.0
    router_aux_loss_per_modality: bool = False

    vision_embed_dim = _vision_field("hidden_size")
    vision_patch_size = _vision_field("patch_size")
    vision_num_channels = _vision_field("num_channels")
    vision_num_layers = _vision_field("num_hidden_layers")
    vision_num_heads = _vision_field("num_attention_heads")
    vision_image_size = _vision_field("image_size")

    def __post_init__(self, **kwargs: Any) -> None:
        flat = {name: kwargs.pop(name, default) for name, (_, default) in FLAT_VISION_ARGUMENTS.items()}
        for derived in ("nope_layers", "num_image_tokens"):
            kwargs.pop(derived, None)
        self.vision_config = self._build_vision_config(flat)
        super().__post_init__(**kwargs)
        # The decorator calls every validator after this, but wraps their errors; here users get the plain message.
        self.validate_text_shape()
        self.validate_vision()

    def _build_vision_config(self, flat: dict[str, Any]) -> PreTrainedConfig:
        config = self.vision_config
        if config is None:
            fields = {field: flat[name] for name, (field, _) in FLAT_VISION_ARGUMENTS.items()}
            return ViTConfig(intermediate_size=4 * fields["hidden_size"], **fields)
        return tower_config(config if isinstance(config, dict) else config.to_dict())

    @property
    def nope_layers(self) -> list[int]:
        """
        One entry per decoder layer: 1 where the layer has **no** rotation, 0 where it rotates. Megatron's
        `no_rope_freq` lists mean the same; SmolLM3's `no_rope_layers` means the opposite.
        """
        return [int(self.use_nope and (i + 1) % self.nope_stride == 0) for i in range(self.num_hidden_layers)]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return image_shape(self.vision_config)

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens per image: the tower's tokens, and the pool token if there is one."""
        return tower_tokens(self.vision_config) + (1 if self.vision_pool_token else 0)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "GPTOSSVisionConfig":
        """As in transformers, but the configuration of another architecture raises a ValueError with its name."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in LOADABLE_MODEL_TYPES:
            raise ValueError(
                f"This is a checkpoint of `{model_type}`; GPT-OSS-Vision loads {' and '.join(LOADABLE_MODEL_TYPES)}."
            )
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        As in transformers, and writes the code that `auto_map` names. Models, converters and Megatron-Bridge all save
        the config of a checkpoint by this method.
        """
        folder, self.auto_map = Path(save_directory), {}
        folder.mkdir(parents=True, exist_ok=True)
        for auto_class, reference in AUTO_MAP.items():
            name = reference.partition(".")[0] + ".py"
            source = Path(__file__).with_name(name)
            if source.is_file():  # transformers puts remote code of config and model apart; a model writes its file
                shutil.copyfile(source, folder / name)
            if (folder / name).is_file():
                self.auto_map[auto_class] = reference
        super().save_pretrained(save_directory, *args, **kwargs)

    def validate_text_shape(self) -> None:
        """Part of `@strict`-powered validation. Checks the decoder's numbers against each other."""
        if self.nope_stride < 1:
            raise ValueError(f"nope_stride must be at least 1, got {self.nope_stride}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than "
                f"num_local_experts ({self.num_local_experts})."
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers ({self.num_hidden_layers})."
            )

    def validate_vision(self) -> None:
        """Part of `@strict`-powered validation. Checks the placeholder and the tower's numbers."""
        if not self.use_vision:
            return
        if not 0 <= self.image_token_id < self.vocab_size:
            raise ValueError(
                f"image_token_id ({self.image_token_id}) is outside the vocabulary of {self.vocab_size} tokens."
            )
        image, patch = _height_width(self.vision_image_size), _height_width(self.vision_patch_size)
        if image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(
                f"vision_image_size ({self.vision_image_size}) must be a multiple of "
                f"vision_patch_size ({self.vision_patch_size})."
            )


# transformers writes this file and its entry of `auto_map` itself.
GPTOSSVisionConfig.register_for_auto_class()

__all__ = ["GPTOSSVisionConfig"]
