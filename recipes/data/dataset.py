"""A JSONL file of rows as a dataset: its usable rows in shuffled epochs, and the check which rows are usable."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from .order import Order
from .rows import UNREADABLE, Row, Skipped, UnusableRow, check_row, describe_skipped, numbered_lines, parse_row
from .samples import Sample, encode_row


class ChatDataset(Dataset[Sample]):
    """The usable rows of a JSONL file, in the file's order, as samples.

    Only the offsets of the rows are held in memory, 16 bytes a row with its line; a row is read and its images are
    decoded on access. Which rows are usable is decided when the dataset is made, never later, so that row i is the same
    on all ranks and in all runs: `skipped` is what the ranks found together, or None to check the file in this process.

    Raises:
        UserError: more than `max_skipped` (a fraction) of the rows can't be used, or none can; it names the first few.
            On access: a row that had passed the check can't be read.
    """

    def __init__(
        self,
        path: str | Path,
        processor: GPTOSSVisionProcessor,
        seq_length: int,
        *,
        max_skipped: float = 0.01,
        skipped: Sequence[Skipped] | None = None,
    ) -> None:
        self.path = Path(path)
        self.processor = processor
        self.seq_length = seq_length
        self.skipped = tuple(find_unusable(path, processor, seq_length) if skipped is None else skipped)
        offsets = ((line, offset) for line, offset, _ in numbered_lines(self.path))
        self._offsets = np.fromiter(offsets, dtype=[("line", np.int64), ("offset", np.int64)])
        self._refuse_too_many(len(self._offsets), max_skipped)
        self._offsets = self._offsets[~np.isin(self._offsets["line"], [row.line for row in self.skipped])]

    def __len__(self) -> int:
        return len(self._offsets)

    def images_of(self, index: int) -> int:
        """Number of images of a row, which are not opened."""
        return len(self._row(index).images)

    def __getitem__(self, index: int) -> Sample:
        line = int(self._offsets[index]["line"])
        try:
            return encode_row(self._row(index), self.processor)
        except UNREADABLE as error:
            # Another row in its place would differ between ranks that share this one.
            raise UserError(
                f"{self.path}, line {line}, had passed the check and can't be used now ({error}). Of images the check "
                "reads the headers; with decode_images=True also the pixels."
            ) from error

    def _row(self, index: int) -> Row:
        # Opened each time: forked loader workers would share the position of an open file.
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[index]["offset"]))
            return parse_row(file.readline(), self.path.parent)

    def _refuse_too_many(self, rows: int, max_skipped: float) -> None:
        if not rows:
            raise UserError(f"{self.path} has no rows.")
        if len(self.skipped) == rows or len(self.skipped) > max_skipped * rows:
            raise UserError(
                f"{describe_skipped(self.path, self.skipped, rows)} At most {max_skipped:.1%} may be skipped."
            )


class ShuffledEpochs(Dataset[Sample]):
    """A dataset in the epochs of an order, for more than `num_samples`.

    Sample i depends on i alone, not on the rank, the layout or earlier accesses, so a loader resumes from the number of
    samples already consumed without any state. The length is a whole number of epochs, and always more than
    `num_samples`: Megatron's sampler refuses to start when nothing is left, as when a finished run is resumed.
    """

    def __init__(self, dataset: ChatDataset, order: Order, num_samples: int) -> None:
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


def find_unusable(
    path: str | Path,
    processor: GPTOSSVisionProcessor,
    seq_length: int,
    *,
    decode_images: bool = False,
    shard: int = 0,
    shards: int = 1,
) -> list[Skipped]:
    """Check every row whose index in the file is `shard` modulo `shards`, and name those that can't be used.

    A row is usable when it parses, has something to learn, its images open, and it fits `seq_length` whole. Image
    headers are read (of PNG files the checksums too), and an image's tokens are counted without its pixels, so nothing
    is decoded without `decode_images`, which also finds a file that is cut off behind a good header.

    On one slow core a row takes 0.1 ms, with a small image 0.2 ms; a text that has more bytes than `seq_length` is
    tokenised, at 0.3 ms a kilobyte. So half a million short rows are a minute or two, and ranks share them.
    """
    path = Path(path)
    skipped = []
    for index, (line, _, content) in enumerate(numbered_lines(path)):
        if index % shards != shard:
            continue
        try:
            check_row(parse_row(content, path.parent), processor, seq_length, decode_images)
        except (UnusableRow, UnicodeEncodeError) as error:  # half a surrogate pair is JSON, but no text
            skipped.append(Skipped(line, str(error)))
    return skipped
