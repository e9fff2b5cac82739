"""How far apart two tensors are, by the bits of their numbers, and what rounding and packing explain of it."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from ...bridge.ops.mxfp4 import EXPONENT_BIAS, VALUES_PER_SCALE, Dequantizer, scales_of

ROWS_AT_ONCE = 256
"""Of a packed tensor, whose errors are worked out in fp32."""

BITS = {2: torch.int16, 4: torch.int32}
"""Integers with the bits of a number, by its size."""


@dataclass
class Difference:
    """How far apart the numbers of two tensors are.

    Attributes:
        count: numbers that differ.
        rounded: numbers that the narrower type could not hold; they do not count as different.
        largest: the largest difference; infinite where one of two numbers is NaN or infinite.
        bound_used: of packed numbers, the largest share of its bound that a difference takes.
        is_packed: whether there is a bound.
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

        The wider is rounded to the narrower. Of fp16 and bf16 neither holds the other: an import rounds to Megatron's
        type, an export to the source's, and the tensors agree where one of them explains every number.
        """
        ways = [(theirs, mine), (mine, theirs)]
        if mine.dtype == theirs.dtype or mine.itemsize != theirs.itemsize:
            ways = [max(ways, key=lambda way: way[0].itemsize)]
        differ, lost = min(
            (_differing(*way) for way in ways), key=lambda found: 0 if found[0] is None else found[0].sum()
        )
        self.rounded += lost
        if differ is not None:
            self.count += int(torch.count_nonzero(differ))
            self._widen((mine[differ].double() - theirs[differ].double()).abs().max())

    def add_packed(
        self, mine: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, dequantizer: Dequantizer
    ) -> None:
        """Compare ``[r, 32g]`` with blocks ``[r, g, 16]`` and scales ``[r, g]``."""
        self.is_packed = True
        values = torch.empty(min(len(mine), ROWS_AT_ONCE), mine.shape[1])
        for start in range(0, len(mine), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            theirs = values[: len(mine[rows])]
            dequantizer.into(theirs, blocks[rows], scales[rows])
            rounded = theirs.to(mine.dtype)
            if mine.dtype == torch.float16:  # the others hold every number of MXFP4
                self.rounded += _lost(theirs, rounded)
            differ = _bits(rounded) != _bits(mine[rows])
            if differ.any():
                self._add_bounded(mine[rows].float(), theirs, differ)

    def _add_bounded(self, numbers: torch.Tensor, theirs: torch.Tensor, differ: torch.Tensor) -> None:
        """Hold what differs to the bound of packing ``[r, 32g]``, fp32."""
        error = (theirs - numbers).abs_().masked_fill_(~differ, 0)
        step = _rule_scales(numbers).repeat_interleave(VALUES_PER_SCALE, dim=1)
        share = _or_infinite(error / (torch.maximum(numbers.abs(), step) / 4))
        self.count += int(torch.count_nonzero(differ))
        self._widen(error.max())
        self.bound_used = max(self.bound_used, float(share.max()))

    def _widen(self, largest: torch.Tensor) -> None:
        self.largest = max(self.largest, float(_or_infinite(largest)))

    def entry(self) -> dict[str, Any]:
        """What the report says of the tensor beyond its hash."""
        found: dict[str, Any] = {"agrees": self.is_allowed} | ({"rounded": self.rounded} if self.rounded else {})
        if self.count:
            found |= {"different": self.count, "largest_difference": _in_json(self.largest)}
        return found | ({"share_of_bound": _in_json(self.bound_used)} if self.is_packed else {})


def _differing(wide: torch.Tensor, narrow: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Which numbers differ in their bits after rounding (None: none), and how many the narrower type cannot hold.

    A NaN agrees with a NaN of another type, as types do not keep its sign and payload.
    """
    rounded, is_same_type = wide.to(narrow.dtype), wide.dtype == narrow.dtype
    lost = 0 if is_same_type else _lost(wide, rounded)
    if torch.equal(_bits(rounded), _bits(narrow)):
        return None, lost
    differ = _bits(rounded) != _bits(narrow)
    if not is_same_type:
        differ &= ~(rounded.isnan() & narrow.isnan())
    return (differ if differ.any() else None), lost


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(BITS[numbers.itemsize])


def _lost(wide: torch.Tensor, rounded: torch.Tensor) -> int:
    """How many numbers are others after rounding; a NaN stays one."""
    back = rounded.to(wide.dtype)
    return 0 if torch.equal(back, wide) else int(torch.count_nonzero((back != wide) & ~wide.isnan()))


def _or_infinite(difference: torch.Tensor) -> torch.Tensor:
    return difference.nan_to_num(torch.inf, posinf=torch.inf)


def _in_json(number: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return number if isfinite(number) else None


def _rule_scales(numbers: torch.Tensor) -> torch.Tensor:
    """The scales ``[r, g]`` by which ``[r, 32g]`` should have been packed; those of the file prove nothing."""
    largest = numbers.view(len(numbers), -1, VALUES_PER_SCALE).abs().amax(-1)
    return torch.exp2(scales_of(largest).float() - EXPONENT_BIAS)
