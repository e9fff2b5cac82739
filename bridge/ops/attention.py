"""Attention with a learned sink per head: the formula in plain torch, and torch's fused kernels with the sink added.

``p[i, j] = exp(s[i, j]) / (exp(sink) + sum_j exp(s[i, j]))``: one learned logit per head joins the softmax and is then
dropped. It is gpt-oss's attention (OpenAI, 2025), after "Efficient Streaming Language Models with Attention Sinks"
(arXiv 2309.17453).

A fused kernel has no sinks, but it returns the log-sum-exp of each row of logits, ``lse``, and its backward takes
one. With ``L = logaddexp(lse, sink)`` the output is the kernel's times ``exp(lse - L)``. The kernel's backward
recomputes ``p = exp(s - L)`` and takes ``rowsum(do * o)`` from its output argument, so given ``L`` and the output
with the sink it differentiates the formula; and ``dsink = -sum(exp(sink - L) * rowsum(do * o))``.

Shapes: b batch, h query heads, g key/value groups, m = h / g heads of a group, q query positions, k key positions,
d head size, r rows: the queries of a block, times m.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Queries of a block on a CPU. A window of w costs w + 127 keys per query; smaller blocks make smaller matrix products.
_BLOCK = 128
# Up to this many keys the formula is as fast on a CPU in fp32, and 3 to 9 times as fast in bf16, forward and backward.
_SHORT = 64


def fused_sink_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sink_attention` by the fastest exact implementation for the device; same arguments and result.

    On a CPU: torch's flash attention, linear in q with a window; the formula for few keys. On CUDA: torch's flash
    attention for half precision with as many queries as keys and no mask; else the formula on blocks of queries, also
    for decoding and padded batches. Gradients of query, key, value and sinks are exact; a fused kernel has no second
    derivative.
    """
    # Under autocast the rotated query and key can be fp32 and the value bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    learned_mask = mask is not None and mask.requires_grad
    if query.device.type == "cpu" and key.shape[2] > _SHORT and not learned_mask:
        grouped = query.unflatten(1, (key.shape[1], -1))
        return _BlockwiseAttention.apply(grouped, key, value, sinks, mask, scale, window).flatten(1, 2)
    if mask is None and _fits_cuda_flash(query, key):
        return _CudaFlashAttention.apply(query, key, value, sinks, scale, window)
    return blockwise_sink_attention(query, key, value, sinks, scale=scale, window=window, mask=mask)


def blockwise_sink_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sink_attention` on blocks of queries, which the backward pass computes again: memory is linear in q."""
    queries, keys, outputs = query.shape[2], key.shape[2], []
    if queries <= _BLOCK:
        return sink_attention(query, key, value, sinks, scale=scale, window=window, mask=mask)
    for rows, columns in _rows_and_columns(queries, keys, window, mask):
        part = mask
        if mask is not None:
            part = mask[:, columns] if mask.ndim == 2 else mask[..., rows, :]
        attend = partial(sink_attention, scale=scale, window=window, mask=part)
        tensors = query[:, :, rows], key[:, :, columns], value[:, :, columns], sinks
        outputs.append(checkpoint(attend, *tensors, use_reentrant=False))
    return torch.cat(outputs, dim=2)


def sink_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention with sinks by the formula.

    Args:
        query: ``[b, h, q, d]``.
        key: ``[b, g, k, d]``; ``g`` divides ``h``, and query head ``i`` reads group ``i // (h / g)``.
        value: ``[b, g, k, d]``.
        sinks: ``[h]``, in the units of the scaled logits.
        scale: factor on the query-key products, usually ``d ** -0.5``.
        window: positions that a query attends to, itself included; None for all before it.
        mask: ``[b, k]`` bool, true at keys that are not padding. Or ``[b, 1 or h, q, k]``, bool or added to the logits,
            in place of the causal rule **and** of the window.

    Returns:
        ``[b, h, q, d]`` in the value's dtype, zeros where a query attends to nothing. Without a 4-D mask, queries are
        the last ``q`` of the ``k`` positions.
    """
    groups = key.shape[1]
    query = query.unflatten(1, (groups, -1))
    at_least_fp32 = torch.promote_types(query.dtype, torch.float32)
    logits = torch.einsum("bgmqd,bgkd->bgmqk", query, key).to(at_least_fp32) * scale
    rows, columns = slice(0, query.shape[3]), slice(0, key.shape[2])
    logits = logits + _bias(rows, columns, key.shape[2] - query.shape[3], window, mask, groups, logits)
    # The sink adds to the normaliser and has no value, so it only scales the probabilities down.
    sinks = sinks.to(at_least_fp32).view(1, groups, -1, 1, 1).expand(*logits.shape[:-1], 1)
    probabilities = torch.cat((logits, sinks), -1).softmax(-1)[..., :-1].to(value.dtype)
    return torch.einsum("bgmqk,bgkd->bgmqd", probabilities, value).flatten(1, 2)


class _BlockwiseAttention(torch.autograd.Function):
    """The CPU's flash attention on blocks of queries and their visible keys.

    The rows of a block are the queries of all heads of a group, so keys and values are never repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Query ``[b, g, m, q, d]``, key and value ``[b, g, k, d]`` to ``[b, g, m, q, d]``."""
        key, value = _with_dense_rows(key), _with_dense_rows(value)
        batch, groups, per_group, queries, size = query.shape
        # Callers transpose to positions before heads.
        output = query.new_empty(batch, queries, groups, per_group, size).permute(0, 2, 3, 1, 4)
        wide = torch.promote_types(query.dtype, torch.float32)
        normaliser = query.new_empty(query.shape[:-1], dtype=wide)
        for rows, columns, bias in _blocks(query, key, window, mask):
            fused, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _fold(query[..., rows, :]), key[..., columns, :], value[..., columns, :], attn_mask=bias, scale=scale
            )
            shape = (batch, groups, per_group, rows.stop - rows.start)
            lse = lse.view(shape)  # 0 where no key is visible, where the fused output is 0: right with any normaliser
            normaliser[..., rows] = torch.logaddexp(lse, sinks.to(wide).view(groups, per_group, 1))
            output[..., rows, :] = fused.reshape(*shape, size) * torch.exp(lse - normaliser[..., rows])[..., None]
        ctx.save_for_backward(query, key, value, sinks, mask, output, normaliser)
        ctx.scale, ctx.window = scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, mask, output, normaliser = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=normaliser.dtype)
        grad_value = torch.zeros_like(grad_key)
        for rows, columns, bias in _blocks(query, key, ctx.window, mask):
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _fold(grad_output[..., rows, :]),
                _fold(query[..., rows, :]),
                key[..., columns, :],
                value[..., columns, :],
                _fold(output[..., rows, :]),
                normaliser[..., rows].flatten(2),
                0.0,
                False,
                attn_mask=bias,
                scale=ctx.scale,
            )
            grad_query[..., rows, :] = of_query.reshape(grad_query[..., rows, :].shape)
            grad_key[..., columns, :] += of_key
            grad_value[..., columns, :] += of_value
        grad_sinks = _sink_gradient(sinks.view(*query.shape[1:3], 1), normaliser, grad_output, output).view_as(sinks)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks, None, None, None


class _CudaFlashAttention(torch.autograd.Function):
    """CUDA's flash attention on the whole sequence; it has windows and groups itself."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Query ``[b, h, s, d]``, key and value ``[b, g, s, d]`` to ``[b, h, s, d]``."""
        # The kernel's layout is [b, s, h, d]; it counts the positions before the query.
        query, key, value = (_with_dense_rows(tensor).transpose(1, 2) for tensor in (query, key, value))
        before = None if window is None else window - 1
        length = query.shape[1]
        fused, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, None, None, length, length, 0.0, True, False, scale=scale, window_size_left=before
        )
        normaliser = torch.logaddexp(lse, sinks.to(lse.dtype).view(-1, 1))
        output = (fused * torch.exp(lse - normaliser).transpose(1, 2)[..., None]).to(fused.dtype)
        ctx.save_for_backward(query, key, value, sinks, output, normaliser, rng_state, unused)
        ctx.scale, ctx.before = scale, before
        return output.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, output, normaliser, rng_state, unused = ctx.saved_tensors
        grad = _with_dense_rows(grad_output).transpose(1, 2)
        length, options = query.shape[1], {"scale": ctx.scale, "window_size_left": ctx.before}
        gradients = torch.ops.aten._flash_attention_backward(
            *(grad, query, key, value, output, normaliser, None, None, length, length, 0.0, True, rng_state, unused),
            **options,
        )
        grad_sinks = _sink_gradient(sinks.view(-1, 1), normaliser, grad_output, output.transpose(1, 2))
        return *(gradient.transpose(1, 2) for gradient in gradients), grad_sinks.view_as(sinks), None, None


def _fits_cuda_flash(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether torch's CUDA flash attention supports the arguments; it needs Ampere or later."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] == key.shape[2]
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _blocks(
    query: torch.Tensor, key: torch.Tensor, window: int | None, mask: torch.Tensor | None
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Queries of each block, their visible keys, and the bias of their logits, ``[b|1, g|1, r, k]``."""
    groups, per_group, queries = query.shape[1:4]
    keys = key.shape[2]
    for rows, columns in _rows_and_columns(queries, keys, window, mask):
        bias = _bias(rows, columns, keys - queries, window, mask, groups, query)
        yield rows, columns, bias.expand(-1, -1, per_group, -1, -1).flatten(2, 3)


def _rows_and_columns(
    queries: int, keys: int, window: int | None, mask: torch.Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Queries of each block, and their visible keys."""
    offset = keys - queries
    for start in range(0, queries, _BLOCK):
        rows, columns = slice(start, min(start + _BLOCK, queries)), slice(0, keys)
        if mask is None or mask.ndim == 2:
            first = 0 if window is None else max(0, offset + rows.start - window + 1)
            columns = slice(first, offset + rows.stop)
        yield rows, columns


def _bias(
    rows: slice,
    columns: slice,
    offset: int,
    window: int | None,
    mask: torch.Tensor | None,
    groups: int,
    like: torch.Tensor,
) -> torch.Tensor:
    """The bias of the logits of some queries and keys, ``[b|1, g|1, m|1, q, k]``: 0 where visible, else -inf.

    Query ``i`` stands at key position ``i + offset``.
    """
    if mask is None or mask.ndim == 2:
        visible = _visible(rows, columns, offset, window, like.device)[None, None, None]
        if mask is not None:
            visible = visible & mask[:, None, None, None, columns].bool()
    else:
        visible = mask[..., rows, columns]
        visible = visible.unsqueeze(1) if mask.shape[1] == 1 else visible.unflatten(1, (groups, -1))
        if mask.dtype != torch.bool:
            return visible.to(like.dtype)
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))


def _visible(rows: slice, columns: slice, offset: int, window: int | None, device: torch.device) -> torch.Tensor:
    """The causal rule with a window, ``[q, k]``: true where ``0 <= i + offset - j < window``."""
    places = torch.arange(rows.start + offset, rows.stop + offset, device=device)
    distance = places[:, None] - torch.arange(columns.start, columns.stop, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _sink_gradient(
    sinks: torch.Tensor, normaliser: torch.Tensor, grad_output: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """Sinks ``[…, 1]``, normaliser ``[b, …, q]``, output and its gradient ``[b, …, q, d]`` to ``[…]``."""
    share = torch.exp(sinks.to(normaliser.dtype) - normaliser)
    taken = share * (grad_output * output).sum(-1, dtype=normaliser.dtype)
    return -taken.sum((0, -1)).to(sinks.dtype)


def _fold(block: torch.Tensor) -> torch.Tensor:
    """From ``[b, g, m, q, d]`` to ``[b, g, r, d]``."""
    return _with_dense_rows(block.flatten(2, 3))


def _with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels need a stride of 1 in the last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
