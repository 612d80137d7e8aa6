"""Long work tells how far it is."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from helpers import make_recipe, runnable
from rich.console import Console
from rich.progress import Progress
from test_folder import FPS, GEOMETRY, WHOLE, write_clip
from test_video import numbered
from torch import randn
from toy import Regression, Samples, settings

from lltk.cli.bars import Bars, Steps
from lltk.train.data import first_samples
from lltk.train.folder import FolderClips
from lltk.train.loop import Trainer
from lltk.train.sampling import sample

pytestmark = pytest.mark.cpu


class Notes(list[tuple[str, int, int]]):
    """What was noted."""

    def __call__(self, work: str, done: int, total: int) -> None:
        self.append((work, done, total))


def test_encoding_clips() -> None:
    notes = Notes()
    made = first_samples(Samples(), 3, 5, block=2, note=notes)
    assert notes == [("encoding clips", done, 5) for done in (0, 2, 4, 5)]
    assert (made["x"] == first_samples(Samples(), 3, 5)["x"]).all() and len(made["x"]) == 5


def test_looking_at_clips(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path, name, 1, numbered(0, WHOLE), "a red square")
    notes = Notes()
    FolderClips(tmp_path, GEOMETRY, FPS, 1, note=notes)
    assert notes == [("looking at clips", done, 2) for done in range(3)]


def test_validating(tmp_path: Path) -> None:
    notes = Notes()
    section = settings(steps=2, batch=2, validate_every=2)
    run = Trainer(Regression(clips=2), Samples(), section, tmp_path, {}, note=notes)
    (_, last) = run
    assert last.validation and notes == [("validating", done, 8) for done in range(9)]


def test_sampling() -> None:
    notes = Notes()
    program, module = runnable(make_recipe("train", window=12))
    text = randn(1, program.geometry.chunks, 5, 16)
    sample(program, module, text, steps=1, seed=0, note=notes)
    assert notes == [("sampling", done, 3) for done in range(4)]


def test_lines_where_no_bar_is_seen() -> None:
    """One for every tenth, at most."""
    for terminal, wanted in ((False, ["0 of 40", "4 of 40", "20 of 40", "40 of 40"]), (True, [])):
        written = StringIO()
        with Progress(console=Console(file=written, force_terminal=terminal)) as progress:
            bars = Bars(progress)
            for done in (0, 2, 4, 6, 20, 40):
                bars("encoding clips", done, 40)
        lines = [line for line in written.getvalue().splitlines() if " of " in line]
        assert lines == [f"encoding clips: {each}" for each in wanted]


def test_a_bar_for_each_work() -> None:
    with Progress(console=Console(quiet=True)) as progress:
        bars = Bars(progress)
        bars("encoding clips", 0, 5)
        bars("encoding clips", 2, 5)
        bars("validating", 0, 2)
        shown = [(task.description, task.completed, task.total) for task in progress.tasks]
        assert shown == [("encoding clips", 2, 5), ("validating", 0, 2)]
        bars("encoding clips", 5, 5)
        assert [task.description for task in progress.tasks] == ["validating"]


def test_steps_are_told_where_no_bar_is_seen() -> None:
    """The first and the last, and one in half a minute."""
    for terminal, wanted in ((False, [3, 5, 6]), (True, [])):
        written = StringIO()
        with Progress(console=Console(file=written, force_terminal=terminal)) as progress:
            clock = iter((0.0, 20.0, 49.0, 51.0, 52.0)).__next__
            steps = Steps(progress, 2, 6, clock)
            for done in range(3, 7):
                steps(done, f"loss {done}.5")
            assert [(task.completed, task.total) for task in progress.tasks] == [(6, 6)]
        lines = [line for line in written.getvalue().splitlines() if line.startswith("step ")]
        assert lines == [f"step {done} of 6: loss {done}.5" for done in wanted]
