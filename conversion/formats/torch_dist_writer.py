"""The files of a `torch_dist` iteration folder, planned before the first byte is written.

Such a folder is a torch distributed checkpoint: files in which every chunk of a tensor is a zip archive written by
``torch.save``, and a ``.metadata`` with their offsets. An archive is a header, the data and a footer. Header and footer
depend only on shape and dtype; ``torch.save`` writes them here without data (`torch.serialization.skip_data`). The data
can then be written at known offsets, in any order and by any thread, and a killed conversion can continue, which
torch's ``FileSystemWriter`` cannot. The archives hold no checksum of the data; torch checks none.
"""

import io
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..engine.files import BLOCK
from ..parameters import MegatronParameter

ALIGNMENT = 64
"""Of an archive's offset in its file, as of the data within an archive."""

BATCH_BYTES = 2**20
"""Consecutive parameters up to this size are written by one task."""

COMMON_STATE = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}
"""Megatron-Bridge's state beside the tensors when it saves a model without optimizer."""

LAYER_STATES = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "pre_mlp_layernorm",
)
EXPERT_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
"""Modules with an ``_extra_state`` on Transformer Engine (FP8 scales; empty in any other precision). A model loads only
where all its objects are in the checkpoint; additional objects are ignored."""


@dataclass(frozen=True, slots=True)
class WriteItem:
    """A chunk's archive in a file: ``header`` at `offset`, ``nbytes`` of data, ``footer``."""

    key: str
    chunk: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    header: bytes
    footer: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def start(self) -> int:
        """Offset of the data in the file."""
        return self.offset + len(self.header)

    @property
    def end(self) -> int:
        """Offset of the archive's end in the file."""
        return self.start + self.nbytes + len(self.footer)


@dataclass(frozen=True, slots=True)
class WriteBatch:
    """Parameters that are written together: whole blocks ``[start, end)`` of a file, shared with no other batch."""

    file: str
    start: int
    end: int
    parameters: tuple[MegatronParameter, ...]
    items: tuple[tuple[WriteItem, ...], ...]

    @property
    def name(self) -> str:
        """The name of its first parameter."""
        return self.parameters[0].name


class TorchDistPlan:
    """The files of an iteration folder and the offsets of everything in them.

    Attributes:
        batches: all parameters, in the order of the files.
        sizes: bytes of every ``.distcp`` file, by name.
        objects: the first bytes of the file `OBJECTS_FILE`: archives of everything that is not a tensor.
        metadata: the bytes of ``.metadata``.
    """

    OBJECTS_FILE = "__0_0.distcp"

    def __init__(self, parameters: Sequence[MegatronParameter], dtype: torch.dtype):
        self.dtype = dtype
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self.objects = self._place_objects(parameters)
        self.batches: list[WriteBatch] = []
        self.sizes: dict[str, int] = {}
        for file, members in _by_file(parameters):
            end = len(self.objects) if file == self.OBJECTS_FILE else 0
            for batch in self._place(file, members, end):
                self.batches.append(batch)
                end = batch.end
            self.sizes[file] = end
        self.metadata = self._metadata(parameters)

    def dtype_of(self, parameter: MegatronParameter) -> torch.dtype:
        """The dtype in which a parameter is stored."""
        return torch.float32 if parameter.keep_fp32 else self.dtype

    def _place_objects(self, parameters: Sequence[MegatronParameter]) -> bytes:
        """Archives of everything that is not a tensor."""
        layers, experts = next(parameter.axes for parameter in parameters if parameter.expert is not None)
        names = [
            f"decoder.layers.{name}._extra_state/shard_{n}_{layers}" for name in LAYER_STATES for n in range(layers)
        ]
        names += [
            f"decoder.layers.{name}._extra_state/shard_{n}.{e}_{layers}.{experts}"
            for name in EXPERT_STATES
            for n in range(layers)
            for e in range(experts)
        ]
        names += ["decoder.final_layernorm._extra_state/shard_0_1"]
        stored, nothing = bytearray(), _archive([None])
        for name, data in [("common_state/shard_0_1", _archive([COMMON_STATE])), *((name, nothing) for name in names)]:
            self._storage[MetadataIndex(name)] = _StorageInfo(self.OBJECTS_FILE, len(stored), len(data))
            stored += data + bytes(-len(data) % ALIGNMENT)
        return bytes(stored + bytes(-len(stored) % BLOCK))

    def _place(self, file: str, parameters: Iterable[MegatronParameter], start: int) -> Iterator[WriteBatch]:
        for members in _together(parameters, self.dtype_of):
            end, items = start, []
            for parameter in members:
                mine = []
                for chunk, shape in parameter.chunks:
                    header, footer = archive_header_footer(shape, self.dtype_of(parameter))
                    place = _round_up(end, ALIGNMENT)
                    item = WriteItem(parameter.key, chunk, shape, self.dtype_of(parameter), file, place, header, footer)
                    self._storage[MetadataIndex(item.key, chunk)] = _StorageInfo(file, place, item.end - place)
                    mine.append(item)
                    end = item.end
                items.append(tuple(mine))
            end = _round_up(end, BLOCK)
            yield WriteBatch(file, start, end, tuple(members), tuple(items))
            start = end

    def _metadata(self, parameters: Sequence[MegatronParameter]) -> bytes:
        state: dict[str, Any] = {}
        for parameter in parameters:
            size = torch.Size(parameter.axes + parameter.shape)
            properties = TensorProperties(dtype=self.dtype_of(parameter))
            tensor = state.setdefault(parameter.key, TensorStorageMetadata(properties, size, []))
            tensor.chunks += [ChunkStorageMetadata(torch.Size(at), torch.Size(of)) for at, of in parameter.chunks]
        state |= {index.fqn: BytesStorageMetadata() for index in self._storage if index.offset is None}
        return pickle.dumps(
            Metadata(state_dict_metadata=state, storage_data=self._storage, storage_meta=StorageMeta(), version="1.0.0")
        )


@cache
def archive_header_footer(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """The bytes that `torch.save` writes before and after the data of a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "archive")  # this name is written into the archive
        with torch.serialization.skip_data():
            torch.save(torch.empty(shape, dtype=dtype), path)
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            header = archive.getinfo("archive/data/0").header_offset
            file.seek(header)
            fixed = file.read(30)
            names = sum(struct.unpack("<HH", fixed[26:30]))
            start, nbytes = header + 30 + names, prod(shape) * dtype.itemsize
            file.seek(0)
            header = file.read(start)
            file.seek(start + nbytes)
            return header, file.read()


def _archive(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _by_file(parameters: Sequence[MegatronParameter]) -> Iterator[tuple[str, list[MegatronParameter]]]:
    """The files in order: one for everything outside the layers, one for each layer."""
    files: dict[str, list[MegatronParameter]] = {TorchDistPlan.OBJECTS_FILE: []}
    for parameter in sorted(parameters, key=lambda parameter: parameter.index[:1]):
        number = parameter.index[0] + 1 if parameter.index else 0
        files.setdefault(f"__0_{number}.distcp", []).append(parameter)
    return iter(files.items())


def _together(parameters: Iterable[MegatronParameter], dtype_of: Any) -> Iterator[list[MegatronParameter]]:
    """Consecutive parameters, up to `BATCH_BYTES`."""
    batch: list[MegatronParameter] = []
    total = 0
    for parameter in parameters:
        nbytes = prod(parameter.shape) * dtype_of(parameter).itemsize
        if batch and total + nbytes > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(parameter)
        total += nbytes
    if batch:
        yield batch


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
