"""What `data check` finds in sources: rows by format, images, tokens, duplicates, and the rows that cannot be used."""

import gc
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from ...terminal import Progress
from .findings import Findings, examine
from .lock import check_place, lock_of, write_lock
from .order import Order
from .packing import PackedOrder, PackStatistics
from .printable import printable
from .rows import describe_skipped
from .sources.base import Source
from .sources.opening import open_source
from .tokens import ALL, Learned

CHUNK = 2000
"""Rows that a process checks at once."""
NAMED_KEYS = 10
"""Keys that are not read and are printed."""

SUMS = ("rows", "usable", "repeated", "images", "tokens", "learned_tokens")


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found in a source.

    Attributes:
        source: the rows.
        found: of all rows, with those left out that are too long.
        seq_length: longest row in tokens.
        rows_per_step: of a recipe; None without one.
    """

    source: Source
    found: Findings
    seq_length: int
    rows_per_step: int | None = None

    @classmethod
    def of(cls, source: Source, found: Findings, seq_length: int, rows_per_step: int | None) -> "Check":
        """Of what `check_source` has found, which does not know the longest row."""
        limited = found.limited_to(seq_length, source)
        return cls(source=source, found=limited, seq_length=seq_length, rows_per_step=rows_per_step)

    @property
    def share_skipped(self) -> float:
        """Rows that cannot be used, of all."""
        return len(self.found.skipped) / len(self.found)

    @property
    def format(self) -> str:
        """Kind of the files, and by format the rows that can be read, with those that are only too long."""
        shapes = ", ".join(f"{count:,} {shape}" for shape, count in self.found.shapes.most_common())
        return f"{self.source.kind}: {shapes or 'no row that can be used'}"

    @cached_property
    def packs(self) -> PackStatistics:
        """If the rows are packed."""
        usable = self.found.usable
        lengths, images = self.found.lengths[usable], self.found.images[usable]
        return PackedOrder(Order((len(usable),), seed=0), lengths, images, seq_length=self.seq_length).statistics()

    @cached_property
    def repeated(self) -> int:
        """Usable rows that are the same as one before."""
        hashes = self.found.hashes[self.found.usable]
        return len(hashes) - len(np.unique(hashes))

    def lines(self) -> Iterator[tuple[str, str]]:
        """Titles and values."""
        found, usable = self.found, self.found.usable
        yield "format", self.format
        yield "rows", f"{len(found):,}, of which {len(found.skipped):,} cannot be used; {self.repeated:,} are repeated"
        if len(usable):
            images, tokens, learned = found.images[usable], found.lengths[usable], found.learned[usable]
            without = int((images == 0).sum())
            yield "images", f"{images.sum():,}; {without:,} rows have none, at most {images.max()} in a row"
            if found.modes:
                modes = ", ".join(f"{count:,} {mode}" for mode, count in found.modes.most_common())
                sides = ", ".join(f"{count:,} to {side}" for side, count in sorted(found.sides.items()))
                yield "", f"by mode: {modes}; by longer side in pixels: {sides}"
            low, half, high = np.percentile(tokens, (0, 50, 100)).round().astype(int)
            yield "tokens", f"{tokens.sum():,}; a row has {low:,} to {high:,}, the median is {half:,}"
            for start, end, count in histogram(tokens):
                yield "", f"{start:>7,} to {end:>7,}  {count:>9,}  {'█' * round(30 * count / len(usable))}"
            yield "learned", f"{learned.sum() / tokens.sum():.1%} of the tokens"
            yield "packs", f"of {self.seq_length:,} tokens, with data.packing=true: {self.packs}"
            if self.rows_per_step is not None:
                rows, packs = (math.ceil(count / self.rows_per_step) for count in (len(usable), self.packs.packs))
                yield "steps", f"{rows:,} an epoch of {self.rows_per_step:,} rows, or {packs:,} of as many packs"
        if found.left_out:
            yield "not read", self._left_out()
        if found.skipped:
            yield "skipped", printable(describe_skipped(self.source.title, found.skipped, len(found)))

    def _left_out(self) -> str:
        """The most common keys that are not read, with their rows."""
        (first, count), *others = self.found.left_out.most_common(NAMED_KEYS)
        named = [f"{count:,} row{' has' if count == 1 else 's have'} `{first:.80}`"]
        named += [f"{count:,} `{key:.80}`" for key, count in others]
        more = len(self.found.left_out) - len(named)
        return printable(", ".join(named) + (f", and {more:,} more keys" if more else ""))

    def as_json(self) -> dict[str, Any]:
        """The same for programs, with all rows that are left out."""
        found, usable = self.found, self.found.usable
        images, tokens = found.images[usable], found.lengths[usable]
        return {
            "files": [str(file) for file in self.source.files],
            "format": self.format,
            "rows_by_format": dict(found.shapes),
            "left_out": dict(found.left_out),
            "rows": len(found),
            "usable": len(usable),
            "repeated": self.repeated,
            "skipped": [{"file": row.file, "line": row.line, "reason": row.reason} for row in found.skipped],
            "images": int(images.sum()),
            "tokens": int(tokens.sum()),
            "learned_tokens": int(found.learned[usable].sum()),
            "tokens_per_row": [[*map(int, bar)] for bar in histogram(tokens)],
            "images_per_row": {str(number): int((images == number).sum()) for number in np.unique(images)},
            "packs": None if not len(usable) else asdict(self.packs),
            "image_modes": dict(found.modes),
            "image_sides": {str(side): count for side, count in sorted(found.sides.items())},
        }


def together(checks: Sequence[Check]) -> dict[str, Any]:
    """For programs: the sums over all sources, all rows that are left out, and each source as `Check.as_json`."""
    sources = [check.as_json() for check in checks]
    sums = {name: sum(source[name] for source in sources) for name in SUMS}
    skipped = [row for source in sources for row in source["skipped"]]
    format_of_all = "; ".join(dict.fromkeys(source["format"] for source in sources))
    return {"format": format_of_all, **sums, "skipped": skipped, "sources": sources}


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """First and last length, and number of rows, between powers of two."""
    if not len(lengths):
        return []
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    bars = range(exponents.min(), exponents.max() + 1)
    return [(2 ** (bar - 1) + 1 if bar else 1, 2**bar, int((exponents == bar).sum())) for bar in bars]


def check_files(
    paths: Sequence[str],
    processor: GPTOSSVisionProcessor,
    seq_length: int,
    *,
    rows_per_step: int | None = None,
    image_folder: Path | None = None,
    allowed_hosts: frozenset[str] = frozenset(),
    decode_images: bool = False,
    learned_parts: Learned = ALL,
    writes_lock: bool = True,
) -> Iterator[Check]:
    """Check sources, and write a lock for each. All are opened before the first is checked.

    Args:
        paths: as of `open_source`.
        processor: of the model.
        seq_length: longest row in tokens.
        rows_per_step: of a recipe.
        image_folder: as of `open_source`.
        allowed_hosts: as of `open_source`.
        decode_images: whether pixels are checked.
        learned_parts: of chats.
        writes_lock: whether locks are written.

    Raises:
        UserError: a source is not of a kind that is read, or has no rows.
        OSError: a source cannot be read, or its lock not be written.
    """
    console = Console(stderr=True, highlight=False)
    sources = [open_rows(path, image_folder, allowed_hosts, seq_length) for path in paths]
    for path in paths if writes_lock else ():
        check_place(lock_of(path))
    for path, source in zip(paths, sources, strict=True):
        options = {"decode_images": decode_images, "learned_parts": learned_parts}
        found = check_source(source, processor, console=console, **options)
        if writes_lock:
            write_lock(lock_of(path), source, found, processor, **options)
        yield Check.of(source, found, seq_length, rows_per_step)


def open_rows(path: str, image_folder: Path | None, allowed_hosts: frozenset[str], seq_length: int) -> Source:
    """Open a source, as `open_source`.

    Raises:
        UserError: it has no rows.
    """
    source = open_source(path, image_folder=image_folder, allowed_hosts=allowed_hosts, seq_length=seq_length)
    if not len(source):
        raise UserError(f"{source.title} has no rows.")
    return source


def check_source(
    source: Source,
    processor: GPTOSSVisionProcessor,
    *,
    decode_images: bool = False,
    learned_parts: Learned = ALL,
    processes: int | None = None,
    console: Console | None = None,
) -> Findings:
    """Check all rows of a source in several processes.

    Args:
        source: the rows.
        processor: of the model.
        decode_images: whether pixels are checked.
        learned_parts: of chats.
        processes: None for one per core.
        console: for progress.
    """
    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    processes = min(processes or len(os.sched_getaffinity(0)), max(len(chunks), 1))
    found = Findings.of_rows(range(len(source)))
    # Forked: the source, with the places of all rows, and the processor are shared.
    setting = (source, processor, {"decode_images": decode_images, "learned_parts": learned_parts})
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _set_up, setting) as pool:
        parts = pool.map(_examine, chunks)
        with Progress("Rows checked", len(source), console) as progress:
            found.merge(_counted(parts, progress))
    return found


def _counted(parts: Iterable[Findings], progress: Progress) -> Iterator[Findings]:
    for part in parts:
        yield part
        progress.advance(len(part))


_state: dict[str, Any] = {}


def _set_up(source: Source, processor: GPTOSSVisionProcessor, options: dict[str, Any]) -> None:
    gc.freeze()  # a collection would write to the pages of all objects, which are shared until then
    _state.update(source=source, processor=processor, options=options)


def _examine(numbers: range) -> Findings:
    return examine(_state["source"], _state["processor"], numbers=numbers, **_state["options"])
