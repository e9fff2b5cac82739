"""Figures of pages as SVG: lines over steps or layers, bars, and heat maps. Colours are in the style sheet.

Drawn here and not by matplotlib, whose figures know one background, and take a second at every checkpoint.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 40
POINTS = 400
"""Points of a line at most: more are closer than pixels."""
CELLS_WITH_TITLES = 2500
"""Cells of a heat map up to which each says its value under the pointer."""


@dataclass(frozen=True, slots=True)
class Line:
    """A named line of a figure.

    Attributes:
        name: in the legend.
        points: x and y, in the order of x; a y that is None is left out.
        color: number of a colour of the page.
        style: "faint" is for values that vary from step to step, "dots" marks each of a few.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    color: int = 0
    style: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale with round ticks, linear or logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """The place of a value between the ends, 0 to 1."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return (self._scaled(value) - low) / (high - low)

    def ticks(self, at_most: int) -> list[float]:
        """Round values between the ends."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                ticks = [digit * 10.0**decade for decade in decades for digit in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= at_most:
                    return ticks
            return ticks[:: -(-len(ticks) // at_most)]
        step = _round_step((self.high - self.low) / at_most)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, from_zero: bool = False) -> Markup | None:
    """Lines over one x, with axes, a legend if there are several, and the last value of each; None without points.

    The scale of y is logarithmic where values fall to a tenth, unless it is `from_zero`.
    """
    lines = [kept for line in lines if (kept := _finite(line)).points]
    if not lines:
        return None
    ys = [y for line in lines for _, y in line.points]
    x = _around([x for line in lines for x, _ in line.points], margin=0)
    is_log = not from_zero and 0 < min(ys) < max(ys) / 10
    y = _logarithmic(ys) if is_log else _around([0.0, *ys] if from_zero else ys, margin=0.06)
    drawn = [*_axes(x, y, x_label, y_label), *(part for line in lines for part in _drawn(line, x, y))]
    legend = Markup("").join(
        Markup('<li class="c{}"><i class="{}"></i>{} <b>{}</b></li>').format(
            line.color, line.style, line.name, number(line.points[-1][1])
        )
        for line in lines
    )
    title = f"{y_label} over {x_label}"
    figure = _svg(title, HEIGHT, drawn)
    return Markup('{}<ul class="legend">{}</ul>').format(figure, legend)


def heat_map(
    values: Sequence[Sequence[float | None]], half: float, color: int, x_label: str, y_label: str, title: str
) -> Markup:
    """A cell per value, rows from the top; a None has none. A value of `half` has half of the colour's strength.

    The strength is ``value / (value + half)``, so that one large value does not make all others pale.
    """
    rows, columns = len(values), len(values[0])
    has_titles = rows * columns <= CELLS_WITH_TITLES
    side = max(5.0, min(18.0, 300 / rows))
    height = round(TOP + rows * side + BOTTOM)
    width = (WIDTH - LEFT - RIGHT) / columns
    cells = []
    for row, shares in enumerate(values):
        for column, share in enumerate(shares):
            if share is None:
                continue
            place = f'x="{LEFT + column * width:.1f}" y="{TOP + row * side:.1f}"'
            size = f'width="{width - 0.6:.1f}" height="{side - 0.6:.1f}" opacity="{share / (share + half):.3f}"'
            said = f"<title>{y_label} {row}, {x_label} {column}: {share:.1%}</title>" if has_titles else ""
            cells.append(f"<rect {place} {size}>{said}</rect>")
    drawn = [f'<g class="c{color} cells">{"".join(cells)}</g>']
    below, left = height - BOTTOM + 16, LEFT - 7
    drawn += [_text(LEFT + (index + 0.5) * width, below, index, "middle") for index in _some(columns, 12)]
    drawn += [_text(left, TOP + (index + 0.5) * side + 4, index, "end") for index in _some(rows, 9)]
    drawn += _labels(x_label, y_label, height)
    return _svg(title, height, drawn)


def bar_chart(bars: Sequence[tuple[str, int]], x_label: str, y_label: str) -> Markup:
    """A bar for each name, with its number above it."""
    most, width = max(count for _, count in bars), (WIDTH - LEFT - RIGHT) / len(bars)
    y = Axis(0.0, 1.12 * max(most, 1))
    named, drawn = _some(len(bars), 9), [*_scale(y)]
    for index, (name, count) in enumerate(bars):
        middle, top = LEFT + (index + 0.5) * width, _y(y, count)
        place = f'x="{middle - 0.41 * width:.1f}" y="{top:.1f}" width="{0.82 * width:.1f}"'
        said = f"<title>{escape(name)}: {count:,}</title>"
        drawn.append(f'<rect class="c0 cells" {place} height="{HEIGHT - BOTTOM - top:.1f}">{said}</rect>')
        if count and len(bars) <= 12:
            drawn.append(_text(middle, top - 5, f"{count:,}", "middle"))
        if index in named:
            drawn.append(_text(middle, HEIGHT - BOTTOM + 16, name, "middle"))
    return _svg(f"{y_label} by {x_label}", HEIGHT, [*drawn, *_base(), *_labels(x_label, y_label, HEIGHT)])


def with_mean(name: str, points: Sequence[tuple[float, float]], color: int = 0) -> list[Line]:
    """A line; of more than 200 points, faint, and with the mean over a hundredth of them."""
    window = len(points) // 100
    if window < 2:
        return [Line(name, points, color)]
    mean = Line(f"{name}, mean of {window}", smoothed(points, window), color)
    return [Line(name, points, color, "faint"), mean]


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean over the last `window` points at each point."""
    found, total = [], 0.0
    for index, (x, y) in enumerate(points):
        total += y - (points[index - window][1] if index >= window else 0.0)
        found.append((x, total / min(index + 1, window)))
    return found


def number(value: float) -> str:
    """A value in three or four digits, large ones with separators."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.3g}"


def _finite(line: Line) -> Line:
    points = [(x, y) for x, y in line.points if y is not None and math.isfinite(y)]
    return Line(line.name, points, line.color, line.style)


def _around(values: Sequence[float], margin: float) -> Axis:
    low, high = min(values), max(values)
    if low == high:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    extra = (high - low) * margin
    return Axis(low if low == 0 else low - extra, high + extra)


def _logarithmic(values: Sequence[float]) -> Axis:
    return Axis(min(values) / 1.15, max(values) * 1.15, is_log=True)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))


def _axes(x: Axis, y: Axis, x_label: str, y_label: str) -> Iterator[str]:
    yield from _scale(y)
    for tick in x.ticks(7):
        if tick == round(tick):
            yield _text(_x(x, tick), HEIGHT - BOTTOM + 16, _short(tick), "middle")
    yield from _base()
    yield from _labels(x_label, y_label, HEIGHT)


def _scale(y: Axis) -> Iterator[str]:
    for tick in y.ticks(6):
        place = _y(y, tick)
        yield f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>'
        yield _text(LEFT - 7, place + 4, _short(tick), "end")


def _base() -> Iterator[str]:
    yield f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'


def _labels(x_label: str, y_label: str, height: int) -> list[str]:
    middle = TOP + (height - TOP - BOTTOM) / 2
    return [
        _text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "middle", "label"),
        f'<g transform="rotate(-90 13 {middle:.0f})">{_text(13, middle, y_label, "middle", "label")}</g>',
    ]


def _drawn(line: Line, x: Axis, y: Axis) -> Iterator[str]:
    places = [f"{_x(x, point):.1f},{_y(y, value):.1f}" for point, value in _thinned(line.points)]
    if line.style != "dots" or len(places) > 1:
        yield f'<polyline class="c{line.color} {line.style}" points="{" ".join(places)}"/>'
    for place in places if line.style == "dots" or len(places) == 1 else ():
        yield '<circle class="c{}" cx="{}" cy="{}" r="3"/>'.format(line.color, *place.split(","))


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """The lowest and the highest point of each of many parts, so that no peak is lost."""
    if len(points) <= POINTS:
        return points
    size, kept = 2 * len(points) / POINTS, []
    for part in range(POINTS // 2):
        some = points[round(part * size) : round((part + 1) * size)]
        kept += sorted({min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])})
    return [*kept, points[-1]]


def _some(count: int, at_most: int) -> range:
    return range(0, count, max(1, math.ceil(_round_step(count / at_most))) if count > at_most else 1)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    return f"{value:.10g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _text(x: float, y: float, text: object, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(str(text))}</text>'


def _svg(title: str, height: int, parts: Sequence[str]) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")
