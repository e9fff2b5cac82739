"""The three pictures of a run: loss over steps, what the model answers, which experts see images and which see text.

Each function draws on a figure of its own, never through pyplot; the caller's matplotlib settings are neither used nor
changed, and the same input gives the same bytes. Colours are Okabe and Ito's, told apart with any colour vision.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL.Image import Image

BLUE, VERMILLION, GREY, INK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"
STYLE: dict = {
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "text.color": INK,
    "text.parse_math": False,
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
    "xtick.color": INK,
    "ytick.color": INK,
}
GRID_COLUMNS, GRID_ROWS = 6, 4


def loss_figure(
    steps: Sequence[int],
    losses: Sequence[float],
    path: Path,
    *,
    held_out: tuple[Sequence[int], Sequence[float]] | None = None,
) -> None:
    """Draw the training loss over optimizer steps, and the loss on held-out data (its own steps and values) if given.

    Losses are in nats per answer token. The scale is logarithmic where the loss falls to a tenth and below.

    Raises:
        ValueError: there is nothing to draw, or a loss is not a finite number.
    """
    _check_losses(steps, losses)
    window = len(losses) // 25 | 1
    smooth = _running_mean(np.asarray(losses, dtype=float), window)
    with _page(path, width=8, height=4.5) as figure:
        axes = figure.subplots()
        axes.plot(steps, losses, color=BLUE, alpha=0.4 if window > 1 else 1, linewidth=0.8, label="training, each step")
        if window > 1:
            axes.plot(steps, smooth, color=BLUE, linewidth=2, label=f"training, mean of {window} steps")
        if held_out is not None:
            _check_losses(*held_out)
            axes.plot(*held_out, color=VERMILLION, marker="o", markersize=4, linewidth=1.2, label="held out")
        _scale_losses(axes, [*losses, *(held_out[1] if held_out else [])])
        _mark(axes, steps[0], losses[0])
        _mark(axes, steps[-1], losses[-1])
        axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats per answer token)")
        axes.set_title(f"Loss over {len(steps)} steps", fontsize="x-large")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.legend()


def predictions_figure(
    images: Sequence[Image], questions: Sequence[str], answers: Sequence[str], truths: Sequence[str], path: Path
) -> None:
    """Draw test images with what was asked above each and what the model said below; count right answers in the title.

    An answer is right when it equals its truth but for case and space at its ends. Where not all fit, up to a third of
    those shown are wrong ones, and the title says how many are wrong in all.

    Raises:
        ValueError: there is nothing to draw, or the four sequences differ in length.
    """
    lengths = [len(images), len(questions), len(answers), len(truths)]
    if len(set(lengths)) != 1 or not images:
        raise ValueError(f"need as many images as questions, answers and truths, and one at least; got {lengths}")
    right = [a.strip().casefold() == t.strip().casefold() for a, t in zip(answers, truths, strict=True)]
    shown = _choose(right, GRID_COLUMNS * GRID_ROWS)
    rows = -(-len(shown) // GRID_COLUMNS)
    with _page(path, width=9, height=0.9 + 2.1 * rows) as figure:
        figure.suptitle(f"{sum(right)} of {len(right)} answers are right ({sum(right) / len(right):.1%})")
        grid = figure.subplots(rows, GRID_COLUMNS, squeeze=False).flat
        for axes, index in zip_longest(grid, shown):
            if index is None:
                axes.set_axis_off()
            else:
                truth = None if right[index] else truths[index]
                _draw_answer(axes, images[index], questions[index], answers[index], truth)
        figure.supxlabel(_shown_note(right, shown), color=GREY, fontsize="medium")


def experts_figure(shares: np.ndarray, path: Path) -> None:
    """Draw for each layer which share of visual tokens (upwards) and of text tokens (downwards) each expert takes.

    `shares` is [layers, 2, experts], visual before text; each row sums to 1. A layer's overlap is the sum over its
    experts of the smaller share: 1 where both kinds of token are routed alike, 0 where they share no expert.

    Raises:
        ValueError: the shape is another, or a row does not sum to 1.
    """
    _check_shares(shares)
    layers, _, experts = shares.shape
    columns = 1 if layers < 3 else 2 if layers < 9 else 3 if layers < 19 else 4
    rows = -(-layers // columns)
    limit = 1.08 * max(shares.max(), 1.5 / experts)
    with _page(path, width=max(7, 4 * columns), height=1.2 + (1.9 if layers < 9 else 1.5) * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for layer, axes in enumerate(grid.flat):
            if layer < layers:
                _draw_layer(axes, shares[layer], f"layer {layer}", limit)
            else:
                axes.set_axis_off()
            if layers - columns <= layer < layers:
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("expert")
        figure.suptitle("Which experts see images, which see text")
        figure.supylabel("share of routed tokens", fontsize="medium")
        figure.legend(handles=_share_legend(experts), loc="outside lower center", ncols=3)


@contextmanager
def _page(path: Path, *, width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` × `height` inches in the house style, written to `path` as PNG at the end."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, format="png", metadata={"Software": None})


def _check_losses(steps: Sequence[int], losses: Sequence[float]) -> None:
    if len(steps) != len(losses) or len(losses) == 0:
        raise ValueError(
            f"need a loss for each step, and one at least; got {len(steps)} steps and {len(losses)} losses"
        )
    for step, loss in zip(steps, losses, strict=True):
        if not np.isfinite(loss):
            raise ValueError(f"the loss at step {step} is {loss}")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values; over those that exist at both ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _scale_losses(axes: Axes, losses: Sequence[float]) -> None:
    if 0 < min(losses) < losses[0] / 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    else:
        axes.set_ylim(min(0, *losses), 1.05 * max(losses) or 1)


def _mark(axes: Axes, step: int, loss: float) -> None:
    axes.plot(step, loss, "o", color=INK, markersize=4, zorder=3)
    axes.annotate(f"{loss:.3g}", (step, loss), (6, 5), textcoords="offset points")


def _choose(right: Sequence[bool], room: int) -> list[int]:
    """Indices of what is shown, in order: all, or an even pick with up to a third of `room` wrong."""
    if len(right) <= room:
        return list(range(len(right)))
    wrong_ones = [i for i, is_right in enumerate(right) if not is_right]
    right_ones = [i for i, is_right in enumerate(right) if is_right]
    wrong_count = max(min(len(wrong_ones), room // 3), room - len(right_ones))
    return sorted(_evenly(wrong_ones, wrong_count) + _evenly(right_ones, room - wrong_count))


def _evenly(items: list[int], count: int) -> list[int]:
    return [items[i * len(items) // count] for i in range(count)]


def _shown_note(right: Sequence[bool], shown: list[int]) -> str:
    if len(shown) == len(right):
        return ""
    wrong, wrong_shown = right.count(False), sum(not right[index] for index in shown)
    return f"{len(shown)} of {len(right)} shown, with {wrong_shown} of the {wrong} wrong ones"


def _draw_answer(axes: Axes, image: Image, question: str, answer: str, truth: str | None) -> None:
    """One cell: `truth` is the right word where the answer is wrong, else None."""
    color = BLUE if truth is None else VERMILLION
    pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=color, linewidth=1 if truth is None else 3.5)
    axes.set_title(_lines(question, 22), color=GREY, fontsize="small", loc="center")
    said = f"{'✓' if truth is None else '✗'} {_lines(answer, 16)}"
    axes.set_xlabel(said, color=color, fontsize="x-large" if len(said) < 12 else "medium", fontweight="bold")
    if truth is not None:
        below = axes.xaxis.label
        axes.annotate(
            f"right: {_lines(truth, 16)}",
            (0.5, 0),
            (0, -1),
            xycoords=below,
            textcoords="offset points",
            ha="center",
            va="top",
        )


def _lines(text: str, width: int) -> str:
    """At most two lines of `text`, with a box for what the font cannot show."""
    font = get_font(findfont("DejaVu Sans"))
    plain = "".join(c if c.isspace() or font.get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in text)
    return "\n".join(textwrap.wrap(plain, width, max_lines=2, placeholder=" …")) or "(nothing)"


def _check_shares(shares: np.ndarray) -> None:
    if shares.ndim != 3 or shares.shape[1] != 2 or 0 in shares.shape:
        raise ValueError(f"shares must be [layers, 2 (visual, text), experts], got {list(shares.shape)}")
    for layer, kind in np.argwhere(~np.isclose(shares.sum(-1), 1, atol=1e-3)):
        raise ValueError(
            f"{('visual', 'text')[kind]} shares of layer {layer} sum to {shares[layer, kind].sum():.4f}, not 1"
        )


def _draw_layer(axes: Axes, shares: np.ndarray, name: str, limit: float) -> None:
    experts = np.arange(shares.shape[1])
    width = 0.8 if len(experts) <= 32 else 1.0
    tick_step = 1 if len(experts) <= 16 else len(experts) // 8
    axes.bar(experts, shares[0], width, color=BLUE)
    axes.bar(experts, -shares[1], width, color=VERMILLION)
    axes.axhline(0, color=INK, linewidth=0.8)
    for uniform in (1 / len(experts), -1 / len(experts)):
        axes.axhline(uniform, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(f"{name} · overlap {np.minimum(*shares).sum():.2f}")
    axes.set(ylim=(-limit, limit), xlim=(-0.6, len(experts) - 0.4), xticks=experts[::tick_step])
    axes.yaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * abs(share):.3g}%"))


def _share_legend(experts: int) -> list[Patch | Line2D]:
    return [
        Patch(color=BLUE, label="visual tokens (up)"),
        Patch(color=VERMILLION, label="text tokens (down)"),
        Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label=f"uniform share 1/{experts}"),
    ]
