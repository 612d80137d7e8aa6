"""The benchmark of endless shots: what it reads from frames as they come, and its minutes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from lltk.bench.quality import STRETCH, draw_stories
from lltk.models.tiny.world import render

pytestmark = pytest.mark.cpu

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "endless.py"))


def test_stretches_are_read_as_frames_come() -> None:
    """One shot for two stretches, and then another one."""
    stories = draw_stories(seed=2, count=2, shots=1, chunks=14, chunk=3)
    one, two = (
        (render([story])[0] * 127.5 + 127.5).round().to(torch.uint8)[: 2 * STRETCH]
        for story in stories
    )
    watcher = SCRIPT["Watcher"](stories[0].shots[0].caption)
    for frames in torch.cat([one, two[:-1]]).split(12):
        watcher.see(frames)
    assert watcher.shown == [100, 100, 0] and watcher.kept[:2] == [100, 100]
    assert watcher.kept[2] < 100
    watcher.see(two[-1:])
    assert len(watcher.shown) == 4


def test_minutes_are_means_over_stretches_and_then_over_videos() -> None:
    """A minute that is not whole is left out."""
    steady, falling = [100.0] * 61, [100.0] * 30 + [50.0, 0.0] * 15 + [0.0]
    first, second = SCRIPT["by_minute"]([steady, falling])
    assert first == (100, 100, 100)
    assert second[0] == 62.5 and second[1] < 62.5 < second[2]
