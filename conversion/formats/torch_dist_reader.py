"""Read any region of any tensor of a Megatron `torch_dist` checkpoint, saved at any parallel layout, without Megatron.

Such a checkpoint is a pickled table, ``.metadata``, and files in which each chunk of a tensor is a zip archive written
by ``torch.save``. torch's own ``FileSystemReader`` unpickles the table without restrictions and loads whole chunks, of
an fp32 embedding 2.3 GB at once. Here an allow-list of classes guards the table, and only the bytes of the region are
read, at their offset in the archive.
"""

import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from ..dtypes import FLOAT_NAMES, FLOATS, SAFETENSORS, dtype_name
from ..engine.files import bytes_of
from ..engine.stream import STEP, Worker
from ..messages import refuse_mismatch
from ..parameters import KEPT_WHOLE, MegatronParameter
from .hf_config import read_json

NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|common_state|rerun_state_machine|.*\._extra_state")
"""Keys of the training state."""

LATEST = "latest_checkpointed_iteration.txt"

type Region = tuple[slice, ...]
"""A slice with start and stop for each axis of a tensor."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor, and its zip archive: ``length`` bytes of `file` from `position` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class ReadItem:
    """The intersection of a chunk and a region.

    Attributes:
        chunk: the chunk to read from.
        start: index of its first element within the chunk, row-major.
        count: elements from there up to and including its last one.
        sizes: its sizes.
        strides: its strides within the chunk.
        into: its place in the region.
    """

    chunk: Chunk
    start: int
    count: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    into: Region

    @property
    def is_whole(self) -> bool:
        """Whether the region contains the whole chunk."""
        return self.count == math.prod(self.chunk.sizes)


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of the checkpoint, as its chunks."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(repr=False)

    @cached_property
    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        shape = len(self.chunks), len(self.shape)
        starts = np.array([chunk.offsets for chunk in self.chunks], dtype=np.int64).reshape(shape)
        sizes = np.array([chunk.sizes for chunk in self.chunks], dtype=np.int64).reshape(shape)
        return starts, starts + sizes

    def read_plan(self, region: Region) -> list[ReadItem]:
        """The parts of a region by chunk, each element exactly once.

        Raises:
            ValueError: the chunks leave a gap in the region, or overlap there.
        """
        starts, stops = self._grid
        low, high = (np.array([getattr(axis, end) for axis in region], dtype=np.int64) for end in ("start", "stop"))
        first, last = np.maximum(starts, low), np.minimum(stops, high)
        hits = np.flatnonzero((first < last).all(axis=1))
        wanted, held = math.prod(high - low), int((last[hits] - first[hits]).prod(axis=1).sum())
        if held != wanted or _overlap(first[hits], last[hits]):
            problem = f"hold {held} of the {wanted} elements" if held < wanted else "overlap in the elements"
            raise UserError(
                f"The chunks of {self.key} {problem} from {low.tolist()} to {high.tolist()}; save it again."
            )
        return [_read_item(self.chunks[hit], first[hit], last[hit], low) for hit in hits]


def _overlap(first: np.ndarray, last: np.ndarray) -> bool:
    meets = (np.maximum(first[:, None], first) < np.minimum(last[:, None], last)).all(axis=2)
    return bool(np.triu(meets, 1).any())


def _read_item(chunk: Chunk, first: np.ndarray, last: np.ndarray, low: np.ndarray) -> ReadItem:
    strides = _row_major(chunk.sizes)
    sizes = tuple((last - first).tolist())
    start = int(np.dot(first - chunk.offsets, strides))
    count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    into = tuple(slice(int(a), int(b)) for a, b in zip(first - low, last - low, strict=True))
    return ReadItem(chunk, start, count, sizes, strides, into)


def _row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


@dataclass(frozen=True)
class TorchDistCheckpoint:
    """An opened checkpoint.

    Attributes:
        folder: the iteration folder.
        root: the folder above it, if that holds `LATEST`; else `folder`.
        tensors: the weights by key, without the optimizer's.
    """

    folder: Path
    root: Path
    tensors: dict[str, ShardedTensor]


def open_checkpoint(path: Path) -> TorchDistCheckpoint:
    """Open the latest iteration of a checkpoint's root, or one iteration folder.

    Raises:
        FileNotFoundError: the folder, its ``.metadata`` or a file that this names is missing.
        ValueError: it has another format, or is damaged or truncated.
    """
    folder = _iteration_folder(path)
    form = folder / "metadata.json"
    backend = read_json(form).get("sharded_backend") if form.is_file() else "torch_dist"
    if backend != "torch_dist":
        raise UserError(f"{folder} was saved as {backend!r}; save it with ckpt_format='torch_dist'")
    tensors = _tensors(folder, read_metadata(folder / ".metadata"))
    _check_files(folder, [chunk for tensor in tensors.values() for chunk in tensor.chunks])
    return TorchDistCheckpoint(folder, folder.parent if (folder.parent / LATEST).is_file() else folder, tensors)


def _iteration_folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; name the folder of a Megatron checkpoint")
    if (path / ".metadata").is_file():
        return path
    if not (path / LATEST).is_file():
        raise FileNotFoundError(
            f"{path} holds neither {LATEST} nor .metadata; name the folder of a Megatron checkpoint"
        )
    word = (path / LATEST).read_text(errors="replace").strip()
    folder = path / (f"iter_{int(word):07d}" if word.isdecimal() else word)
    if not (folder / ".metadata").is_file():
        raise FileNotFoundError(
            f"{path / LATEST} names {folder.name}, which has no .metadata; copy the checkpoint again"
        )
    return folder


def _check_files(folder: Path, chunks: list[Chunk]) -> None:
    ends: dict[Path, int] = {}
    for chunk in chunks:
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.position + chunk.length)
    missing = sorted(file.name for file in ends if not file.is_file())
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; copy the checkpoint again")
    for file, end in ends.items():
        if file.stat().st_size < end:
            raise UserError(f"{file} has {file.stat().st_size} of at least {end} bytes; copy it again")


# --- .metadata ---------------------------------------------------------------------------------------------------


class _Record:
    """An inert stand-in for the classes of the table: keeps the pickled state."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _joined(*parts: str) -> str:
    return "/".join(parts)


_DCP = "torch.distributed.checkpoint."
ADMITTED: dict[tuple[str, str], Any] = {
    **{(_DCP + "metadata", name): _Record for name in ("Metadata", "MetadataIndex", "StorageMeta")},
    **{(_DCP + "metadata", name + "StorageMetadata"): _Record for name in ("Tensor", "Bytes", "Chunk")},
    (_DCP + "metadata", "TensorProperties"): _Record,
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): int,
    (_DCP + "filesystem", "_StorageInfo"): _Record,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    **{("pathlib", name): _joined for name in ("Path", "PosixPath", "PurePosixPath")},
    **{("torch", dtype_name(dtype)): dtype for dtype in SAFETENSORS.values()},
}
"""Allow-list for unpickling ``.metadata``: each global is replaced by an inert stand-in, so no code runs."""


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global of the allow-list."""
        if (module, name) not in ADMITTED:
            raise ValueError(f"it names {module}.{name}, which no checkpoint needs")
        return ADMITTED[module, name]


def read_metadata(file: Path) -> tuple[dict[str, Any], dict[tuple[str, tuple[int, ...] | None], dict[str, Any]]]:
    """Read the table of a checkpoint.

    Returns:
        The metadata of each entry by key, and the storage of each chunk by key and offset.

    Raises:
        ValueError: it names a class outside the allow-list, or is damaged.
    """
    data = BytesIO(file.read_bytes())
    try:
        table = _TableUnpickler(data).load().state
        entries = {key: getattr(entry, "state", None) or {} for key, entry in table["state_dict_metadata"].items()}
        places = {(at.state["fqn"], at.state.get("offset")): info.state for at, info in table["storage_data"].items()}
    except Exception as error:  # a damaged pickle may raise anything, and nothing that is admitted does anything
        said = str(error) or type(error).__name__
        raise UserError(f"{file} was refused: {said}; it is not the table of a checkpoint, or damaged") from error
    return entries, places


def _tensors(folder: Path, metadata: tuple[dict[str, Any], dict]) -> dict[str, ShardedTensor]:
    entries, places = metadata
    try:
        return {
            key: _tensor(folder, key, entry, places)
            for key, entry in entries.items()
            if "chunks" in entry and not NOT_WEIGHTS.match(key)
        }
    except KeyError as error:
        raise UserError(f"{folder / '.metadata'} does not say where {error} is; copy the checkpoint again") from error
    except (AttributeError, TypeError) as error:
        raise UserError(f"{folder / '.metadata'} is damaged ({error}); copy it again") from error


def _tensor(folder: Path, key: str, entry: dict[str, Any], places: dict) -> ShardedTensor:
    chunks = []
    for stored in entry["chunks"]:
        offsets, sizes = stored.state["offsets"], stored.state["sizes"]
        place = places[key, offsets]
        if Path(place["relative_path"]).name != place["relative_path"] or place.get("transform_descriptors"):
            raise UserError(f"{folder / '.metadata'} puts {key} into {place}, which is no plain file of the folder")
        numbers = (*entry["size"], *offsets, *sizes, place["offset"], place["length"])
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise UserError(f"{folder / '.metadata'} does not say in numbers where {key} is; copy it again")
        chunks.append(Chunk(offsets, sizes, folder / place["relative_path"], place["offset"], place["length"]))
    return ShardedTensor(key, entry["properties"].state[0], entry["size"], chunks)


# --- chunks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Payload:
    """The data of a chunk: position in its file, bytes, and the CRC-32 in the archive."""

    position: int
    nbytes: int
    crc32: int


class _Window(RawIOBase):
    """A read-only file object for the archive of a chunk, which `zipfile` needs: it finds an archive by its end."""

    def __init__(self, read_small: Callable[[Path, int, int], bytes], chunk: Chunk):
        self.read_small, self.chunk, self.length, self.at = read_small, chunk, chunk.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if self.at < 0:
            raise ValueError("it points before its own beginning")
        return self.at

    def read(self, size: int = -1) -> bytes:
        room = max(0, self.length - self.at)
        data = self.read_small(self.chunk.file, self.chunk.position + self.at, room if size < 0 else min(size, room))
        self.at += len(data)
        return data


@dataclass(frozen=True)
class _Pickled:
    """The pickled description of the tensor in an archive."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Allow the three globals that describe a tensor."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, sizes, strides, *rest: _Pickled(offset, sizes, strides)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise ValueError(f"it names {module}.{name}, which is no part of a tensor")

    def persistent_load(self, pid: Any) -> Any:
        """The storage's identifier; an archive has only one."""
        return pid


def find_payload(read_small: Callable[[Path, int, int], bytes], chunk: Chunk, dtype: torch.dtype) -> Payload:
    """Find a chunk's data in its file, and check that they are row-major and the whole storage.

    Args:
        read_small: reads a few bytes of a file, given offset and count.
        chunk: the chunk.
        dtype: dtype of its tensor.

    Raises:
        ValueError: the archive is damaged, or does not match the table.
    """
    try:
        window = _Window(read_small, chunk)
        with zipfile.ZipFile(window) as archive:  # pyright: ignore[reportArgumentType] - it reads and seeks
            (data,) = (entry for entry in archive.infolist() if re.fullmatch(r"[^/]+/data/0", entry.filename))
            prefix = data.filename.removesuffix("data/0")
            tensor = _TensorUnpickler(archive.open(prefix + "data.pkl")).load()
            byteorder = archive.read(prefix + "byteorder") if prefix + "byteorder" in archive.namelist() else b"little"
        window.seek(data.header_offset)
        name, extra = struct.unpack("<26xHH", window.read(30))
    except OSError:
        raise
    except Exception as error:  # zip and pickle each raise a dozen types
        raise UserError(f"{chunk.file} is damaged at byte {chunk.position} ({error}); copy it again") from error
    nbytes = math.prod(chunk.sizes) * dtype.itemsize
    found = (tensor, data.compress_type, data.file_size, byteorder)
    expected = (_Pickled(0, chunk.sizes, _row_major(chunk.sizes)), zipfile.ZIP_STORED, nbytes, b"little")
    if found != expected:
        raise UserError(f"{chunk.file} holds {found} at byte {chunk.position}, not {expected} as .metadata says")
    return Payload(chunk.position + data.header_offset + 30 + name + extra, nbytes, data.CRC)


def check_sum(values: torch.Tensor, payload: Payload, chunk: Chunk) -> None:
    """Compare the CRC-32 of a whole chunk with the one in its archive, if that has one (0: none).

    Raises:
        ValueError: they differ.
    """
    if payload.crc32 and zlib.crc32(bytes_of(values).numpy()) != payload.crc32:
        raise UserError(f"{chunk.file} has other bytes at {payload.position} than were written; copy it again")


def read_region(worker: Worker, tensor: ShardedTensor, region: Region) -> torch.Tensor:
    """Read a region of a tensor into the worker's memory.

    Raises:
        ValueError: chunks leave a gap or overlap, or an archive is damaged.
    """
    shape, parts = [axis.stop - axis.start for axis in region], tensor.read_plan(region)
    if _is_one_range(parts):
        return _read_part(worker, parts[0], tensor.dtype).view(shape)
    values = worker.take(shape, tensor.dtype)
    for part in parts:
        with worker.scope():
            data = _read_part(worker, part, tensor.dtype)
            values[part.into].copy_(data.as_strided(part.sizes, part.strides, data.storage_offset()))
    return values


def memory_of(tensor: ShardedTensor, region: Region) -> int:
    """Peak memory of `read_region`, in bytes."""
    parts, count = tensor.read_plan(region), math.prod(axis.stop - axis.start for axis in region)
    return (count + (0 if _is_one_range(parts) else max(part.count for part in parts))) * tensor.dtype.itemsize


def _is_one_range(parts: Sequence[ReadItem]) -> bool:
    """Whether a region is one contiguous range of one chunk."""
    return len(parts) == 1 and parts[0].count == math.prod(parts[0].sizes)


def _read_part(worker: Worker, part: ReadItem, dtype: torch.dtype) -> torch.Tensor:
    """The elements ``[part.count]`` of a chunk from `part.start` on."""
    payload = find_payload(worker.read_small, part.chunk, dtype)
    offset = payload.position + part.start * dtype.itemsize
    data = worker.read(part.chunk.file, offset, (part.count,), dtype)
    if part.is_whole:
        check_sum(data, payload, part.chunk)
    return data


def whole(shape: tuple[int, ...]) -> Region:
    """The region of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


def region_of(parameter: MegatronParameter, block: slice | None = None) -> Region:
    """The region of a parameter, or of a block of its rows, in the checkpoint's tensor."""
    rows = () if block is None or not parameter.shape else (block,)
    return (*(slice(i, i + 1) for i in parameter.index), *rows, *whole(parameter.shape[len(rows) :]))


def blocks_of(parameter: MegatronParameter, dtype: torch.dtype) -> list[slice]:
    """Blocks of rows to process one after the other: one, unless the parameter is large and keeps its layout."""
    count = parameter.shape[0] if parameter.shape else 1
    nbytes = math.prod(parameter.shape) * dtype.itemsize // count
    rows = max(1, STEP // nbytes) if parameter.layout in KEPT_WHOLE else count
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def check_tensors(checkpoint: TorchDistCheckpoint, wanted: Sequence[MegatronParameter]) -> None:
    """Check that a checkpoint holds exactly the tensors of the model, in their shapes and a type of `FLOATS`.

    Raises:
        ValueError: lists the missing, the unknown, and those of another shape or type.
    """
    shapes = {parameter.key: parameter.axes + parameter.shape for parameter in wanted}
    found = checkpoint.tensors
    wrong = [
        f"{key} is {list(found[key].shape)} {dtype_name(found[key].dtype)}, not {list(shape)} {FLOAT_NAMES}"
        for key, shape in shapes.items()
        if key in found and (found[key].shape != shape or found[key].dtype not in FLOATS.values())
    ]
    titles = {
        "tensors missing in the checkpoint": sorted(shapes.keys() - found.keys()),
        "tensors of another shape or type": wrong,
        "tensors of the checkpoint that nothing reads": sorted(found.keys() - shapes.keys()),
    }
    refuse_mismatch(checkpoint.folder, titles)
