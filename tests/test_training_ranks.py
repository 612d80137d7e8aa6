"""Ranks that share clips, weights or both train what one process does."""

from __future__ import annotations

import multiprocessing
from functools import cache
from pathlib import Path

import pytest
import replay_longlive
import replay_sp
from helpers import refused
from ranks import LIMIT
from safetensors.torch import load_file
from torch import Tensor
from training_ranks import CPU, FAULTS, FAULTY, RECORDED, RUNS, file_of, recorded, save_all, trained

from lltk.parallel.mesh import meshed
from lltk.parallel.ranks import Ranks

pytestmark = pytest.mark.cpu

BOUND = 1e-10
"""In float64, relative to each tensor's largest value."""
FAR = 1e-3
Made = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank makes of its runs, in files."""
    made = tmp_path_factory.mktemp("ranks")
    process = multiprocessing.get_context("spawn").Process(target=save_all, args=(made,))
    process.start()
    process.join(3 * LIMIT)
    process.kill()
    assert process.exitcode == 0
    return made


@cache
def alone(case: str) -> Made:
    """What one process makes of a case."""
    return trained(case, Ranks(0, 1, CPU))


def apart(ours: Made, theirs: Made) -> float:
    """The largest difference, relative to each tensor's largest value."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - v).abs().max() / v.abs().max()) for n, v in theirs.items())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: file_of(run, 0)[:-3])
def test_ranks_train_what_one_does(folder: Path, run: tuple[int, tuple[int, int], str]) -> None:
    """Losses, gradients, their norm and the weights after each step, on every rank."""
    wanted = alone(run[2])
    assert float(wanted["0.loss"]) != float(wanted["1.loss"])
    for rank in range(run[0]):
        assert apart(load_file(folder / file_of(run, rank)), wanted) < BOUND


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(folder: Path, fault: str) -> None:
    wanted = alone(FAULTY[2])
    for rank in range(FAULTY[0]):
        assert apart(load_file(folder / f"{fault}, {rank}"), wanted) > FAR


def test_recorded_ranks_replay(folder: Path) -> None:
    """Flow, loss and gradients of two of LongLive's own ranks."""
    data = load_file(RECORDED)
    made = [load_file(folder / f"recorded, {rank}") for rank in range(2)]
    assert replay_sp.worst(made, data) < replay_longlive.BOUND
    assert replay_sp.worst(made[::-1], data) > FAR


def test_frames_that_count_follow_from_the_facts() -> None:
    _, meta = recorded(RECORDED)
    assert replay_sp.counted_frames(meta) is None
    padded = replay_sp.counted_frames(meta | {"num_valid_latent_frames": 6})
    assert padded is not None and padded.sum() == 6 and not padded[0, 6:].any()
    first = replay_sp.counted_frames(meta | {"i2v": True})
    assert first is not None and first.sum() == 7 and not first[0, 0]


@pytest.mark.parametrize(
    ("size", "sequence", "shards", "key"),
    [(4, 3, 1, "passes.balanced_sp.size"), (2, 1, 4, "train.shards"), (1, 2, 1, "torchrun")],
)
def test_a_mesh_that_is_not_the_ranks_is_refused(
    size: int, sequence: int, shards: int, key: str
) -> None:
    def opened() -> None:
        with meshed(Ranks(0, size, CPU), sequence, shards):
            pass

    message = refused(opened)
    assert key in message and f"the {size} that run" in message
