"""WebDataset: tar files in which the members of one name, with several extensions, are a sample."""

import logging
import re
import tarfile
from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
import xxhash

from ....atomic import atomic_file
from ....errors import UserError
from ..formats import CHATS, has_own_images, parse_record
from ..json_values import parse_json, texts_in
from ..pictures import Picture, Pictures, UnusableRow
from ..rows import Row
from .base import Source, UnchangedFile
from .cache import cached, made_once
from .tar_headers import BLOCK, headers, members

logger = logging.getLogger(__name__)

MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""Key and extension, as webdataset and Energon split a name; members of other names belong to no sample."""
SKIPPED = re.compile(r"__[^/]*__($|/)")
"""Members about the archive, which webdataset and Energon leave out."""
IMAGES = {
    *("jpg", "jpeg", "jpe", "jfif", "jp2", "png", "webp", "avif", "gif", "bmp", "dib", "tif", "tiff", "ico", "tga"),
    *("pcx", "ppm", "pgm", "pbm", "pnm", "img"),
}
TEXTS = ("txt", "text", "caption")
DESCRIBE = {"json", *TEXTS, "cls", "cls2", "class", "index", "inx", "id", "key", "url"}
"""Extensions of members that are texts, or about the sample."""
DOCUMENTS = {"html", "xml", "yaml", "csv", "md"}
"""Extensions of texts that are read only where a field_map of Energon names them."""
PLACE = np.dtype([("start", np.int64), ("end", np.int64)])


class Archive(Source):
    """A tar file, of which the places of its samples are held in memory.

    Raises:
        UserError: it is cut off or damaged, or the members of a sample do not stand side by side.
    """

    kind = "WebDataset"

    def __init__(self, path: Path, pictures: Pictures) -> None:
        self.path = path
        self.pictures = pictures
        self.files = (path,)
        self._file = UnchangedFile(path)
        self._places = _places_of(self._file)

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int, *, for_training: bool = True) -> Row:
        """Parse the texts of one sample."""
        start, end = self._places[index]
        parts: dict[str, bytes | Picture] = {}
        names: dict[str, str] = {}
        with self._file.open() as file:
            for member, place in members(file, int(start)):
                if (split := _split(member.name, member.isdir())) is not None:
                    _, extension = split
                    if extension in parts:
                        raise UnusableRow(f"the member {member.name} is there twice")
                    names[extension], parts[extension] = member.name, self._content(member, extension, file)
                if place >= end:
                    break
        return parse_sample(parts, names, self.pictures, for_training=for_training)

    def place(self, index: int) -> tuple[str, int | str]:
        """Its key."""
        start, _ = self._places[index]
        with self._file.open() as file:
            return str(self.path), _key_at(file, start)

    def _content(self, member: tarfile.TarInfo, extension: str, file: BinaryIO) -> bytes | Picture:
        if not member.isreg() or member.issparse():
            raise UnusableRow(f"the member {member.name} is a link or sparse, which is not read")
        if is_image(extension):
            return Picture(member.name, path=str(self.path), start=member.offset_data, size=member.size)
        if _last(extension) not in DESCRIBE:
            return b""
        file.seek(member.offset_data)
        return file.read(member.size)


def parse_sample(
    parts: Mapping[str, bytes | Picture], names: Mapping[str, str], pictures: Pictures, *, for_training: bool
) -> Row:
    """The row of a sample of WebDataset.

    Its text is a record in "json", or else in "txt", or the "caption" in "json". Where the record names no image, all
    images of the sample are its images, in the order of their names.

    Args:
        parts: the members of the sample by extension: an image, or the bytes of a text.
        names: of the members, by extension.
        pictures: where other images are looked up.
        for_training: as for `parse_record`.

    Raises:
        UnusableRow: it has no text, members that are not read, or images that are in no place of the row. A text beside
            the one that is read is no such member where it is a part of it, or of a value in the json.
    """
    refuse_unread(names)
    images = {extension: part for extension, part in parts.items() if isinstance(part, Picture)}
    record = _record(parts, names)
    if images and not has_own_images(record):
        record = {key: value for key, value in record.items() if key not in ("image", "images")}
        record["images"] = [images[extension] for extension in sorted(images, key=_natural)]
    members = {name: image for extension, image in images.items() for name in _spellings(names[extension], extension)}
    row = parse_record(record, Pictures(pictures.folder, pictures.hosts, members), for_training=for_training)
    if lost := [names[extension] for extension, image in images.items() if image not in row.images]:
        raise UnusableRow(f"{', '.join(lost)} is not among the images that the json names")
    others = [names[extension] for extension in parts if extension != "json" and _last(extension) == "json"]
    return replace(row, left_out=(*row.left_out, *others))


def refuse_unread(names: Mapping[str, str]) -> None:
    """Refuse members that are neither images nor texts: they may be what the model should learn from.

    Args:
        names: of the members, by extension.

    Raises:
        UnusableRow: there are some.
    """
    if unread := [name for extension, name in names.items() if _last(extension) not in IMAGES | DESCRIBE]:
        raise UnusableRow(f"{', '.join(unread)} is not read; members of a sample are images, json and txt")


def _record(parts: Mapping[str, bytes | Picture], names: Mapping[str, str]) -> dict[str, Any]:
    record = parse_json(cast(bytes, parts["json"])) if "json" in parts else {}
    if not isinstance(record, dict):
        raise UnusableRow("the json is no object")
    used = "json"
    if all(record.get(key) is None for key in (*CHATS, "texts", "text")):
        used = next((extension for extension in TEXTS if extension in parts), "json")
        if used != "json":
            record = record | {"text": _decoded(parts, used)}
        elif isinstance(record.get("caption"), str):
            record = record | {"text": record["caption"]}
        else:
            raise UnusableRow('neither a json with "messages", "text" or "caption", nor a txt')
    others = [extension for extension in parts if extension != used and _last(extension) in TEXTS]
    held = list(texts_in(record)) if others else []
    if lost := [names[each] for each in others if not any(_decoded(parts, each).strip() in text for text in held)]:
        raise UnusableRow(f"{', '.join(lost)} is not read, as the text is in {names[used]}")
    return record


def _decoded(parts: Mapping[str, bytes | Picture], extension: str) -> str:
    try:
        return cast(bytes, parts[extension]).decode()
    except UnicodeDecodeError as error:
        raise UnusableRow(f"the {extension} is not in UTF-8 ({error})") from error


def _spellings(name: str, extension: str) -> set[str]:
    """The names that a record may have for a member."""
    return {name, name.removeprefix("./"), PurePosixPath(name).name, extension, name[-len(extension) :]}


def _last(extension: str) -> str:
    return extension.rpartition(".")[2].lower()


def is_document(extension: str) -> bool:
    """Whether members of that extension are of `DOCUMENTS`."""
    return _last(extension) in DOCUMENTS


def is_image(extension: str) -> bool:
    """Whether members of that extension are images."""
    return _last(extension) in IMAGES


def _natural(name: str) -> list[tuple[int, str]]:
    """An order in which 10 comes after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _split(name: str, is_folder: bool) -> tuple[str, str] | None:
    """Key and extension of a member; None where it belongs to no sample."""
    if is_folder or SKIPPED.match(name) or not (match := MEMBER.fullmatch(name)):
        return None
    return match[1], match[2].lower()


def _places_of(archive: UnchangedFile) -> np.ndarray:
    """Where each sample begins and ends, `[samples]` of `PLACE`; found once, and kept in the cache folder of the user.

    Raises:
        UserError: the archive is cut off or damaged, or members of a sample stand apart.
    """
    places, kept = None, cached(archive.path, "tar", ".npy")
    try:
        with made_once(kept) as is_missing:
            if not is_missing:
                return np.load(kept)
            places = _scanned(archive)
            with atomic_file(kept) as file:
                np.save(file.buffer, places)
    except OSError as error:
        logger.warning("%s is scanned at each start, as its index cannot be kept (%s)", archive.path, error)
    return _scanned(archive) if places is None else places


def _scanned(archive: UnchangedFile) -> np.ndarray:
    with archive.open() as file:
        return _scan(file, archive.path)


def _scan(file: BinaryIO, path: Path) -> np.ndarray:
    """Where each sample begins and ends: `[samples]` of `PLACE`."""
    places, keys = array("q"), array("Q")
    key, last, end = None, None, 0
    try:
        for name, is_folder, start, end in headers(file):
            if (split := _split(name, is_folder)) is None:
                continue
            if split[0] != key:
                last, key = key, split[0]
                places.extend((start, end))
                keys.append(xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape")))
            places[-1] = end
        _check_end(file, end)
    except tarfile.ReadError as error:
        whole = "it has no whole sample" if last is None else f"its last whole sample is {last}"
        raise UserError(f"{path} is cut off or damaged behind byte {end:,} ({error}); {whole}") from error
    found = np.frombuffer(places, dtype=PLACE) if places else np.empty(0, dtype=PLACE)
    _refuse_scattered(np.frombuffer(keys, dtype=np.uint64), found, file, path)
    return found


def _check_end(file: BinaryIO, end: int) -> None:
    """Refuse an archive without its end mark, which may lack members, or with another one behind it.

    Raises:
        tarfile.ReadError: it is so.
    """
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK or any(block):
        raise tarfile.ReadError("no end mark")
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("data behind the end mark, as of tar files that were joined by cat")


def _refuse_scattered(keys: np.ndarray, places: np.ndarray, file: BinaryIO, path: Path) -> None:
    """Refuse an archive in which members of one sample stand apart.

    Raises:
        UserError: two samples have the same key.
    """
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order[1:]] == keys[order[:-1]]]
    if len(again):
        key = _key_at(file, places["start"][again.min()])
        raise UserError(f"{path} has members of sample {key} in several places; a sample's members stand side by side")


def _key_at(file: BinaryIO, start: int) -> str:
    found = (_split(member.name, member.isdir()) for member, _ in members(file, int(start)))
    return next(split[0] for split in found if split is not None)
