"""A sequence of rows in files."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from ..rows import Row


class Source(ABC):
    """Rows in the order of their files. Nothing is read from them before it is asked for, but where each begins.

    Attributes:
        kind: what the files are, in a word or two.
        files: that are read, without images.
    """

    kind: str
    files: tuple[Path, ...]

    @property
    def title(self) -> str:
        """Its files, for messages."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{next(iter(self.files))}{more}"

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
        self._starts = list(accumulate((len(source) for source in sources), initial=0))

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
