"""Line plots as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lltk.files.outputs import marked

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 720, 360, 64, 36, 16
_ROW = 15
_POINTS = 600
SVG = marked("a plot", "<desc>lltk plot</desc>")


@dataclass(frozen=True)
class Curve:
    """A line in a plot.

    Attributes:
        label: the text above the plot, in the line's colour; empty for no text.
        points: pairs (x, y), sorted by x.
        colour: an SVG colour.
        width: the width of the stroke in pixels.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = "#036"
    width: float = 2


def line_plot(
    curves: Sequence[Curve], caption: str = "", limits: tuple[float, float] | None = None
) -> str:
    """Curves over one pair of axes, as an SVG.

    Args:
        curves: at least one, each with points. Of a long curve every n-th point is drawn.
        caption: the text below the horizontal axis.
        limits: the lowest and the highest y; by default those of the points.
    """
    points = [point for curve in curves for point in curve.points]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    heights = _ticks(*(limits or (min(y for _, y in points), max(y for _, y in points))))
    low, high = heights[0], heights[-1]
    labelled = [curve for curve in curves if curve.label]
    top = _EDGE + _ROW * len(labelled)

    def x(value: float) -> float:
        return _LEFT + (value - left) / (right - left or 1.0) * (_WIDTH - _LEFT - _EDGE)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (_HEIGHT - _BOTTOM - top)

    marks = []
    for tick in heights:
        marks.append(
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
            f'<line x1="{_LEFT}" x2="{_WIDTH - _EDGE}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="#ddd"/>'
        )
    for tick in (tick for tick in _ticks(left, right) if left <= tick <= right):
        marks.append(
            f'<text x="{x(tick):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{tick:g}</text>'
        )
    for row, curve in enumerate(labelled):
        marks.append(
            f'<text x="{_LEFT}" y="{_EDGE + _ROW * row}" fill="{curve.colour}">{curve.label}</text>'
        )
    for curve in curves:
        some = curve.points[:: max(1, len(curve.points) // _POINTS)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in some)
        marks.append(
            f'<polyline fill="none" stroke="{curve.colour}" stroke-width="{curve.width}" '
            f'points="{path}"/>'
        )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="11">',
            "<desc>lltk plot</desc>",
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            *marks,
            f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{caption}</text>',
            "</svg>\n",
        ]
    )


def running_mean(values: Sequence[float], smoothing: float = 0.95) -> list[float]:
    """The exponential moving average up to each value; it starts at the first value."""
    mean, means = values[0], []
    for value in values:
        mean = smoothing * mean + (1 - smoothing) * value
        means.append(mean)
    return means


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers; the first is at most ``low`` and the last at least ``high``."""
    rough = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * size for size in (1, 2, 5, 10) if unit * size >= 0.75 * rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{step * index:.12g}") for index in range(first, max(last, first + 1) + 1)]
