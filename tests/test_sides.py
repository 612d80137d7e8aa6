"""Measuring two checkouts in turns, and the benchmark that does so with a denoising pass."""

from __future__ import annotations

import io
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import PASSES, make_recipe

from lltk.bench.record import Record
from lltk.bench.script import script_record
from lltk.bench.sides import in_turns, side

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ANSWERS = """\
import json, os, sys
for line in sys.stdin:
    if line == "end\\n":
        break
    print(json.dumps([line.strip(), json.loads(sys.argv[1]), sys.path[1], os.getcwd()]), flush=True)
"""


def test_a_side_answers_over_its_own_checkout(tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text(ANSWERS)
    for name in ("old", "new"):
        (tmp_path / name / "lltk").mkdir(parents=True)
    with side(script, tmp_path / "old", {"a": 1}) as old, side(script, tmp_path / "new", {}) as new:
        folder = str((tmp_path / "new").resolve())
        assert new("x") == ["x", {}, folder, folder]
        folder = str((tmp_path / "old").resolve())
        assert [old("y"), old("z")] == [[line, {"a": 1}, folder, folder] for line in "yz"]
        for _ in range(2):
            with pytest.raises(ValueError, match="old: its process failed; see the error above"):
                old("end")
            time.sleep(0.1)  # until nothing reads any more
    with (
        pytest.raises(ValueError, match="holds no lltk; name a checkout"),
        side(script, tmp_path, {}),
    ):
        pass


def test_turns_go_back_and_forth() -> None:
    order: list[str] = []
    times = iter([3.0, 9.0, 8.0, 1.0, 2.0, 7.0])

    def measure(name: str) -> dict[str, Any]:
        order.append(name)
        return {"median_ms": next(times)}

    found = in_turns({"a": lambda: measure("a"), "b": lambda: measure("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [each["median_ms"] for each in found["a"]] == [1.0, 2.0, 3.0]
    assert [each["median_ms"] for each in found["b"]] == [7.0, 8.0, 9.0]


def test_a_pass_is_compared_with_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster one's gain, its products' share and its frames a second."""
    script = runpy.run_path(str(BENCHMARKS / "step.py"))

    def answering(step: float) -> Any:
        facts = {"checkout": "12", "frames": 32, "peak_bytes": 2**30, "output": "ab", "ran": {}}
        answers = {
            "about": facts,
            "step": {"median_ms": step, "p90_ms": 2 * step},
            "commit": {"median_ms": 200.0, "p90_ms": 300.0},
            "products": {"linears": {"ms": 40.0}, "attention": {"ms": 80.0}},
        }
        return answers.__getitem__

    old, new = script["measured"]({"r, old": answering(200.0), "r": answering(150.0)}, 3)
    assert (old["name"], old["times_as_fast"], old["products_share"]) == ("r, old", 1.0, 0.6)
    assert (new["times_as_fast"], new["products_share"]) == (200 / 150, 0.8)
    assert new["dit_fps"] == {"4": 40.0, "2": 64.0}
    assert new["step"] == {"median_ms": 150.0, "p90_ms": 300.0, "range_ms": [150.0, 150.0]}
    words = ["step.py", "--old", ".old", "recipes/r.yaml"]
    monkeypatch.setattr(sys, "argv", words)
    assert script["rows"](script["parser"]().parse_args(words[1:])) == ["r, old", "r"]
    record: Record = script_record("step", "how", [old, new])
    assert "| r | 12 | 150.0 | 300.0 | 150.0 to 150.0 | 1.333 | 120.0 | 80.0% |" in script["text"](
        record
    )


def test_one_side_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("stream", PASSES["stream"])
    path, stream = tmp_path / "recipe.yaml", {"pipeline": "tiny", "fps": 8}
    path.write_text(json.dumps({**recipe.resolved(), "stream": stream}))
    options = {"recipe": str(path), "device": "cpu", "runs": 1}
    questions = ("about", "step", "commit", "products", "about")
    monkeypatch.setattr(sys, "argv", ["side.py", json.dumps(options)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    runpy.run_path(str(BENCHMARKS / "step" / "side.py"), run_name="__main__")
    about, step, commit, products, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert about["ran"] == {"paged_attention": "sdpa"} and about["frames"] > 0
    assert step["median_ms"] > 0 and commit["median_ms"] > 0
    assert products["linears"]["ms"] > 0
    assert again["output"] != about["output"], "the commit has written another page"
