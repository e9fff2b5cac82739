"""Core attention of the `torch` back end: the learnable sink on Megatron's [s, b, …] layout."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import nn

from ..ops.attention import fused_sink_attention
from .context_parallel import heads_to_sequence, sequence_to_heads
from .packing import sample_boundaries
from .parameters import ExtraState, parameter_device


class SinkAttention(ExtraState, MegatronModule):
    """`ModuleSpec` core attention with ``softmax_type="learnable"``: causal, with a window in the layers that have one.

    Has one parameter, ``softmax_offset [heads / tp]``, named as in Megatron-Core's and Transformer Engine's core
    attention. Runs on any device: Megatron-Core 0.19.2's ``DotProductAttention`` allocates
    this parameter on the current CUDA device.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert pg_collection is not None
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # Megatron counts the positions before the query, gpt-oss counts the query too.
        self.window = config.window_size[0] + 1 if windowed else None
        heads = divide(config.num_attention_heads, self.tp_group.size())
        self.softmax_offset = nn.Parameter(
            torch.empty(heads, dtype=config.params_dtype, device=parameter_device(config))
        )
        # Without this attribute Megatron treats it as replicated and counts one rank's shard only in the gradient norm.
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                config.init_method(self.softmax_offset)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Query ``[s/cp, b, heads/tp, d]``, key and value ``[s/cp, b, groups/tp, d]`` to ``[s/cp, b, heads/tp * d]``.

        With ``packed_seq_params``, query ``[t, heads/tp, d]`` and so on to ``[t, heads/tp * d]``; samples do not attend
        to one another. ``attention_mask`` is ignored: padding is on the right, where a causal query never attends.
        """
        if attention_bias is not None:
            raise ValueError("The `torch` back end takes no attention bias.")
        if packed_seq_params is None:
            return self._attend(query, key, value)
        lengths = [length for length in sample_boundaries(packed_seq_params).diff().tolist() if length]
        samples = zip(*(part.unsqueeze(1).split(lengths) for part in (query, key, value)), strict=True)
        return torch.cat([self._attend(*sample) for sample in samples]).squeeze(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        whole = [sequence_to_heads(part, self.cp_group).permute(1, 2, 0, 3) for part in (query, key, value)]
        sinks = self.softmax_offset.chunk(self.cp_group.size())[self.cp_group.rank()]
        context = fused_sink_attention(*whole, sinks, scale=self.scale, window=self.window)
        return heads_to_sequence(context.permute(2, 0, 1, 3), self.cp_group).flatten(2).contiguous()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """The sinks, sharded over the tensor-parallel ranks along the heads, and the extra state."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
