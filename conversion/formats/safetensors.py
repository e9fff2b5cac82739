"""safetensors files: the layout of existing ones, read from their headers, and of those that will be written.

Written tensors go into shards in the order given, divided by `huggingface_hub`, and lie within a shard as the
`safetensors` library orders them, so that the same tensors give the same files as ``save_pretrained``.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ...errors import UserError
from ..dtypes import SAFETENSORS
from ..engine.stream import Task, Worker, write_header_task
from ..messages import listed
from .hf_config import ADAPTERS, INDEX, check_safetensors, indexed_files, weight_files

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
DTYPE_ORDER = ("F32", "BF16", "F16", "U8")
"""Order of types within a file: the library sorts by its own list of types, largest first, then by name."""

SHARD_BYTES = 5 * 10**9
"""Largest size of a shard's tensors: the default of `huggingface_hub`, and the size of gpt-oss's own shards."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: ``nbytes`` bytes from ``offset``, row-major."""

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
    """Return the tensors of a checkpoint by name.

    Raises:
        FileNotFoundError: there is no weight file, or one that the index names is missing.
        ValueError: a file is cut off or damaged, two hold the same tensor, the index and the files disagree, or there
            are adapters, which transformers would load with the weights.
    """
    if (folder / ADAPTERS).is_file():
        raise UserError(f"{folder} holds adapters ({ADAPTERS}) beside its weights; merge them, or move them away")
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
    """Return the tensors of one safetensors file by name.

    Raises:
        ValueError: it is cut off or damaged, or holds a number type that this model family does not use.
    """
    check_safetensors(file)  # JSON, offsets without holes, and the file's length
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS:
            raise UserError(f"{file}: {name} is of type {entry['dtype']}, which this model family does not use")
        start, end = entry["data_offsets"]
        dtype, shape = SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
        tensors[name] = TensorInfo(name, file, dtype, shape, 8 + length + start, end - start)
    return tensors


def _check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    files = indexed_files(folder)
    wrong = sorted(name for name, file in files.items() if name not in tensors or tensors[name].file != file)
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
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileOffset:
    """The byte of a file at which a tensor begins."""

    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The files to write.

    Attributes:
        headers: the first bytes of each file, by its name.
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
        """Write the index, if there is one."""
        if self.index is not None:
            (folder / INDEX).write_text(self.index)


def plan_shards(tensors: Iterable[TensorSpec], stem: str = "model", shard_bytes: int = SHARD_BYTES) -> ShardPlan:
    """Divide tensors among files.

    Args:
        tensors: in the order of the shards.
        stem: of the files' names.
        shard_bytes: largest size of a file's tensors; a larger tensor gets a file of its own.
    """
    specs = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    plan = ShardPlan({}, {}, {}, _index(specs, split.tensor_to_filename) if split.is_sharded else None)
    for file, names in split.filename_to_tensors.items():
        shard = sorted((specs[name] for name in names), key=lambda spec: (_order(spec), spec.name))
        offsets = [0, *accumulate(spec.nbytes for spec in shard)]
        plan.headers[file] = header = _header(shard, offsets)
        plan.sizes[file] = len(header) + offsets[-1]
        for spec, offset in zip(shard, offsets[:-1], strict=True):
            plan.places[spec.name] = FileOffset(file, len(header) + offset)
    return plan


def _order(spec: TensorSpec) -> int:
    return DTYPE_ORDER.index(DTYPE_NAMES[spec.dtype])


def _header(shard: list[TensorSpec], offsets: list[int]) -> bytes:
    """Length of the JSON in 8 bytes, then the JSON, padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for spec, start, end in zip(shard, offsets[:-1], offsets[1:], strict=True):
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(specs: Mapping[str, TensorSpec], files: Mapping[str, str]) -> str:
    metadata = {
        "total_parameters": sum(math.prod(spec.shape) for spec in specs.values()),
        "total_size": sum(spec.nbytes for spec in specs.values()),
    }
    return json.dumps({"metadata": metadata, "weight_map": dict(files)}, indent=2, sort_keys=True) + "\n"
