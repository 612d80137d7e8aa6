"""Benchmark records: each holds what one command made on one machine at one clean commit."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lltk.bench import comparison, stream
from lltk.bench.record import Record
from lltk.bench.script import script_record
from lltk.cli.bench import stream as stream_command
from lltk.cli.compare import command as compare_command

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
NAMES = sorted(path.stem for path in (ROOT / "benchmarks" / "records").glob("*.json"))
KEYS = {
    "bundle": ("name", "threads"),
    "distillation": ("precision", "model", "steps"),
    "export": ("recipe",),
    "export_spread": ("recipe",),
    "quality": ("model", "steps"),
    "nvfp4_training": ("variant", "seed"),
    "transform": ("recipe",),
}
"""What tells a benchmark's rows apart, where that is not their name."""


def file_of(name: str, suffix: str) -> Path:
    return ROOT / "benchmarks" / "records" / f"{name}{suffix}"


def record_of(name: str) -> Record:
    return Record.model_validate_json(file_of(name, ".json").read_text())


@cache
def script(name: str) -> dict[str, Any]:
    """The names that a script of ``benchmarks/`` defines."""
    return runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))


def arguments(record: Record) -> list[str]:
    """A command's arguments, without the program that takes them."""
    programs = {"compare": "lltk compare", "stream": "lltk bench stream"}
    start = r"(?:PYTORCH_CUDA_ALLOC_CONF=\S+ )?(?:python|torchrun --nproc-per-node \d+)"
    script = rf"{start} benchmarks/{record.benchmark}\.py"
    found = re.fullmatch(f"{programs.get(record.benchmark, script)}(.*)", record.command)
    assert found, f"{record.command}: not one command of {record.benchmark}"
    return shlex.split(found[1])


def named(record: Record) -> list[Any] | None:
    """The rows that a record's command names; None for a script that always makes the same ones."""
    words = arguments(record)
    if record.benchmark == "compare":
        context = compare_command.make_context("compare", words)
        return [Path(recipe).stem for recipe in context.params["recipes"]]
    if record.benchmark == "stream":
        return [stream_command.make_context("stream", [*words, "-o", "x"]).params["recipe"]]
    found = script(record.benchmark)
    options = found["parser"]().parse_args(words)
    if "rows" not in found:
        return None
    if record.benchmark == "inference":
        ranks = re.match(r"torchrun --nproc-per-node (\d+) ", record.command)
        return found["rows"](options, len(record.hardware.gpus), ranks and int(ranks[1]))
    return found["rows"](options)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_made_from_its_record(name: str) -> None:
    record = record_of(name)
    assert file_of(name, ".json").read_text() == record.model_dump_json(indent=2) + "\n"
    texts: dict[str, Callable[[Record], str]] = {"compare": comparison.text, "stream": stream.text}
    text = texts.get(record.benchmark) or script(record.benchmark)["text"]
    assert file_of(name, ".md").read_text() == text(record)


def check_rows(record: Record) -> None:
    """Check that a record's rows are those that its command names, in their order."""
    keys, rows = KEYS.get(record.benchmark, ("name",)), named(record)
    if rows is not None:
        made = [tuple(row[key] for key in keys) for row in record.results]
        assert made == [row if isinstance(row, tuple) else (row,) for row in rows]
    assert record.results


@pytest.mark.parametrize("name", NAMES)
def test_a_records_rows_are_those_its_command_names(name: str) -> None:
    check_rows(record_of(name))


@pytest.mark.parametrize(
    "change",
    [
        {"command": "python benchmarks/decode.py --rows FP8"},
        {"command": "benchmarks/decode.py; the same on another GPU"},
        {"results": record_of("decode").results[1:]},
        {"results": [*record_of("decode").results, {"name": "plain"}]},
    ],
)
def test_rows_that_another_command_made_are_seen(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_rows(record_of("decode").model_copy(update=change))


# At the record's commit


def git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    ).stdout


def whole_history() -> bool:
    """Whether this is a clone with all commits; an unpacked archive or a shallow clone is not."""
    try:
        root, shallow = git("rev-parse", "--show-toplevel", "--is-shallow-repository").splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return False
    return Path(root).samefile(ROOT) and shallow == "false"


needs_history = pytest.mark.skipif(not whole_history(), reason="needs the repository's history")


def check_commit(record: Record) -> None:
    """Check that a record's commit is clean, part of the history, and has what the record ran."""
    commit = record.commit
    assert re.fullmatch("[0-9a-f]{7,40}", commit), f"{commit}: not a clean commit"
    assert git("merge-base", commit, "HEAD").startswith(commit)
    held = set(git("ls-tree", "-r", "--name-only", commit).splitlines())
    assert {*files(record)} <= held
    quoted = git("grep", "-h", "-o", "-E", '"[a-z0-9_]+"', commit, "--", "lltk/ops")
    folders = {part for path in held if path.startswith("lltk/ops/") for part in Path(path).parts}
    known = folders | {Path(part).stem for part in folders} | set(quoted.replace('"', "").split())
    assert {*implementations(record)} <= known


@needs_history
@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_of_a_clean_commit_that_has_what_it_ran(name: str) -> None:
    """That is, the commit has the files that the command names, and the rows' passes and ops."""
    check_commit(record_of(name))


@needs_history
@pytest.mark.parametrize(
    "change",
    [
        {"commit": "unknown"},
        {"commit": f"{record_of('decode').commit}-dirty"},
        {"command": "python benchmarks/decode.py --recipe benchmarks/none.yaml"},
        {"results": [{"passes": ["fold_nothing"]}]},
        {"results": [{"ran": {"fp8_conv3d": "cublas"}}]},
        {"results": [{"reader": "cublas"}]},
    ],
)
def test_what_a_commit_has_not_is_seen(change: dict[str, Any]) -> None:
    check_commit(record_of("decode"))
    with pytest.raises(AssertionError):
        check_commit(record_of("decode").model_copy(update=change))


def files(record: Record) -> Iterator[str]:
    """The script, recipes and passes that a record names."""
    words = shlex.split(record.command)
    yield from (word for word in words if word.startswith("benchmarks/"))
    if record.benchmark in ("compare", "dit", "stream"):
        yield from (
            f"recipes/{word}.yaml" for word in words if word.startswith(("tiny_", "wan22_"))
        )
    for row in record.results:
        passes = row["recipe"] if record.benchmark == "compare" else row.get("passes", [])
        for entry in passes:
            name = entry if isinstance(entry, str) else entry.get("name") or next(iter(entry))
            yield f"passes/{name}.py"


def implementations(record: Record) -> Iterator[str]:
    """The names of ops and of what ran them."""
    for row in record.results:
        ran = row["implementations"] if "implementations" in row else row.get("ran", {})
        yield from (*ran.keys(), *ran.values())
        if "reader" in row:
            yield row["reader"]


# Scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_how_it_is_called(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``python benchmarks/X.py --help`` does; its examples are commands that it takes."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    assert "--output" in capsys.readouterr().out
    examples = re.findall(rf"benchmarks/{path.name}(.*)", script(path.stem)["__doc__"])
    assert examples
    for example in examples:
        script(path.stem)["parser"]().parse_args(shlex.split(example))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_replaces_nothing_that_is_no_record(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so before it measures anything."""
    found = script(path.stem)
    (example, *_) = re.findall(rf"benchmarks/{path.name}(.*)", found["__doc__"])
    options = [*shlex.split(example), "-o", str(tmp_path / "record")]
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    for ending in (".md", *([found["PLOT"]] if "PLOT" in found else [])):
        target = tmp_path / f"record{ending}"
        target.write_text("mine")
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert end.value.code == 2 and target.read_text() == "mine"
        assert f"{target}: exists, and lltk did not write it" in capsys.readouterr().err
        target.unlink()


def test_a_command_has_the_settings_that_it_ran_under(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--runs", "3", "-o", "elsewhere"])
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert script_record("x", "", []).command == "python benchmarks/x.py --runs 3"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    wanted = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True torchrun --nproc-per-node 2"
    assert script_record("x", "", [], 2).command == f"{wanted} benchmarks/x.py --runs 3"
