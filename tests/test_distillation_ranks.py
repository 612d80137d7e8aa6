"""Ranks that share clips, weights or both distil what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distillation_ranks import CPU, FAULT, RUNS, Run, distilled, file_of, goes_on, planned, save_all
from helpers import refused
from ranks import saved
from safetensors.torch import load_file
from streams import save_pipeline
from test_training_ranks import BOUND, FAR, apart
from torch import Tensor

from lltk.parallel.ranks import Ranks

pytestmark = pytest.mark.cpu

ALONE = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """What both ranks make of their runs, in files."""
    made = tmp_path_factory.mktemp("ranks")
    saved(save_all, pipeline, made)
    return made


@pytest.fixture(scope="module")
def alone(pipeline: Path) -> dict[str, Tensor]:
    """What one process makes."""
    return distilled(pipeline, ALONE)


@pytest.mark.parametrize("run", RUNS)
def test_ranks_distil_what_one_does(folder: Path, run: Run, alone: dict[str, Tensor]) -> None:
    """Losses, norms and gradients of student and critic, and the student's weights.

    Equal weights are one memory on each rank, too.
    """
    assert {name.split(".")[0] for name in alone} == {"0", "1", "2", "3", "weight", "once"}
    for rank in range(2):
        found = load_file(folder / file_of(run, rank))
        changed = {name for name, value in alone.items() if value.any()}
        assert found.keys() == alone.keys() and len(changed) > 0.8 * len(alone)
        assert apart({n: found[n] for n in changed}, {n: alone[n] for n in changed}) < BOUND


def test_a_fault_is_seen(folder: Path, alone: dict[str, Tensor]) -> None:
    first = {name: value for name, value in alone.items() if name[:2] == "0." and value.any()}
    for rank in range(2):
        found = load_file(folder / file_of(FAULT, rank))
        assert apart({name: found[name] for name in first}, first) > FAR


def test_a_run_over_ranks_goes_on(folder: Path, pipeline: Path) -> None:
    """Bit for bit on as many ranks; also with one process."""
    told = [json.loads((folder / file_of("losses", rank)).read_text()) for rank in range(2)]
    assert told[0] == told[1] and len(told[0]["whole"]) == 2
    assert told[0]["rest"] == told[0]["whole"][1:]
    (state,) = (folder / "other" / "checkpoints").glob("step_00000001")
    for part in ("critic_weights", "critic_optimiser", "weights"):
        assert len(list(state.glob(f"{part}.shard?of2.safetensors"))) == 2
    alone = goes_on(pipeline, ALONE, folder / "other", 2, (1, 1))
    assert alone[0] == pytest.approx(told[0]["whole"][1], rel=1e-3)


@pytest.mark.parametrize("key", ["exchange", "exchange_queries"])
def test_exchanges_that_round_are_refused(pipeline: Path, key: str) -> None:
    message = refused(planned, pipeline, (2, 1), f"passes.ulysses_stream.{key}=fp8")
    assert f"ulysses_stream.{key}: no gradients flow" in message


def test_scores_of_other_ranks_are_refused(pipeline: Path) -> None:
    passes = "[canonicalise, per_frame_timesteps, frame_positions, text_per_chunk, block_causal]"
    message = refused(planned, pipeline, (2, 1), f"distil.real.passes={passes}")
    assert "distil.real.passes: 1 ranks share a clip here, and 2 the student's" in message
