"""A checkout runs as it stands: no installation, or one by links that a new file is not among."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
ADDED = """
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage


class Config(PassConfig):
    pass


class Added(Pass[Config]):
    Config = Config
    reads = (Stage.CANONICAL,)
    numerics = Numerics.BITWISE

    def apply(self, program: Program, report: Report) -> None:
        report.match("files")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has every package but lltk."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if "lltk" not in entry.name:
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, of which a strict editable installation was made."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("lltk", "passes", "models", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    install = "from setuptools.build_meta import build_editable\n"
    install += "build_editable('.', {'editable_mode': 'strict'})"
    ran(sys.executable, ["-c", install], folder)
    return folder


def ran(
    python: Path | str, arguments: Sequence[object], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The outcome of a command that was started in a folder."""
    return subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_runs_in_the_root_and_sees_a_new_pass(
    python: Path, copy: Path, tmp_path: Path
) -> None:
    away = ran(python, ["-m", "lltk", "--help"], tmp_path)
    assert "No module named lltk" in away.stderr, "so that it is the folder's lltk that runs"
    (copy / "passes" / "added.py").write_text(ADDED)
    command = ["-m", "lltk", "transform", "tiny_score", "--no-weights", "--json",
               "--set", "passes=[canonicalise, added]", "--set", "model.config={num_layers: 1}",
               "-o", tmp_path / "made"]  # fmt: skip
    done = ran(python, command, copy)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["log"][-1]["matches"] == {"files": 1}
    assert (tmp_path / "made" / "program.json").exists()


def test_ranks_run_in_the_root(python: Path) -> None:
    """They find recipes, passes and models. The run ends early, by an error about a name."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "lltk", "stream",
               "wan22_5b_stream_sp2", "--prompt", "a cat", "--dry-run",
               "--set", "model.config=none"]  # fmt: skip
    done = ran(python, command, ROOT)
    wanted = "error: model configuration 'none' is not known; use one of wan22_5b, tiny"
    assert wanted in done.stderr, done.stderr


def test_an_installation_by_links_sees_a_new_pass(python: Path, copy: Path, tmp_path: Path) -> None:
    """Folders of the same names, where it is started, do not mislead it."""
    (wheel,) = copy.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        links = Path(archive.read(name).decode().strip())
    assert (links / "lltk" / "passes" / "lora.py").is_symlink()
    (copy / "passes" / "later.py").write_text(ADDED)
    (copy / "recipes" / "later.yaml").write_text("extends: tiny_score\n")
    for folder in ("passes", "models", "recipes", "graph"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise OSError('the wrong one')")
    code = """
import lltk.models.wan22, lltk.recipes, lltk.graph.recipe_files
from lltk.passes import make_pass
print(lltk.__file__, make_pass("later", {}).name, lltk.graph.recipe_files.find_recipe("later"))
"""
    done = ran(python, ["-c", code], tmp_path, PYTHONPATH=str(links))
    wanted = [str(links / "lltk" / "__init__.py"), "later", str(copy / "recipes" / "later.yaml")]
    assert done.stdout.split() == wanted, done.stderr
