"""Files of the user's own, outside the repository: a pass, what runs an op, and a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import (
    GEOMETRY,
    PASSES,
    Run,
    inputs,
    make_program,
    make_recipe,
    randomise,
    refused,
    texts,
    tiny_config,
)
from helpers import run as outputs
from yaml import safe_dump

from lltk.artefact import load_program
from lltk.compiler import transform, with_weights
from lltk.graph.recipe import load_recipe
from lltk.ops.implementations import find_implementation
from lltk.passes import make_pass

pytestmark = pytest.mark.cpu

DIM = """
from lltk.graph.edit import building, output
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
import torch


class Config(PassConfig):
    factor: float = 0.25


class Dim(Pass[Config]):
    Config = Config
    reads = (Stage.CANONICAL, Stage.CAUSAL)
    numerics = Numerics.CHANGING

    def apply(self, program: Program, report: Report) -> None:
        for graph in program.graphs.values():
            end = output(graph)
            for value in end.all_input_nodes:
                with building(end, "") as build:
                    end.replace_input_with(
                        value, build(torch.ops.aten.mul.Scalar, value, self.config.factor)
                    )
                report.match("results")
"""
ATTEND = """
from lltk.ops.block_causal_attention.reference import block_causal_attention as attend
from lltk.ops.declaration import Declaration, Exactness

DECLARATION = Declaration(Exactness.ROUNDING, "twice the values, then half of the result")


def block_causal_attention(q, k, v, chunk_tokens, teacher_forcing, ranks=1):
    return attend(q, k, 2 * v, chunk_tokens, teacher_forcing, ranks) / 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python looks for modules in; files of the user's lie there."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_files").mkdir()
    (tmp_path / "own_files" / "dim.py").write_text(DIM)
    (tmp_path / "own_files" / "attend.py").write_text(ATTEND)
    (tmp_path / "own.yaml").write_text(
        safe_dump(
            {
                "extends": "tiny_score",
                "model": {"config": tiny_config(1), "dtype": "float32"},
                "geometry": GEOMETRY | {"batch": 1},
                "passes": [
                    *PASSES["score"][:-2],
                    {"own_files.dim": {"factor": 0.5}},
                    "regionalise",
                    {"lower": {"block_causal_attention": "own_files.attend"}},
                ],
            }
        )
    )
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("own_files", "half")]:
        del sys.modules[name]


def test_a_pass_an_implementation_and_a_recipe_are_a_file_each(run: Run, folder: Path) -> None:
    """The Program computes what they say, and keeps both modules by their whole paths."""
    code, out, err = run(
        "transform", folder / "own.yaml", "--no-weights", "--json", "-o", folder / "program",
        "--set", "passes.own_files.dim.factor=4",
    )  # fmt: skip
    assert (code, err) == (0, "")
    log = {entry["name"]: entry for entry in json.loads(out)["log"]}
    assert log["own_files.dim"]["config"] == {"factor": 4}
    assert log["lower"]["matches"] == {"block_causal_attention → own_files.attend": 1}
    program = load_program(folder / "program")
    assert {"own_files.dim": {"factor": 4}} in program.recipe["passes"]
    assert "own_files.attend.block_causal_attention(" in texts(program)["score_block"]
    program = with_weights(program, randomise(program.weights))
    plain = make_program(make_recipe("score", layers=1))
    given = inputs(program, "score")
    ours, theirs = (outputs(each, "score", given)["sample"] for each in (program, plain))
    assert float((ours - 4 * theirs).abs().max()) < 1e-5 * float(ours.abs().max())


def test_a_pass_named_as_one_of_lltk_is_another_pass(folder: Path) -> None:
    (folder / "own_files" / "canonicalise.py").write_text(DIM)
    recipe = load_recipe(
        folder / "own.yaml", ["passes=[canonicalise, {own_files.canonicalise: {factor: 2}}]"]
    )
    log = transform(recipe, weights=False).log
    assert [entry.name for entry in log] == ["canonicalise", "own_files.canonicalise"]
    left = transform(recipe, weights=False, disable=["own_files.canonicalise"]).log
    assert [entry.name for entry in left] == ["canonicalise"]


@pytest.mark.parametrize(
    ("stem", "code", "message"),
    [
        ("syntax", "def", "cannot be imported (SyntaxError: "),
        ("stops", "1 / 0", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("lacks", "import absent", "cannot be imported (ModuleNotFoundError: No module named 'abs"),
        ("exits", "import sys; sys.exit(3)", "cannot be imported (SystemExit: 3)"),
        ("empty", "", "must define one subclass of Pass, it defines none"),
        ("alias", "from lltk.passes.lora import Lora", "must define one subclass of Pass, it def"),
        ("two", DIM + "class More(Dim): pass", "must define one subclass of Pass, it defines Dim,"),
        ("blank", DIM.replace("reads =", "read ="), "Dim lacks reads"),
        ("idle", DIM.replace("def apply", "def applies"), "Dim lacks apply"),
    ],
)
def test_a_broken_pass_is_named_with_its_file(
    folder: Path, stem: str, code: str, message: str
) -> None:
    file = folder / "own_files" / f"{stem}.py"
    file.write_text(code)
    assert refused(make_pass, f"own_files.{stem}", {}).startswith(f"{file}: {message}")


def test_an_error_in_a_pass_has_a_note_that_names_its_file(folder: Path) -> None:
    """The traceback stays: it is the pass that must be repaired."""
    (folder / "own_files" / "dim.py").write_text(DIM + "        {}['absent']\n")
    with pytest.raises(KeyError, match="absent") as caught:
        transform(load_recipe(folder / "own.yaml"), weights=False)
    file = folder / "own_files" / "dim.py"
    assert caught.value.__notes__ == [f"The pass own_files.dim failed; it lies in {file}."]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "declares no implementation of block_causal_attention; assign DECLARATION"),
        ("DECLARATION = Declaration(1 / 0, '')", "its declaration cannot be read: division by"),
        (ATTEND + "raise SystemExit(3)", "cannot be imported (SystemExit: 3)"),
        (ATTEND.replace("def block", "def other"), "define a function block_causal_attention(q, "),
        (ATTEND.replace("(q, k", "(k, q"), "define a function block_causal_attention(q, k, v, "),
        (ATTEND + "block_causal_attention = 3", "define a function block_causal_attention(q, k,"),
    ],
)
def test_a_broken_implementation_is_named_with_its_file(
    folder: Path, code: str, message: str
) -> None:
    file = folder / "own_files" / "broken.py"
    file.write_text(code)

    def load() -> object:
        return find_implementation("block_causal_attention", "own_files.broken").load()

    assert refused(load).startswith(f"{file}: {message}")


def test_a_broken_package_is_named_with_its_file(folder: Path) -> None:
    (folder / "half").mkdir()
    (folder / "half" / "__init__.py").write_text("raise OSError('no disk')")
    (folder / "half" / "dim.py").write_text(DIM)
    wanted = f"{folder / 'half' / '__init__.py'}: cannot be imported (OSError: no disk)"
    assert refused(make_pass, "half.dim", {}) == wanted


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.dim", "Python finds no module 'absent'; run `python -m lltk` in the folder"),
        ("own_files.dimm", "Python finds no module 'own_files.dimm'; "),
        ("own_files.dim.x", "Python finds no module 'own_files.dim.x'; "),
        (".dim", "Python finds no module '.dim'; "),
        ("own_files/dim.py", "Python finds no module 'own_files/dim'; "),
        ("lltk.passes.lora", "passes: lltk.passes.lora: lltk's own passes go by their last name"),
        ("zzz", "there is no pass 'zzz'; passes: balanced_sp, bidirectional, "),
    ],
)
def test_a_pass_that_is_not_there(folder: Path, name: str, message: str) -> None:
    assert refused(make_pass, name, {}).startswith(message)
    if name == "zzz":
        assert refused(make_pass, name, {}).endswith("or your own by its path, my_passes.zzz")


def test_an_option_that_a_pass_of_ones_own_has_not(folder: Path) -> None:
    message = refused(make_pass, "own_files.dim", {"facto": 2})
    assert message == "passes: own_files.dim: unknown key 'facto'; did you mean 'factor'?"
