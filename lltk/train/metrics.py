"""A run's metrics: a file with a line of JSON for each step, and a plot of the loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from lltk.files.outputs import marked
from lltk.files.reading import read_text
from lltk.files.writing import append_line, write_text
from lltk.train.plot import Curve, line_plot, running_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Metrics:
    """What one step measured.

    Attributes:
        step: the step's number, counted from 1.
        loss: the mean over what the objective counts, before the update.
        grad_norm: the gradient's norm, before clipping.
        lr: the learning rate.
        seconds: the wall time, without validation and samples.
        samples_per_second: the clips of the step, divided by those seconds.
        validation: what validation measured after this step; empty where there was none.
        parts: the seconds of the first rank's parts of the step: ``data`` (reading and encoding
            clips), ``forward``, ``backward`` (with what is recomputed), ``exchange`` (adding up
            gradients of other ranks; what they exchange inside the passes counts there) and
            ``optimiser`` (clipping, the update and averaging). On a GPU by its own clock.
        tokens_per_second: the video tokens of the step's clips, divided by its seconds; None for an
            autoencoder.
        mfu: the model FLOPs (`lltk.graph.flops`) of the step, divided by those that its devices
            could do in bfloat16 in its seconds; None where one of the two is not known.
        memory: bytes on the first rank's device by owner, and on a GPU the ``peak`` of what torch
            allocated; empty but for the first step after the run begins or goes on.
        losses: further losses of the step by name, such as a critic's.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    samples_per_second: float
    validation: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)


METRICS_FILE = marked("a run's metrics", '{"step": 1, "loss": ')
_READER = TypeAdapter(Metrics)
_MOST = 1 << 32
"""Bytes of the file of a run that is very long."""


def append_metrics(path: Path, metrics: Metrics) -> None:
    """Add a step's line to a file; errors as `append_line`'s."""
    append_line(path, _line(metrics))


def _line(metrics: Metrics) -> str:
    return json.dumps(asdict(metrics))


def read_metrics(path: Path) -> list[Metrics]:
    """The steps in a file. A last line that a kill cut short is left out.

    Raises:
        ValueError: a line is damaged.
    """
    return list(_read(path))


def _read(path: Path) -> Iterator[Metrics]:
    if not path.exists():
        return
    *lines, _ = read_text(path, _MOST).split("\n")
    for number, line in enumerate(lines, 1):
        try:
            yield _READER.validate_json(line, strict=True)
        except ValidationError as error:
            raise ValueError(
                f"{path}: line {number}: is no step's metrics ({error.errors()[0]['msg']}); remove "
                "the line"
            ) from error


def forget_after(path: Path, step: int) -> None:
    """Remove the lines after a step's, which a resumed run takes again; they may be damaged.

    Raises:
        ValueError: an earlier line is damaged.
    """
    kept = []
    for metrics in _read(path) if step else ():
        if metrics.step <= step:
            kept.append(metrics)
        if metrics.step >= step:
            break
    write_text(path, "".join(f"{_line(metrics)}\n" for metrics in kept))


def plot_loss(metrics: Sequence[Metrics]) -> str:
    """The losses over steps as an SVG: that of every step, faint, and the running means.

    Args:
        metrics: the steps, at least one.
    """
    steps, losses = [m.step for m in metrics], [m.loss for m in metrics]
    every = list(zip(steps, losses, strict=True))
    smooth = list(zip(steps, running_mean(losses), strict=True))
    curves = [Curve("", every, "#9bc", 1), Curve("", smooth)]
    for name in metrics[0].losses:
        means = running_mean([m.losses[name] for m in metrics])
        curves.append(Curve(name, list(zip(steps, means, strict=True)), "#a40"))
    return line_plot(curves, "loss over steps")


def last_tenth(steps: Sequence[T]) -> Sequence[T]:
    """The last tenth of a run's steps, at least one."""
    return steps[-max(1, len(steps) // 10) :]
