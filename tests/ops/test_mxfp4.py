"""The MXFP4 codec against the standard's definition, one value at a time, and against transformers."""

import math
from fractions import Fraction

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gpt_oss_vision.bridge.ops.mxfp4 import Dequantizer, Quantizer, dequantize, quantize

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
MAGNITUDES = [Fraction(value) for value in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]


def every_byte_under_every_scale() -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    return blocks, torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16).contiguous()


def random_packed(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(BITS[one.dtype]), other.view(BITS[other.dtype]))


def exactly(nibble: int, scale: int) -> float:
    """The standard's value as a float64, which represents every one exactly."""
    magnitude = MAGNITUDES[nibble & 7] * Fraction(2) ** (scale - 127)
    return math.copysign(float(magnitude), -1 if nibble & 8 else 1)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_every_byte_under_every_scale_is_the_product_rounded_once(dtype: torch.dtype):
    blocks, scales = every_byte_under_every_scale()
    found = dequantize(blocks, scales, dtype)
    expected = torch.tensor(
        [[exactly(nibble, scale) for byte in range(256) for nibble in (byte & 15, byte >> 4)] for scale in range(256)],
        dtype=torch.float64,
    )
    assert same_bits(found, expected.to(dtype))


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_every_byte_under_every_scale_is_as_in_transformers_transposed(dtype: torch.dtype):
    blocks, scales = every_byte_under_every_scale()
    turned = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)
    assert same_bits(dequantize(blocks[None], scales[None], dtype), turned.mT.contiguous())


@pytest.mark.parametrize(
    "shape", [(3, 130, 90), (2, 1, 20000), (1, 40000, 1), (0, 4, 2), (3, 0), (5,), (5, 2), (2, 3, 4, 5)], ids=str
)
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_any_shape_is_dequantised_through_all_its_chunks(shape: tuple[int, ...], dtype: torch.dtype):
    blocks, scales = random_packed(*shape)
    found = dequantize(blocks, scales, dtype)
    nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    values = torch.tensor([exactly(nibble, 127) for nibble in range(16)], dtype=torch.float64)[nibbles]
    expected = (values * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)
    assert found.shape == (*shape[:-1], 32 * shape[-1])
    assert same_bits(found, expected.to(dtype))


def test_interleaved_rows_of_gate_and_up_are_separated():
    blocks, scales = random_packed(2 * 300, 20, low=110, high=140)
    plain, parted = dequantize(blocks, scales), torch.empty(600, 640, dtype=torch.bfloat16)
    dequantizer = Dequantizer()
    dequantizer.into(parted[:300], blocks[0::2], scales[0::2])
    dequantizer.into(parted[300:], blocks[1::2], scales[1::2])
    assert same_bits(parted, torch.cat([plain[0::2], plain[1::2]]))


@pytest.mark.parametrize(
    "part",
    [lambda t: t[::3, :64], lambda t: t[:, 8:72], lambda t: t[:, 1:65], lambda t: t.view(-1)[1:].unfold(0, 64, 64)],
    ids=["rows", "columns", "odd columns", "odd start"],
)
def test_a_destination_of_any_stride_is_filled_and_the_rest_left(part):
    whole = torch.full((301, 80), 7.0, dtype=torch.bfloat16)
    mine = part(whole)
    blocks, scales = random_packed(len(mine), 2, low=110, high=140)
    Dequantizer().into(mine, blocks, scales)
    assert same_bits(mine.contiguous(), dequantize(blocks, scales))
    mine.fill_(7.0)
    assert torch.equal(whole, torch.full_like(whole, 7.0))


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_the_scales_alone_show_whether_values_are_finite(dtype: torch.dtype):
    blocks, dequantizer = torch.arange(256, dtype=torch.uint8).view(1, 16, 16), Dequantizer(dtype)
    for scale in range(256):
        scales = torch.full((1, 16), scale, dtype=torch.uint8)
        assert dequantizer.is_finite(scales) == bool(dequantize(blocks, scales, dtype).isfinite().all())


def test_one_object_serves_tensors_of_different_sizes():
    dequantizer, quantizer = Dequantizer(), Quantizer()
    for shape in ((2, 3), (7, 5000), (300, 90), (1, 1)):
        blocks, scales = random_packed(*shape, low=110, high=140)
        values = torch.empty(shape[0], 32 * shape[1], dtype=torch.bfloat16)
        dequantizer.into(values, blocks, scales)
        assert same_bits(values, dequantize(blocks, scales))
        packed = torch.empty_like(blocks), torch.empty_like(scales)
        quantizer.into(*packed, values)
        assert all(map(torch.equal, packed, quantize(values)))


def by_the_book(block: list[float]) -> tuple[list[int], int]:
    """Section 6.3 of the standard over exact fractions: the nibbles of a block and its scale."""
    largest = max(map(abs, block))
    exponent = max(math.frexp(largest)[1] - 1 - 2, -127) if largest else -127
    nibbles = []
    for value in block:
        scaled = abs(Fraction(value)) / Fraction(2) ** exponent
        # round to nearest, ties to the even mantissa, which has an even index in the list
        code = min(range(8), key=lambda place: (abs(MAGNITUDES[place] - scaled), place % 2))
        nibbles.append(code | (8 if math.copysign(1, value) < 0 else 0))
    return nibbles, exponent + 127


def samples(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of one block each: of every magnitude, at and next to every tie, subnormal, sparse, and both zeros."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    low, high = math.ceil(math.log2(info.smallest_normal)) - 8, math.floor(math.log2(info.max)) - 3
    exponents = torch.randint(low, high, (200, 1), generator=generator)
    normal = torch.randn(200, 32, generator=generator, dtype=torch.float64) * torch.exp2(exponents.double())
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0], dtype=torch.float64).repeat(200, 4)
    ties[:, 1::2] *= -1
    ties = (ties * torch.exp2(exponents.double())).to(dtype)
    near = ties.view(BITS[dtype]) + torch.randint(-1, 2, ties.shape, generator=generator, dtype=BITS[dtype])
    subnormal = torch.randint(0, 300, (40, 32), generator=generator, dtype=BITS[dtype]).view(dtype)
    sparse = torch.where(torch.rand(200, 32, generator=generator) < 0.9, -0.0, normal)
    zero = torch.tensor([0.0, -0.0], dtype=dtype).repeat(1, 16)
    return torch.cat([normal.to(dtype), near.view(dtype), subnormal, sparse.to(dtype), zero])


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_quantising_follows_the_standard(dtype: torch.dtype):
    values = samples(dtype, seed=1)
    values = values[values.isfinite().all(-1)]
    blocks, scales = quantize(values)
    nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).flatten(1)
    assert len(values) > 500
    for row, found, scale in zip(values.double().tolist(), nibbles.tolist(), scales.flatten().tolist(), strict=True):
        assert (found, scale) == by_the_book(row)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_the_error_of_quantising_is_within_the_bound(dtype: torch.dtype):
    for seed in range(10):
        values = samples(dtype, seed)
        values = values[values.isfinite().all(-1)]
        blocks, scales = quantize(values)
        back = dequantize(blocks, scales, torch.float32).double()
        unit = torch.exp2(scales.double() - 127)
        error = (back - values.double()).abs()
        assert (error <= torch.maximum(values.double().abs(), unit) / 4).all()


def test_the_bound_is_reached():
    blocks, scales = quantize(torch.tensor([[4.0, 0.25] + 30 * [0.0]]))
    assert scales.item() == 127
    assert dequantize(blocks, scales)[0, :2].tolist() == [4.0, 0.0]
    largest = torch.tensor(8.0).nextafter(torch.tensor(0.0))
    blocks, scales = quantize(largest.expand(1, 32))
    assert dequantize(blocks, scales).unique().tolist() == [6.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantising_again_keeps_values_always_and_bytes_where_the_scale_is_the_rules(dtype: torch.dtype):
    blocks, scales = random_packed(64, 256)
    blocks[:32] &= 0x99  # magnitudes up to 1/2 only: the rule gives these blocks another scale
    values = dequantize(blocks, scales, dtype)
    finite = values.view(-1, 32).isfinite().all(-1)
    assert 0.98 < finite.double().mean() < 1  # large scales overflow
    blocks, scales, values = blocks.view(-1, 1, 16)[finite], scales.view(-1, 1)[finite], values.view(-1, 32)[finite]
    again = quantize(values)
    assert same_bits(dequantize(*again, dtype), values)
    # With the rule's scale the largest value has the exponent 2; only with scale 0 it may have a smaller one.
    codes = torch.maximum(blocks & 7, blocks >> 4 & 7).amax(-1)
    by_rule = ((codes >= 6) | (scales == 0)).squeeze(-1)
    assert 0.3 < by_rule.double().mean() < 0.7
    assert torch.equal(again[0][by_rule], blocks[by_rule]) and torch.equal(again[1][by_rule], scales[by_rule])
    assert (again[1][~by_rule] < scales[~by_rule]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantising_twice_changes_nothing(dtype: torch.dtype):
    values = samples(dtype, seed=3)
    once = quantize(values[values.isfinite().all(-1)])
    assert all(map(torch.equal, once, quantize(dequantize(*once, dtype))))


@pytest.mark.parametrize("shape", [(64,), (3, 0), (0, 32), (2, 3, 4, 96)], ids=str)
def test_any_shape_is_quantised(shape: tuple[int, ...]):
    blocks, scales = quantize(torch.full(shape, 6.0))
    assert blocks.shape == (*shape[:-1], shape[-1] // 32, 16) and scales.shape == blocks.shape[:-1]
    assert torch.equal(dequantize(blocks, scales, torch.float32), torch.full(shape, 6.0))


def test_packed_rows_and_values_of_any_stride_are_read_and_written():
    values = torch.randn(7, 96, 10).mT  # [7, 10, 96], last axis not contiguous
    assert all(map(torch.equal, quantize(values), quantize(values.contiguous())))
    blocks, scales = torch.zeros(20, 3, 16, dtype=torch.uint8), torch.zeros(20, 3, dtype=torch.uint8)
    for part in (0, 1):
        Quantizer().into(blocks[part::2], scales[part::2], values[part])
    expected = quantize(torch.stack([values[0], values[1]], dim=1).flatten(0, 1))
    assert torch.equal(blocks, expected[0]) and torch.equal(scales, expected[1])


def test_parameters_are_read_and_written():
    parameter = torch.nn.Parameter(torch.randn(4, 64))
    blocks, scales = quantize(parameter)
    Dequantizer(torch.float32).into(parameter, blocks, scales)
    assert same_bits(parameter.detach(), dequantize(blocks, scales, torch.float32))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_what_is_not_finite_is_refused_and_found(bad: float, dtype: torch.dtype):
    values = torch.zeros(500, 640, dtype=dtype)
    values[413, 77] = bad
    with pytest.raises(ValueError, match="Row 413 has an infinite value or a NaN"):
        quantize(values)


def test_what_does_not_fit_is_refused_with_its_shapes():
    blocks, scales = random_packed(4, 2)
    with pytest.raises(ValueError, match="a row here has 48 values"):
        quantize(torch.zeros(2, 48))
    with pytest.raises(ValueError, match=r"\[4, 2, 16\], \[4, 2\] and \[4, 32\]"):
        Dequantizer().into(torch.zeros(4, 32, dtype=torch.bfloat16), blocks, scales)
    with pytest.raises(ValueError, match=r"Blocks \[4, 2, 16\] and scales \[4, 1\] do not fit"):
        dequantize(blocks, scales[:, :1])
    with pytest.raises(ValueError, match=r"float64"):
        dequantize(blocks, scales, torch.float64)
    with pytest.raises(ValueError, match=r"destination is torch.float32; this dequantises to torch.bfloat16"):
        Dequantizer().into(torch.zeros(4, 64), blocks, scales)
    with pytest.raises(ValueError, match=r"torch.int8"):
        dequantize(blocks.view(torch.int8), scales)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits():
    blocks, scales = random_packed(3, 200, 90)
    for dtype in BITS:
        values = dequantize(blocks, scales, dtype)
        assert same_bits(dequantize(blocks.cuda(), scales.cuda(), dtype).cpu(), values)
        values = samples(dtype, seed=4)
        values = values[values.isfinite().all(-1)]
        assert all(map(torch.equal, (part.cpu() for part in quantize(values.cuda())), quantize(values)))
