"""The installed package is whole and light, and its parts import one way."""

import ast
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
MAPPED = ("passes", "models", "recipes")
LAZY = ("diffusers", "transformers")
FOLDERS = ("lltk", *MAPPED)

# Which parts of lltk a part may import, beside itself.
ARROWS: dict[str, set[str]] = {
    "module_paths": set(),
    "files": set(),
    "ops": {"module_paths", "parallel"},
    "parallel": set(),
    "graph": {"files", "ops"},
    "models": {"files", "parallel", "graph", "ops"},
    "recipes": {"graph"},
    "passes": {"parallel", "graph", "ops", "module_paths"},
    "stream": {"files", "parallel", "graph", "ops"},
    "train": {"files", "stream", "parallel", "graph", "ops"},
}
ARROWS["compiler"] = {"files", "graph", "ops", "models", "passes"}
ARROWS["artefact"] = ARROWS["compiler"] | {"compiler"}
ARROWS["export"] = {"files", "graph", "ops", "stream"}
ARROWS["streaming"] = ARROWS["compiler"] | {"compiler", "export", "parallel", "stream"}
ARROWS["serve"] = {"files", "stream", "streaming"}
ARROWS["exporting"] = ARROWS["streaming"] | {"streaming"}
ARROWS["calibrating"] = ARROWS["exporting"]
ARROWS["tasks"] = ARROWS["compiler"] | {"compiler", "artefact", "parallel", "stream", "train"}
ARROWS["training"] = {"files", "parallel", "graph", "models", "train", "tasks"}
ARROWS["bench"] = set(ARROWS)
ARROWS["cli"] = set(ARROWS)
ARROWS["__main__"] = {"cli"}
ARROWS["__init__"] = {"streaming"}


def source_files() -> Iterator[PurePosixPath]:
    """Every file of the four folders, relative to the checkout."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT)
            hidden = any(part == "__pycache__" or part[0] == "." for part in relative.parts)
            if path.is_file() and not hidden:
                yield PurePosixPath(relative.as_posix())


def installed(path: PurePosixPath) -> PurePosixPath:
    """Where a file of the checkout lies in an installation."""
    return "lltk" / path if path.parts[0] in MAPPED else path


def imported_parts(source: str, package: str) -> set[str]:
    """The parts of lltk that a module of `package` imports, at any depth and in any form."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    parts = set()
    for top, *rest in (name.split(".") for name in names):
        if top == "lltk" and rest and not rest[0].startswith("__"):
            parts.add(rest[0])
        elif top in MAPPED:
            parts.add(f"{top} by its bare name")
    return parts


def wrong_imports(path: PurePosixPath, source: str) -> list[str]:
    """The imports of a file that go against the arrows."""
    package = installed(path).parent.parts
    part = package[1] if len(package) > 1 else path.stem
    if part not in ARROWS and path.name != "__init__.py":
        return [f"{path}: belongs to no part of lltk"]
    wrong = imported_parts(source, ".".join(package)) - ARROWS.get(part, set()) - {part}
    return [f"{path}: must not import {name}" for name in sorted(wrong)]


def test_imports_follow_the_arrows() -> None:
    files = [path for path in source_files() if path.suffix == ".py"]
    wrong = [line for path in files for line in wrong_imports(path, (ROOT / path).read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source", "culprit"),
    [
        ("lltk/__init__.py", "from .graph import program", "graph"),
        ("lltk/ops/rope/op.py", "import lltk.graph.program as p", "graph"),
        ("lltk/ops/__init__.py", "from ..stream import pages", "stream"),
        ("lltk/graph/capture.py", "from lltk import ops, models", "models"),
        ("lltk/graph/runner.py", "def run():\n    from lltk.passes import causal", "passes"),
        ("lltk/bench/record.py", "from .. import cli", "cli"),
        ("lltk/train/loop.py", "from lltk.tasks.clips import TinyVideos", "tasks"),
        ("lltk/training.py", "from lltk.bench import quality", "bench"),
        ("passes/causal.py", "from ..models.wan22 import spec", "models"),
        ("models/wan22/vae.py", "import passes.causal", "passes by its bare name"),
    ],
)
def test_a_wrong_import_is_caught(path: str, source: str, culprit: str) -> None:
    assert wrong_imports(PurePosixPath(path), source) == [f"{path}: must not import {culprit}"]


def unguarded_imports(source: str) -> list[int]:
    """The lines of a module that import from diffusers or transformers without the lock."""
    guarded, lines = set[ast.AST](), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.With) and "LOADING" in ast.unparse(node.items[0]):
            guarded.update(ast.walk(node))
        elif isinstance(node, ast.ImportFrom) and node not in guarded:
            package = (node.module or "").split(".")[0]
            if package in LAZY and [name.name for name in node.names] != ["__version__"]:
                lines.append(node.lineno)
    return lines


def test_one_thread_at_a_time_imports_diffusers() -> None:
    """Its modules import one another in circles: a second thread would find one half imported."""
    sources = {path: (ROOT / path).read_text() for path in source_files() if path.suffix == ".py"}
    assert not {path: lines for path, text in sources.items() if (lines := unguarded_imports(text))}


def test_the_drawing_of_the_rooms_is_true() -> None:
    """Each of its arrows is an import, and they lead from each room to all that it imports."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawing = page.partition("## Folders")[2].split("```")[1]
    names = dict(re.findall(r"(\w+)\[(\w+)", drawing))
    drawn: dict[str, set[str]] = {}
    for start, end in re.findall(r"(\w+)(?:\[.*?\])? --> (\w+)", drawing):
        drawn.setdefault(names[start], set()).add(names[end])
    imported: dict[str, set[str]] = {}
    for path in source_files():
        if path.suffix == ".py" and installed(path).parts[1:]:
            package = installed(path).parent.parts
            part = package[1] if len(package) > 1 else path.stem
            found = imported_parts((ROOT / path).read_text(), ".".join(package)) - {part}
            imported.setdefault(part, set()).update(found)

    def reached(room: str) -> set[str]:
        return {room}.union(*(reached(other) for other in drawn.get(room, ())))

    rooms = imported.keys() - {"__init__", "__main__", "module_paths", "recipes"}
    assert reached("cli") == rooms
    for room in rooms:
        found = imported[room] & rooms
        assert drawn.get(room, set()) <= found <= reached(room), room


def test_right_imports_pass() -> None:
    source = "import torch\nimport lltk\nfrom lltk import __version__\nfrom . import base\n"
    source += "from ..graph.program import Program\nfrom lltk.ops import rope\n"
    assert wrong_imports(PurePosixPath("passes/causal.py"), source) == []


def test_a_module_outside_every_part_is_caught() -> None:
    path = PurePosixPath("lltk/helpers.py")
    assert wrong_imports(path, "") == ["lltk/helpers.py: belongs to no part of lltk"]


def test_commands_are_thin() -> None:
    """What a command does stands in the parts below it; its file has options and tables."""
    files = list((ROOT / "lltk" / "cli").glob("*.py"))
    long = [path.name for path in files if len(path.read_text().splitlines()) > 250]
    assert files and not long


def test_wheel_holds_every_file(tmp_path: Path) -> None:
    """Built from a copy: what an earlier build left in build/ would end up in the wheel."""
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tmp_path)]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    held = {name for name in names if ".dist-info/" not in name}
    expected = {str(installed(path)) for path in source_files()}
    missing = sorted(expected - held)
    assert not missing, f"pyproject.toml: packages or package-data leave out {missing}"
    assert held == expected


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_package_goes_by_one_name(name: str) -> None:
    importlib.import_module(f"lltk.{name}")
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=f"import lltk.{name}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_import_is_light(tmp_path: Path) -> None:
    code = "import json, sys, lltk; print(json.dumps(list(sys.modules)))"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in json.loads(output.stdout)}
    assert "lltk" in modules
    assert modules.isdisjoint({"torch", "triton", "numpy", "diffusers", "transformers"})
    with pytest.raises(AttributeError, match="module 'lltk' has no attribute 'strem_video'"):
        importlib.import_module("lltk").strem_video  # noqa: B018


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==[0-9][0-9A-Za-z.]*", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    pinned = {re.sub(r"[-_.]+", "-", pin[1]).lower() for pin in pins if pin}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=\[]", line)[0].lower() for line in required}
    assert names <= pinned
