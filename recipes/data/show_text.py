"""`data show --text`: the samples for a terminal, with styles; elsewhere with marks."""

from itertools import groupby

from rich.console import Console
from rich.text import Text

from .printable import printable
from .show import Shown, ShownSource, Span

STYLES = {"learned": "green underline", "given": "dim", "visual": "reverse yellow", "gap": "red"}
LEARNED = ("⟦", "⟧")
"""Marks around what is learned, where there are no styles."""


def print_text(source: ShownSource, console: Console | None = None) -> None:
    """Print the samples of a source; to stdout, unless a console is given."""
    console = console or Console()
    legend = Text("Legend: ")
    if console.is_terminal:
        for name, style in (("learned", STYLES["learned"]), ("not learned", STYLES["given"]), ("visual", "reverse")):
            legend.append(name, style).append(" ")
    else:
        legend.append(f"{LEARNED[0]}learned{LEARNED[1]}, the rest is not")
    _print(console, legend)
    for heading, samples in source.samples.items():
        _print(console, Text(f"\n{heading}", "bold"))
        for sample in samples:
            _print_sample(sample, console)


def _print_sample(sample: Shown, console: Console) -> None:
    _print(console, Text(f"\n{printable(sample.file)}, {printable(sample.place)}", "bold"))
    if sample.problem:
        _print(console, Text(f"cannot be used: {printable(sample.problem)}", "red"))
        return
    counts = f"{sample.tokens:,} tokens, {sample.learned:,} learned, {len(sample.images)} images"
    _print(console, Text(f"{sample.shape}; {counts}; {sample.reason}"))
    for number, image in enumerate(sample.images, start=1):
        size = f"{image.width} x {image.height} {image.mode}, to {image.tower.width} x {image.tower.height}"
        _print(console, Text(f"image {number}: {printable(image.name)}, {size} {image.tower.mode}"))
    for each in sample.left_out:
        _print(console, Text(f"left out: {printable(each)}"))
    text = Text()
    for kind, spans in groupby(sample.spans, lambda span: span.kind):
        is_marked = kind == "learned" and not console.is_terminal
        start, end = LEARNED if is_marked else ("", "")
        text.append(start + "".join(map(_said, spans)) + end, STYLES[kind])
    _print(console, text)


def _said(span: Span) -> str:
    if span.kind == "visual":
        return f"[{len(span.ids):,} visual tokens, image {span.image}]"
    if span.kind == "gap":
        return f"\n[{len(span.ids):,} tokens in the middle are not shown]\n"
    return printable(span.text)


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False)
