"""The vision stage: pixels in, token embeddings of the decoder out. It lives on the first pipeline stage."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers import AutoConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionModel, ViTModel


class VisionStage(nn.Module):
    """Tower, optional learned token in front, LayerNorm, projection; parameter names as in the transformers model.

    The tower is transformers' own module and is replicated over the tensor-parallel ranks: each computes all images
    of the microbatch, and because the decoder's input gradient is complete on every rank, so are the tower's
    gradients, without any reduction.

    Args:
        config: the provider; ``vision_config`` names the tower, ``vision_pool_token`` adds the learned token.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.vit = build_tower(config.vision_config)
        width = self.vit.config.hidden_size
        self.pool_token = nn.Parameter(torch.zeros(1, 1, width)) if config.vision_pool_token else None
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.hidden_size)
        if config.perform_initialization:
            config.init_method(self.proj.weight)
            nn.init.zeros_(self.proj.bias)
            if self.pool_token is not None:
                config.init_method(self.pool_token)
        self.to(config.params_dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[n, channels, height, width]`` to ``[n, tokens per image, h]``: pool token, CLS, patches row by row."""
        hidden_states = self.vit(pixel_values.to(self.proj.weight.dtype)).last_hidden_state
        if self.pool_token is not None:
            hidden_states = torch.cat([self.pool_token.expand(len(hidden_states), -1, -1), hidden_states], dim=1)
        return self.proj(self.norm(hidden_states))

    def idle(self) -> torch.Tensor:
        """A zero that depends on every parameter, for a microbatch without images.

        It costs nothing, and keeps gradient reduction from waiting for parameters that this rank did not use.
        """
        return sum(parameter.flatten()[:0].sum() for parameter in self.parameters())


def build_tower(vision_config: dict) -> PreTrainedModel:
    """The transformers vision model that a config describes, without parameters that never reach the output.

    Args:
        vision_config: ``to_dict()`` of a ViT, CLIP or SigLIP vision config, with its ``model_type``.

    Raises:
        ValueError: for any other ``model_type``.
    """
    config = AutoConfig.for_model(**vision_config)
    if config.model_type == "vit":
        return ViTModel(config, add_pooling_layer=False)
    if config.model_type == "siglip_vision_model":
        return SiglipVisionModel(config)
    if config.model_type == "clip_vision_model":
        tower = CLIPVisionModel(config)
        tower.post_layernorm = nn.Identity()  # it only serves the pooled output
        return tower
    raise ValueError(
        f"vision_config.model_type is {config.model_type!r}; it must be 'vit', 'clip_vision_model' or "
        "'siglip_vision_model'."
    )
