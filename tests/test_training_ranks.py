"""Ranks that share clips, weights or both train what one process does."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import replay_longlive
import replay_sp
import torch
from helpers import refused
from ranks import saved
from safetensors.torch import load_file
from torch import Tensor
from training_ranks import (
    CASES,
    CPU,
    FAULTS,
    RECORDED,
    ROUNDED,
    RUNS,
    STEPS,
    Clips,
    damage,
    file_of,
    goes_on,
    program,
    quantised,
    recorded,
    save_all,
    trained,
)

from lltk.graph.module import instantiate
from lltk.parallel.mesh import Mesh, meshed
from lltk.parallel.ranks import Ranks
from lltk.train.flow_matching import FlowMatching
from lltk.train.loop import Trainer
from lltk.train.recipe import TrainSection
from lltk.train.shards import divided
from lltk.train.state import load_training_state

pytestmark = pytest.mark.cpu

BOUND = 1e-10
"""In float64, relative to each tensor's largest value."""
FAR = 1e-3
Made = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank makes of its runs, in files."""
    made = tmp_path_factory.mktemp("ranks")
    saved(save_all, made)
    return made


@cache
def alone(case: str, steps: int = STEPS) -> Made:
    """What one process makes of a case."""
    return trained(case, Ranks(0, 1, CPU), steps=steps)


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
    """In one step."""
    (size, _, case), _ = FAULTS[fault]
    wanted = alone(case, 1)
    for rank in range(size):
        assert apart(load_file(folder / f"{fault}, {rank}"), wanted) > FAR


LOST = {"sent in fp8": (0.005, 0.02), "sent in nvfp4": (0.02, 0.1)}
"""Least and most of a step's gradient that rounding moves."""


@pytest.mark.parametrize("case", LOST)
def test_what_is_sent_rounded_is_near(folder: Path, case: str) -> None:
    """NVFP4, whose groups of values are the smaller, is rounded alike by two ranks and four."""
    first, *rest = (load_file(folder / file_of(run, 0)) for run in ROUNDED if run[2] == case)
    assert len(rest) == (case == "sent in nvfp4")
    assert all(apart(made, first) < BOUND for made in rest)
    wanted = alone(case)
    least, most = LOST[case]
    for name in ("0.loss", "0.norm"):
        assert 0 < abs(float(first[name] / wanted[name]) - 1) < most / 2, name
    assert least < error(first, wanted) < most


def error(ours: Made, theirs: Made) -> float:
    """What the first step's gradient differs by, in relation to its norm."""
    names = [name for name in theirs if name.startswith("0.gradient")]
    lost = sum(float((ours[name] - theirs[name]).square().sum()) for name in names)
    return (lost / sum(float(theirs[name].square().sum()) for name in names)) ** 0.5


@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_quantised_as_the_whole(folder: Path, size: int) -> None:
    """Every rank has the 4-bit values that one process has, bit for bit, and receives no more."""
    wanted = quantised(Ranks(0, 1, CPU))
    assert int(wanted.pop("received")) == 0
    for rank in range(size):
        found = load_file(folder / f"quantised on {size}, {rank}")
        received = int(found.pop("received"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    parts = sum(len(v) for name, v in wanted.items() if "codes_t" not in name and "_t_" not in name)
    scalars = 4 * sum(name.endswith(("_scale_0", "_scale_1")) for name in wanted)
    assert received == parts - scalars + size * scalars
    weights = program("nvfp4", 1).weights
    names = [name for name in weights if "blocks" in name and weights[name].dim() == 2]
    assert received < 0.29 * 2 * sum(weights[name].numel() for name in names)


def test_shards_that_cut_tiles_are_refused(folder: Path) -> None:
    made = instantiate(program("nvfp4", 1))
    mesh = Mesh(0, 8, 1, 8)
    assert refused(divided, made, mesh, True) == (
        "train.shards: 8 shards of blocks.0.attn1.to_q.weight would end within tiles of 16 of its "
        "64 rows, which have a scale in NVFP4; set train.shards to one of 1, 2, 4, or exclude it "
        "with nvfp4_train.exclude=['blocks.0.attn1.to_q']"
    )


def test_a_run_goes_on_with_other_ranks(folder: Path, tmp_path: Path) -> None:
    """With as many as before it is the same run, bit for bit."""

    first, last = losses(folder / "whole, 0")[:2], losses(folder / "whole, 0")[-2:]
    assert losses(folder / "whole, 1")[-2:] == last
    assert [losses(folder / f"resumed on 2, {rank}") for rank in range(2)] == [last, last]
    shutil.copytree(folder / "half", tmp_path / "half")
    assert goes_on(Ranks(0, 1, CPU), tmp_path / "half", 3) == pytest.approx(last, rel=1e-6)
    assert losses(folder / "resumed on 4, 3") == pytest.approx(last, rel=1e-6)
    assert first != pytest.approx(last, rel=1e-3)


def test_a_rank_reads_its_own_parts_alone(folder: Path) -> None:
    """Two ranks wrote half of the weights each; of four each reads a quarter."""
    (state,) = (folder / "half" / "checkpoints").iterdir()
    names = {path.name for path in state.iterdir()}
    assert names == {"checkpoint.json"} | {
        f"{part}.shard{rank}of2.safetensors"
        for part in ("weights", "ema", "optimiser")
        for rank in range(2)
    }
    whole = load_training_state(state)
    sizes = {name: value.numel() for name, value in {**whole.weights, **whole.optimiser}.items()}
    written = [load_file(state / f"weights.shard{rank}of2.safetensors") for rank in range(2)]
    assert sum(value.numel() for part in written for value in part.values()) == sum(
        value.numel() for value in whole.weights.values()
    )
    for size in (2, 4):
        read = [
            json.loads((folder / f"read on {size}, {rank}").read_text()) for rank in range(size)
        ]
        for name in whole.weights:  # as weights and, of the same name, as averages
            assert sum(each[name] for each in read) == 2 * sizes[name]
            assert sum(each[f"exp_avg.{name}"] for each in read) == sizes[name]
        assert (
            max(sum(each.values()) for each in read)
            < 1.2 * sum(map(sum, map(dict.values, read))) / size
        )


def test_replicas_write_a_state_once(folder: Path, tmp_path: Path) -> None:
    """Two sets of two shards each write one state, with which one process goes on."""
    (state,) = (folder / "replicas" / "checkpoints").iterdir()
    assert {path.name for path in state.glob("weights*")} == {
        f"weights.shard{rank}of2.safetensors" for rank in range(2)
    }
    shutil.copytree(folder / "replicas", tmp_path / "replicas")
    found = goes_on(Ranks(0, 1, CPU), tmp_path / "replicas", 3)
    assert found == pytest.approx(losses(folder / "whole, 0")[-2:], rel=1e-6)


def test_a_killed_rank_leaves_a_run_that_goes_on(folder: Path) -> None:
    """It was killed while it wrote its pieces of the second state: the first one stands."""
    whole = losses(folder / "whole, 0")
    for rank in range(2):
        assert losses(folder / f"after the kill, {rank}") == whole[2:]


def test_what_one_rank_cannot_write_ends_all(folder: Path) -> None:
    state = folder / "disk" / "checkpoints" / "step_00000001"
    for rank in range(2):
        told = (folder / f"full, {rank}").read_text()
        assert told.startswith(
            f"OSError: {state}: cannot be written (No space left on device); make"
        )
    assert not list(state.parent.iterdir())


def test_a_damaged_piece_is_refused_on_all_ranks(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "half", tmp_path / "half")
    file = damage(tmp_path / "half")
    message = refused(goes_on, Ranks(0, 1, CPU), tmp_path / "half", 3)
    assert message.startswith(f"{file}: was changed after it was written, or is damaged; remove")
    wanted = message.replace(str(tmp_path / "half"), str(folder / "damaged"))
    for rank in range(2):
        assert (folder / f"damaged, {rank}").read_text() == f"ValueError: {wanted}"
    file.unlink()
    assert refused(goes_on, Ranks(0, 1, CPU), tmp_path / "half", 3).startswith(
        f"{file}: is missing"
    )


def losses(file: Path) -> list[float]:
    """What `goes_on` gave."""
    found: list[float] = json.loads(file.read_text())
    return found


def test_weights_of_two_dtypes_are_divided(folder: Path, tmp_path: Path) -> None:
    """A model in bfloat16 keeps some weights in float32, which shards leave whole."""
    alone = goes_on(Ranks(0, 1, CPU), tmp_path / "rounded", 2, "bfloat16")
    assert losses(folder / "rounded, 0") == losses(folder / "rounded, 1")
    assert losses(folder / "rounded, 0") == pytest.approx(alone, rel=1e-2)
    assert alone[:2] != pytest.approx(alone[2:], rel=2e-2)


def test_a_run_of_another_recipe_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "half", tmp_path / "half")
    settings = {"steps": 3, "batch": 2, "lr": 2e-3, "ema_start": 1}
    made = program("text", 1)
    message = refused(
        Trainer,
        FlowMatching(made, instantiate(made)),
        Clips(made, CASES["text"]),
        TrainSection.model_validate(settings),
        tmp_path / "half",
        {"recipe": made.recipe | {"geometry": {}}, "log": [], "versions": {}},
        resume=True,
    )
    assert "was made by another recipe: geometry.batch was 1 and is None; geometry.chunk" in message


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
    [(4, 3, 1, "of balanced_sp or naive_sp"), (2, 1, 4, "train.shards"), (1, 2, 1, "torchrun")],
)
def test_a_mesh_that_is_not_the_ranks_is_refused(
    size: int, sequence: int, shards: int, key: str
) -> None:
    def opened() -> None:
        with meshed(Ranks(0, size, CPU), sequence, shards):
            pass

    message = refused(opened)
    assert key in message and f"the {size} that run" in message
