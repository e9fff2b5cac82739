"""The vision stage: pixels to token embeddings of the decoder, on the first pipeline stage."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..hf.configuration_gpt_oss_vision import build_tower, image_shape, tower_config


class VisionStage(nn.Module):
    """Tower, optional pool token, LayerNorm, projection; parameter names as in the transformers model.

    The tower is transformers' module, replicated on every rank of the stage. The tensor- and context-parallel ranks,
    which all have the same images, compute a share of them each and gather the results. A rank's gradients are those
    of its images: Megatron-Core sums gradients of ``sequence_parallel`` parameters over the tensor-parallel ranks, and
    data parallelism reduces over the context-parallel ranks.

    Args:
        config: the provider; ``vision_config`` is the tower's, ``vision_pool_token`` adds the learned token,
            ``vision_recompute`` recomputes the tower's activations in the backward pass.
        pg_collection: the process groups; images are shared over ``tp`` and ``cp``.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__()
        self.config = config
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.vit = build_tower(tower_config(config.vision_config))
        self.image_shape = image_shape(self.vit.config)
        self.num_image_tokens = config.num_image_tokens
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
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """``[n, channels, height, width]`` to ``[n, tokens per image, h]``: pool token, CLS, patches row by row.

        In training a rank with an empty share runs the tower on a blank image and drops the result. So every parameter
        has a gradient (zero), and the hooks that gather parameters and reduce gradients run in the same order on all
        ranks.
        """
        images = 0 if pixel_values is None else len(pixel_values)
        ranks, rank = self.tp_group.size() * self.cp_group.size(), self.cp_group.rank() * self.tp_group.size()
        share = -(-images // ranks)
        first = min((rank + self.tp_group.rank()) * share, images)
        if first < images:
            mine = self.features(pixel_values[first : first + share])
        elif torch.is_grad_enabled():
            mine = self.features(self.proj.weight.new_zeros(1, *self.image_shape))[:0]
        else:
            mine = self.proj.weight.new_empty(0, self.num_image_tokens, self.config.hidden_size)
        if images == 0:
            return mine
        # Gathered shares must have equal sizes; the last ones may be padding.
        mine = F.pad(mine, (0, 0, 0, 0, 0, share - len(mine)))
        # The output's gradient is whole on every tensor-parallel rank, and partial on every context-parallel one.
        gathered = gather_from_sequence_parallel_region(mine, tensor_parallel_output_grad=False, group=self.tp_group)
        gathered = gather_from_sequence_parallel_region(gathered, tensor_parallel_output_grad=True, group=self.cp_group)
        return gathered[:images]

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `forward`, on this rank alone."""
        if self.config.vision_recompute and torch.is_grad_enabled():
            return checkpoint(self._features, pixel_values, use_reentrant=False)
        return self._features(pixel_values)

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.vit(pixel_values.to(self.proj.weight.dtype)).last_hidden_state
        if self.pool_token is not None:
            hidden_states = torch.cat([self.pool_token.expand(len(hidden_states), -1, -1), hidden_states], dim=1)
        return self.proj(self.norm(hidden_states))
