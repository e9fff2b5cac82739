"""The three pictures of a run: loss over steps, answers under their images, experts used by images and by text.

Each function draws on a figure of its own, never through pyplot, with matplotlib's defaults and `STYLE`, whatever the
caller's settings are. Colours are Okabe and Ito's, told apart with any colour vision.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL.Image import Image

BLUE, VERMILLION, GREY, INK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"
STYLE: dict = {
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "text.color": INK,
    "text.parse_math": False,  # an answer may hold a dollar sign
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.titlesize": "x-large",
    "legend.frameon": False,
}
GRID_COLUMNS, GRID_ROWS = 6, 4


def loss_figure(losses: Sequence[float], path: Path) -> None:
    """Draw the loss of each optimizer step, in nats per answer token, and its mean over a twenty-fifth of the steps.

    The scale is logarithmic where the loss falls to a tenth and below.
    """
    steps, window = np.arange(1, len(losses) + 1), len(losses) // 25 | 1
    kernel = np.ones(window)
    smooth = np.convolve(losses, kernel, "same") / np.convolve(np.ones(len(losses)), kernel, "same")
    with _page(path, width=8, height=4.5) as figure:
        axes = figure.subplots()
        axes.plot(steps, losses, color=BLUE, alpha=0.4 if window > 1 else 1, linewidth=0.8, label="each step")
        if window > 1:
            axes.plot(steps, smooth, color=BLUE, linewidth=2, label=f"mean of {window} steps")
        if 0 < min(losses) < losses[0] / 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        for step in (0, -1):
            axes.plot(steps[step], losses[step], "o", color=INK, markersize=4, zorder=3)
            axes.annotate(f"{losses[step]:.3g}", (steps[step], losses[step]), (6, 5), textcoords="offset points")
        axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats per answer token)")
        axes.set_title(f"Training loss over {len(losses)} steps", fontsize="x-large")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.legend()


def predictions_figure(
    images: Sequence[Image], questions: Sequence[str], answers: Sequence[str], truths: Sequence[str], path: Path
) -> None:
    """Draw images, wrong answers first, each with its question above and the answer below; the title counts all."""
    right = [answer == truth for answer, truth in zip(answers, truths, strict=True)]
    shown = sorted(range(len(right)), key=right.__getitem__)[: GRID_COLUMNS * GRID_ROWS]
    rows = -(-len(shown) // GRID_COLUMNS)
    with _page(path, width=9, height=0.9 + 2.1 * rows) as figure:
        figure.suptitle(f"{sum(right)} of {len(right)} answers are right ({sum(right) / len(right):.1%})")
        for axes, index in zip_longest(figure.subplots(rows, GRID_COLUMNS, squeeze=False).flat, shown):
            if index is None:
                axes.set_axis_off()
                continue
            color = BLUE if right[index] else VERMILLION
            axes.imshow(np.asarray(images[index].convert("RGB")), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=color, linewidth=1 if right[index] else 3.5)
            axes.set_title(_lines(questions[index], 22), color=GREY, fontsize="small", loc="center")
            said = f"✓ {answers[index]}" if right[index] else f"✗ {answers[index]}, not {truths[index]}"
            axes.set_xlabel(
                _lines(said, 18), color=color, fontsize="large" if right[index] else "medium", fontweight="bold"
            )
        if len(shown) < len(right):
            figure.supxlabel(f"{len(shown)} shown, wrong ones first", color=GREY, fontsize="medium")


def experts_figure(shares: np.ndarray, path: Path) -> None:
    """Draw for each layer the share of visual tokens (upwards) and of text tokens (downwards) that each expert takes.

    `shares` is [layers, 2 (visual, text), experts]; each row sums to 1. The overlap of a layer is the sum, over its
    experts, of the smaller share: 1 where both kinds of token are routed alike, 0 where they share no expert.
    """
    layers, _, experts = shares.shape
    rows = -(-layers // 2)
    with _page(path, width=8, height=1.2 + 1.9 * rows) as figure:
        grid = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True).flat
        for layer, axes in enumerate(grid):
            if layer < layers:
                _draw_layer(axes, shares[layer], f"layer {layer}", 1.08 * max(shares.max(), 1.5 / experts))
            else:
                axes.set_axis_off()
            if layers - 2 <= layer < layers:
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("expert")
        figure.suptitle("Experts used by images and by text")
        figure.supylabel("share of routed tokens", fontsize="medium")
        legend = [
            Patch(color=BLUE, label="visual tokens (up)"),
            Patch(color=VERMILLION, label="text tokens (down)"),
            Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label=f"uniform share 1/{experts}"),
        ]
        figure.legend(handles=legend, loc="outside lower center", ncols=3)


@contextmanager
def _page(path: Path, *, width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` x `height` inches, written to `path` as PNG at the end; the same input, the same bytes."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, format="png", metadata={"Software": None})


def _lines(text: str, width: int) -> str:
    """At most two lines of `text`, without control characters."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return "\n".join(textwrap.wrap(printable, width, max_lines=2, placeholder=" …"))


def _draw_layer(axes: Axes, shares: np.ndarray, name: str, limit: float) -> None:
    experts = np.arange(shares.shape[1])
    axes.bar(experts, shares[0], color=BLUE)
    axes.bar(experts, -shares[1], color=VERMILLION)
    axes.axhline(0, color=INK, linewidth=0.8)
    for uniform in (1 / len(experts), -1 / len(experts)):
        axes.axhline(uniform, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(f"{name} · overlap {np.minimum(*shares).sum():.2f}")
    axes.set(ylim=(-limit, limit), xlim=(-0.6, len(experts) - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * abs(share):.3g}%"))
