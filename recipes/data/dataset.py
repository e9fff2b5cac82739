"""The rows of a source as a dataset of samples: its usable rows in shuffled epochs, and the check which are usable."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from .order import Order
from .pictures import UNREADABLE, Picture, UnusableRow
from .rows import Skipped, check_text, describe_skipped
from .samples import Sample, count_tokens, encode_row
from .sources.base import Joined, Source
from .sources.opening import open_source

REMEMBERED = 100_000
"""Images whose check is remembered, for rows that share them."""


@dataclass(kw_only=True)
class Findings:
    """What the check of a source has found.

    Attributes:
        lengths: tokens of each row, ``[rows]``, those of images included; 0 where a row cannot be used.
        learned: learned tokens of each row, ``[rows]``.
        images: images of each row, ``[rows]``.
        skipped: the rows that cannot be used, in their order.
        shapes: usable rows of each format.
    """

    lengths: np.ndarray
    learned: np.ndarray
    images: np.ndarray
    skipped: list[Skipped] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_rows(cls, count: int) -> "Findings":
        """Nothing found yet."""
        return cls(**{name: np.zeros(count, dtype=np.int32) for name in ("lengths", "learned", "images")})

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def usable(self) -> np.ndarray:
        """The numbers of the rows that can be used."""
        return np.flatnonzero(self.lengths)

    def merge(self, others: Sequence["Findings"]) -> None:
        """Add what was found in other rows."""
        for other in others:
            for name in ("lengths", "learned", "images"):
                getattr(self, name)[other.usable] = getattr(other, name)[other.usable]
            self.skipped += other.skipped
            self.shapes += other.shapes
        self.skipped.sort()

    def part(self, start: int, end: int) -> "Findings":
        """Those of the rows from `start` to `end`; without the formats."""
        numbers = {name: getattr(self, name)[start:end] for name in ("lengths", "learned", "images")}
        return Findings(**numbers, skipped=[row for row in self.skipped if start <= row.row < end])

    def refuse_too_many(self, path: object, max_skipped: float) -> None:
        """Refuse a source without rows, or with too many that cannot be used.

        Raises:
            UserError: more than `max_skipped` (a fraction) of the rows can't be used, or none can; it names a few.
        """
        if not len(self):
            raise UserError(f"{path} has no rows.")
        if len(self.skipped) == len(self) or len(self.skipped) > max_skipped * len(self):
            raise UserError(
                f"{describe_skipped(path, self.skipped, len(self))} At most {max_skipped:.1%} may be skipped."
            )


class ChatDataset(Dataset[Sample]):
    """The usable rows of one source or several, in their order, as samples.

    A row is read and its images are decoded on access. Which rows are usable is decided when the dataset is made, never
    later, so that row i is the same on all ranks and in all runs: `findings` are what the ranks found together, or None
    to check the rows in this process.

    Attributes:
        rows: the number of each sample's row, ``[samples]``.
        lengths: tokens of each sample, ``[samples]``.
        image_counts: images of each sample, ``[samples]``.
        source_of: the source of each sample, ``[samples]``.
        samples_of: samples of each source.

    Raises:
        UserError: more than `max_skipped` (a fraction) of the rows of a source can't be used, or none can; it names the
            first few. On access: a row that had passed the check can't be read.
    """

    def __init__(
        self,
        sources: Source | str | Path | Sequence[Source],
        processor: GPTOSSVisionProcessor,
        seq_length: int,
        *,
        max_skipped: float = 0.01,
        findings: Findings | None = None,
    ) -> None:
        opened = [open_source(sources)] if isinstance(sources, str | Path) else sources
        opened = [opened] if isinstance(opened, Source) else opened
        self.source = Joined(opened) if len(opened) > 1 else opened[0]
        self.processor = processor
        self.seq_length = seq_length
        found = examine(self.source, processor, seq_length) if findings is None else findings
        starts = np.cumsum([0, *map(len, opened)])
        for source, start, end in zip(opened, starts, starts[1:], strict=False):
            found.part(start, end).refuse_too_many(source.title, max_skipped)
        self.skipped = tuple(found.skipped)
        self.rows = found.usable
        self.lengths, self.image_counts = found.lengths[self.rows], found.images[self.rows]
        self.source_of = (np.searchsorted(starts, self.rows, side="right") - 1).astype(np.int32)
        self.samples_of = np.bincount(self.source_of, minlength=len(opened)).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        try:
            sample = encode_row(self.source.row(row), self.processor)
            if len(sample["input_ids"]) != self.lengths[index]:
                raise UnusableRow(f"it has {len(sample['input_ids'])} tokens and had {self.lengths[index]}")
        except UNREADABLE as error:
            # Another row in its place would differ between ranks that share this one.
            file, line = self.source.place(row)
            raise UserError(
                f"{file}, {Skipped(row, file, line, '').place}, had passed the check and can't be used now ({error}). "
                "Of images the check reads the headers; with data.decode_images=true also the pixels."
            ) from error
        return sample


class ShuffledEpochs(Dataset[Sample]):
    """A dataset in the epochs of an order, for more than `num_samples`.

    Sample i depends on i alone, not on the rank, the layout or earlier accesses, so a loader resumes from the number of
    samples already consumed without any state. The length is a whole number of epochs, and always more than
    `num_samples`: Megatron's sampler refuses to start when nothing is left, as when a finished run is resumed.
    """

    def __init__(self, dataset: Dataset[Sample], order: Order, num_samples: int) -> None:
        self.dataset = dataset
        self.order = order
        self._length = (num_samples // len(order) + 1) * len(order)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        epoch, position = divmod(index, len(self.order))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self.order.epoch(epoch)
        return self.dataset[int(self._epoch[1][position])]


def examine(
    source: Source,
    processor: GPTOSSVisionProcessor,
    seq_length: int,
    *,
    decode_images: bool = False,
    shard: int = 0,
    shards: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Findings:
    """Check every row whose number is `shard` modulo `shards`, and count its tokens.

    A row is usable when it parses, has something to learn, its images open, and it fits `seq_length` whole. Image
    headers are read (of PNG files the checksums too), and an image's tokens are counted without its pixels, so nothing
    is decoded without `decode_images`, which also finds a file that is cut off behind a good header.

    Args:
        source: the rows.
        processor: of the model.
        seq_length: longest row in tokens.
        decode_images: whether pixels are checked.
        shard: the share of this process.
        shards: number of processes.
        advance: called after each row.
    """
    found, images = Findings.of_rows(len(source)), _Images(processor, decode_images)
    for index in range(shard, len(source), shards):
        try:
            row = source.row(index)
            text = check_text(row, processor) if row.tokens is None else None
            tokens, learned = count_tokens(row, text, processor)
            if tokens > seq_length:
                of_images = len(row.images) * processor.num_image_tokens
                raise UnusableRow(f"{tokens} tokens, {of_images} of them of images, don't fit seq_length {seq_length}")
            if not learned:
                raise UnusableRow("no token to learn")
            for picture in row.images:
                images.check(picture)
        except UnusableRow as error:
            found.skipped.append(Skipped(index, *source.place(index), str(error)))
        else:
            found.lengths[index], found.learned[index], found.images[index] = tokens, learned, len(row.images)
            found.shapes[row.shape] += 1
        advance()
    return found


class _Images:
    """Checks of images, of which those of files are remembered."""

    def __init__(self, processor: GPTOSSVisionProcessor, decode: bool) -> None:
        self._processor, self._decode = processor, decode
        self._of_files: dict[Path, str | None] = {}

    def check(self, picture: Picture) -> None:
        """Refuse an image that can't be used.

        Raises:
            UnusableRow: it is missing or broken.
        """
        file = picture.path if picture.size is None else None
        if file in self._of_files:
            if (reason := self._of_files[file]) is not None:
                raise UnusableRow(reason)
            return
        reason = None
        try:
            picture.check(self._processor, self._decode)
        except UnusableRow as error:
            reason = str(error)
            raise
        finally:
            if file is not None and len(self._of_files) < REMEMBERED:
                self._of_files[file] = reason
