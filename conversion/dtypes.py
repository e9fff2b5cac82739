"""Number types: torch's, and their names on the command line, in configs and in safetensors files."""

import torch

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types of weights that are converted, by the names of ``--dtype``."""

EXPORTED = {"bf16": torch.bfloat16, "fp32": torch.float32, "mxfp4": torch.bfloat16}
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
