"""The record of distillation: its rows, how it goes on, and what it says was reached."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lltk.bench.quality import ShotScore
from lltk.bench.record import Record
from lltk.graph.recipe import Recipe
from lltk.train.metrics import Metrics, append_metrics

pytestmark = pytest.mark.cpu

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "distillation.py"
PRECISIONS = ["bfloat16", "W4A4, NVFP4 cache"]
OFF = {("before", 50): 4.0, ("before", 4): 4.2, ("before", 2): 6.0, ("a", 4): 4.0, ("a", 2): 4.3}
"""The distance of first frames."""


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Folders of two finished runs; the second's name says that it is worse."""
    made = [tmp_path / "a", tmp_path / "worse"]
    for run in made:
        run.mkdir()
        (run / "lora.safetensors").write_bytes(run.name.encode())
        for step in (1, 2):
            metrics = Metrics(step, 0.1 * step, 1.0, 1e-4, 3.0, 2.0, losses={"critic": 0.2})
            append_metrics(run / "metrics.jsonl", metrics)
    return made


def called(
    monkeypatch: pytest.MonkeyPatch, runs: list[Path], folder: Path, *words: str
) -> tuple[list[tuple[str, int]], int]:
    """Run the script over made-up videos and scores.

    Returns:
        The model and the steps of each row that it measured, and its exit code.
    """
    measured: list[tuple[str, int]] = []

    def planned(recipe: Recipe, _device: Any) -> str:
        adapters = recipe.model.adapters()
        return Path(adapters[0][0]).parent.name if adapters else "before"

    def videos(plan: str, stories: Any, steps: int, _seed: int) -> tuple[str, int]:
        assert len(stories) == 2
        measured.append((plan, steps))
        return measured[-1]

    def scored(_pool: Any, films: tuple[str, int], _stories: Any) -> Callable[[], list[ShotScore]]:
        off, right = OFF.get(films, 7.0), films[0] != "worse"
        scores = [
            ShotScore(i % 3, (True, True, True, right), 90.0, off, 4.0, i / 60) for i in range(60)
        ]
        return lambda: scores

    monkeypatch.setattr("lltk.bench.agreement.videos", videos)
    monkeypatch.setattr("lltk.bench.agreement.scored", scored)
    monkeypatch.setattr("lltk.streaming.plan_stream", planned)
    line = [str(SCRIPT), *map(str, runs), "--device", "cpu", "-o", str(folder / "record"),
            "--rows", str(folder / "rows"), "--workers", "1", "--videos", "2", *words]  # fmt: skip
    monkeypatch.setattr(sys, "argv", line)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return measured, end.code if isinstance(end.code, int) else 1
    return measured, 0


def test_it_goes_on_and_says_what_was_reached(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert called(monkeypatch, runs, tmp_path, "--minutes", "0") == ([], 3)
    assert not (tmp_path / "record.json").exists()
    first = ["--precisions", PRECISIONS[0]]
    few = [("before", n) for n in (50, 4, 2)] + [
        (name, n) for name in ("a", "worse") for n in (4, 2)
    ]
    assert called(monkeypatch, runs, tmp_path, *first) == (few, 0)
    assert called(monkeypatch, runs, tmp_path) == (few, 0)  # the other precision's alone
    assert called(monkeypatch, runs, tmp_path) == ([], 0)
    record = Record.model_validate_json((tmp_path / "record.json").read_text())
    assert [(row["precision"], row["model"], row["steps"]) for row in record.results] == [
        (precision, *cell) for precision in PRECISIONS for cell in few
    ]
    trained = [row.get("trained") for row in record.results[:7]]
    assert trained == [None, None, None, 2, 2, 2, 2]
    text = (tmp_path / "record.md").read_text()
    assert f"| {PRECISIONS[1]} | a | yes | yes | yes (1.07) | yes (1.00) |" in text
    assert f"| {PRECISIONS[0]} | worse | no | yes | no (1.75) | yes (1.00) |" in text
    plot = (tmp_path / "record.svg").read_text()
    assert plot.count(">student<") == plot.count(">critic<") == 1


@pytest.mark.parametrize("name", ["a", "before"])
def test_models_of_one_name_are_refused(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Neither is left out."""
    other = shutil.copytree(runs[0], tmp_path / "other" / name)
    assert called(monkeypatch, [runs[0], other], tmp_path) == ([], 1)


def test_another_adapter_is_measured_anew(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--precisions", PRECISIONS[0], "--before", "--after", "2"]
    assert called(monkeypatch, runs[:1], tmp_path, *words) == ([("a", 2)], 0)
    (runs[0] / "lora.safetensors").write_bytes(b"other")
    assert called(monkeypatch, runs[:1], tmp_path, *words) == ([("a", 2)], 0)
    (runs[0] / "lora.safetensors").unlink()
    assert called(monkeypatch, runs[:1], tmp_path, *words) == ([], 1)
