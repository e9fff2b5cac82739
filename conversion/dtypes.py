"""Number types: torch's, and their names on the command line, in configs and in safetensors files."""

from collections import Counter
from collections.abc import Iterable

import torch

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types of weights that are converted, by the names of ``--dtype``."""

EXPORTED = FLOATS | {"mxfp4": torch.bfloat16}
"""``--dtype`` of an export: the type of the tensors that are not packed."""

SAFETENSORS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""Types that a file of this model family may hold, by their names in safetensors headers."""


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a type in configs and reports, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


FLOAT_NAMES = " or ".join(map(dtype_name, FLOATS.values()))


def most_common(elements: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The type of most elements, given the type and the number of elements of each tensor."""
    totals: Counter[torch.dtype] = Counter()
    for dtype, count in elements:
        totals[dtype] += count
    return totals.most_common(1)[0][0]


def rounding_warnings(casts: Iterable[tuple[torch.dtype, torch.dtype]]) -> list[str]:
    """A sentence for each pair of types of which the new one cannot hold every number of the stored one.

    Args:
        casts: the stored and the new type of each tensor.
    """
    return [
        f"{count} tensors are rounded from {dtype_name(stored)} to {dtype_name(new)}"
        for (stored, new), count in Counter(casts).items()
        if torch.promote_types(stored, new) != new
    ]
