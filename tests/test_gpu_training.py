"""Ranks on GPUs of their own train what one GPU does."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoding_ranks import LATENTS, Odd, save_on, video
from ranks import LIMIT, ended, free_port
from safetensors.torch import load_file
from test_train_resume import lines, train_shipped
from test_training_ranks import BOUND, FAR, apart
from test_vae_frames import vae
from training_ranks import RUNS, file_of, save_on_gpu, trained

from lltk.models.wan_vae import encode
from lltk.parallel.ranks import Ranks
from lltk.train.data import first_samples

pytestmark = pytest.mark.gpu

SIZE = 2


def run_ranks(save: Callable[..., None], *first: str, folder: Path) -> None:
    """Let every rank write what it makes, in a process of its own."""
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} GPUs")
    port, spawn = free_port(), multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=save, args=(*first, rank, SIZE, port, folder)) for rank in range(SIZE)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT)
        process.kill()
    assert not any(process.exitcode for process in ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank makes of its runs, in files."""
    made = tmp_path_factory.mktemp("ranks")
    run_ranks(save_on_gpu, folder=made)
    return made


@pytest.mark.parametrize("run", [run for run in RUNS if run[0] == SIZE], ids=str)
def test_ranks_train_what_one_gpu_does(folder: Path, run: tuple[int, tuple[int, int], str]) -> None:
    alone = Ranks(0, 1, torch.device("cuda", 0))
    wanted = trained(run[2], alone)
    for rank in range(SIZE):
        assert apart(load_file(folder / file_of(run, rank)), wanted) < BOUND
    assert float((wanted["0.loss"] - wanted["1.loss"]).abs()) > FAR


def test_ranks_encode_what_one_does(tmp_path: Path) -> None:
    """They hand frames on over NCCL, and kept clips are on every rank."""
    run_ranks(save_on, "cuda", folder=tmp_path)
    kept = first_samples(Odd(), 7, 9, block=2)
    for rank in range(SIZE):
        made = load_file(tmp_path / f"cuda, {SIZE} ranks, {rank}")
        for latents in LATENTS:
            assert float((made[str(latents)] - encode(vae(), video(latents))).abs().max()) < 1e-10
        assert all(torch.equal(made[name], value) for name, value in kept.items())


def test_all_end_when_one_is_killed(tmp_path: Path) -> None:
    """Within seconds; one that waits in an exchange too."""
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} GPUs")
    ranks = train_shipped(tmp_path / "run", SIZE, "cuda")
    deadline = time.monotonic() + LIMIT
    while lines(tmp_path / "run") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks[1].kill()
    first, second = ended(ranks, limit=10)
    assert second[0] == -signal.SIGKILL
    assert first[0] > 0 and "Traceback" not in first[2]
