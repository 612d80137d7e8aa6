"""A run's metrics as TensorBoard reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lltk.files.outputs import Kind
from lltk.train.metrics import Metrics

EVENTS = Kind(
    "TensorBoard's events",
    lambda folder: all("tfevents" in path.name for path in folder.iterdir()),
    folder=True,
)
_ONE_NUMBER = (
    "loss", "grad_norm", "lr", "seconds", "samples_per_second", "tokens_per_second", "mfu",
)  # fmt: skip


class Board:
    """Writes metrics to a folder of event files.

    Args:
        folder: where; it is made.
        step: the last step that the run has done. TensorBoard shows nothing that an earlier run
            wrote after it.

    Raises:
        ValueError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        check_installed()
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / f"events.{step:08d}"))
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, metrics: Metrics) -> None:
        """Add a step's numbers, which are in the file when this returns."""
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = (Summary.Value(tag=name, simple_value=value) for name, value in _numbers(metrics))
        self._write(metrics.step, summary=Summary(value=numbers))

    def _write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
        self._writer.flush()


def check_installed() -> None:
    """Raise ValueError if what writes events is not installed."""
    if find_spec("tensorboardX") is None:
        raise ValueError(
            "train.tensorboard: needs tensorboardX; install it by pip install tensorboardX, or set "
            "it to false"
        )


def _numbers(metrics: Metrics) -> Iterator[tuple[str, float]]:
    for name in _ONE_NUMBER:
        value = getattr(metrics, name)
        if value is not None:
            yield f"train/{name}", value
    groups = {
        "seconds": metrics.parts,
        "validation": metrics.validation,
        "memory": metrics.memory,
        "losses": metrics.losses,
    }
    for group, values in groups.items():
        for name, value in values.items():
            yield f"{group}/{name.replace(' ', '_')}", value
