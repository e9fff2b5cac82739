"""What a check has found, written beside the data, so that training need not check again while nothing has changed.

A lock is a safetensors file: the arrays of `Findings`, and in its metadata the files with sizes, times and hashes, the
rows that are left out, the folders and the allowed hosts of images, and a hash of the processor. Images are not part of
it.
"""

import errno
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from glob import has_magic
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...atomic import atomic_file
from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from .findings import COUNTERS, KINDS, Findings
from .rows import Skipped
from .sources.base import Source
from .tokens import ALL, Learned

VERSION = 3
CHUNK = 2**24
FILE_FORMAT = ("auto_map", "image_processor_type", "processor_class")
"""Settings of an image processor that say how it is saved; some are there only after it was."""


@dataclass(frozen=True, slots=True)
class LockedFile:
    """A file when it was checked."""

    path: str
    size: int
    time: int
    hash: str


def lock_of(path: str | Path) -> Path:
    """Where the lock of a source is: beside a file or a folder; for a pattern in the folder in front of it."""
    path = os.path.abspath(path)
    if not has_magic(path) or Path(path).exists():
        return Path(f"{path}.lock")
    folder = next(parent for parent in Path(path).parents if not has_magic(str(parent)))
    return folder / f"{xxhash.xxh3_64_hexdigest(str(Path(path).relative_to(folder)).encode())}.lock"


def check_place(path: Path) -> None:
    """Refuse a lock that could not be written, before the work whose result it holds.

    Raises:
        OSError: it is a folder, or its folder cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"{path} cannot be written ({error.strerror}); leave it out by --no-lock") from error


def write_lock(
    path: Path,
    source: Source,
    found: Findings,
    processor: GPTOSSVisionProcessor,
    *,
    decode_images: bool,
    learned_parts: Learned = ALL,
) -> None:
    """Write the lock of a source.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    record = {
        "version": VERSION,
        "kind": source.kind,
        "image_folders": _image_folders(source, path),
        "allowed_hosts": sorted(source.allowed_hosts),
        "seq_length": source.seq_length,
        "files": [_measured(file) for file in source.files],
        "processor": processor_hash(processor),
        "decoded": decode_images,
        "learned": asdict(learned_parts),
        "skipped": [list(row) for row in found.skipped],
        **{name: dict(getattr(found, name)) for name in COUNTERS},
    }
    arrays = {name: np.ascontiguousarray(getattr(found, name)) for name in KINDS}
    with atomic_file(path) as file:
        file.buffer.write(save(arrays, {"lock": json.dumps(record)}))


def read_lock(
    path: Path,
    source: Source,
    processor: GPTOSSVisionProcessor,
    *,
    decode_images: bool,
    learned_parts: Learned = ALL,
) -> Findings | None:
    """What a lock holds, None where there is none.

    Args:
        path: of the lock.
        source: that it should be of; the contents of its files are compared where their times differ.
        processor: that the rows should have been checked with.
        decode_images: whether pixels should have been checked.
        learned_parts: that should have been counted.

    Raises:
        UserError: it is of another source or of another processor, or damaged.
    """
    if not path.exists():
        return None
    again = f"run `gpt-oss-vision data check` again, or remove {path}"
    try:
        with safe_open(path, "np") as file:
            record = json.loads(file.metadata()["lock"])
            arrays = {name: file.get_tensor(name) for name in KINDS}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or no lock of data ({error}); {again}") from error
    if problem := _problem(path, record, arrays, source, processor, decode_images, learned_parts):
        raise UserError(f"{path} does not fit: {problem}; {again}")
    return Findings(
        numbers=range(len(source)),
        skipped=[Skipped(*row) for row in record["skipped"]],
        shapes=Counter(record["shapes"]),
        modes=Counter(record["modes"]),
        left_out=Counter(record["left_out"]),
        sides=Counter({int(side): count for side, count in record["sides"].items()}),
        **arrays,
    )


def _problem(
    path: Path,
    record: dict[str, Any],
    arrays: dict[str, np.ndarray],
    source: Source,
    processor: GPTOSSVisionProcessor,
    decode_images: bool,
    learned_parts: Learned,
) -> str | None:
    """Why a lock cannot be taken."""
    if record["version"] != VERSION:
        return f"it has version {record['version']}, and {VERSION} is read"
    if len(record["files"]) != len(source.files):
        return f"it is of {len(record['files'])} files, and there are {len(source.files)}"
    for saved, file in zip(record["files"], source.files, strict=True):
        if changed := _changed(LockedFile(**saved), file):
            return changed
    if record["seq_length"] != source.seq_length:
        return f"its tokens were cut for seq_length {record['seq_length']}, and it is {source.seq_length} now"
    if any(len(array) != len(source) for array in arrays.values()):
        return f"it is of {len(arrays['lengths'])} rows, and there are {len(source)}"
    if record["image_folders"] != (folders := _image_folders(source, path)):
        before, now = (", ".join(each) or "none" for each in (record["image_folders"], folders))
        return f"images were looked up in {before}, and now in {now}, from {path.parent}"
    if record["allowed_hosts"] != (hosts := sorted(source.allowed_hosts)):
        before, now = (", ".join(each) or "none" for each in (record["allowed_hosts"], hosts))
        return f"the allowed hosts were {before}, and are {now} now (`--allowed-hosts`, data.allowed_hosts)"
    if record["processor"] != processor_hash(processor):
        return "the processor is another"
    if record["learned"] != asdict(learned_parts):
        return f"other parts of chats are learned ({record['learned']})"
    if decode_images and not record["decoded"]:
        return "the images were not decoded (`--decode`)"
    return None


def _changed(saved: LockedFile, file: Path) -> str | None:
    state = file.stat()
    if state.st_size != saved.size:
        return f"{file} has {state.st_size:,} bytes and had {saved.size:,}"
    if state.st_mtime_ns != saved.time and content_hash(file) != saved.hash:
        return f"the content of {file} has changed"
    return None


def _image_folders(source: Source, lock: Path) -> list[str]:
    """From the folder of the lock, so that it may be moved together with the images."""
    start = lock.parent.resolve()
    return sorted({os.path.relpath(folder.resolve(), start) for folder in source.image_folders})


def _measured(file: Path) -> dict[str, Any]:
    state = file.stat()
    return {"path": str(file), "size": state.st_size, "time": state.st_mtime_ns, "hash": content_hash(file)}


def content_hash(file: Path) -> str:
    """A hash of all bytes of a file."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def processor_hash(processor: GPTOSSVisionProcessor) -> str:
    """A hash of all that decides tokens and pixels."""
    settings = processor.image_processor.to_dict()
    parts: Sequence[str] = (
        processor.tokenizer.backend_tokenizer.to_str(),
        str(processor.chat_template),
        json.dumps({name: value for name, value in settings.items() if name not in FILE_FORMAT}, sort_keys=True),
        f"{processor.num_image_tokens} {processor.image_token}",
    )
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())
