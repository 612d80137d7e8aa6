"""The tiny world's whole pipeline: its commands, how the script goes on with them, its record."""

from __future__ import annotations

import json
import runpy
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lltk.bench.script import script_record
from lltk.graph.recipe import parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.train.metrics import Metrics, append_metrics

pytestmark = pytest.mark.cpu

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tiny_pipeline.py"
ENDS: list[int | None] = []
"""How the next commands end: their exit codes, or None for one that is not done in time."""
STARTED: list[list[str]] = []


class Command:
    """A command of lltk that ends at once."""

    def __init__(self, words: list[str]) -> None:
        STARTED.append(words)
        self.returncode = ENDS.pop(0)

    def wait(self, timeout: float | None = None) -> None:
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("lltk", timeout)

    def send_signal(self, sent: int) -> None:
        assert sent == signal.SIGINT
        self.returncode = 1


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def options(script: dict[str, Any], folder: Path, *words: str) -> Any:
    return script["parser"]().parse_args(["--folder", str(folder), *words])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("share", ["1", "0.01"])
def test_commands_are_of_their_recipes(
    share: str, device: str, script: dict[str, Any], tmp_path: Path
) -> None:
    given = options(script, tmp_path, "--share", share, "--device", device)
    steps = []
    for name, stage in script["STAGES"].items():
        words = script["command"](given, stage, name)
        changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        recipe = read_recipe(find_recipe(words[1]), changes)
        parse_recipe(recipe, name)
        steps.append(recipe["train"]["steps"])
        assert ("distil" in recipe) == (words[0] == "distil")
        assert recipe["train"].get("graphs", False) == (device == "cuda")
    whole = [4100, 8000, 2000, 300]
    assert steps == (whole if share == "1" else [41, 80, 20, 3])


def test_the_script_goes_on(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted stage goes on, a finished one is left alone, and a failure is told."""
    monkeypatch.setattr(subprocess, "Popen", Command)
    given = options(script, tmp_path)
    finish, stage = script["_finish"], script["STAGES"]["score"]
    STARTED.clear()
    ENDS[:] = [None, 0, 2]
    with pytest.raises(SystemExit) as ended:
        finish(given, "score", stage, time.monotonic())
    assert ended.value.code == 3
    for _ in range(2):
        finish(given, "score", stage, None)
    assert len(STARTED) == 2 and all("--resume" in words for words in STARTED)
    notes = json.loads((tmp_path / "score.json").read_text())
    assert notes["done"] and len(notes["seconds"]) == 2
    assert shlex.split(notes["command"])[1:] == STARTED[1][3:]
    with pytest.raises(SystemExit, match="causal: its command failed"):
        finish(given, "causal", script["STAGES"]["causal"], None)


def test_the_record_has_stages_and_what_they_show(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(script, tmp_path)
    (tmp_path / "score.json").write_text('{"command": "lltk train", "seconds": [9.6, 3]}')
    (tmp_path / "score").mkdir()
    for step in range(1, 21):
        metrics = Metrics(step, float(step), 1.0, 1e-4, 3.0, 2.0)
        append_metrics(tmp_path / "score" / "metrics.jsonl", metrics)
    row = script["_stage"](given, "score")
    assert (row["steps"], row["loss"]) == (20, 19.5)
    shown = {key: [1.0, 0.5, 2.0] for key in ("agreement", "identity")}
    shown |= {key: [4.0, 3.0, 5.0] for key in ("first_frame", "other_frames")}
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    record = script_record("tiny_pipeline", "", [row, {"name": "after", "shots": 6} | shown])
    text = script["text"](record)
    assert "| score | 20 | 10 + 3 | 19.5000 | `lltk train` |" in text
    assert "| after | 6 | 1.0 (0.5 to 2.0) | 1.0 (0.5 to 2.0) | 4.0 (3.0 to 5.0) |" in text
