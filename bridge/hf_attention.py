"""The attention implementation `sink_sdpa` for transformers: our fused attention with sinks.

Shapes: b rows, h query heads, g key/value heads, q query positions, k key positions, d head size.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .ops.attention import fused_sink_attention


def register_attention() -> None:
    """Register ``attn_implementation="sink_sdpa"`` in transformers. Idempotent."""
    AttentionInterface.register("sink_sdpa", sink_sdpa_attention)
    AttentionMaskInterface.register("sink_sdpa", sink_sdpa_mask)


def sink_sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Query ``(b, h, q, d)``, key and value ``(b, g, k, d)``, sinks ``s_aux (h,)`` to ``(b, q, h, d)``.

    Attention without sinks that is not causal, as in a vision tower, runs as transformers' ``sdpa``.

    Raises:
        ValueError: for causal attention without sinks, dropout, and ``output_attentions=True``.
    """
    if s_aux is None:
        if getattr(module, "is_causal", True):
            raise ValueError(
                f'attn_implementation="sink_sdpa" is for attention with sinks; {type(module).__name__} has none.'
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError(f'"sink_sdpa" has no dropout; use "eager" or attention_dropout=0, not {dropout}.')
    if kwargs.get("output_attentions"):
        raise ValueError('"sink_sdpa" never holds the attention weights; use "eager" for output_attentions=True.')
    context = fused_sink_attention(query, key, value, s_aux, scale=scaling, window=sliding_window, mask=attention_mask)
    return context.transpose(1, 2).contiguous(), None


def sink_sdpa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of `fused_sink_attention`, which applies the causal rule and the window itself.

    Where the queries are the last of the keys, the padding ``(b, k)``, or None without padding. For static caches,
    packed sequences and user-defined masks, visibility per query and key, ``(b, 1, q, k)``.
    """
    if not allow_is_causal_skip or q_offset + q_length != kv_offset + kv_length:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            **kwargs,
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return padding if is_tracing(padding) or not padding.all() else None
