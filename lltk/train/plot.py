"""Line plots as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 720, 360, 64, 36, 16
_TICKS = 4
_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """A line.

    Attributes:
        label: shown in its colour; empty for none.
        points: (x, y), in order of x.
        colour: as SVG has it.
        width: of the stroke.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = "#036"
    width: float = 2


def line_plot(
    curves: Sequence[Curve], caption: str = "", limits: tuple[float, float] | None = None
) -> str:
    """Curves over one pair of axes.

    Args:
        curves: at least one, with points; long ones are thinned out.
        caption: below the axis.
        limits: lowest and highest y; by default those of the points.
    """
    points = [point for curve in curves for point in curve.points]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = limits or (min(y for _, y in points), max(y for _, y in points))

    def x(value: float) -> float:
        return _LEFT + (value - left) / (right - left or 1.0) * (_WIDTH - _LEFT - _EDGE)

    def y(value: float) -> float:
        room = _HEIGHT - _BOTTOM - _EDGE
        return _EDGE + (high - value) / (high - low or 1.0) * room

    marks = []
    for tick in range(_TICKS + 1):
        across, up = left + (right - left) * tick / _TICKS, low + (high - low) * tick / _TICKS
        marks.append(
            f'<text x="{_LEFT - 6}" y="{y(up) + 4:.1f}" text-anchor="end">{_short(up)}</text>'
            f'<line x1="{_LEFT}" x2="{_WIDTH - _EDGE}" y1="{y(up):.1f}" y2="{y(up):.1f}" '
            'stroke="#ddd"/>'
            f'<text x="{x(across):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">'
            f"{_short(across)}</text>"
        )
    labelled = [curve for curve in curves if curve.label]
    for row, curve in enumerate(labelled):
        marks.append(
            f'<text x="{_WIDTH - _EDGE - 6}" y="{_EDGE + 14 + 15 * row}" text-anchor="end" '
            f'fill="{curve.colour}">{curve.label}</text>'
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
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            *marks,
            f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{caption}</text>',
            "</svg>\n",
        ]
    )


def running_mean(values: Sequence[float], smoothing: float = 0.95) -> list[float]:
    """Each value's exponential mean with those before it."""
    mean, means = values[0], []
    for value in values:
        mean = smoothing * mean + (1 - smoothing) * value
        means.append(mean)
    return means


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
