"""Sources of a run and their shares: what `data.sources` may hold, and how many samples of each an epoch has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from ...bridge.mcore.batch_statistics import MAX_SOURCES
from ...errors import UserError

MAX_SAMPLES = 2**31
"""Of an epoch, whose order is held in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One source of a mixture.

    Attributes:
        path: as of `open_source`.
        weight: its share of the samples, beside the other weights; None for one that is repeated.
        repeat: how often an epoch reads it; may be a fraction.
        image_folder: that relative paths of its images start from; None for the folder of each file.
        name: for its loss; None for the name of its file.
    """

    path: str
    weight: float | None = None
    repeat: float | None = None
    image_folder: str | None = None
    name: str | None = None

    @property
    def title(self) -> str:
        """Its name in logs."""
        return self.name or Path(self.path).name


def parse_parts(sources: Sequence[Any]) -> list[Part]:
    """The parts of a mixture: paths, or mappings with a path.

    Raises:
        UserError: a key or a value is none of those, or two sources have the same name.
    """
    if not isinstance(sources, Sequence) or isinstance(sources, str) or not sources:
        raise UserError(f"data.sources is a list of paths and of {{path: …, weight: …}}, not {sources!r:.80}")
    if len(sources) > MAX_SOURCES:
        raise UserError(
            f"data.sources has {len(sources)} sources, and at most {MAX_SOURCES} are read; join some of them"
        )
    parts = [_part(source) for source in sources]
    titles = [part.title for part in parts]
    if twice := next((title for title in titles if titles.count(title) > 1), None):
        raise UserError(f"two of data.sources are called {twice}; give one of them another name by name=…")
    return parts


def source_titles(sources: Sequence[Any]) -> list[str]:
    """The names of the sources."""
    return [part.title for part in parse_parts(sources)]


def per_epoch(parts: Sequence[Part], rows: Sequence[int]) -> list[int]:
    """Samples of each source in an epoch, rounded to whole samples.

    Sources with `repeat`, 1 unless set, are read so often; a source with `weight` w has the share w of all samples.
    Where all have weights, these are shares of their sum, and an epoch is just long enough that each row is read.

    Args:
        parts: the sources.
        rows: usable rows of each.

    Raises:
        UserError: weights leave nothing for the sources that are repeated, a source would have no sample, or an epoch
            more than `MAX_SAMPLES`.
    """
    weights = [None if part.weight is None else Fraction(str(part.weight)) for part in parts]
    total = sum(weight for weight in weights if weight is not None)
    repeats = [
        count * (1 if part.repeat is None else Fraction(str(part.repeat)))
        for part, count in zip(parts, rows, strict=True)
    ]
    repeated = sum(count for count, weight in zip(repeats, weights, strict=True) if weight is None)
    if all(weight is not None for weight in weights):
        if not total:
            raise UserError("the weights of data.sources are all 0")
        shares = [weight / total for weight in weights if weight is not None]
        length = max(Fraction(count) / share for count, share in zip(rows, shares, strict=True) if share)
        counts = [round(length * share) for share in shares]
    else:
        if total >= 1:
            raise UserError(
                f"the weights of data.sources are shares of all samples; their sum {float(total):g} leaves nothing for "
                "the sources without a weight"
            )
        length = repeated / (1 - total)
        shares = zip(repeats, weights, strict=True)
        counts = [round(count if weight is None else length * weight) for count, weight in shares]
    _check_counts(parts, rows, counts)
    return counts


def _check_counts(parts: Sequence[Part], rows: Sequence[int], counts: Sequence[int]) -> None:
    for part, there, count in zip(parts, rows, counts, strict=True):
        if not count and part.weight is None:
            raise UserError(
                f"{part.title} would have no sample in any epoch: repeat={part.repeat} of its {there:,} rows is "
                f"rounded to 0; set a repeat of at least {1 / there:.3g}, or leave it out of data.sources"
            )
        if not count and part.weight:
            raise UserError(
                f"{part.title} would have no sample in any epoch: weight={part.weight} of the {sum(counts):,} samples "
                f"of an epoch is rounded to 0; set a weight of at least {1 / sum(counts):.3g}, or leave it out of "
                "data.sources"
            )
    if sum(counts) > MAX_SAMPLES:
        each = ", ".join(f"{count:,} of {part.title}" for part, count in zip(parts, counts, strict=True))
        raise UserError(
            f"an epoch would have {sum(counts):,} samples ({each}), and at most {MAX_SAMPLES:,} are possible; set "
            "weights or repeats that differ less"
        )


def _part(source: Any) -> Part:
    if isinstance(source, str):
        return Part(path=source)
    names = [field.name for field in fields(Part)]
    if not isinstance(source, Mapping) or not isinstance(source.get("path"), str):
        raise UserError(f"one of data.sources is neither a path nor {{path: …}}: {source!r:.80}")
    if unknown := source.keys() - {*names}:
        raise UserError(f"{', '.join(sorted(unknown))} of a source is not known; it takes {', '.join(names)}")
    for name in ("weight", "repeat"):
        value = source.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < math.inf):
            raise UserError(f"{name} of {source['path']} is {value!r}, and must be a number of at least 0")
    if source.get("repeat") == 0:
        raise UserError(f"repeat of {source['path']} is 0; leave it out of data.sources")
    if source.get("weight") is not None and source.get("repeat") is not None:
        raise UserError(f"{source['path']} has both a weight and a repeat; give one of them")
    return Part(**source)
