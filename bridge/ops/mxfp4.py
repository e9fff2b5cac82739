"""The MXFP4 codec: 32 values in 16 bytes and a shared scale (OCP Microscaling Formats v1.0), by table look-up.

A byte of ``blocks`` holds two E2M1 values, the first in its low nibble: sign, two bits of exponent, one of mantissa, so
±{0, ½, 1, 1½, 2, 3, 4, 6}. A byte s of ``scales`` multiplies the 32 values of its block by ``2^(s - 127)``.

Shapes: r rows, g blocks of 32 values in a row. Orientation is not changed: ``[.., r, g, 16]`` and ``[.., r, 32g]`` are
the same rows in the same order. gpt-oss stores its experts output rows first, so this is ``[E, 2f, h]`` and
``[E, h, f]``, as Megatron-Bridge's ``dequantize_mxfp4`` gives too. transformers' ``convert_moe_packed_tensors`` returns
the last two axes exchanged, which is how unquantised checkpoints have them. Megatron's ``[2f, h]`` is an expert's rows
as they are packed, with all gates before all ups.
"""

from functools import cache

import torch

VALUES_PER_SCALE = 32
"""Values that share a scale."""

MXFP4_PARTS = ("_blocks", "_scales")
"""Suffixes of the two tensors of a checkpoint that hold one packed tensor."""

EXPONENT_BIAS = 127
LARGEST_EXPONENT = 2
"""Of an E2M1 value: 4 = 2^2 and 6 = 1.5 × 2^2."""

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the three low bits of a nibble; the fourth is the sign."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

CHUNK = 16384
"""Blocks processed at a time: the scratch, 1 to 6 MB, stays in cache, and the overhead of torch calls is small."""


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The values of a packed tensor, in a new one.

    Args:
        blocks: ``[.., r, g, 16]``, uint8.
        scales: ``[.., r, g]``, uint8.
        dtype: bfloat16, float16 or float32.

    Returns:
        ``[.., r, 32g]``; see `Dequantizer` for exactness and edges.

    Raises:
        ValueError: when shapes or dtypes do not fit.

    >>> dequantize(torch.full((1, 1, 16), 0x72, dtype=torch.uint8), torch.tensor([[128]], dtype=torch.uint8))[0, :4]
    tensor([ 2., 12.,  2., 12.], dtype=torch.bfloat16)
    """
    if blocks.shape != (*scales.shape, VALUES_PER_SCALE // 2):
        raise ValueError(f"Blocks {list(blocks.shape)} and scales {list(scales.shape)} do not fit together.")
    rows, groups = scales.shape[:-1].numel(), scales.shape[-1]
    values = torch.empty(rows, VALUES_PER_SCALE * groups, dtype=dtype, device=blocks.device)
    packed = blocks.reshape(rows, groups, VALUES_PER_SCALE // 2), scales.reshape(rows, groups)
    Dequantizer(dtype, blocks.device).into(values, *packed)
    return values.view(*scales.shape[:-1], VALUES_PER_SCALE * groups)


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack values by the rule of the OCP standard (section 6.3); see `Quantizer` for the rule, its error and edges.

    Args:
        values: ``[.., n]``, bfloat16, float16 or float32, n a multiple of 32.

    Returns:
        Blocks ``[.., n / 32, 16]`` and scales ``[.., n / 32]``, both uint8.

    Raises:
        ValueError: when n is no multiple of 32, or a value is infinite or NaN.
    """
    if values.shape[-1] % VALUES_PER_SCALE:
        raise ValueError(f"MXFP4 packs rows in blocks of {VALUES_PER_SCALE}; a row here has {values.shape[-1]} values.")
    rows, groups = values.shape[:-1].numel(), values.shape[-1] // VALUES_PER_SCALE
    blocks = torch.empty(rows, groups, VALUES_PER_SCALE // 2, dtype=torch.uint8, device=values.device)
    scales = torch.empty(rows, groups, dtype=torch.uint8, device=values.device)
    Quantizer(values.device).into(blocks, scales, values.reshape(rows, VALUES_PER_SCALE * groups))
    return blocks.view(*values.shape[:-1], groups, VALUES_PER_SCALE // 2), scales.view(*values.shape[:-1], groups)


class Dequantizer:
    """Dequantises into given memory, with reused scratch. Not thread-safe: one object per thread.

    Every result is the exact product, rounded once to `dtype`: bit-identical to Megatron-Bridge's ``dequantize_mxfp4``
    and transformers' ``convert_moe_packed_tensors``, for every byte and scale. In bfloat16 and float32
    that is exact wherever it does not overflow, down to the subnormal ``2^-128`` of scale 0. Products too large become
    infinite (scale 252 is the last under which none does). The standard reserves scale 255 for NaN; both peers read it
    as ``2^128``, and so does this. In float16 small scales round to subnormals and to zero, large ones overflow sooner.

    Nothing is multiplied: a table has each pair of values for each scale, 65,536 entries, of which a checkpoint reads
    the few kilobytes of its scales.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"):
        self.dtype = dtype
        self._pairs = _pair_table(dtype, torch.device(device))
        self._index = torch.empty(0, dtype=torch.int32, device=device)
        self._scale = torch.empty(0, dtype=torch.int32, device=device)
        self._found = torch.empty(0, dtype=self._pairs.dtype, device=device)

    def is_finite(self, scales: torch.Tensor) -> bool:
        """Whether under these scales, uint8 of any shape, every value is a finite number of this object's type."""
        return VALUES[-1] * 2.0 ** (int(scales.max()) - EXPONENT_BIAS) <= torch.finfo(self.dtype).max

    def into(self, values: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        """Dequantise `blocks` into `values`, any of them with any row stride.

        Interleaved gate and up rows become Megatron's gates before ups::

            dequantizer.into(megatron[:f], blocks[0::2], scales[0::2])
            dequantizer.into(megatron[f:], blocks[1::2], scales[1::2])

        Args:
            values: ``[r, 32g]`` of this object's dtype; written without another copy where its rows are adjacent.
            blocks: ``[r, g, 16]``, uint8.
            scales: ``[r, g]``, uint8.

        Raises:
            ValueError: when shapes or dtypes do not fit.
        """
        _check(values, blocks, scales)
        if values.dtype != self.dtype:
            raise ValueError(f"The destination is {values.dtype}; this dequantises to {self.dtype}.")
        values = values.detach()
        rows, groups = scales.shape
        step = max(1, CHUNK // max(1, groups))
        if self._scale.numel() < step * groups:
            self._scale = self._scale.new_empty(step * groups)
            self._index = self._index.new_empty(step * groups * (VALUES_PER_SCALE // 2))
            self._found = self._found.new_empty(step * groups * (VALUES_PER_SCALE // 2))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            self._chunk(values[part], blocks[part], scales[part])

    def _chunk(self, values: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        index = self._index[: blocks.numel()].view(blocks.shape)
        row = self._scale[: scales.numel()].view(scales.shape)
        index.copy_(blocks)
        row.copy_(scales).mul_(256)
        torch.add(index, row.unsqueeze(-1), out=index)
        # A pair is written as one integer, which must lie on a pair's boundary.
        is_direct = values.is_contiguous() and values.storage_offset() % 2 == 0
        found = values.view(-1).view(self._pairs.dtype) if is_direct else self._found[: index.numel()]
        torch.index_select(self._pairs, 0, index.view(-1), out=found)
        if not is_direct:
            values.copy_(found.view(self.dtype).view(values.shape))


class Quantizer:
    """Quantises into given memory, with reused scratch. Not thread-safe: one object per thread.

    The rule: with m the largest magnitude of a block, its scale is ``X = 2^(floor(log2 m) - 2)``, so that m/X lies in
    [4, 8); every value is divided by X, rounded to the nearest E2M1 value, ties to the even mantissa, and saturated at
    6. The smallest scale is ``2^-127`` (byte 0): blocks of zeros and of smaller values have it. The largest that the
    rule gives is ``2^125`` (byte 252). Zeros keep their signs, and so do values that round to zero.

    What comes back differs from x by at most ``max(|x|, X) / 4``. With u = |x|/X: steps of ½ up to 2 err by at most ¼;
    steps of 1 up to 4 by ½, and of 2 up to 6 by 1, both at most u/5, at the ties 2½ and 5; beyond 6, saturated,
    ``u - 6 < u/4`` as u < 8.

    What came out of a `Dequantizer` finite, in bfloat16 or float32, keeps all its values: below X the rule can only
    choose a smaller scale, where each is a multiple of E2M1's steps still. The bytes are the same where the source's
    scales are the ones that the rule gives, and so quantising twice changes nothing.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._codes = _code_table(torch.device(device))
        self._float = torch.empty(0, VALUES_PER_SCALE, device=device)
        self._spare = torch.empty(0, VALUES_PER_SCALE, device=device)
        self._half = torch.empty(0, VALUES_PER_SCALE, dtype=torch.float16, device=device)
        self._code = torch.empty(0, VALUES_PER_SCALE, dtype=torch.uint8, device=device)

    def into(self, blocks: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
        """Quantise `values` into `blocks` and `scales`, any of them with any row stride.

        Args:
            blocks: ``[r, g, 16]``, uint8.
            scales: ``[r, g]``, uint8.
            values: ``[r, 32g]``, bfloat16, float16 or float32.

        Raises:
            ValueError: when shapes or dtypes do not fit, or a value is infinite or NaN.
        """
        _check(values, blocks, scales)
        values = values.detach()
        rows, groups = scales.shape
        step = max(1, CHUNK // max(1, groups))
        if len(self._float) < step * groups:
            for name in ("_float", "_spare", "_half", "_code"):
                setattr(self, name, getattr(self, name).new_empty(step * groups, VALUES_PER_SCALE))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            self._chunk(blocks[part], scales[part], values[part], start)

    def _chunk(self, blocks: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, start: int) -> None:
        count = scales.numel()
        exact, spare, half, code = (scratch[:count] for scratch in (self._float, self._spare, self._half, self._code))
        exact.view(values.shape).copy_(values)
        largest = torch.abs(exact, out=spare).amax(-1)
        is_finite = largest < torch.inf
        if not is_finite.all():
            row = start + int(is_finite.logical_not().nonzero()[0]) // scales.shape[1]
            raise ValueError(f"Row {row} has an infinite value or a NaN; MXFP4 holds neither.")
        if values.dtype != torch.bfloat16:
            _round_to_odd(exact.view(torch.int32), spare.view(torch.int32))
        exponent = scales_of(largest)
        scales.copy_(exponent.view(scales.shape))
        inverse = (2 * EXPONENT_BIAS - exponent).bitwise_left_shift(23).view(torch.float32)
        half.copy_(torch.mul(exact, inverse.unsqueeze(-1), out=spare))
        index = spare.view(torch.int32).copy_(half.view(torch.uint16)).view(-1)
        torch.index_select(self._codes, 0, index, out=code.view(-1))
        pairs = code.view(torch.int16)  # low byte first
        blocks.copy_((pairs | (pairs >> 4)).view(blocks.shape))


def scales_of(largest: torch.Tensor) -> torch.Tensor:
    """The scale's byte, as int32, for blocks whose largest magnitudes are `largest`, finite float32 of any shape."""
    # The exponent's field of a float32 is biased like the scale; it is 0 for subnormals.
    return largest.view(torch.int32).bitwise_right_shift(23).sub_(LARGEST_EXPONENT).clamp_(min=0)


def _round_to_odd(bits: torch.Tensor, spare: torch.Tensor) -> None:
    """Truncate float32 to bfloat16's bits, setting the last bit where a nonzero part is truncated.

    All E2M1 ties are even bfloat16 numbers, so no value moves onto or over one, and the later conversion to float16
    is exact from the smallest tie upwards. That makes one rounding, to E2M1, of what would be two.
    """
    torch.bitwise_and(bits, 0xFFFF, out=spare)
    bits.bitwise_or_(spare.add_(0xFFFF)).bitwise_and_(-0x10000)


@cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Entry ``256 scale + byte`` is the byte's two values under that scale, as the integer with their bits."""
    if dtype not in DTYPES:
        raise ValueError(f"MXFP4 is dequantised to bfloat16, float16 or float32, not to {dtype}.")
    nibble = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float64, device="cpu")
    byte = torch.arange(256, device="cpu")
    scale = torch.exp2(byte.double() - EXPONENT_BIAS)
    pairs = scale.view(256, 1, 1) * torch.stack([nibble[byte & 15], nibble[byte >> 4]], dim=-1)
    integer = torch.int64 if dtype == torch.float32 else torch.int32
    return pairs.to(dtype).view(integer).flatten().to(device)


@cache
def _code_table(device: torch.device) -> torch.Tensor:
    """Entry i is the nibble nearest to the float16 with the bits i."""
    bits = torch.arange(65536, dtype=torch.int32, device="cpu")
    magnitude = (bits & 0x7FFF).to(torch.int16).view(torch.float16).double()
    values = torch.tensor(VALUES, dtype=torch.float64, device="cpu")
    middles = (values[1:] + values[:-1]) / 2
    below, at_most = (torch.bucketize(magnitude, middles, right=right) for right in (False, True))
    # `below` and `at_most` differ on ties only; the even one of the two neighbours has an even mantissa bit.
    code = torch.where(below % 2 == 0, below, at_most)
    return (code | (bits >> 15 << 3)).to(torch.uint8).to(device)


def _check(values: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> None:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or values.dtype not in DTYPES:
        raise ValueError(
            "MXFP4 is uint8 blocks and scales of bfloat16, float16 or float32 values, "
            f"not {blocks.dtype}, {scales.dtype} and {values.dtype}."
        )
    rows, groups = scales.shape if scales.ndim == 2 else (-1, -1)
    if blocks.shape != (rows, groups, VALUES_PER_SCALE // 2) or values.shape != (rows, VALUES_PER_SCALE * groups):
        raise ValueError(
            f"Blocks [r, g, 16], scales [r, g] and values [r, 32g] do not fit together: "
            f"{list(blocks.shape)}, {list(scales.shape)} and {list(values.shape)}."
        )
