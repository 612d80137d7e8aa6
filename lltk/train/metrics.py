"""A run's metrics: JSON lines, one a step, and their plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lltk.graph.files import written_whole
from lltk.train.plot import Curve, line_plot, running_mean


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


def plot_loss(metrics: Sequence[Metrics]) -> str:
    """The loss over steps as an SVG: every step's, faint, and its running mean.

    Args:
        metrics: at least one.
    """
    steps, losses = [m.step for m in metrics], [m.loss for m in metrics]
    every = list(zip(steps, losses, strict=True))
    smooth = list(zip(steps, running_mean(losses), strict=True))
    return line_plot([Curve("", every, "#9bc", 1), Curve("", smooth)], "loss over steps")
