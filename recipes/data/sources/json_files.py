"""JSON: a record per line, an array of records, or records one after the other; compressed or not."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BufferedReader, RawIOBase, TextIOWrapper
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO, TextIO

import numpy as np
import zstandard

from ....atomic import atomic_file
from ....errors import UserError
from ..formats import parse_record
from ..json_values import parse_json
from ..pictures import Pictures
from ..rows import Row
from .base import Source, UnchangedFile
from .cache import cached, made_once

WINDOW = 2**23
"""Bytes of an array that are scanned at once."""
LONGEST = 2**28
"""Bytes of a record."""
LONGEST_WORD = 16
"""Bytes of a literal or an escape, at the beginning of which `json` reports that it is not whole."""
BLANK = b" \t\r\n"
BLANKS, FIRST, NEXT = (re.compile(rf"[ \t\r\n]*{mark}[ \t\r\n]*") for mark in ("", r"\[", ","))
LAST, END = re.compile(r"[ \t\r\n]*(\[[ \t\r\n]*)?\][ \t\r\n]*\Z"), re.compile(r"[ \t\r\n]*\Z")
GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
"""How compressed files begin."""
WIDE = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order marks of encodings whose records cannot be found by their bytes."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PLACE = np.dtype([("line", np.int64), ("start", np.int64), ("size", np.int64)])


class JSONFile(Source):
    """A file of JSON, of which the places of its records are held in memory.

    What is compressed, or in UTF-16 or UTF-32, is written once as plain UTF-8 into the cache folder of the user.

    Raises:
        UserError: an array ends in the middle, or is malformed.
    """

    def __init__(self, path: Path, pictures: Pictures) -> None:
        self.path = path
        self.pictures = pictures
        self.files = (path,)
        plain = _plain(path)
        self._plain = UnchangedFile(plain)
        is_lines, found = _records(plain, path)
        self.kind = "JSON lines" if is_lines else "JSON"
        self._places = np.fromiter(found, dtype=PLACE)

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int, *, for_training: bool = True) -> Row:
        """Parse one record."""
        _, start, size = self._places[index]
        content = self._plain.read(start, size)
        return parse_record(parse_json(content), self.pictures, for_training=for_training)

    def place(self, index: int) -> tuple[str, int | str]:
        """The line at which it begins."""
        return str(self.path), int(self._places[index]["line"])


def _plain(path: Path) -> Path:
    """The file, or its copy in plain UTF-8."""
    with path.open("rb") as file:
        head = file.read(4)
    if not head.startswith((GZIP, ZSTANDARD, *WIDE)):
        return path
    copy = cached(path, "plain", ".json")
    with made_once(copy) as is_missing:
        if is_missing:
            with atomic_file(copy) as target:
                _decode(path, target)
    return copy


def _decode(path: Path, target: TextIO) -> None:
    try:
        with _decompressed(path) as file:
            mark = file.peek(4)[:4]
            encoding = next((name for begin, name in WIDE.items() if mark.startswith(begin)), None)
            if encoding is None:
                copyfileobj(file, target.buffer)
            else:
                with TextIOWrapper(file, encoding) as text:
                    copyfileobj(text, target)
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile, UnicodeError) as error:
        raise UserError(f"{path} is cut off or damaged ({error})") from error


def _decompressed(path: Path) -> BufferedReader:
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(GZIP):
        return BufferedReader(gzip.open(path))
    if head.startswith(ZSTANDARD):
        return BufferedReader(_ZstandardFile(path))
    return path.open("rb")


class _ZstandardFile(RawIOBase):
    """The content of a file of zstandard. The library's own readers end quietly where the file is cut off.

    Raises:
        EOFError: on reading, it is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Decompress until there is something, or the file ends."""
        while not self._content:
            rest = self._frame.unused_data if self._frame.eof else b""
            if not (read := rest or self._file.read(2**17)):
                if not self._frame.eof:
                    raise EOFError("the last frame is not whole")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._content = self._frame.decompress(read)
        taken, self._content = self._content[: len(buffer)], self._content[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def _records(plain: Path, path: Path) -> tuple[bool, Iterator[tuple[int, int, int]]]:
    """Whether each line is a record; and line, start and size of each record."""
    with plain.open("rb") as file:
        head = file.read(WINDOW)
        start = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
        text = head[start:].lstrip(BLANK)
        is_array = text.startswith(b"[")
        if not is_array and not _goes_over_lines(text, file):
            return True, _lines(plain, start)
    return False, _values(plain, path, start, is_array)


def _goes_over_lines(text: bytes, file: BinaryIO) -> bool:
    """Whether the first value is whole and does not end in its first line.

    Args:
        text: how it begins.
        file: where it goes on; read until it ends, is malformed, or is longer than a record may be.
    """
    while True:
        first = text.partition(b"\n")[0]
        try:
            json.loads(first)
        except RecursionError:
            return False
        except ValueError:
            pass
        else:
            return False
        try:
            _, end = json.JSONDecoder().raw_decode(text.decode("latin-1"))
        except RecursionError:
            return False
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - LONGEST_WORD
            if not is_cut or len(text) > LONGEST or not (more := file.read(max(WINDOW, len(text)))):
                return False
            text += more
        else:
            return end > len(first)


def _lines(path: Path, start: int) -> Iterator[tuple[int, int, int]]:
    """The lines that are not blank."""
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, start, len(line)
            start += len(line)


def _values(plain: Path, path: Path, start: int, is_array: bool) -> Iterator[tuple[int, int, int]]:
    """The elements of an array, or values one after the other."""
    decoder, size, line = json.JSONDecoder(), plain.stat().st_size, 1
    separator, between = (FIRST, NEXT) if is_array else (BLANKS, BLANKS)
    closing = LAST if is_array else END
    # As latin-1 each byte is a character, so places in the text are places in the file.
    text, at = "", 0
    with plain.open("rb") as file:
        while True:
            found = separator.match(text, at)
            try:
                if found is None:
                    raise ValueError("no separator")
                _, end = decoder.raw_decode(text, found.end())
                if end == len(text) and start + end < size:
                    raise ValueError("a number may go on")
            except (ValueError, RecursionError) as error:
                held = len(text) - at
                if start + len(text) == size and closing.match(text, at):
                    return
                if start + len(text) == size or held > LONGEST or isinstance(error, RecursionError):
                    line += text.count("\n", at, found.end() if found else at)
                    raise UserError(f"{path} is malformed JSON, or cut off, behind line {line}") from None
                start += at
                file.seek(start)
                text, at = file.read(max(WINDOW, 2 * held)).decode("latin-1"), 0
                continue
            line += text.count("\n", at, found.end())
            yield line, start + found.end(), end - found.end()
            line += text.count("\n", found.end(), end)
            at, separator = end, between
