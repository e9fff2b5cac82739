"""Differences between two tensors, bit by bit, without those that rounding or MXFP4 packing explains."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from ...bridge.ops.mxfp4 import EXPONENT_BIAS, VALUES_PER_SCALE, Dequantizer, scales_of

ROWS_AT_ONCE = 256
"""Rows of a packed tensor that are dequantised at once, to fp32."""

BITS = {2: torch.int16, 4: torch.int32}
"""Integer types by their size in bytes, to compare floating-point numbers by their bits."""


@dataclass
class Difference:
    """The differences between two tensors.

    Attributes:
        count: elements that differ.
        rounded: elements that the narrower type cannot represent; they do not count as different.
        largest: the largest difference; infinite where one of two elements is NaN or infinite.
        bound_used: the largest ratio of a difference to its bound, where one of the tensors is packed.
        is_packed: whether one of the tensors is packed.
    """

    count: int = 0
    rounded: int = 0
    largest: float = 0.0
    bound_used: float = 0.0
    is_packed: bool = False

    @property
    def is_allowed(self) -> bool:
        """Whether the tensors agree."""
        return self.bound_used <= 1 if self.is_packed else not self.count

    def add(self, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        """Compare the bits of two tensors of the same shape, Megatron's and the source's, after rounding one of them.

        The wider type is rounded to the narrower. fp16 and bf16 are rounded both ways, as an import rounds to
        Megatron's type and an export to the source's; the way with fewer differences counts.
        """
        ways = [(theirs, mine), (mine, theirs)]
        if mine.dtype == theirs.dtype or mine.itemsize != theirs.itemsize:
            ways = [max(ways, key=lambda way: way[0].itemsize)]
        count, rounded, differ = min((_differing(*way) for way in ways), key=lambda found: found[0])
        self.count += count
        self.rounded += rounded
        if count:
            self._enlarge((mine[differ].double() - theirs[differ].double()).abs())

    def add_packed(
        self, mine: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, dequantizer: Dequantizer
    ) -> None:
        """Compare a tensor ``[r, 32g]`` with MXFP4 blocks ``[r, g, 16]`` and scales ``[r, g]``."""
        self.is_packed = True
        values = torch.empty(min(len(mine), ROWS_AT_ONCE), mine.shape[1])
        for start in range(0, len(mine), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            theirs = values[: len(mine[rows])]
            dequantizer.into(theirs, blocks[rows], scales[rows])
            rounded = theirs.to(mine.dtype)
            if mine.dtype == torch.float16:  # fp32 and bf16 represent every MXFP4 value exactly
                self.rounded += _count_rounded(theirs, rounded)
            differ = _bits(rounded) != _bits(mine[rows])
            if differ.any():
                self._add_bounded(mine[rows].float(), theirs, differ)

    def _add_bounded(self, values: torch.Tensor, theirs: torch.Tensor, differ: torch.Tensor) -> None:
        """Compare differing elements of ``[r, 32g]`` in fp32 with the bound of a value's rounding, see `Quantizer`."""
        error = (theirs - values).abs_().masked_fill_(~differ, 0)
        # The scales by which `values` should have been packed: those in the file prove nothing.
        largest = values.view(len(values), -1, VALUES_PER_SCALE).abs().amax(-1)
        scales = torch.exp2(scales_of(largest).float() - EXPONENT_BIAS).repeat_interleave(VALUES_PER_SCALE, dim=1)
        self.count += int(torch.count_nonzero(differ))
        self._enlarge(error)
        self.bound_used = max(self.bound_used, _max_or_infinite(error / (torch.maximum(values.abs(), scales) / 4)))

    def _enlarge(self, error: torch.Tensor) -> None:
        self.largest = max(self.largest, _max_or_infinite(error))

    def entry(self) -> dict[str, Any]:
        """The fields of the tensor in the report, beside its hash."""
        found: dict[str, Any] = {"agrees": self.is_allowed} | ({"rounded": self.rounded} if self.rounded else {})
        if self.count:
            found |= {"different": self.count, "largest_difference": _in_json(self.largest)}
        return found | ({"share_of_bound": _in_json(self.bound_used)} if self.is_packed else {})


def _differing(wide: torch.Tensor, narrow: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """Compare bits after rounding: how many elements differ, how many the narrower type cannot represent, and a mask.

    Two NaN of different types agree, as a cast may change a NaN's sign and payload.
    """
    rounded, is_same_type = wide.to(narrow.dtype), wide.dtype == narrow.dtype
    count_rounded = 0 if is_same_type else _count_rounded(wide, rounded)
    if torch.equal(_bits(rounded), _bits(narrow)):  # the usual case, without a mask
        return 0, count_rounded, torch.empty(0, dtype=torch.bool)
    differ = _bits(rounded) != _bits(narrow)
    if not is_same_type:
        differ &= ~(rounded.isnan() & narrow.isnan())
    return int(torch.count_nonzero(differ)), count_rounded, differ


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(BITS[values.itemsize])


def _count_rounded(wide: torch.Tensor, rounded: torch.Tensor) -> int:
    """Count the elements that rounding has changed; a NaN stays a NaN."""
    back = rounded.to(wide.dtype)
    return 0 if torch.equal(back, wide) else int(torch.count_nonzero((back != wide) & ~wide.isnan()))


def _max_or_infinite(values: torch.Tensor) -> float:
    """The largest element; infinite where there is a NaN."""
    return float(values.nan_to_num(torch.inf, posinf=torch.inf).max())


def _in_json(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if isfinite(value) else None
