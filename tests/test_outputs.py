"""No command destroys what it did not make, and no file that it reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Run, refused
from torch.fx import Graph
from toy import finish, trainer

from lltk.files import outputs
from lltk.files.locks import held
from lltk.files.outputs import Kind, Output, check_outputs, marked
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe

pytestmark = pytest.mark.cpu

TEXT = marked("a text", "made by a test")
FOLDER = Kind("a folder", lambda folder: (folder / "mark").exists(), folder=True)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder under a folder, with the files' contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with files of the user's; nothing in it may change."""
    folder = tmp_path / "mine"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "notes").write_text("mine")
    (folder / "file").write_text("mine")
    (folder / "made").write_text("made by a test")
    (folder / "empty").touch()
    (folder / "link").symlink_to(folder / "file")
    (folder / "hard").hardlink_to(folder / "made")
    (folder / "made_folder").mkdir()
    (folder / "made_folder" / "mark").touch()
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("new", TEXT, None),
        ("deep/new", TEXT, None),
        ("empty", TEXT, None),
        ("made", TEXT, None),
        ("made_folder", FOLDER, None),
        ("file", TEXT, "exists, and lltk did not write it as a text"),
        ("link", TEXT, "exists, and lltk did not write it as a text"),
        ("folder", FOLDER, "exists, and lltk did not write it as a folder"),
        ("folder", TEXT, "it is a folder"),
        ("made_folder", TEXT, "it is a folder"),
        ("made", FOLDER, "it is a file"),
        ("pipe", TEXT, "is a device or a pipe"),
        ("file/new", TEXT, "file is a file"),
        ("x" * 300, TEXT, "cannot be written (File name too long)"),
        ("/", TEXT, "it is the root of all folders"),
        ("/", FOLDER, "is the folder you are in, or holds it"),
    ],
)
def test_what_is_there_is_replaced_if_it_was_made(
    mine: Path, name: str, kind: Kind, message: str | None
) -> None:
    before = listing(mine)
    wanted = [Output(mine / name, kind)]
    if message is None:
        check_outputs(wanted, [])
    else:
        with pytest.raises((ValueError, OSError)) as caught:
            check_outputs(wanted, [])
        assert str(caught.value).startswith(str(mine / name)) and message in str(caught.value)
    if message is None or "did not write" in message:
        check_outputs(wanted, [], overwrite=True)
    else:
        with pytest.raises((ValueError, OSError)):
            check_outputs(wanted, [], overwrite=True)
    assert listing(mine) == before, "a check changes nothing"


@pytest.mark.parametrize(
    ("output", "given"),
    [
        ("file", "file"), ("file", "link"), ("link", "file"), ("made", "hard"),
        ("new", "folder/../new"), ("made_folder", "made_folder/mark"),
        ("made_folder", "made_folder"),
    ],
)  # fmt: skip
def test_inputs_and_outputs_may_not_meet(mine: Path, output: str, given: str) -> None:
    kind = FOLDER if "folder" in output else TEXT
    wanted = [Output(mine / output, kind)]
    message = refused(check_outputs, wanted, [mine / given], overwrite=True)
    assert "which is read" in message
    other = [*wanted, Output(mine / given, FOLDER if given == "made_folder" else TEXT)]
    assert "would be one" in refused(check_outputs, other, [], overwrite=True)
    assert "would be one" in refused(check_outputs, other[::-1], [], overwrite=True)


@pytest.mark.parametrize("name", ["", ".", "..", "../made_folder"])
def test_the_folder_that_one_is_in_is_not_replaced(
    mine: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An empty name is that folder too, such as that of a variable which is not set."""
    monkeypatch.chdir(mine / "made_folder")
    message = refused(check_outputs, [Output(Path(name), FOLDER)], [], overwrite=True)
    assert message.endswith(": is the folder you are in, or holds it; name another")


def test_names_that_differ_in_case(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one file where the file system says so."""
    wanted = [Output(mine / "new.MP4", TEXT)]
    check_outputs(wanted, [mine / "NEW.mp4"])
    monkeypatch.setattr(outputs, "_ignores_case", lambda folder: True)
    assert "which is read" in refused(check_outputs, wanted, [mine / "NEW.mp4"])


def test_a_folder_that_cannot_be_written(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Path, exist_ok: bool = True) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(OSError, match=r"new: cannot be written \(Permission denied\)"):
        check_outputs([Output(mine / "new", TEXT)], [])


# The commands

RUN = (
    "loss.svg", "metrics.jsonl", "train.log", "run.lock", "transformer", "vae", "pipeline",
    "checkpoints",
)  # fmt: skip
"""What a run writes to its folder, beside training states."""


def commands(folder: Path) -> dict[str, Callable[[Path], list[object]]]:
    """For each output of each command, a command that writes it to a path; inputs in a folder."""
    stream = ["stream", "tiny_stream", "--prompt", "x"]
    video = ["-o", folder / "v.mp4"]
    train = ["train", "tiny_vae"]
    compare = ["compare", "tiny_stream", "tiny_stream"]
    return {
        "inspect --diagram": lambda path: ["inspect", folder / "program", "--diagram", path],
        "transform -o": lambda path: ["transform", "tiny_stream", "--no-weights", "-o", path],
        "transform --dump": lambda path: ["transform", "tiny_stream", "--dump", path],
        "stream -o": lambda path: [*stream, "-o", path],
        "stream --save": lambda path: [*stream, *video, "--save", path],
        "stream --contact-sheet": lambda path: [*stream, *video, "--contact-sheet", path],
        "demo -o": lambda path: ["demo", "-o", path],
        "bench stream -o": lambda path: ["bench", "stream", "tiny_stream", "-o", path],
        "compare -o": lambda path: [*compare, "-o", path],
        **{
            f"train -o, {name}": lambda path, name=name: [*train, "-o", path.parent]  # type: ignore[misc]
            for name in RUN
        },
    }


@pytest.mark.parametrize("name", ["", ".", "..", "/", "deep/.."])
@pytest.mark.parametrize("option", ["stream -o", "demo -o", "bench stream -o", "compare -o"])
def test_a_path_without_a_name(run: Run, tmp_path: Path, option: str, name: str) -> None:
    code, _, err = run(*commands(tmp_path)[option](Path(name)))
    assert code == 2 and "does not end in a name; write one" in err


SUFFIXES = {"bench stream -o": ".json", "compare -o": ".md"}
NAMES = {f"train -o, {name}": name for name in RUN}


@pytest.mark.parametrize("option", commands(Path()))
def test_no_command_replaces_what_it_did_not_make(run: Run, tmp_path: Path, option: str) -> None:
    make = commands(tmp_path / "inputs")[option]
    for name, folder in (("file", False), ("folder", True)):
        place = tmp_path / name / (NAMES.get(option, "place"))
        target = Path(f"{place}{SUFFIXES.get(option, '')}")
        target.parent.mkdir()
        if folder:
            target.mkdir()
            (target / "notes.txt").write_text("mine")
        else:
            target.write_text("mine")
        before = listing(tmp_path)
        code, _, err = run(*make(place))
        assert code == 2 and str(target) in err.replace("\n", ""), err
        assert "Traceback" not in err
        assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        (["-o", "script.yaml"], ["--script", "script.yaml"]),
        (["-o", "link.yaml"], ["--script", "script.yaml"]),
        (["-o", "v.mp4", "--save", "red.png"], ["--prompt", "x", "--image", "red.png"]),
        (["-o", "v.mp4", "--contact-sheet", "script.yaml"], ["--script", "script.yaml"]),
        (["-o", "v.mp4", "--save", "v.mp4"], ["--prompt", "x"]),
        (["-o", "v.mp4", "--contact-sheet", "./v.mp4"], ["--prompt", "x"]),
        (["-o", "v.mp4", "--contact-sheet", "v.state.safetensors"], ["--prompt", "x"]),
        (["-o", "v.mp4"], ["--resume", "v.state.safetensors"]),
    ],
)
def test_a_stream_writes_over_none_of_its_files(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outputs: list[str],
    inputs: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.yaml").write_text("- caption: x\n  seconds: 1\n")
    (tmp_path / "link.yaml").symlink_to("script.yaml")
    for name in ("red.png", "v.state.safetensors"):
        (tmp_path / name).write_text("mine")
    before = listing(tmp_path)
    for more in ([], ["--overwrite"], ["--dry-run"]):
        code, _, err = run("stream", "tiny_stream", *inputs, *outputs, *more)
        assert code == 2 and "name another" in err.replace("\n", " "), err
    assert listing(tmp_path) == before


def test_a_folder_of_videos_replaces_no_note_of_another(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("x\n")
    (tmp_path / "videos.json").write_text("[]")
    before = listing(tmp_path)
    for folder, problem in (
        ("videos", "lltk did not write it as a note on videos"),
        ("prompts.txt/videos", "prompts.txt is a file"),
    ):
        given = ["--prompts", tmp_path / "prompts.txt", "-o", tmp_path / folder]
        code, _, err = run("stream", "tiny_stream", *given)
        assert code == 2 and problem in err.replace("\n", " "), err
        assert listing(tmp_path) == before


def test_a_dump_takes_the_place_of_a_dump_behind_a_link(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is there until the model is captured."""
    passes = [SimpleNamespace(name="one"), SimpleNamespace(name="two")]
    reached = [3, 0, 2]

    def transformed(recipe: Recipe, **options: Any) -> Program:
        for count in range(reached.pop(0)):
            program = SimpleNamespace(log=passes[:count], every_graph=lambda: [("a", Graph())])
            options["observe"](program)
        raise ValueError("no more")

    monkeypatch.setattr("lltk.compiler.transform", transformed)
    (tmp_path / "link").symlink_to(tmp_path / "dump")
    given = ["transform", "tiny_stream", "--no-weights", "--dump", tmp_path / "link"]
    for kept in (3, 3, 2):
        code, _, err = run(*given)
        assert code == 2 and "no more" in err and (tmp_path / "link").is_symlink()
        names = sorted(path.name for path in (tmp_path / "dump").iterdir())
        assert names == ["00_captured", "01_one", "02_two"][:kept]


# Two of anything


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with held(tmp_path):
        message = refused(held(tmp_path).__enter__)
        assert message.startswith(f"{tmp_path}: is in use by process {os.getpid()};")
    with held(tmp_path):  # the file is left, the lock is not
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_states_that_are_not_the_runs_are_kept(tmp_path: Path) -> None:
    """Only training states are removed when there are newer ones."""
    finish(trainer(tmp_path, steps=2, keep=1))
    foreign = tmp_path / "checkpoints" / "step_00000001"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    other = tmp_path / "checkpoints" / "step_by_step"
    other.mkdir()
    finish(trainer(tmp_path, steps=4, keep=1, resume=True))
    assert (foreign / "notes.txt").read_text() == "mine" and other.is_dir()
