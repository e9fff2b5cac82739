"""A sequence of rows in files."""

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from ....errors import UserError
from ..pictures import Pictures
from ..rows import Row


class Source(ABC):
    """Rows in the order of their files. Nothing is read from them before it is asked for, but where each begins.

    Attributes:
        kind: what the files are, in a word or two.
        files: that are read, without images.
        pictures: where images are looked up; None for rows that have none, and for several sources.
        seq_length: most tokens of a row that is cut from tokens; None for other rows.
    """

    kind: str
    files: tuple[Path, ...]
    pictures: Pictures | None = None
    seq_length: int | None = None

    @property
    def title(self) -> str:
        """Its files, for messages."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{next(iter(self.files))}{more}"

    @property
    def image_folders(self) -> set[Path]:
        """The folders that relative paths of images start from."""
        return set() if self.pictures is None else {self.pictures.folder}

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """From which images may be fetched."""
        return frozenset() if self.pictures is None else self.pictures.hosts

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int, *, for_training: bool = True) -> Row:
        """One row.

        Raises:
            UnusableRow: it is malformed, or of no format that is read.
            OSError: its file cannot be read.
        """

    @abstractmethod
    def place(self, index: int) -> tuple[str, int | str]:
        """The file of a row, and its line from 1 or its key."""


class Joined(Source):
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.kind = " and ".join(dict.fromkeys(source.kind for source in sources))
        self.files = tuple(file for source in sources for file in source.files)
        self.seq_length = next((source.seq_length for source in sources if source.seq_length is not None), None)
        self._starts = list(accumulate((len(source) for source in sources), initial=0))

    @property
    def image_folders(self) -> set[Path]:
        """Those of all sources."""
        return {folder for source in self.sources for folder in source.image_folders}

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """Those of all sources."""
        return frozenset(host for source in self.sources for host in source.allowed_hosts)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int, *, for_training: bool = True) -> Row:
        """The row of the source that holds it."""
        source, own = self._find(index)
        return source.row(own, for_training=for_training)

    def place(self, index: int) -> tuple[str, int | str]:
        """Its place in the source that holds it."""
        source, own = self._find(index)
        return source.place(own)

    def _find(self, index: int) -> tuple[Source, int]:
        which = bisect_right(self._starts, index) - 1
        return self.sources[which], index - self._starts[which]


class UnchangedFile:
    """A file in which places are remembered, so it must stay as it is.

    Opened anew each time: forked loader workers would share the position of an open file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _state(os.stat(path))

    def open(self) -> BinaryIO:
        """Open it to read.

        Raises:
            UserError: as of `check`.
        """
        self.check()
        return self.path.open("rb")

    def read(self, start: int, size: int) -> bytes:
        """Some bytes of it.

        Raises:
            UserError: as of `check`.
        """
        file = os.open(self.path, os.O_RDONLY)
        try:
            self._refuse_change(os.fstat(file))
            return os.pread(file, size, start)
        finally:
            os.close(file)

    def check(self) -> None:
        """Refuse another file, or one that has been written to, since this object was made.

        Raises:
            UserError: it is so.
        """
        self._refuse_change(os.stat(self.path))

    def _refuse_change(self, found: os.stat_result) -> None:
        if _state(found) != self._state:
            raise UserError(f"{self.path} has changed since it was opened; data must stay as it is during a run")


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns
