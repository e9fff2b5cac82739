"""The weight files of a Hugging Face checkpoint, planned from names, types and shapes: where each tensor will lie.

Tensors go into shards in the order given, as `huggingface_hub` deals them out; within a shard they lie as the
`safetensors` library lays them out, so that the same tensors give the same files as ``save_pretrained``.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .safetensors_reader import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FIRST_IN_A_FILE = ("F32", "BF16", "F16", "U8")
"""The order of types within a file: the library sorts by its own list of types, largest first, then by name."""

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in a file: the default of `huggingface_hub`, and what gpt-oss itself comes in."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes begin in which file."""

    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The files to write.

    Attributes:
        headers: what each file begins with, by its name.
        sizes: bytes of each file.
        places: of each tensor, by its name.
        index: content of ``model.safetensors.index.json``; None where one file holds everything.
    """

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, Place]
    index: str | None

    def write_index(self, folder: Path) -> None:
        """Write the index, where there is one."""
        if self.index is not None:
            (folder / "model.safetensors.index.json").write_text(self.index)


def plan_shards(tensors: Iterable[Tensor], stem: str = "model", shard_bytes: int = SHARD_BYTES) -> ShardPlan:
    """Deal tensors out to files.

    Args:
        tensors: in the order of the shards.
        stem: of the files' names.
        shard_bytes: most bytes of tensors in a file; a larger tensor has a file of its own.
    """
    shards = list(_dealt(tensors, shard_bytes))
    plan = ShardPlan({}, {}, {}, _index(shards, stem) if len(shards) > 1 else None)
    for name, shard in zip(_file_names(len(shards), stem), shards, strict=True):
        ordered = sorted(shard, key=lambda tensor: (FIRST_IN_A_FILE.index(NAMES[tensor.dtype]), tensor.name))
        offsets = _offsets(ordered)
        plan.headers[name] = header = _header(ordered, offsets)
        plan.sizes[name] = len(header) + sum(tensor.nbytes for tensor in ordered)
        for tensor, offset in zip(ordered, offsets, strict=True):
            plan.places[tensor.name] = Place(name, len(header) + offset)
    return plan


def _dealt(tensors: Iterable[Tensor], shard_bytes: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if tensor.nbytes > shard_bytes:
            yield [tensor]
            continue
        if held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(tensor)
        held += tensor.nbytes
    if shard:
        yield shard


def _file_names(count: int, stem: str) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _offsets(tensors: list[Tensor]) -> list[int]:
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + tensor.nbytes)
    return offsets[:-1]


def _header(tensors: list[Tensor], offsets: list[int]) -> bytes:
    """The length of the JSON in 8 bytes, then the JSON, filled with blanks to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor, offset in zip(tensors, offsets, strict=True):
        data_offsets = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": data_offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(shards: list[list[Tensor]], stem: str) -> str:
    names = _file_names(len(shards), stem)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    everything = [tensor for shard in shards for tensor in shard]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in everything),
        "total_size": sum(tensor.nbytes for tensor in everything),
    }
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
