"""Rows of any format to shards: tar files, for file systems that are slow with many small ones, or JSON lines.

A shard is a tar file of WebDataset, or a folder with ``rows.jsonl`` and ``images``. It appears under its name when it
is complete, so a conversion that was interrupted continues with those that are not there.
"""

import fcntl
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from rich.console import Console

from ...atomic import atomic_file, atomic_folder, remove
from ...errors import UserError
from ...terminal import Progress
from .lock import content_hash
from .pictures import UNREADABLE, UnusableRow
from .printable import printable, reason_of
from .rows import Row, Skipped, describe_skipped
from .sources.archives import IMAGES as EXTENSIONS
from .sources.base import Joined, Source

RECORD = ".conversion.json"
"""What a folder is converted from."""

IMAGES = "images/"
"""Folder of the images in a shard of JSON lines."""

OTHER_NAMES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}
"""Extensions of formats, by Pillow's name; that of the others is the name itself."""

type Converted = tuple[str, dict[str, Any], dict[str, bytes]]
"""Key and record of a row, and the contents of its images by the names that the record has for them."""

type Format = Literal["jsonl", "webdataset"]


def convert(
    sources: Sequence[Source], out: Path, to: Format, *, rows_per_shard: int = 1000, max_skipped: float = 0.01
) -> str:
    """Convert all rows of some sources.

    Args:
        sources: the rows.
        out: folder, which is made; or that of an earlier call, which is continued.
        to: "webdataset" for tar files, "jsonl" for folders with rows and images.
        rows_per_shard: of the last shard there may be fewer.
        max_skipped: fraction of the rows that may be left out, because they cannot be read.

    Returns:
        A sentence: what is there now.

    Raises:
        UserError: `out` holds something else, or too many rows cannot be read, or none can.
        OSError: a file cannot be read or written.
    """
    source = Joined(sources)
    if not len(source):
        raise UserError(f"{source.title} has no rows.")
    record = {
        "to": to,
        "rows_per_shard": rows_per_shard,
        "files": [_named(file) for file in source.files],
        "image_folders": sorted(str(folder.resolve()) for folder in source.image_folders),
    }
    starts = range(0, len(source), rows_per_shard)
    shards = [range(start, min(start + rows_per_shard, len(source))) for start in starts]
    with _claimed(out, record):
        skipped = _write_shards(source, shards, out, to)
    said = printable(describe_skipped(source.title, skipped, len(source)))
    if len(skipped) == len(source):
        raise UserError(f"{said} So nothing was converted.")
    if len(skipped) > max_skipped * len(source):
        raise UserError(f"{said} At most {max_skipped:.1%} may be left out.")
    written = len(source) - len(skipped)
    there = f"{written:,} rows are in {out}, in {len(shards):,} shard{'s' if len(shards) > 1 else ''}."
    return f"{there} {said}" if skipped else there


def _write_shards(source: Source, shards: Sequence[range], out: Path, to: Format) -> list[Skipped]:
    """Write the shards that are not there, or lack rows, which may be readable now; return the rows left out."""
    skipped: list[Skipped] = []
    with Progress("Rows converted", sum(map(len, shards)), Console(stderr=True, highlight=False)) as progress:
        for number, rows in enumerate(shards):
            left_out = out / f".{number:05}.skipped.json"  # written last, so the shard is complete where it is
            if not left_out.exists() or json.loads(left_out.read_text()):
                skipped += _write_shard(source, rows, out / f"{number:05}", to, left_out)
            progress.advance(len(rows))
    return skipped


def _write_shard(source: Source, rows: range, path: Path, to: Format, left_out: Path) -> list[Skipped]:
    """Write a shard, unless no row can be read, and then the rows that are left out, which are returned."""
    skipped: list[Skipped] = []
    if to == "webdataset":
        path = path.with_suffix(".tar")
        _write_tar(path, _records(source, rows, "", skipped))
    else:
        _write_folder(path, _records(source, rows, IMAGES, skipped))
    if len(skipped) == len(rows):
        remove(path)
    with atomic_file(left_out) as file:
        json.dump(skipped, file)
    return skipped


@contextmanager
def _claimed(out: Path, record: dict[str, Any]) -> Iterator[None]:
    """Make the folder, or find that it is one of the same conversion; and lock it against a second process.

    Raises:
        UserError: it is of something else, or another process converts into it.
    """
    out.mkdir(exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another `data convert` writes into --out {out}; wait, or name another folder") from error
        except OSError:
            pass  # some network file systems cannot lock a folder
        _claim(out, record)
        yield
    finally:
        os.close(lock)


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Write what the folder is converted from, unless it holds something else.

    Raises:
        UserError: it does.
    """
    held = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else None
    if held is None and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty, and was not made by `data convert`; name another folder")
    if held not in (None, record):
        raise UserError(f"--out {out} holds a conversion of other data or with other options; name another folder")
    for partial in out.glob(".*.partial-*"):  # of a process that was killed
        remove(partial)
    with atomic_file(out / RECORD) as file:
        json.dump(record, file, indent=1)


def _named(file: Path) -> dict[str, Any]:
    return {"path": str(file.absolute()), "hash": content_hash(file)}


def _records(source: Source, rows: range, folder: str, skipped: list[Skipped]) -> Iterator[Converted]:
    """The rows that can be read; the others are added to `skipped`. In a folder, names of images begin with the key."""
    for number in rows:
        key = f"{number:09}"
        try:
            row = source.row(number, for_training=False)
            contents = [picture.read() for picture in row.images]
            names = [f"{place}.{_extension(content)}" for place, content in enumerate(contents)]
            if not folder:
                _refuse_members(row, names)
        except UNREADABLE as error:  # UnusableRow is one of them
            skipped.append(Skipped(number, *source.place(number), reason_of(error)))
            continue
        if row.tokens is not None:
            raise UserError(f"{source.title} holds tokens, which have no text to convert")
        names = [f"{folder}{key}.{name}" for name in names] if folder else names
        yield key, _record(row, names), dict(zip(names, contents, strict=True))


def _extension(content: bytes) -> str:
    """That of the format of an image file."""
    with Image.open(BytesIO(content)) as image:
        return OTHER_NAMES.get(str(image.format), str(image.format).lower())


def _refuse_members(row: Row, names: Sequence[str]) -> None:
    """Refuse images of formats that are not read as members of a tar file.

    Raises:
        UnusableRow: there is one.
    """
    for picture, name in zip(row.images, names, strict=True):
        if (extension := name.rpartition(".")[2]) not in EXTENSIONS:
            raise UnusableRow(
                f"image {picture.name} is of the format {extension}, which is not read from tar files; "
                "convert it, or use --to jsonl"
            )


def _record(row: Row, images: Sequence[str]) -> dict[str, Any]:
    """A row in our own format, with names for its images."""
    if row.messages is None:
        return {"text": row.text} | ({"images": [*images]} if images else {})
    names = iter(images)
    messages = [
        message
        | {
            "content": [
                {"type": "image", "path": next(names)} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in row.messages
    ]
    return {"messages": messages} | ({"tools": row.tools} if row.tools else {})


def _write_tar(path: Path, records: Iterator[Converted]) -> None:
    with atomic_file(path) as file, tarfile.open(fileobj=file.buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, record, images in records:
            for name, content in (images | {"json": json.dumps(record).encode()}).items():
                information = tarfile.TarInfo(f"{key}.{name}")
                information.size = len(content)
                tar.addfile(information, BytesIO(content))


def _write_folder(path: Path, records: Iterator[Converted]) -> None:
    with atomic_folder(path, overwrite=True) as folder, (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        (folder / IMAGES).mkdir()
        for _, record, images in records:
            for name, content in images.items():
                (folder / name).write_bytes(content)
            print(json.dumps(record), file=file)
