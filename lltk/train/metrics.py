"""A run's metrics: JSON lines, one a step, and their plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lltk.graph.files import written_whole


@dataclass(frozen=True)
class Metrics:
    """One step.

    Attributes:
        step: counted from 1.
        loss: mean over what the objective counts, before the update.
        grad_norm: before clipping.
        lr: learning rate.
        seconds: wall time.
        samples_per_second: clips over wall time.
        validation: what the validation hook measured after this step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    samples_per_second: float
    validation: Mapping[str, float] = field(default_factory=dict)


def append_metrics(path: Path, metrics: Metrics) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(metrics)) + "\n")


def read_metrics(path: Path) -> list[Metrics]:
    """Every whole line; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [Metrics(**json.loads(line)) for line in lines]


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, which a resumed run repeats."""
    kept = [metrics for metrics in read_metrics(path) if metrics.step <= step]
    with written_whole(path) as temporary:
        temporary.touch()
        for metrics in kept:
            append_metrics(temporary, metrics)


_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 360, 64, 36
_POINTS = 600
_SMOOTHING = 0.95


def plot_loss(metrics: Sequence[Metrics]) -> str:
    """The loss over steps as an SVG: every step's, faint, and its running mean.

    Args:
        metrics: at least one.
    """
    stride = max(1, len(metrics) // _POINTS)
    chosen = range(0, len(metrics), stride)
    mean, smooth = metrics[0].loss, []
    for each in metrics:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * each.loss
        smooth.append(mean)
    losses = [metrics[i].loss for i in chosen]
    low, high = min(losses), max(losses)
    first, last = metrics[0].step, metrics[-1].step

    def x(step: float) -> float:
        return _LEFT + (step - first) / max(1, last - first) * (_WIDTH - _LEFT - 16)

    def y(loss: float) -> float:
        room = _HEIGHT - _BOTTOM - 16
        return 16 + (high - loss) / (high - low or 1.0) * room

    def line(values: Sequence[float], style: str) -> str:
        points = " ".join(
            f"{x(metrics[i].step):.1f},{y(value):.1f}"
            for i, value in zip(chosen, values, strict=True)
        )
        return f'<polyline fill="none" {style} points="{points}"/>'

    marks = []
    for quarter in range(5):
        loss = low + (high - low) * quarter / 4
        step = round(first + (last - first) * quarter / 4)
        marks.append(
            f'<text x="{_LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3g}</text>'
            f'<line x1="{_LEFT}" x2="{_WIDTH - 16}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" '
            'stroke="#ddd"/>'
            f'<text x="{x(step):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{step}</text>'
        )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="11">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            *marks,
            line(losses, 'stroke="#9bc" stroke-width="1"'),
            line([smooth[i] for i in chosen], 'stroke="#036" stroke-width="2"'),
            "</svg>\n",
        ]
    )
