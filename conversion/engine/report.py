"""The report of a conversion: every tensor with its hash and its counts of NaN and infinity.

It is written into the output as `REPORT`. Two runs of the same call write the same bytes. Import, export and verify
list Megatron's tensors, so that their hashes can be compared; assemble and adapters list those of their output::

    {"action": "import", "source": "…", "versions": {"torch": "2.11.0", …},
     "bytes_read": 13761264768, "bytes_written": 41839125360, "not_finite": 0, "added": ["…vision_bias", …],
     "tensors": {"decoder.layers.0.mlp.experts.linear_fc1.weight0":
         {"hf": ["model.layers.0.mlp.experts.gate_up_proj_blocks", …], "shape": [5760, 2880], "dtype": "bfloat16",
          "xxh3_128": "…", "nan": 2, "inf": 1}}}

``hf`` names the corresponding tensors of the Hugging Face checkpoint. A hash is XXH3-128 of the tensor's bytes,
little-endian and row-major: as import writes it, as export and verify read it, and, where export merges an adapter, of
the merged values in fp32. ``nan`` and ``inf`` are counts, left out where they are 0. ``left_out`` names the tensors
that were not compared or not copied.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from ...atomic import atomic_file
from ..dtypes import dtype_name

REPORT = "conversion.json"
PACKAGES = ("gpt-oss-vision", "torch", "megatron-core", "megatron-bridge", "transformers")


class Digest:
    """Hash and counts of one tensor, computed block by block."""

    def __init__(self) -> None:
        self._hash, self._counts = xxhash.xxh3_128(), {"nan": 0, "inf": 0}

    def update(self, values: torch.Tensor, *, is_finite: bool = False) -> None:
        """Add the next block of the tensor.

        Args:
            values: contiguous, of any shape and type.
            is_finite: skip the search for NaN and infinity.
        """
        flat = values.view(-1)
        self._hash.update(flat.view(torch.uint8).numpy())
        if is_finite or not flat.is_floating_point():
            return
        # Minimum and maximum are finite only where all values are; this takes one pass and no mask.
        if not all(end.isfinite() for end in flat.aminmax()):
            self._counts["nan"] += int(flat.isnan().sum())
            self._counts["inf"] += int(flat.isinf().sum())

    def entry(self, names: Sequence[str], shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
        """The tensor's entry in the report, with `names` as ``hf``; see the module's docstring."""
        found = {name: count for name, count in self._counts.items() if count}
        return {
            "hf": [*names],
            "shape": [*shape],
            "dtype": dtype_name(dtype),
            "xxh3_128": self._hash.hexdigest(),
        } | found


def make_report(action: str, tensors: Mapping[str, dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """Build a report; `fields` are the action's own."""
    bad = {name: entry for name, entry in tensors.items() if {"nan", "inf"} & entry.keys()}
    return {
        "action": action,
        **fields,
        "versions": package_versions(),
        "not_finite": sum(entry.get("nan", 0) + entry.get("inf", 0) for entry in bad.values()),
        "tensors": dict(tensors),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages on which the bytes of an output depend."""
    return {name: version(name) for name in PACKAGES}


def nonfinite_warnings(report: Mapping[str, Any], most: int = 10) -> list[str]:
    """One warning per tensor with NaN or infinity, at most `most`, then a count of the rest."""
    bad = {name: entry for name, entry in report["tensors"].items() if {"nan", "inf"} & entry.keys()}
    said = [
        f"{name} holds {entry.get('nan', 0)} NaN and {entry.get('inf', 0)} infinite values"
        + (" (float16 ends at 65504)" if entry["dtype"] == "float16" and "inf" in entry else "")
        for name, entry in list(bad.items())[:most]
    ]
    return said + ([f"{len(bad) - most} more tensors do too; {REPORT} lists them"] if len(bad) > most else [])


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write the report into an output folder."""
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an output folder."""
    return json.loads((folder / REPORT).read_text())


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Write a report to a file, atomically.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_file(path) as file:
        file.write(json.dumps(report, indent=1, allow_nan=False) + "\n")
