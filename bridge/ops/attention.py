"""Attention with a learned sink per head, in plain torch.

Shapes: b batch, h query heads, g key/value groups, q query positions, k key positions, d head size.
"""

import torch


def sink_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention in which one learned logit per head joins the softmax and is then dropped.

    ``p[i, j] = exp(s[i, j]) / (exp(sink) + sum_j exp(s[i, j]))``, the gpt-oss attention (OpenAI, 2025; the
    idea is «Efficient Streaming Language Models with Attention Sinks», arXiv 2309.17453).

    Args:
        query: ``[b, h, q, d]``.
        key: ``[b, g, k, d]``; ``g`` divides ``h``, and query head ``i`` reads group ``i // (h / g)``.
        value: ``[b, g, k, d]``.
        sinks: ``[h]``, in the units of the scaled logits.
        scale: factor on the query-key products, usually ``d ** -0.5``.
        window: positions that a query sees, itself included; None is all before it.

    Returns:
        ``[b, h, q, d]`` in the query's dtype. Queries are the last ``q`` of the ``k`` positions.
    """
    heads, groups = query.shape[1], key.shape[1]
    query = query.unflatten(1, (groups, heads // groups))
    logits = torch.einsum("bgmqd,bgkd->bgmqk", query, key).float() * scale
    logits = logits.masked_fill(~visible(query.shape[-2], key.shape[-2], window, query.device), float("-inf"))
    sinks = sinks.float().view(groups, heads // groups, 1, 1)
    # The sink takes its share of the normaliser and has no value, so it only shrinks the probabilities.
    normaliser = torch.logaddexp(logits.logsumexp(-1, keepdim=True), sinks)
    probabilities = torch.exp(logits - normaliser).to(value.dtype)
    return torch.einsum("bgmqk,bgkd->bgmqd", probabilities, value).flatten(1, 2)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which key each query may see: ``[q, k]`` bool, true where ``0 <= i - j < window``."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
