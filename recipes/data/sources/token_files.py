"""Tokens that Megatron has written: a `.bin` file with their values, and an `.idx` file with the documents."""

from pathlib import Path

import numpy as np

from ....errors import UserError
from ..rows import Row
from .base import Source, UnchangedFile

HEADER = b"MMIDIDX\0\0"
"""How an `.idx` file begins."""
ITEM_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes of a token, by the code of its type."""


class TokenFile(Source):
    """Documents of tokens, in pieces of at most `seq_length` tokens.

    A piece begins with the last token of the one before, as in Megatron's own dataset, so that each token but the first
    of a document is predicted once. Documents of one token are left out. A piece is always of one document.

    Raises:
        UserError: the files don't fit each other, or hold more than text; or `seq_length` is 1.
    """

    kind = "Megatron bin/idx"
    seq_length: int

    def __init__(self, prefix: Path, seq_length: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds, and JSON needs none of it

        self.files = (prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx"))
        if seq_length < 2:
            raise UserError(f"{self.files[0]}: a piece needs 2 tokens to learn one, and seq_length is {seq_length}")
        self.seq_length = seq_length
        _check_sizes(*self.files)
        self._written = [UnchangedFile(file) for file in self.files]
        self._tokens = IndexedDataset(str(prefix))
        ends = np.concatenate(([0], np.cumsum(self._tokens.sequence_lengths, dtype=np.int64)))
        self._lengths = np.diff(ends[self._tokens.document_indices])
        pieces = -(-(self._lengths - 1) // (seq_length - 1))
        self._starts = np.concatenate(([0], np.cumsum(np.maximum(pieces, 0))))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int, *, for_training: bool = True) -> Row:
        """Read one piece."""
        for file in self._written:
            file.check()
        document, start = self._find(index)
        length = min(self.seq_length, int(self._lengths[document]) - start)
        # The sequences of a document follow each other in the file.
        tokens = self._tokens.get(int(self._tokens.document_indices[document]), start, length)
        return Row(tokens=tokens.astype(np.int64), shape="tokens")

    def place(self, index: int) -> tuple[str, int | str]:
        """Its document, from 0, and the first token of the piece."""
        document, start = self._find(index)
        return str(self.files[0]), f"document {document}, token {start}"

    def _find(self, index: int) -> tuple[int, int]:
        document = int(np.searchsorted(self._starts, index, side="right")) - 1
        return document, (index - int(self._starts[document])) * (self.seq_length - 1)


def prefix_of(path: Path) -> Path | None:
    """The path of the two files without their endings, where `path` is one of the files, or that."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index = prefix.with_name(f"{prefix.name}.idx")
    if not index.is_file():
        return None
    with index.open("rb") as file:
        return prefix if file.read(len(HEADER)) == HEADER else None


def _check_sizes(values: Path, index: Path) -> None:
    """Refuse files that are cut off, which would be read as zeros or as another error.

    Raises:
        UserError: a size is not the one that the index gives.
    """
    with index.open("rb") as file:
        header = file.read(34)
    if len(header) < 34:
        raise UserError(f"{index} is cut off")
    code, (sequences, documents) = header[17], np.frombuffer(header[18:], dtype="<i8")
    if code not in ITEM_SIZES:
        raise UserError(f"{index} has values of type {code}, which are no tokens")
    expected = 34 + 12 * int(sequences) + 8 * int(documents)
    if index.stat().st_size == expected + int(sequences):
        raise UserError(f"{index} has modes of several media, of which bin/idx files hold no images that can be read")
    if index.stat().st_size != expected:
        raise UserError(f"{index} has {index.stat().st_size:,} bytes and needs {expected:,}; it is cut off or damaged")
    lengths = np.fromfile(index, dtype="<i4", count=int(sequences), offset=34)
    needed = int(lengths.sum(dtype=np.int64)) * ITEM_SIZES[code]
    if not values.is_file() or values.stat().st_size < needed:
        held = values.stat().st_size if values.is_file() else 0
        raise UserError(f"{values} has {held:,} bytes and needs {needed:,}; it is missing or cut off")
