"""Files and folders are old or new and whole, whatever fails; and no change goes unseen."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused

from lltk.files.manifest import Manifest
from lltk.files.tensors import checksum, read_tensors, save_tensors, write_tensors
from lltk.files.writing import (
    append_line,
    claimed,
    remove_unfinished,
    remove_whole,
    standing,
    whole_file,
    whole_folder,
    write_text,
)

FORKS = get_context("fork")
CALLS = ("open", "write", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
FOLDER = Manifest("facts.json", "a folder of the tests", format=1, remedy="write it again")
cpu = pytest.mark.cpu


@pytest.fixture(autouse=True)
def quick_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk: these tests count calls."""
    if request.node.get_closest_marker("cpu"):
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """Stands for the end of the process."""


class Faults:
    """Counts system calls, and lets one of them fail.

    Args:
        at: which one fails, from 0.
        fails: what becomes of it. A `Killed` process makes no call afterwards.
    """

    def __init__(self, at: int, fails: Callable[[], BaseException]) -> None:
        self.made: list[tuple[str, str]] = []
        self.done = False
        self._at = at
        self._fails = fails
        self._dead: BaseException | None = None

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            if self._dead is not None:
                raise self._dead
            self.made.append((name, str(given[0])))
            if len(self.made) - 1 == self._at:
                self.done = True
                if name == "write":  # a part is there
                    real(given[0], memoryview(given[1])[: len(given[1]) // 2])
                error = self._fails()
                self._dead = error if isinstance(error, Killed) else None
                raise error
            return real(*given, **options)

        return call


@contextmanager
def failing(at: int, fails: Callable[[], BaseException]) -> Iterator[Faults]:
    faults = Faults(at, fails)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, faults.wrapped(name, getattr(os, name)))
        yield faults


def write_folder(path: Path, content: str) -> None:
    with whole_folder(path) as folder:
        folder.write_text("deep/content.txt", content)
        with folder.file("content.safetensors") as file:
            write_tensors(file, {"t": torch.tensor([float(content)])}, {})
        FOLDER.write(folder, {"content": content})


def read_folder(path: Path) -> str:
    facts = FOLDER.read(path)
    tensors, _ = read_tensors(standing(path) / "content.safetensors")
    assert facts["content"] == f"{tensors['t'].item():g}"
    return str(facts["content"])


def write_file(path: Path, content: str) -> None:
    save_tensors(path, {"t": torch.tensor([float(content)])}, {})


def read_file(path: Path) -> str:
    return f"{read_tensors(path)[0]['t'].item():g}"


WAYS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], str]]] = {
    "file": (write_file, read_file),
    "folder": (write_folder, read_folder),
}
FAILURES: dict[str, Callable[[], BaseException]] = {
    "full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "broken": lambda: OSError(errno.EIO, "Input/output error"),
    "killed": lambda: Killed(),
}


@cpu
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("before", [None, "1"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("way", WAYS)
def test_old_or_new_is_whole_whatever_call_fails(
    tmp_path: Path, way: str, failure: str, before: str | None, linked: bool
) -> None:
    write, read = WAYS[way]
    for at in range(200):
        root = tmp_path / str(at)
        target = root / "deep" / "target"
        path = root / "link" if linked else target
        root.mkdir()
        if linked:
            path.symlink_to(target)
        if before is not None:
            write(path, before)
        caught: BaseException | None = None
        with failing(at, FAILURES[failure]) as faults:
            try:
                write(path, "2")
            except (OSError, Killed) as error:
                caught = error
        place = standing(path)
        found = read(path) if place.exists() else None
        assert found in (before, "2")
        if caught is None:
            assert found == "2", "it said that it was written"
        elif isinstance(caught, OSError):
            assert str(path) in str(caught) and "cannot be written" in str(caught)
            assert before is None or standing(path) == path, "it is back in its place"
        assert path.is_symlink() == linked
        write(path, "3")
        assert read(path) == "3" and (path.exists() and standing(path) == path)
        assert [each.name for each in target.parent.iterdir()] == ["target"]
        if not faults.done:
            break
    assert at > 5, "calls were counted"


@cpu
@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_on_the_disk_before_it_is_renamed(tmp_path: Path, way: str) -> None:
    write, _ = WAYS[way]
    write(tmp_path / "target", "1")
    with failing(-1, Killed) as faults:
        write(tmp_path / "target", "2")
    names = [name for name, _ in faults.made]
    last = max(at for at, name in enumerate(names) if name in ("rename", "replace"))
    if way == "folder":  # the last removes the old one
        renames = [at for at, name in enumerate(names) if name == "rename"]
        assert len(renames) == 3
        last = renames[1]
    files = 1 if way == "file" else 3
    written = [at for at, name in enumerate(names) if name == "write"]
    synced = [at for at, name in enumerate(names) if name == "fsync"]
    assert sum(written[-1] < at < last for at in synced) >= files
    assert any(at > last for at in synced), "the folder's names too"


def write_until_killed(path: str, way: str, at: int) -> None:
    """Kill this very process at a system call. For another process."""

    def kill() -> BaseException:
        os.kill(os.getpid(), signal.SIGKILL)
        return Killed()

    with failing(at, kill):
        WAYS[way][0](Path(path), "2")


@cpu
@pytest.mark.parametrize("way", WAYS)
def test_real_kills(tmp_path: Path, way: str) -> None:
    write, read = WAYS[way]
    with failing(-1, Killed) as faults:
        write(tmp_path / "counted", "1")
    codes, found = [], set()
    for at in range(0, len(faults.made) + 6, 3):
        path = tmp_path / str(at) / "target"
        write(path, "1")
        process = FORKS.Process(target=write_until_killed, args=(str(path), way, at))
        process.start()
        process.join()
        codes.append(process.exitcode)
        found.add(read(path))
        write(path, "3")
        assert read(path) == "3"
    assert -signal.SIGKILL in codes and found == {"1", "2"}


# Replacing


@cpu
def test_a_file_and_a_folder_never_replace_each_other(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "1")
    write_file(tmp_path / "file", "1")
    with pytest.raises(OSError, match="it is no file"):
        write_file(tmp_path / "folder", "2")
    with pytest.raises(OSError, match="it is no folder"):
        write_folder(tmp_path / "file", "2")
    assert read_folder(tmp_path / "folder") == read_file(tmp_path / "file") == "1"
    with pytest.raises(OSError, match="it is no file"):
        write_text(Path("/dev/null"), "text")


@cpu
def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="circle"):
        write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").is_symlink() and len(list(tmp_path.iterdir())) == 2


@cpu
def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_folder(tmp_path / "folder") as folder:
        folder.write_text("a", "text")
        raise KeyError("a")
    with pytest.raises(KeyError), whole_file(tmp_path / "file") as file:
        file.write(b"text")
        raise KeyError("a")
    assert not list(tmp_path.iterdir())


@cpu
def test_what_is_removed_is_free_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "1")
    with failing(2, Killed), pytest.raises(Killed):
        remove_whole(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


@cpu
@pytest.mark.parametrize("way", WAYS)
def test_what_a_living_writer_writes_is_left(tmp_path: Path, way: str) -> None:
    """It is locked from its first byte to its last; what a killed writer left is removed."""
    whole = whole_file if way == "file" else whole_folder
    with whole(tmp_path / "a*"):
        (mine,) = tmp_path.iterdir()
        same, other = (tmp_path / f".{name}.{'0' * 32}.lltk-new" for name in ("a*", "ab"))
        for left in (same, other):
            left.mkdir()
            (left / "part").touch()
        WAYS[way][0](tmp_path / "a*", "1")
        assert mine.exists() and other.exists() and not same.exists()
        remove_unfinished(tmp_path)
        assert mine.exists() and not other.exists()
    assert [each.name for each in tmp_path.iterdir()] == ["a*"]


@cpu
@pytest.mark.parametrize("folder", [False, True])
def test_what_is_new_may_be_taken_for_left_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    """Then the writer begins anew."""
    real, taken = fcntl.flock, []

    def lock(descriptor: int, way: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].rmdir() if folder else taken[0].unlink()
        real(descriptor, way)

    monkeypatch.setattr(fcntl, "flock", lock)
    path, descriptor = claimed(tmp_path / "a", folder)
    os.close(descriptor)
    assert path.exists() and path != taken[0]


@cpu
def test_a_line_is_added_after_one_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, "é")
    append_line(path, "two")
    path.write_bytes(path.read_bytes()[:-2])
    append_line(path, "three")
    assert path.read_text() == "é\ntw\nthree\n"
    with pytest.raises(OSError, match=f"^{tmp_path}: cannot be written"):
        append_line(tmp_path, "four")


# Checksums


@cpu
def test_every_bit_of_a_sealed_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    tensors = {"a": torch.arange(3.0), "b": torch.ones((), dtype=torch.bfloat16)}
    save_tensors(path, tensors, {"said": 'it is "so"'})
    whole = path.read_bytes()
    back, metadata = read_tensors(path)
    assert metadata == {"said": 'it is "so"'} and back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    for bit in range(0, 8 * len(whole), 5):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert str(path) in refused(read_tensors, path)
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        assert str(path) in refused(read_tensors, path)
    path.write_bytes(whole + b"0")
    assert str(path) in refused(read_tensors, path)


@cpu
def test_equal_tensors_are_equal_files_and_other_software_reads_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        str(dtype): (torch.arange(-3, 4) * 5).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.int64, torch.int8, torch.uint8,
                      torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    }  # fmt: skip
    tensors |= {"empty": torch.zeros(0, 4), "view": torch.arange(12.0).view(3, 4).t()}
    save_tensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    again = dict(reversed(list(tensors.items())))
    save_tensors(tmp_path / "b", again, {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = load_file(tmp_path / "a")
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape and back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))


@cpu
@pytest.mark.parametrize("name", ["facts.json", "content.safetensors", "deep/content.txt"])
def test_every_bit_of_a_folder_counts(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, "1")
    path = tmp_path / name
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert str(path) in refused(FOLDER.read, tmp_path)
    path.unlink()
    assert name in refused(FOLDER.read, tmp_path)


def resealed(path: Path, **changes: object) -> None:
    """Change a manifest as a forger would, with the digest that belongs to it."""
    from lltk.files.manifest import _digest

    content = json.loads(path.read_text()) | changes
    del content["digest"]
    path.write_text(json.dumps(content | {"digest": _digest(content)}))


@cpu
@pytest.mark.parametrize(
    "files",
    [None, 3, ["content.txt"], {"content.txt": 3}, {"../secret": "0"}, {"/etc/passwd": "0"},
     {"": "0"}, {"a/../../b": "0"}],
)  # fmt: skip
def test_a_manifest_lists_files_in_its_folder(tmp_path: Path, files: object) -> None:
    write_folder(tmp_path / "folder", "1")
    (tmp_path / "secret").write_text("")
    resealed(tmp_path / "folder" / "facts.json", files=files)
    message = refused(FOLDER.read, tmp_path / "folder")
    assert "lists" in message and "facts.json" in message
    assert not FOLDER.recognises(tmp_path / "folder")


@cpu
def test_other_folders_and_formats(tmp_path: Path) -> None:
    assert "has no facts.json, so it is not a folder of the tests" in refused(FOLDER.read, tmp_path)
    write_folder(tmp_path, "1")
    assert FOLDER.recognises(tmp_path)
    resealed(tmp_path / "facts.json", format=2, versions={"lltk": "9.9"})
    assert "is of format 2, this lltk reads 1; write it again, or use lltk 9.9" in refused(
        FOLDER.read, tmp_path
    )
    for content in ("[]", "3", "null", '{"what": "another"}', "{", ""):
        (tmp_path / "facts.json").write_text(content)
        assert str(tmp_path / "facts.json") in refused(FOLDER.read, tmp_path)
        assert not FOLDER.recognises(tmp_path)
    write_folder(tmp_path / "more", "1")
    (tmp_path / "more" / "notes.txt").touch()
    assert not FOLDER.recognises(tmp_path / "more"), "it holds something of the user's"


@cpu
def test_the_checksum_is_sha256(tmp_path: Path) -> None:
    import hashlib

    with whole_file(tmp_path / "a") as file:
        for size in (1, 5000, 1 << 13, 3):
            file.write(bytes(range(256)) * size)
        streamed = file.checksum
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 256 * (1 + 5000 + (1 << 13) + 3)
    assert streamed == checksum(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.manual
def test_a_durable_write_takes_at_most_twice_a_bare_one(tmp_path: Path) -> None:
    """The best of several, each over the same bytes with fsync."""
    tensors = {"t": torch.randn(1 << 26)}
    data = tensors["t"].numpy().data.cast("B")

    def bare() -> None:
        descriptor = os.open(tmp_path / "bare", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        left = data
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        os.close(descriptor)

    def timed(act: Callable[[], None]) -> float:
        start = time.perf_counter()
        act()
        return time.perf_counter() - start

    pairs = [
        (timed(bare), timed(lambda: save_tensors(tmp_path / "durable", tensors, {})))
        for _ in range(8)
    ]
    best = [min(times) for times in zip(*pairs, strict=True)]
    assert best[1] < 2 * best[0], pairs
