"""The check of rows: which can be trained on, why the others cannot, and how many tokens and images each has."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import xxhash

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from .pictures import Picture, UnusableRow
from .printable import printable, reason_of
from .rows import Row, Skipped, check_text, describe_skipped
from .sources.base import Source
from .tokens import ALL, Learned, count_tokens

REMEMBERED = 100_000
"""Images whose check is remembered, for rows that share them."""

BATCH = 256
"""Rows whose texts become tokens at once, which takes two thirds of the time."""

KINDS = {"lengths": np.int32, "learned": np.int32, "images": np.int32, "hashes": np.uint64}
"""The arrays of `Findings`."""
COUNTERS = ("shapes", "modes", "sides", "left_out")
"""Its counters."""


@dataclass(kw_only=True)
class Findings:
    """What the check has found in some rows.

    Attributes:
        numbers: the numbers of the rows in their source.
        lengths: tokens of each row, ``[rows]``, those of images included; 0 where it cannot be used.
        learned: learned tokens of each row, ``[rows]``.
        images: images of each row, ``[rows]``.
        hashes: of the text and the names of the images of each row, ``[rows]``.
        skipped: the rows that cannot be used, in their order.
        shapes: usable rows by format.
        modes: their images by PIL's mode; an image file that several rows share counts once in each process.
        sides: their images by the longer side in pixels, rounded up to a power of two.
        left_out: keys that are not read, by the number of usable rows that have each.

    The four counters include the rows that `limited_to` skips because they are too long.
    """

    numbers: range
    lengths: np.ndarray
    learned: np.ndarray
    images: np.ndarray
    hashes: np.ndarray
    skipped: list[Skipped] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_rows(cls, numbers: range) -> "Findings":
        """Nothing found yet."""
        return cls(numbers=numbers, **{name: np.zeros(len(numbers), dtype=kind) for name, kind in KINDS.items()})

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def usable(self) -> np.ndarray:
        """The places in the arrays of the rows that can be used."""
        return np.flatnonzero(self.lengths)

    def add(self, place: int, row: Row, text: str | None, tokens: int, learned: int) -> None:
        """Add a usable row, by its place in the arrays; `text` is None for a row of tokens."""
        self.lengths[place], self.learned[place], self.images[place] = tokens, learned, len(row.images)
        content = text.encode() if text is not None else np.asarray(row.tokens).tobytes()
        pictures = "\0".join(picture.identity for picture in row.images).encode(errors="surrogatepass")
        self.hashes[place] = xxhash.xxh3_64_intdigest(content, xxhash.xxh3_64_intdigest(pictures))
        self.shapes[row.shape] += 1
        self.left_out.update({*row.left_out})

    def skip(self, place: int, source: Source, error: UnusableRow) -> None:
        """Add a row that cannot be used."""
        number = self.numbers[place]
        self.skipped.append(Skipped(number, *source.place(number), reason_of(error)))

    def merge(self, others: Iterable["Findings"]) -> None:
        """Add what was found in some of the rows."""
        for other in others:
            for name in KINDS:
                getattr(self, name)[np.asarray(other.numbers) - self.numbers.start] = getattr(other, name)
            self.skipped.extend(other.skipped)
            for name in COUNTERS:
                getattr(self, name).update(getattr(other, name))
        self.skipped.sort()

    def limited_to(self, seq_length: int, source: Source) -> "Findings":
        """The same without the rows of more than `seq_length` tokens, which are skipped."""
        too_long = np.flatnonzero(self.lengths > seq_length)
        reasons = [
            Skipped(number, *source.place(number), f"{self.lengths[place]} tokens don't fit seq_length {seq_length}")
            for place in too_long.tolist()
            for number in [self.numbers[place]]
        ]
        lengths = np.where(self.lengths > seq_length, 0, self.lengths)
        return replace(self, lengths=lengths, skipped=sorted(self.skipped + reasons))

    def refuse_too_many(self, title: object, max_skipped: float) -> None:
        """Refuse a source without rows, or with too many that cannot be used.

        Raises:
            UserError: more than `max_skipped` (a fraction) of the rows can't be used, or none can; it names a few.
        """
        if not len(self):
            raise UserError(f"{title} has no rows.")
        if len(self.skipped) == len(self) or len(self.skipped) > max_skipped * len(self):
            said = printable(describe_skipped(title, self.skipped, len(self)))
            allowed = f"At most {max_skipped:.1%} may be skipped."
            raise UserError(f"{said} {'No row can be used.' if len(self.skipped) == len(self) else allowed}")


assert {*KINDS, *COUNTERS} < {each.name for each in fields(Findings)}


def examine(
    source: Source,
    processor: GPTOSSVisionProcessor,
    *,
    decode_images: bool = False,
    learned_parts: Learned = ALL,
    numbers: range | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Findings:
    """Check rows, and count their tokens.

    A row is usable when it parses, has something to learn, and its images open. Image headers are read (of PNG files
    the checksums too), and an image's tokens are counted without its pixels, so nothing is decoded without
    `decode_images`, which also finds a file that is cut off behind a good header.

    Args:
        source: the rows.
        processor: of the model.
        decode_images: whether pixels are checked.
        learned_parts: of chats.
        numbers: of the rows; None for all.
        advance: called for each row.
    """
    found = Findings.of_rows(range(len(source)) if numbers is None else numbers)
    images = _Images(processor, decode_images, found)
    for start in range(0, len(found), BATCH):
        places = range(start, min(start + BATCH, len(found)))
        batch = [(place, *read) for place in places if (read := _read(source, processor, place, found)) is not None]
        rows, texts = [row for _, row, _ in batch], [text for _, _, text in batch]
        for (place, row, text), counts in zip(batch, count_tokens(rows, texts, processor, learned_parts), strict=True):
            try:
                if not counts[1]:
                    raise UnusableRow("no token to learn")
                images.check(row.images)
            except UnusableRow as error:
                found.skip(place, source, error)
            else:
                found.add(place, row, text, *counts)
        for _ in places:
            advance()
    found.skipped.sort()
    return found


def _read(
    source: Source, processor: GPTOSSVisionProcessor, place: int, found: Findings
) -> tuple[Row, str | None] | None:
    """A row and its text; None where it is skipped."""
    try:
        row = source.row(found.numbers[place])
        if row.tokens is None:
            return row, check_text(row, processor)
        if (largest := int(row.tokens.max())) >= len(processor.tokenizer):
            raise UnusableRow(f"token {largest} is outside the vocabulary of {len(processor.tokenizer):,}")
        if (row.tokens == processor.image_token_id).any():
            raise UnusableRow(f"token {processor.image_token_id} is the place of an image, and there is none")
    except UnusableRow as error:
        found.skip(place, source, error)
        return None
    return row, None


class _Images:
    """Checks of images, of which those of files are remembered."""

    def __init__(self, processor: GPTOSSVisionProcessor, decode: bool, found: Findings) -> None:
        self._processor, self._decode, self._found = processor, decode, found
        self._of_files: dict[str, tuple[str, int] | str] = {}
        self._counted: set[str] = set()

    def check(self, pictures: Sequence[Picture]) -> None:
        """Refuse a row whose images can't be used; count those of one whose images can.

        Raises:
            UnusableRow: an image is missing or broken.
        """
        facts = [self._check(picture) for picture in pictures]
        for picture, (mode, side) in zip(pictures, facts, strict=True):
            if (file := _whole_file(picture)) not in self._counted:
                self._found.modes[mode] += 1
                self._found.sides[side] += 1
                if file is not None and len(self._counted) < REMEMBERED:
                    self._counted.add(file)

    def _check(self, picture: Picture) -> tuple[str, int]:
        """Mode, and longer side rounded up to a power of two."""
        if (file := _whole_file(picture)) in self._of_files:
            known = self._of_files[file]
            if isinstance(known, str):
                raise UnusableRow(known)
            return known
        try:
            width, height, mode = picture.check(self._processor, self._decode)
            known = mode, 1 << (max(width, height) - 1).bit_length()
        except UnusableRow as error:
            known = str(error)
            raise
        finally:
            if file is not None and len(self._of_files) < REMEMBERED:
                self._of_files[file] = known
        return known


def _whole_file(picture: Picture) -> str | None:
    """The file that an image is; None for a part of one, bytes, and an address."""
    return picture.path if picture.size is None else None
