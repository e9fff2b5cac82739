"""What `data check` finds in a file: rows by kind, images, tokens, and the rows that cannot be used."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from .dataset import examine
from .rows import Skipped, describe_skipped
from .sources.opening import open_source


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What was found.

    Attributes:
        path: the file.
        rows: rows in it.
        skipped: those that cannot be used.
        images: number of images of each usable row.
        tokens: length of each usable row.
        learned: number of tokens of each usable row that are learned.
    """

    path: Path
    rows: int
    skipped: tuple[Skipped, ...]
    images: np.ndarray
    tokens: np.ndarray
    learned: np.ndarray

    def lines(self) -> Iterator[tuple[str, str]]:
        """Titles and values."""
        yield "rows", f"{self.rows:,}, of which {len(self.skipped):,} cannot be used"
        if len(self.tokens):
            without = int((self.images == 0).sum())
            yield "images", f"{self.images.sum():,}; {without:,} rows have none, at most {self.images.max()} in a row"
            low, half, high = np.percentile(self.tokens, (0, 50, 100)).round().astype(int)
            yield "tokens", f"{self.tokens.sum():,}; a row has {low:,} to {high:,}, the median is {half:,}"
            yield "learned", f"{self.learned.sum() / self.tokens.sum():.1%} of the tokens"
        if self.skipped:
            yield "skipped", describe_skipped(self.path, self.skipped, self.rows)


def check_file(path: Path, processor: GPTOSSVisionProcessor, seq_length: int) -> Check:
    """Check a file as a run does before its first step, but decode all images.

    Args:
        path: JSONL.
        processor: of the model.
        seq_length: longest row in tokens.

    Raises:
        UserError: the file has no rows.
        OSError: it cannot be read.
    """
    source = open_source(path)
    found = examine(source, processor, seq_length, decode_images=True)
    found.refuse_too_many(path, max_skipped=1.0)
    usable = found.usable
    return Check(
        path=path,
        rows=len(source),
        skipped=tuple(found.skipped),
        images=found.images[usable],
        tokens=found.lengths[usable],
        learned=found.learned[usable],
    )
