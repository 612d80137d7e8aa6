"""Test set-up: a reproducible hypothesis profile, one thread, and one marker on every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from pathlib import Path

    from bundles import Exported
    from helpers import Run

    from lltk.streaming import StreamPlan

settings.register_profile("lltk", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lltk")

# Several workers share the cores.
torch.set_num_threads(1)

KINDS = ("cpu", "gpu", "engines", "manual")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, object, object]:
    """Hold every test to exactly one of the markers cpu, gpu, engines and manual."""
    made = yield
    for item in made if isinstance(made, list) else []:
        kinds = [kind for kind in KINDS if item.get_closest_marker(kind)]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "as none"
            raise pytest.Collector.CollectError(
                f"{item.nodeid}: marked {found}; mark it as exactly one of {', '.join(KINDS)}"
            )
    return made


def pytest_collection_finish() -> None:
    """Spare the garbage collector all that is imported by now, which stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def captures() -> Iterator[None]:
    """Capture each model once, as that takes a second or several."""
    from captures import shared

    with shared():
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; exit code, output, errors."""
    from lltk.cli.main import main

    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["lltk", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of random weights."""
    from streams import save_pipeline

    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def plan(pipeline: Path) -> StreamPlan:
    """Its stream, at the tests' sizes."""
    from streams import planned

    return planned(pipeline)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bundle and what torch streams beside it; all workers of a run share it."""
    from bundles import exported

    base = tmp_path_factory.getbasetemp()
    return exported(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
