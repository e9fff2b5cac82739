"""The page of `data show`: one file of HTML that needs nothing else."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from ..pages.charts import bar_chart
from ..pages.environment import environment
from .check import Check, histogram
from .printable import printable
from .show import Shown, ShownSource, Span

COMMAND = "data show"
LINE_END = Markup("<s></s>\n")
"""A line end with its sign, which the style sheet writes."""
SKIPPED = 200
"""Rows that cannot be used, of which line and reason are shown."""


def page_of(sources: Sequence[ShownSource]) -> str:
    """The page."""
    templates = environment(Path(__file__).parent, COMMAND)
    templates.filters |= {"printable": printable}
    return templates.get_template("show.html.jinja").render(
        title=", ".join(printable(Path(source.check.source.files[0]).name) for source in sources),
        sources=[_source(source) for source in sources],
        blocks=blocks,
    )


def _source(shown: ShownSource) -> dict[str, Any]:
    check = shown.check
    return {
        "title": printable(check.source.title),
        "summary": [*_summary(check)],
        "facts": [*_facts(check)],
        "figures": [*_figures(check)],
        "skipped": check.found.skipped[:SKIPPED],
        "more_skipped": max(0, len(check.found.skipped) - SKIPPED),
        "all_skipped": len(check.found.skipped),
        "samples": shown.samples,
    }


def _summary(check: Check) -> Iterator[tuple[str, str, str]]:
    """Name, value and unit or explanation."""
    found, usable = check.found, check.found.usable
    yield "Rows", f"{len(found):,}", f"{len(found.skipped):,} cannot be used, {check.repeated:,} are repeated"
    if not len(usable):
        return
    tokens, images, learned = (each[usable] for each in (found.lengths, found.images, found.learned))
    yield "Tokens", f"{tokens.sum():,}", f"{tokens.min():,} to {tokens.max():,} a row, median {np.median(tokens):,.0f}"
    yield "Learned", f"{learned.sum() / tokens.sum():.1%}", "of the tokens"
    yield "Images", f"{images.sum():,}", f"{(images == 0).sum():,} rows have none, at most {images.max():,} in a row"


def _facts(check: Check) -> Iterator[tuple[str, str]]:
    found = check.found
    yield "format", check.format
    if found.modes:
        yield "images by mode", ", ".join(f"{count:,} {mode}" for mode, count in found.modes.most_common())
        sides = sorted(found.sides.items())
        yield "by longer side", ", ".join(f"{count:,} to {side:,} pixels" for side, count in sides)
    if len(found.usable):
        yield "packs", f"of {check.seq_length:,} tokens, with data.packing=true: {check.packs}"
    yield from ((name, value) for name, value in check.lines() if name == "steps")


def _figures(check: Check) -> Iterator[tuple[str, Markup]]:
    usable = check.found.usable
    if len(usable):
        bars = [(f"{first:,}–{last:,}", count) for first, last, count in histogram(check.found.lengths[usable])]
        yield "Tokens per row", bar_chart(bars, "tokens", "rows")
        yield "Images per row", bar_chart(_by_number(check.found.images[usable]), "images", "rows")


def _by_number(images: np.ndarray) -> list[tuple[str, int]]:
    if images.max() <= 12:
        return [(f"{number}", int((images == number).sum())) for number in range(images.max() + 1)]
    bars = [(f"{first:,}–{last:,}", count) for first, last, count in histogram(images[images > 0])]
    return [("0", int((images == 0).sum())), *bars]


def blocks(sample: Shown) -> Iterator[tuple[str, str, Markup]]:
    """Name, channel and tokens of each message of a sample."""
    for turn, spans in groupby(sample.spans, lambda span: span.turn):
        name = sample.turns[turn]
        channel = next((each for each in ("analysis", "commentary", "final") if each in name.partition(",")[2]), "")
        yield printable(name), channel, Markup("").join(_runs([*spans]))


def _runs(spans: Sequence[Span]) -> Iterator[Markup]:
    for kind, run in groupby(spans, lambda span: span.kind):
        yield Markup('<span class="{}">{}</span>').format(kind, Markup("").join(map(_token, run)))


def _token(span: Span) -> Markup:
    last = span.position + len(span.ids) - 1
    if span.kind == "gap":
        return Markup("{:,} tokens in the middle are not shown here; the model gets them").format(len(span.ids))
    if span.kind == "visual":
        title = f"positions {span.position} to {last}, each of token {span.ids[0]}"
        return Markup('<i title="{}">{:,} visual tokens, image {}</i>').format(title, len(span.ids), span.image)
    positions = f"{span.position}" if len(span.ids) == 1 else f"{span.position} to {last}"
    title = f"position {positions}, token {', '.join(map(str, span.ids))}"
    tag = "b" if span.is_control else "i"
    text = escape(printable(span.text)).replace("\n", LINE_END)
    return Markup('<{0} title="{1}">{2}</{0}>').format(Markup(tag), title, text)
