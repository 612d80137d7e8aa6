"""Metrics as TensorBoard reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import refused
from tensorboardX.proto.event_pb2 import Event
from toy import trainer

from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.train import tensorboard
from lltk.train.metrics import read_metrics
from lltk.training import plan_training

pytestmark = pytest.mark.cpu


def events(folder: Path) -> Iterator[Any]:
    """What the files of a folder hold, the oldest file first: TFRecords of protocol buffers."""
    for file in sorted(folder.iterdir(), key=lambda path: path.name):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def test_every_number_of_a_step_is_written(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=3, tensorboard=True, validate_every=2)
    list(run)
    written: dict[tuple[str, int], float] = {}
    for event in events(tmp_path / "tensorboard"):
        for value in event.summary.value:
            written[value.tag, event.step] = value.simple_value
    for metrics in read_metrics(tmp_path / "metrics.jsonl"):
        assert written.pop(("train/loss", metrics.step)) == pytest.approx(metrics.loss)
        assert written.pop(("train/lr", metrics.step)) == pytest.approx(metrics.lr)
        for part, seconds in metrics.parts.items():
            assert written.pop((f"seconds/{part}", metrics.step)) == pytest.approx(seconds)
    assert {tag for tag, step in written if step == 2} == {
        "train/grad_norm", "train/seconds", "train/samples_per_second", "validation/loss",
    }  # fmt: skip
    assert ("memory/AdamW_moments", 1) in written


def test_a_resumed_run_says_where_it_goes_on(tmp_path: Path) -> None:
    """TensorBoard then drops what was written of later steps."""
    list(trainer(tmp_path, steps=3, tensorboard=True))
    list(trainer(tmp_path, resume=True, steps=5, tensorboard=True))
    every = list(events(tmp_path / "tensorboard"))
    begun = [event.step for event in every if event.HasField("session_log")]
    assert begun == [1, 4] and [event.step for event in every[-2:]] == [4, 5]


def test_what_writes_events_is_looked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    recipe = read_recipe(find_recipe("tiny_vae"), ["train.tensorboard=true"])
    assert "pip install tensorboardX" in refused(plan_training, recipe)
