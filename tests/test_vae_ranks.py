"""Ranks that share a video's frames encode what one does, and no frame twice."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from encoding_ranks import FAULTS, FAULTY, RUNS, SIZES, Odd, save_all, video
from helpers import refused
from prepared_sets import contents
from ranks import saved
from safetensors.torch import load_file
from test_vae_frames import BOUND, CONFIGS, apart, vae

from lltk.models.vae_frames import encoded_frames, turns
from lltk.models.vae_ranks import encode_shared
from lltk.models.wan_vae import encode
from lltk.train.data import first_samples

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank makes, in files."""
    made = tmp_path_factory.mktemp("ranks")
    saved(save_all, made)
    return made


@pytest.mark.parametrize("size", SIZES)
def test_ranks_encode_what_one_does(folder: Path, size: int) -> None:
    """No frame is encoded twice. Afterwards each rank can encode by itself."""
    for rank, (number, latents) in product(range(size), RUNS):
        made = load_file(folder / f", {size} ranks, {rank}")
        ours, frames = made[f"{number}, {latents}"], made[f"{number}, {latents} frames"]
        assert ours.dtype == torch.float64
        assert apart(ours, encode(vae(number), video(latents))) < BOUND, (rank, number, latents)
        counted = encoded_frames(CONFIGS[number], latents, size, "shared")
        assert int(frames.sum()) == counted[rank] and sum(counted) == 4 * latents - 3
        assert len(frames) == len(turns(latents, size)[rank::size])
        assert apart(made["after"], encode(vae(), video(4))) < BOUND


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_encode_apart_make_what_one_does(folder: Path, size: int) -> None:
    for rank, (number, latents) in product(range(size), RUNS):
        made = load_file(folder / f", {size} ranks, {rank}")
        wanted = encode(vae(number), video(latents))
        assert apart(made[f"{number}, {latents} apart"], wanted) < BOUND, (rank, number, latents)
        counted = encoded_frames(CONFIGS[number], latents, size, "lookback")
        assert int(made[f"{number}, {latents} apart frames"].sum()) == counted[rank]


@pytest.mark.parametrize("fault", FAULTS)
def test_frames_that_are_not_handed_on_are_missed(folder: Path, fault: str) -> None:
    """All latents but those of the first part differ."""
    size, (number, latents) = FAULTY
    made = load_file(folder / f"{fault}, {size} ranks, 1")[f"{number}, {latents}"]
    wanted, first = encode(vae(number), video(latents)), turns(latents, size)[0][1]
    assert apart(made[:, :, :first], wanted[:, :, :first]) < BOUND
    assert float((made - wanted).abs().amax((0, 1, 3, 4))[first:].min()) > 1e-6


def test_ranks_that_are_not_there_are_refused() -> None:
    message = refused(encode_shared, pytest.fail, vae().config, video(4), 2)
    assert "the recipe is for 2" in message and "1 ran it" in message


def test_clips_that_train_are_those_of_one_process(folder: Path) -> None:
    """New clips are encoded by shares, which rounds differently. Kept ones are the same bits."""
    for name in ("world", "kept"):
        wanted = [load_file(folder / f"{name} alone, {group}") for group in range(2)]
        for path in sorted(folder.glob(f"{name}, * ranks, *")):
            made, own = load_file(path), wanted[int(path.name[-1]) // 2]
            assert made.keys() == own.keys()
            for key, value in own.items():
                shared = "latents" in key and (name != "kept" or "other" in key)
                assert apart(made[key].double(), value.double()) <= (1e-5 if shared else 0), key
        assert apart(wanted[0]["latents"], wanted[1]["latents"]) > 0.01


def test_ranks_prepare_what_one_does(folder: Path) -> None:
    """So do two that go on where one was killed while it wrote its second shard."""
    wanted = contents(folder / "prepared alone")
    assert len(wanted) == 5
    assert contents(folder / "prepared") == wanted
    assert contents(folder / "killed") == wanted


def test_blocks_are_made_once_and_spread(folder: Path) -> None:
    """Nine samples in blocks of two: with four ranks the first makes two blocks."""
    wanted = first_samples(Odd(), 7, 9, block=2)
    blocks = [0, 2, 4, 6, 8]
    for size in SIZES:
        for rank in range(size):
            made = load_file(folder / f"odd, {size} ranks, {rank}")
            assert made.pop("asked").tolist() == blocks[rank::size]
            assert made.keys() == wanted.keys()
            assert all(torch.equal(made[name], value) for name, value in wanted.items())
            assert all(made[name].dtype == value.dtype for name, value in wanted.items())
