"""The gated experts of gpt-oss over tokens sorted by expert, in plain torch.

Shapes: t tokens, h hidden size, f expert FFN size, E experts on this rank.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

QUICK_GELU_SLOPE = 1.702
"""The constant of quick-GELU, ``x * sigmoid(1.702 x)`` (Hendrycks & Gimpel, arXiv 1606.08415)."""


def clamped_gate(gate_up: torch.Tensor, *, limit: float, offset: float) -> torch.Tensor:
    """``(up + offset) * quick_gelu(gate)`` with both halves clamped, the gate from above only.

    Args:
        gate_up: ``[t, 2f]``, all gate columns before all up columns (Megatron's order).
        limit: the clamp; gpt-oss has 7.
        offset: added to the linear half; gpt-oss has 1.

    Returns:
        ``[t, f]``.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + offset) * gate * torch.sigmoid(QUICK_GELU_SLOPE * gate)


def grouped_linear(
    tokens: torch.Tensor, tokens_per_expert: Sequence[int], experts: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Apply one linear layer per expert to consecutive tokens.

    Args:
        tokens: ``[t, in]``, all tokens of expert 0 first, then those of expert 1, …
        tokens_per_expert: E counts that sum to t; an expert with count 0 gets a zero gradient.
        experts: per expert the weight ``[out, in]`` and bias ``[out]``.

    Returns:
        ``[t, out]``.
    """
    runs = tokens.split(list(tokens_per_expert))
    return torch.cat([F.linear(mine, *expert) for mine, expert in zip(runs, experts, strict=True)])
