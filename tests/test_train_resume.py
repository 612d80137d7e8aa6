"""A run killed at any moment goes on to the same losses and weights, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
from helpers import refused, same
from ranks import FORKS, started
from ranks import ended as finished
from toy import SETTINGS, Regression, finish, train_until_killed, trainer

from lltk.files.writing import NewFile
from lltk.train import pieces
from lltk.train.metrics import Metrics, append_metrics, forget_after, read_metrics
from lltk.train.recipe import changes, in_words
from lltk.train.saving import save_training_state
from lltk.train.state import load_training_state, training_states

STEPS = SETTINGS["steps"]
cpu = pytest.mark.cpu


def start(folder: Path, dies_writing: int | None = None) -> BaseProcess:
    process = FORKS.Process(target=train_until_killed, args=(folder, dies_writing))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    """The exit code of a process once it has ended; minus the signal that killed it."""
    process.join()
    return process.exitcode


def run_to_the_end(folder: Path) -> None:
    assert ended(start(folder)) == 0


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(folder: Path, steps: int, seconds: float) -> None:
    """Kill a run once it has taken some steps, and a little later."""
    process, target = start(folder), lines(folder) + steps
    try:
        while lines(folder) < target:
            assert process.is_alive(), "the run ended before it was killed"
            time.sleep(0.001)
        time.sleep(seconds)
    finally:
        process.kill()
        assert ended(process) == -signal.SIGKILL


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(m.step, m.loss, m.grad_norm) for m in read_metrics(folder / "metrics.jsonl")]


def agree(ours: Path, theirs: Path) -> bool:
    """Whether two finished runs have the same losses, weights and averages, bit for bit."""
    newest = [training_states(folder / "checkpoints")[-1] for folder in (ours, theirs)]
    parts = [(e.weights, e.ema, e.optimiser) for e in map(load_training_state, newest)]
    return losses(ours) == losses(theirs) and all(same(a, b) for a, b in zip(*parts, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run_to_the_end(folder)
    assert len(losses(folder)) == STEPS
    return folder


def killed(folder: Path, kills: int) -> None:
    """Kill a run at random steps, sometimes before its first training state, then let it end."""
    random_ = random.Random(kills)
    for _ in range(kills):
        kill_after(folder, random_.randint(1, STEPS // kills - 2), random_.random() / 50)
    assert lines(folder) < STEPS
    run_to_the_end(folder)


@cpu
def test_two_kills_and_one_while_it_writes(tmp_path: Path, whole: Path) -> None:
    """What is half written is never taken for a training state, and is cleared away."""
    run = tmp_path / "run"
    assert ended(start(run, dies_writing=7)) == -signal.SIGKILL
    folder = run / "checkpoints"
    assert [path.name for path in training_states(folder)] == ["step_00000005", "step_00000006"]
    (half,) = folder.glob(".step_00000007.*")
    assert (half / "optimiser.safetensors").read_bytes() == b"half of it"
    killed(run, 2)
    assert agree(run, whole)
    assert not list(run.rglob(".*"))


@cpu
@pytest.mark.parametrize("dies_writing", [None, 1])
def test_killed_before_the_first_state(
    tmp_path: Path, whole: Path, dies_writing: int | None
) -> None:
    """A run that is resumed with nothing to resume from starts at the beginning."""
    run = tmp_path / "run"
    process = start(run, dies_writing)
    if dies_writing is None:
        process.kill()
    assert ended(process) == -signal.SIGKILL
    assert not training_states(run / "checkpoints")
    run_to_the_end(run)
    assert agree(run, whole)


@cpu
def test_ten_kills(tmp_path: Path, whole: Path) -> None:
    killed(tmp_path, 10)
    assert agree(tmp_path, whole)


@cpu
def test_a_full_disk_leaves_the_states_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(trainer(whole, steps=9))
    stopped = trainer(run, steps=9)

    write = os.write

    def save(descriptor: int, data: memoryview) -> int:
        if ".step_00000007." in os.readlink(f"/proc/self/fd/{descriptor}") and len(data) > 5000:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr("lltk.files.writing.os.write", save)
        finish(stopped)
    assert str(run / "checkpoints" / "step_00000007") in str(caught.value)
    assert stopped.left().startswith("the last good training state is")
    assert stopped.left().endswith("step_00000006; resume from it with --resume")
    assert not list(run.rglob(".*"))
    finish(trainer(run, steps=9, resume=True))
    assert agree(run, whole)


@cpu
def test_training_goes_on_while_a_state_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of the step at which it was begun, and the next one waits for it."""
    may_write, write = Event(), pieces.write_tensors

    def waiting(*given: Any) -> None:
        assert may_write.wait(60)
        write(*given)

    monkeypatch.setattr(pieces, "write_tensors", waiting)
    run = trainer(tmp_path, steps=12, checkpoint_every=4)
    weights = {metrics.step: run.weights for metrics in islice(run, 7)}
    assert run.step == 7 and not training_states(tmp_path / "checkpoints")
    Timer(0.3, may_write.set).start()
    next(run)
    assert may_write.is_set()
    (found,) = training_states(tmp_path / "checkpoints")
    state = load_training_state(found)
    assert state.step == 4 and same(state.weights, weights[4])
    assert not same(state.weights, weights[7])
    finish(run)
    names = [path.name for path in training_states(tmp_path / "checkpoints")]
    assert names == ["step_00000008", "step_00000012"]


@cpu
def test_a_failed_write_ends_the_run_at_a_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, write = Event(), pieces.write_tensors

    def failing(file: NewFile, *given: Any) -> None:
        if ".step_00000008." in os.readlink(f"/proc/self/fd/{file._descriptor}"):
            failed.set()
            raise OSError(28, "No space left on device")
        write(file, *given)

    monkeypatch.setattr(pieces, "write_tensors", failing)
    run = trainer(tmp_path, steps=12, checkpoint_every=4)
    for _ in islice(run, 8):
        pass
    assert failed.wait(60)
    with pytest.raises(OSError, match="step_00000008: cannot be written") as caught:
        finish(run)
    assert "No space left on device" in str(caught.value) and 8 <= run.step <= 12
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]


@cpu
@pytest.mark.parametrize("lost", [None, "exp_avg_sq", "step", "rng"])
def test_every_part_of_the_state_matters(tmp_path: Path, lost: str | None) -> None:
    """Negative controls: the losses change if a part of the optimiser's state is lost."""
    changes = {"schedule": "constant", "warmup": 0}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(trainer(whole, Regression(dropout=0.2), steps=14, **changes))
    finish(trainer(stopped, Regression(dropout=0.2), steps=7, **changes))
    folder = stopped / "checkpoints"
    kept = load_training_state(training_states(folder)[-1])
    tensors = dict(kept.optimiser)
    other = torch.Generator().manual_seed(9).get_state()
    for name in (name for name in tensors if lost and name.startswith(lost)):
        tensors[name] = other if lost == "rng" else torch.full_like(tensors[name], lost == "step")
    save_training_state(folder, replace(kept, optimiser=tensors), keep=1)
    finish(trainer(stopped, Regression(dropout=0.2), steps=14, resume=True, **changes))
    assert losses(stopped)[:7] == losses(whole)[:7]
    assert (losses(stopped)[7:] == losses(whole)[7:]) == (lost is None)


@cpu
def test_the_newest_are_kept(tmp_path: Path) -> None:
    finish(trainer(tmp_path, steps=10, checkpoint_every=4, keep=2))
    names = [path.name for path in training_states(tmp_path / "checkpoints")]
    assert names == ["step_00000008", "step_00000010"]


@cpu
def test_another_recipe_is_refused(tmp_path: Path) -> None:
    finish(trainer(tmp_path, steps=3))
    whole = refused(trainer, tmp_path, steps=3, lr=0.02, seed=4, resume=True)
    newest = training_states(tmp_path / "checkpoints")[-1]
    said = "train.lr was 0.01 and is 0.02; train.seed was 3 and is 4"
    assert whole.startswith(f"{newest}: was made by another recipe: {said}; resume with that")
    for file in newest.glob("*.safetensors"):
        file.rename(file.with_suffix(".away"))
    assert refused(trainer, tmp_path, steps=3, lr=0.02, seed=4, resume=True) == whole
    for file in newest.glob("*.away"):
        file.rename(file.with_suffix(".safetensors"))
    assert refused(trainer, tmp_path, steps=3).endswith(
        "holds a run; resume it, or name another folder"
    )
    finish(trainer(tmp_path, steps=5, keep=1, resume=True))
    assert [step for step, _, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]


@cpu
def test_of_long_values_the_place_is_shown_where_they_differ() -> None:
    old = {"passes": ["canonicalise", {"lower": {"attention": "sdpa", "linear": "reference"}}] * 3}
    new = {"passes": [*old["passes"][:-1], {"lower": {"attention": "cudnn"}}]}
    said = in_words(changes(old, new))
    assert said.startswith("passes was …") and "'sdpa', 'linear': 're" in said
    assert " and is …" in said and said.endswith("'cudnn'}}]") and len(said) < 160


@cpu
def test_damaged_states_are_refused(tmp_path: Path) -> None:
    finish(trainer(tmp_path, steps=3))
    newest = training_states(tmp_path / "checkpoints")[-1]
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    message = refused(trainer, tmp_path, steps=4, resume=True)
    assert message.startswith(f"{weights}: was changed after it was written, or is damaged")
    remedy = "remove this state's folder to resume from the one before"
    assert message.endswith(f"damaged; {remedy}")
    weights.unlink()
    assert refused(trainer, tmp_path, steps=4, resume=True) == f"{weights}: is missing; {remedy}"
    shutil.rmtree(newest)
    finish(trainer(tmp_path, steps=4, resume=True))
    assert [step for step, _, _ in losses(tmp_path)] == [1, 2, 3, 4]


CHANGES = (
    "train.steps=24", "train.checkpoint_every=1", "train.keep=1", "train.ema_start=3",
    "train.validate_every=null", "train.sample_every=null",
)  # fmt: skip
SHIPPED: dict[int, tuple[str, ...]] = {
    1: ("tiny_vae", "train.batch=1", "vae.batch=1", "vae.frames=5"),
    2: ("tiny_train_sp2", "train.batch=1", "geometry.batch=1", "train.data.clips=2",
        "train.from_scratch=true", "train.shards=2"),
}  # fmt: skip
"""Shipped recipes with their models, on few and short clips, by the number of ranks."""


def train_shipped(folder: Path, ranks: int, device: str = "cpu") -> list[subprocess.Popen[str]]:
    recipe, *changes = SHIPPED[ranks]
    settings = [word for change in (*CHANGES, *changes) for word in ("--set", change)]
    code = "import torch; torch.set_num_threads(1); from lltk.cli.main import main; main()"
    words = ["train", recipe, *settings, "--device", device, "-o", folder, "--resume"]
    return started(ranks, "-c", code, *words)


def changing(folder: Path, removing: bool) -> bool:
    """Whether a training state is being written, or an old one is being removed."""
    there = [path.name for path in (folder / "checkpoints").glob("*")]
    newest = max((name for name in there if name[0] != "."), default="")
    hidden = [name[1:14] for name in there if name.endswith("lltk-new")]
    return any((name < newest) == removing for name in hidden)


@pytest.mark.manual
@pytest.mark.parametrize("ranks", SHIPPED)
def test_ten_kills_of_a_run_as_shipped(tmp_path: Path, ranks: int) -> None:
    """Some at any time, some while a training state is written, some while one is removed.

    Of several ranks one is killed, and the others end.
    """
    whole, killed_run = tmp_path / "whole", tmp_path / "killed"
    assert [code for code, _, _ in finished(train_shipped(whole, ranks), 900)] == [0] * ranks
    random_ = random.Random(0)
    found = []
    for kill in range(10):
        processes, target = train_shipped(killed_run, ranks), lines(killed_run) + 2
        process = processes[kill % ranks]
        while lines(killed_run) < target:
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.001)
        removing = kill % 3 == 1
        if kill % 3 == 2:
            time.sleep(random_.random() * 2)
        else:
            deadline = time.monotonic() + 60
            while not changing(killed_run, removing) and time.monotonic() < deadline:
                assert process.poll() is None, "the run ended before it was killed"
        process.kill()
        codes = [code for code, _, _ in finished(processes)]
        assert codes.pop(kill % ranks) == -signal.SIGKILL and all(codes)
        found.append(changing(killed_run, removing))
        states = training_states(killed_run / "checkpoints")
        for path in states:
            load_training_state(path)
    assert [code for code, _, _ in finished(train_shipped(killed_run, ranks), 900)] == [0] * ranks
    assert agree(killed_run, whole)
    assert any(found), "a kill came within a write or a removal"


@cpu
def test_metrics_after_the_state_are_forgotten_also_if_they_are_damaged(tmp_path: Path) -> None:
    """A kill leaves a part of a line; a machine that loses power, zeros."""
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(path, Metrics(step, 0.5, 1.0, 0.1, 2.0, 4.0))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "lo')
    assert [metrics.step for metrics in read_metrics(path)] == [1, 2, 3]
    path.write_bytes(whole + bytes(40) + b'\n{"step": 5, "lo')
    assert "line 4: is no step's metrics" in refused(read_metrics, path)
    assert "line 4: is no step's metrics" in refused(forget_after, path, 4)
    for step in (3, 2, 0):
        forget_after(path, step)
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:step])
