"""Where every tensor of a Hugging Face checkpoint lies, from the headers of its files alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import UserError
from ..engine.stream import Worker
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


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: ``nbytes`` bytes from ``offset`` on, its last axis fastest."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, worker: Worker, first: int = 0, count: int | None = None, *, at: int = 0) -> torch.Tensor:
        """Numbers `first` to `first + count` in the worker's inbox, flat; see `Worker.read` for `at`."""
        size = self.dtype.itemsize
        count = self.nbytes // size - first if count is None else count
        return worker.read(self.file, self.offset + first * size, count * size, at=at).view(self.dtype)

    def read_part(self, worker: Worker, index: int, *, at: int = 0) -> torch.Tensor:
        """Entry `index` of the first axis, for example one expert."""
        count = self.nbytes // self.dtype.itemsize // self.shape[0]
        return self.read(worker, index * count, count, at=at).view(self.shape[1:])


def read_index(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name.

    Raises:
        FileNotFoundError: there is no weight file, or one that the index names is missing.
        ValueError: a file is cut off or damaged, two hold the same tensor, or the index and the files disagree.
    """
    tensors: dict[str, Stored] = {}
    for file in weight_files(folder):
        found = read_header(file)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise UserError(f"{folder} holds {twice[0]} twice, in {tensors[twice[0]].file.name} and {file.name}")
        tensors |= found
    _check_index(folder, tensors)
    return tensors


def read_header(file: Path) -> dict[str, Stored]:
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
        tensors[name] = Stored(name, *place)
    return tensors


def _check_index(folder: Path, tensors: Mapping[str, Stored]) -> None:
    promised = weight_map(folder)
    wrong = sorted(name for name, file in promised.items() if name not in tensors or tensors[name].file.name != file)
    if wrong:
        raise UserError(f"{folder / INDEX} and its files disagree about {listed(wrong)}; copy the checkpoint again")


def listed(names: list[str], shown: int = 5) -> str:
    """Names for a sentence: the first few, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
