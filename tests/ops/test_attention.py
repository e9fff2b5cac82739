"""Sink attention, by the formula and fused, against the formula in plain loops of fp64."""

import pytest
import torch

from gpt_oss_vision.bridge.ops import attention
from gpt_oss_vision.bridge.ops.attention import blockwise_sink_attention, fused_sink_attention, sink_attention

BOTH = [sink_attention, fused_sink_attention]
SINKS = [-5.0, 0.0, 3.0, 20.0]
NAMES = ["query", "key", "value", "sinks"]


@pytest.fixture(autouse=True)
def always_fused(monkeypatch):
    """Use the fused kernel for short sequences too, since the loops that it is compared with are slow."""
    monkeypatch.setattr(attention, "_SHORT", 0)


def attention_by_hand(query, key, value, sinks, scale, window=None, mask=None):
    """One query at a time: ``exp(s_ij) / (exp(sink) + sum_j exp(s_ij))`` over its visible keys."""
    rows = []
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for q in range(queries):
                place = q + keys - queries
                first = 0 if window is None else max(0, place - window + 1)
                seen = torch.zeros(keys, dtype=torch.bool)
                seen[first : place + 1] = True
                if mask is not None:
                    seen = mask[b, 0, q] if mask.ndim == 4 else seen & mask[b]
                weights = torch.exp((key[b, g, seen] @ query[b, h, q]) * scale)
                rows.append((weights[:, None] * value[b, g, seen]).sum(0) / (weights.sum() + sinks[h].exp()))
    return torch.stack(rows).view(query.shape)


def inputs(queries: int, keys: int | None = None, heads=4, groups=2, batch=2, size=8, dtype=torch.float64):
    """Query, key, value and sinks; drawn in fp64, so that every dtype gets the same values."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch, n, length, size)
        for n, length in ((heads, queries), (groups, keys or queries), (groups, keys or queries))
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors.append(torch.tensor(SINKS, dtype=torch.float64).repeat(heads // len(SINKS)))
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def results(attend, tensors, **options) -> list[torch.Tensor]:
    """Output and gradients of query, key, value and sinks, for a random gradient of the output."""
    output = attend(*tensors, scale=tensors[0].shape[-1] ** -0.5, **options)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, grad_output)]


def assert_same(found, expected, rtol: float, atol: float):
    for name, ours, theirs in zip(["output", *NAMES], found, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("attend", BOTH)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("queries", [10, 3, 1])
def test_output_and_gradients_are_those_of_the_formula(attend, window: int | None, queries: int):
    expected = results(attention_by_hand, inputs(queries, keys=10), window=window)
    assert_same(results(attend, inputs(queries, keys=10), window=window), expected, 1e-10, 1e-12)
    narrow = inputs(queries, keys=10, dtype=torch.float32)
    assert_same(results(attend, narrow, window=window), expected, 1e-4, 1e-5)


# Blocks have 128 queries. The loops are slow, so longer sequences are compared with `sink_attention`, tested above.
@pytest.mark.parametrize("window", [None, 1, 7, 127, 128, 129, 300])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 300])
def test_block_boundaries_do_not_change_the_results(window: int | None, length: int):
    expected = results(sink_attention, inputs(length, batch=1), window=window)
    assert_same(results(fused_sink_attention, inputs(length, batch=1), window=window), expected, 1e-9, 1e-12)


@pytest.mark.parametrize("window", [None, 5, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (130, 300), (130, 131)])
def test_queries_are_the_last_positions(window: int | None, queries: int, keys: int):
    expected = results(sink_attention, inputs(queries, keys, batch=1), window=window)
    assert_same(results(fused_sink_attention, inputs(queries, keys, batch=1), window=window), expected, 1e-9, 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_heads_share_the_keys_of_their_group(groups: int):
    expected = results(attention_by_hand, inputs(5, heads=8, groups=groups), window=3)
    assert_same(results(fused_sink_attention, inputs(5, heads=8, groups=groups), window=3), expected, 1e-10, 1e-12)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_errors_are_within_the_rounding_of_the_dtype(window: int | None, dtype: torch.dtype, tolerance: float):
    expected = results(sink_attention, inputs(200, size=64), window=window)
    found = results(fused_sink_attention, inputs(200, size=64, dtype=dtype), window=window)
    assert all(tensor.dtype == dtype for tensor in found)
    for name, ours, theirs in zip(["output", *NAMES], found, expected, strict=True):
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm(), name


def padding(lengths: list[int], keys: int) -> torch.Tensor:
    """`[b, k]`, padded on the left."""
    return torch.arange(keys)[None] >= keys - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("attend", BOTH)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_left_padding_attends_to_nothing(attend, window: int | None, side: str):
    mask = padding([4, 10], 10)
    mask = mask if side == "left" else mask.flip(1)
    expected = results(attention_by_hand, inputs(10), window=window, mask=mask)
    assert_same(results(attend, inputs(10), window=window, mask=mask), expected, 1e-10, 1e-12)


@pytest.mark.parametrize("window", [None, 50, 128])
def test_padding_over_several_blocks(window: int | None):
    mask = padding([20, 290], 300)
    expected = results(sink_attention, inputs(300), window=window, mask=mask)
    assert_same(results(fused_sink_attention, inputs(300), window=window, mask=mask), expected, 1e-9, 1e-12)


@pytest.mark.parametrize("attend", BOTH)
@pytest.mark.parametrize("keys", [10, 14])
@pytest.mark.parametrize("hidden", [False, float("-inf"), torch.finfo(torch.float32).min])
def test_a_mask_of_queries_and_keys_replaces_the_causal_mask(attend, keys: int, hidden: bool | float):
    """As for packed sequences and static caches; the window is ignored. One query has no visible key."""
    mask = torch.rand(2, 1, 10, keys, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[0, 0, 3] = False
    expected = results(attention_by_hand, inputs(10, keys), mask=mask)
    given = mask if hidden is False else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)
    found = results(attend, inputs(10, keys), mask=given, window=2)
    assert_same(found, expected, 1e-10, 1e-12)
    assert not found[0][0, :, 3].any()


def test_a_mask_can_differ_from_head_to_head_and_be_learned():
    bias = torch.randn(2, 4, 150, 150, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = results(sink_attention, inputs(150), mask=bias)
    assert_same(results(fused_sink_attention, inputs(150), mask=bias), expected, 1e-9, 1e-12)
    bias.requires_grad_()
    fused_sink_attention(*inputs(150), scale=0.3, mask=bias).square().sum().backward()
    assert bias.grad.abs().max() > 0


@pytest.mark.parametrize("window", [None, 2])
def test_gradients_pass_gradcheck(monkeypatch, window: int | None):
    monkeypatch.setattr(attention, "_BLOCK", 3)

    def attend(*tensors):
        return fused_sink_attention(*tensors, scale=0.5, window=window)

    assert torch.autograd.gradcheck(attend, inputs(7, keys=8, batch=1, size=4))


def test_strides_and_gradients_of_any_layout_are_taken():
    """Models pass transposed tensors, and `sum` passes an expanded gradient, with strides of 0."""
    tensors = inputs(140, batch=2)
    expected = torch.autograd.grad(sink_attention(*tensors, scale=0.3).sum(), tensors)
    strange = [tensor.detach().transpose(1, -1).contiguous().transpose(1, -1) for tensor in tensors[:3]] + tensors[3:]
    strange = [tensor.requires_grad_() for tensor in strange]
    found = torch.autograd.grad(fused_sink_attention(*strange, scale=0.3).sum(), strange)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_queries_in_fp32_and_values_in_bf16_are_taken_as_autocast_gives_them():
    tensors = [tensor.bfloat16() for tensor in inputs(9)]
    mixed = [tensors[0].float(), tensors[1].float(), *tensors[2:]]
    assert torch.equal(fused_sink_attention(*mixed, scale=0.3), fused_sink_attention(*tensors, scale=0.3))


@pytest.mark.parametrize("kind", ["none", "padding", "4-D"])
@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (130, 310), (128, 128)])
def test_the_formula_on_blocks_of_queries_is_the_formula(kind: str, window: int | None, queries: int, keys: int):
    """For padded batches and fp32 on CUDA; the same code runs on every device."""
    tensors = inputs(queries, keys)
    masks = {
        "none": None,
        "padding": padding([keys, keys - 70], keys),
        "4-D": torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(0)) < 0.5,
    }
    options = {"window": window, "mask": masks[kind]}
    assert_same(
        results(blockwise_sink_attention, tensors, **options), results(sink_attention, tensors, **options), 1e-9, 1e-12
    )


def test_the_formula_on_blocks_of_queries_keeps_no_softmax():
    kept = []
    tensors = inputs(512)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda kept: kept
    ):
        blockwise_sink_attention(*tensors, scale=0.3)
    assert max(kept) <= tensors[0].numel()


@pytest.mark.parametrize(("length", "is_fused"), [(64, False), (65, True)])
def test_few_keys_use_the_formula(monkeypatch, length: int, is_fused: bool):
    monkeypatch.undo()
    output = fused_sink_attention(*inputs(length), scale=0.3)
    assert ("_BlockwiseAttention" in str(output.grad_fn.next_functions)) == is_fused
    torch.testing.assert_close(output, sink_attention(*inputs(length), scale=0.3))


def test_a_second_derivative_is_an_error():
    tensors = inputs(4)
    loss = fused_sink_attention(*tensors, scale=0.3).square().sum()
    gradient = torch.autograd.grad(loss, tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("attend", BOTH)
def test_a_large_sink_takes_nearly_everything(attend):
    ones = torch.ones(1, 1, 3, 4)
    found = attend(ones, ones, ones, torch.tensor([20.0]), scale=0.5)
    assert found.max() < 1e-6


# CUDA


@pytest.mark.parametrize("window", [None, 128])
def test_the_cuda_path_calls_its_kernels_with_valid_arguments(window: int | None):
    """Shapes only: torch checks a kernel's arguments on the meta device too; its values need a GPU."""
    shapes = [(2, 64, 300, 64), (2, 8, 300, 64), (2, 8, 300, 64), (64,)]
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    output = attention._CudaFlashAttention.apply(*tensors, 0.125, window)
    gradients = torch.autograd.grad(output, tensors, torch.empty_like(output))
    assert output.shape == tensors[0].shape
    assert [gradient.shape for gradient in gradients] == shapes


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 7, 128])
@pytest.mark.parametrize("length", [1, 128, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_cuda_output_and_gradients_are_those_of_the_formula(window: int | None, length: int, dtype: torch.dtype):
    wide = inputs(length, heads=8, groups=2, size=64)
    expected = results(sink_attention, wide, window=window)
    device = [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in wide]
    assert attention._fits_cuda_flash(device[0], device[1]) == (dtype == torch.bfloat16)
    output = fused_sink_attention(*device, scale=64**-0.5, window=window)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    found = [output, *torch.autograd.grad(output, device, grad_output)]
    for name, ours, theirs in zip(["output", *NAMES], found, expected, strict=True):
        # A sink's gradient is a sum over all rows, whose terms cancel; on an H200 their rounding left up to 2.04e-2.
        bound = 4e-2 if name == NAMES[-1] else 2e-2
        assert (ours.cpu().double() - theirs).norm() < bound * theirs.norm(), name
