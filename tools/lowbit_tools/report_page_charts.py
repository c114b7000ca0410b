"""Charts as inline SVG that follows the page's light and dark colours: lines, points with labels, heat maps."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy
from matplotlib import image

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 14, 50
#: Line styles and marker shapes that tell series apart where colours do not.
DASHES = ("", "7 3", "2 3", "9 3 2 3")
SHAPES = ("circle", "square", "diamond", "triangle", "cross")
COLOURS = 7
COLOUR_MAP = "cividis"


@dataclass(frozen=True)
class Point:
    """`low`, `high`: interval, None for none. `note`: shown where a mouse rests."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """`style`: number that picks colour, shape and dashes; the same for a scheme in all charts of a page."""

    name: str
    style: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """label: with its unit. ticks: (place, text), chosen from the values where None. log: places are powers of 10."""

    label: str
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    start: float | None = None
    stop: float | None = None


def line_chart(title: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis, height: int = HEIGHT) -> str:
    """Lines through the points of each series, whiskers for intervals; what a log axis cannot show is left out."""
    return _chart(title, series, x_axis, y_axis, height, lines=True, labels=False)


def point_chart(title: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis, height: int = HEIGHT) -> str:
    """Points with the name of their series beside them."""
    return _chart(title, series, x_axis, y_axis, height, lines=False, labels=True)


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Which line is whose, as text with swatches."""
    items = []
    for name, style in names:
        line = f'<line x1="1" y1="7" x2="33" y2="7" class="line s{style % COLOURS}"{_dash(style)}/>'
        swatch = f'<svg width="34" height="14" aria-hidden="true">{line}{_marker(17, 7, style)}</svg>'
        items.append(f"<li>{swatch}<code>{escape(name)}</code></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def heat_map(
    title: str, rows: Sequence[Sequence[float]], columns_are: int, low: float, high: float, y_label: str, x_label: str
) -> str:
    """`rows` of values between `low` and `high`, the first at the bottom. columns_are: features in a column."""
    height = 34 + 9 * len(rows) + BOTTOM
    plot = _Frame(0, len(rows[0]) * columns_are, 0, len(rows), height)
    data = _png(numpy.array(rows[::-1]), low, high)
    parts = [
        f'<image href="{data}" x="{LEFT}" y="{TOP}" width="{plot.width}" height="{plot.height}" '
        'preserveAspectRatio="none" class="pixels"/>',
        *_x_axis(plot, Axis(x_label, ticks=_even_ticks(0, len(rows[0]) * columns_are)), grid=False),
        *_y_axis(plot, Axis(y_label, ticks=[(at + 0.5, str(at)) for at in range(0, len(rows), 5)]), grid=False),
    ]
    return _svg(title, height, parts)


def colour_bar(label: str, low: float, high: float) -> str:
    """What the colours of a heat map of powers of ten mean."""
    plot = _Frame(low, high, 0, 1, 62)
    data = _png(numpy.linspace(low, high, 256)[None], low, high)
    bar = f'<image href="{data}" x="{LEFT}" y="{TOP}" width="{plot.width}" height="10" preserveAspectRatio="none"/>'
    parts = [bar]
    for power in range(math.ceil(low), math.floor(high) + 1):
        x = plot.x(power)
        parts.append(f'<text x="{x:.1f}" y="38" class="tick" text-anchor="middle">{_power(power)}</text>')
    parts.append(f'<text x="{LEFT + plot.width / 2}" y="56" class="label" text-anchor="middle">{escape(label)}</text>')
    return _svg(label, 62, parts)


class _Frame:
    """From values to places in the picture."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float, height: int) -> None:
        self._x, self._y = (x_low, x_high), (y_low, y_high)
        self.width, self.height = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self._y
        return TOP + self.height * (1 - (value - low) / (high - low))


def _chart(
    title: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis, height: int, lines: bool, labels: bool
) -> str:
    def place(axis: Axis) -> Callable[[float], float]:
        return math.log10 if axis.log else float

    place_x, place_y = place(x_axis), place(y_axis)
    shown = {
        each.name: [p for p in each.points if (p.y > 0 or not y_axis.log) and (p.x > 0 or not x_axis.log)]
        for each in series
    }
    points = [point for found in shown.values() for point in found]
    if not points:
        return '<p class="note">No values to show.</p>'
    x_low, x_high = _bounds([place_x(point.x) for point in points], x_axis, 0.04 if lines else 0.05)
    y_values = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    least = min(point.y for point in points)
    floor = least / 3 if y_axis.log else -math.inf  # an interval may reach below zero
    y_low, y_high = _bounds([place_y(max(value, floor)) for value in y_values], y_axis, 0.06)
    plot = _Frame(x_low, x_high, y_low, y_high, height)
    parts = [*_x_axis(plot, x_axis, (x_low, x_high)), *_y_axis(plot, y_axis, (y_low, y_high))]
    named: list[tuple[float, float, float, str, int]] = []
    for each in series:
        places = [(plot.x(place_x(point.x)), plot.y(place_y(point.y)), point) for point in shown[each.name]]
        colour = f"s{each.style % COLOURS}"
        if lines and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
            parts.append(f'<polyline points="{path}" class="line {colour}"{_dash(each.style)}/>')
        for x, y, point in places:
            if point.low is not None and point.high is not None:
                low, high = (plot.y(place_y(max(bound, floor))) for bound in (point.low, point.high))
                parts.append(
                    f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" class="whisker {colour}"/>'
                )
            note = escape(point.note or each.name)
            parts.append(f"<g>{_marker(x, y, each.style)}<title>{note}</title></g>")
            if labels:
                named.append((y, x, y, each.name, each.style))
    parts += _labels(named, plot)
    return _svg(title, height, parts)


def _labels(named: Sequence[tuple[float, float, float, str, int]], plot: _Frame) -> list[str]:
    """Names beside their points, pushed apart where they would lie on each other."""
    parts = []
    taken: list[tuple[float, float, float]] = []  # left, right, height
    for _, x, y, name, style in sorted(named):
        width = 7.2 * len(name)
        right_side = x + 12 + width < LEFT + plot.width
        left = x + 12 if right_side else x - 12 - width
        at = y
        while any(left < end and start < left + width and abs(at - other) < 15 for start, end, other in taken):
            at += 3
        taken.append((left, left + width, at))
        anchor = "start" if right_side else "end"
        text_x = x + 12 if right_side else x - 12
        if abs(at - y) > 4:
            parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{text_x:.1f}" y2="{at:.1f}" class="lead"/>')
        parts.append(
            f'<text x="{text_x:.1f}" y="{at + 4:.1f}" class="name t{style % COLOURS}" text-anchor="{anchor}">'
            f"{escape(name)}</text>"
        )
    return parts


def _bounds(values: Sequence[float], axis: Axis, margin: float) -> tuple[float, float]:
    low = min(values) if axis.start is None else axis.start
    high = max(values) if axis.stop is None else axis.stop
    if high - low < 1e-9:
        return low - 0.5, high + 0.5
    pad = margin * (high - low)
    return low - (pad if axis.start is None else 0), high + (pad if axis.stop is None else 0)


def _ticks(axis: Axis, low: float, high: float) -> list[tuple[float, str]]:
    """(place, text) within the bounds, which are powers on a log axis."""
    if axis.ticks is not None:
        return [(math.log10(at) if axis.log else at, text) for at, text in axis.ticks]
    if not axis.log:
        return _even_ticks(low, high)
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = (1,) if high - low > 2.5 else (1, 2, 5)
    ticks = [(math.log10(step) + power, _decimal(step, power)) for power in powers for step in steps]
    return [tick for tick in ticks if low <= tick[0] <= high]


def _even_ticks(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / 7
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [(index * step, f"{index * step:.10g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _x_axis(plot: _Frame, axis: Axis, bounds: tuple[float, float] = (0, 0), grid: bool = True) -> list[str]:
    bottom = TOP + plot.height
    parts = [f'<line x1="{LEFT}" y1="{bottom}" x2="{LEFT + plot.width}" y2="{bottom}" class="axis"/>']
    for at, text in _ticks(axis, *bounds):
        x = plot.x(at)
        if grid:
            parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" class="tick" text-anchor="middle">{escape(text)}</text>')
    middle = LEFT + plot.width / 2
    parts.append(f'<text x="{middle}" y="{bottom + 40}" class="label" text-anchor="middle">{escape(axis.label)}</text>')
    return parts


def _y_axis(plot: _Frame, axis: Axis, bounds: tuple[float, float] = (0, 0), grid: bool = True) -> list[str]:
    parts = []
    for at, text in _ticks(axis, *bounds):
        y = plot.y(at)
        if grid:
            parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + plot.width}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="tick" text-anchor="end">{escape(text)}</text>')
    middle = TOP + plot.height / 2
    parts.append(
        f'<text transform="translate(15 {middle:.1f}) rotate(-90)" class="label" text-anchor="middle">'
        f"{escape(axis.label)}</text>"
    )
    return parts


def _marker(x: float, y: float, style: int) -> str:
    colour, shape = f"s{style % COLOURS}", SHAPES[style % len(SHAPES)]
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="mark {colour}"/>'
    outline = {
        "square": "M-3.6-3.6h7.2v7.2h-7.2z",
        "diamond": "M0-5.2L5.2 0 0 5.2-5.2 0z",
        "triangle": "M0-5L4.8 3.6H-4.8z",
        "cross": "M-4.2-4.2L4.2 4.2M-4.2 4.2L4.2-4.2",
    }[shape]
    kind = "mark open" if shape == "cross" else "mark"
    return f'<path d="{outline}" transform="translate({x:.1f} {y:.1f})" class="{kind} {colour}"/>'


def _dash(style: int) -> str:
    dash = DASHES[style % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"'
    body = "".join(parts)
    # scrolls by itself on a narrow screen, where its text would be too small
    return f'<div class="scroll"><svg {size} class="chart"><title>{escape(title)}</title>{body}</svg></div>'


def _png(values: numpy.ndarray, low: float, high: float) -> str:
    stream = io.BytesIO()
    image.imsave(stream, values, vmin=low, vmax=high, cmap=matplotlib.colormaps[COLOUR_MAP], format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _decimal(digit: int, power: int) -> str:
    """A tick of a log axis."""
    if -3 <= power <= 4:
        return f"{digit * 10.0**power:g}"
    return _power(power) if digit == 1 else f"{digit}·{_power(power)}"


def _power(power: int) -> str:
    if -3 <= power <= 4:
        return f"{10.0**power:g}"
    return "10" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(sign)] if sign.isdigit() else "⁻" for sign in str(power))
