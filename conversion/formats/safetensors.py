"""safetensors files: where each tensor lies in those that exist, and the layout of those that will be written.

Only headers are read. Written tensors go into shards in the order given, as `huggingface_hub` divides them, and lie
within a shard as the `safetensors` library orders them, so that the same tensors give the same files as
``save_pretrained``.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import UserError
from ..engine.stream import Task, Worker, write_header_task
from ..messages import listed
from .hf_config import INDEX, check_safetensors, weight_files, weight_map

DTYPES = {
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
"""safetensors' names of number types, for those that a checkpoint of this family may hold."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FIRST_IN_A_FILE = ("F32", "BF16", "F16", "U8")
"""The order of types within a file: the library sorts by its own list of types, largest first, then by name."""

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in a file: the default of `huggingface_hub`, and what gpt-oss itself comes in."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: ``nbytes`` bytes from ``offset`` on, its last axis fastest."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, worker: Worker, index: int | None = None) -> torch.Tensor:
        """The whole tensor, or entry `index` of its first axis, for example one expert."""
        if index is None:
            return worker.read(self.file, self.offset, self.shape, self.dtype)
        return worker.read(self.file, self.offset + index * self.nbytes // self.shape[0], self.shape[1:], self.dtype)

    def read_flat(self, worker: Worker, first: int, count: int) -> torch.Tensor:
        """Elements `first` to `first + count`."""
        return worker.read(self.file, self.offset + first * self.dtype.itemsize, (count,), self.dtype)


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by name.

    Raises:
        FileNotFoundError: there is no weight file, or one that the index names is missing.
        ValueError: a file is cut off or damaged, two hold the same tensor, or the index and the files disagree.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        found = read_header(file)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise UserError(f"{folder} holds {twice[0]} twice, in {tensors[twice[0]].file.name} and {file.name}")
        tensors |= found
    _check_index(folder, tensors)
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        ValueError: it is cut off or damaged, or holds a type of number that this family does not have.
    """
    check_safetensors(file)  # JSON, offsets without holes, and the file's length
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{file}: {name} is of type {entry['dtype']}, which this model family does not use")
        start, end = entry["data_offsets"]
        place = file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start, end - start
        tensors[name] = TensorInfo(name, *place)
    return tensors


def _check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    promised = weight_map(folder)
    wrong = sorted(name for name, file in promised.items() if name not in tensors or tensors[name].file.name != file)
    if wrong:
        raise UserError(f"{folder / INDEX} and its files disagree about {listed(wrong)}; copy the checkpoint again")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileOffset:
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
    places: dict[str, FileOffset]
    index: str | None

    def header_tasks(self) -> list[Task]:
        """The tasks that write the headers."""
        return [write_header_task(*header) for header in self.headers.items()]

    def write_index(self, folder: Path) -> None:
        """Write the index, where there is one."""
        if self.index is not None:
            (folder / "model.safetensors.index.json").write_text(self.index)


def plan_shards(tensors: Iterable[TensorSpec], stem: str = "model", shard_bytes: int = SHARD_BYTES) -> ShardPlan:
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
            plan.places[tensor.name] = FileOffset(name, len(header) + offset)
    return plan


def _dealt(tensors: Iterable[TensorSpec], shard_bytes: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
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


def _offsets(tensors: list[TensorSpec]) -> list[int]:
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + tensor.nbytes)
    return offsets[:-1]


def _header(tensors: list[TensorSpec], offsets: list[int]) -> bytes:
    """The length of the JSON in 8 bytes, then the JSON, filled with blanks to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor, offset in zip(tensors, offsets, strict=True):
        data_offsets = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": data_offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(shards: list[list[TensorSpec]], stem: str) -> str:
    names = _file_names(len(shards), stem)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    everything = [tensor for shard in shards for tensor in shard]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in everything),
        "total_size": sum(tensor.nbytes for tensor in everything),
    }
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
