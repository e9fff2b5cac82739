"""The usable rows of sources as a dataset of samples, and in shuffled epochs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from torch.utils.data import Dataset

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from .findings import Findings, examine
from .order import Order
from .pictures import UNREADABLE, UnusableRow
from .rows import Skipped
from .samples import Sample, encode_row, encode_rows
from .sources.base import Joined, Source
from .sources.opening import open_source
from .tokens import ALL, Learned


class ChatDataset(Dataset[Sample]):
    """The usable rows of one source or several, in their order, as samples.

    A row is read and its images are decoded on access. Which rows are usable is decided when the dataset is made, never
    later, so that row i is the same on all ranks and in all runs: `findings` are what was found in each source, or None
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
        learned_parts: Learned = ALL,
        findings: Sequence[Findings] | None = None,
    ) -> None:
        opened = [open_source(sources)] if isinstance(sources, str | Path) else sources
        opened = [opened] if isinstance(opened, Source) else opened
        self.source = Joined(opened) if len(opened) > 1 else opened[0]
        self.processor = processor
        self.seq_length = seq_length
        self.learned_parts = learned_parts
        found = (
            [examine(source, processor, learned_parts=learned_parts) for source in opened]
            if findings is None
            else findings
        )
        found = [each.limited_to(seq_length, source) for each, source in zip(found, opened, strict=True)]
        for each, source in zip(found, opened, strict=True):
            each.refuse_too_many(source.title, max_skipped)
        starts = np.cumsum([0, *map(len, opened)])
        self.skipped = tuple(row for each in found for row in each.skipped)
        self.rows = np.concatenate([start + each.usable for start, each in zip(starts, found, strict=False)])
        self.lengths = np.concatenate([each.lengths[each.usable] for each in found])
        self.image_counts = np.concatenate([each.images[each.usable] for each in found])
        self.samples_of = [len(each.usable) for each in found]
        self.source_of = np.repeat(np.arange(len(found), dtype=np.int32), self.samples_of)

    def __len__(self) -> int:
        return len(self.rows)

    def usable_rows(self) -> list[str]:
        """Of each source how many rows are usable, and a hash of their numbers and lengths."""
        ends = np.cumsum(self.samples_of)
        pieces = zip(np.split(self.rows, ends[:-1]), np.split(self.lengths, ends[:-1]), strict=True)
        return [
            f"{len(rows)} {xxhash.xxh3_64_hexdigest(np.stack([rows, lengths]).astype(np.int64).tobytes())}"
            for rows, lengths in pieces
        ]

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        try:
            return self._checked(encode_row(self.source.row(row), self.processor, self.learned_parts), index)
        except UNREADABLE as error:
            # Another row in its place would differ between ranks that share this one.
            file, line = self.source.place(row)
            raise UserError(
                f"{file}, {Skipped(row, file, line, '').place}, had passed the check and can't be used now ({error}). "
                "Of images the check reads the headers; with data.decode_images=true also the pixels."
            ) from error

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples, for loaders and packs: quicker than one after the other (`encode_rows`)."""
        try:
            rows = [self.source.row(int(self.rows[index])) for index in indices]
            samples = encode_rows(rows, self.processor, self.learned_parts)
            return [self._checked(sample, index) for sample, index in zip(samples, indices, strict=True)]
        except UNREADABLE:
            return [self[index] for index in indices]  # which names the row

    def _checked(self, sample: Sample, index: int) -> Sample:
        """The sample with its source.

        Raises:
            UnusableRow: it has another length than when it was checked.
        """
        if len(sample["input_ids"]) != self.lengths[index]:
            raise UnusableRow(f"it has {len(sample['input_ids'])} tokens and had {self.lengths[index]}")
        sample["source_ids"].fill_(int(self.source_of[index]))
        return sample


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
        return self.dataset[self._place(index)]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples, as PyTorch's loaders ask for them."""
        return self.dataset.__getitems__([self._place(index) for index in indices])

    def _place(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        epoch, position = divmod(index, len(self.order))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self.order.epoch(epoch)
        return int(self._epoch[1][position])
