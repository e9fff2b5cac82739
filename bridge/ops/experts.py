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


def grouped_experts(
    tokens: torch.Tensor,
    tokens_per_expert: Sequence[int],
    probs: torch.Tensor,
    fc1: Sequence[tuple[torch.Tensor, torch.Tensor]],
    fc2: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    limit: float,
    offset: float,
) -> torch.Tensor:
    """Run every expert on its own run of tokens and weigh the results.

    Args:
        tokens: ``[t, h]``, all tokens of expert 0 first, then those of expert 1, …
        tokens_per_expert: E counts that sum to t; a zero still gives that expert a (zero) gradient.
        probs: ``[t]``, the routing weight of each token for its expert.
        fc1: per expert the weight ``[2f, h]`` and bias ``[2f]``, gate before up.
        fc2: per expert the weight ``[h, f]`` and bias ``[h]``.

    Returns:
        ``[t, h]`` in the tokens' dtype, the bias weighted like the rest.
    """
    outputs = []
    weights = probs.unsqueeze(-1).to(tokens.dtype)
    for mine, weight, one, two in zip(
        tokens.split(list(tokens_per_expert)), weights.split(list(tokens_per_expert)), fc1, fc2, strict=True
    ):
        activated = clamped_gate(F.linear(mine, *one), limit=limit, offset=offset)
        outputs.append(F.linear(activated, *two) * weight)
    return torch.cat(outputs)
