"""Ranks on GPUs of their own train what one GPU does."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from ranks import LIMIT, free_port
from safetensors.torch import load_file
from test_training_ranks import BOUND, FAR, apart
from training_ranks import RUNS, file_of, save_on_gpu, trained

from lltk.parallel.ranks import Ranks

pytestmark = pytest.mark.gpu

SIZE = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank makes of its runs, in files."""
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} GPUs")
    made, port = tmp_path_factory.mktemp("ranks"), free_port()
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=save_on_gpu, args=(rank, SIZE, port, made)) for rank in range(SIZE)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT)
        process.kill()
    assert not any(process.exitcode for process in ranks)
    return made


@pytest.mark.parametrize("run", [run for run in RUNS if run[0] == SIZE], ids=str)
def test_ranks_train_what_one_gpu_does(folder: Path, run: tuple[int, tuple[int, int], str]) -> None:
    alone = Ranks(0, 1, torch.device("cuda", 0))
    wanted = trained(run[2], alone)
    for rank in range(SIZE):
        assert apart(load_file(folder / file_of(run, rank)), wanted) < BOUND
    assert float((wanted["0.loss"] - wanted["1.loss"]).abs()) > FAR
