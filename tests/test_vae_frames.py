"""Parts of a video's latents are those of the whole, and which frames they are made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import AUTOENCODER
from torch import Tensor

from lltk.models import vae_frames, wan_vae
from lltk.models.vae_frames import (
    Way,
    encode_part,
    encoded_frames,
    lookback,
    own_frames,
    shares,
    turns,
    window,
)
from lltk.models.wan_vae import encode

pytestmark = pytest.mark.cpu

LATENTS = 24
WAYS: tuple[Way, ...] = get_args(Way)
BOUND = 1e-12
WAN22 = wan_vae.validate_config(
    {**wan_vae.CONFIGS["wan22_vae"], "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    | {"temperal_downsample": [False, True, True], "base_dim": 4, "decoder_base_dim": 4}
    | {"z_dim": 4, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.5, 0.8, 1.1]}
)
"""Wan2.2's, with fewer channels."""
CONFIGS: list[dict[str, Any]] = [
    AUTOENCODER,
    WAN22,
    AUTOENCODER | {"num_res_blocks": 3},
    AUTOENCODER | {"is_residual": False, "num_res_blocks": 2},
    WAN22 | {"temperal_downsample": [True, False, True], "num_res_blocks": 1},
]


@cache
def vae(number: int = 0) -> Any:
    """One of them in float64. What its convolutions see first counts as much as the rest."""
    torch.manual_seed(0)
    made = wan_vae.build(CONFIGS[number]).double().eval().requires_grad_(False)
    for name, weight in made.encoder.named_parameters():
        if weight.dim() == 5:
            weight[:, :, :-1] *= 3
        if name.endswith("gamma"):
            weight.add_(0.3 * torch.randn_like(weight))
    return made


@cache
def video(sides: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, 4 * LATENTS - 3, *sides, generator=generator, dtype=torch.float64)


@cache
def whole(sides: tuple[int, int]) -> Tensor:
    return encode(vae(), video(sides))


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_how_far_the_encoder_looks_back(config: dict[str, Any]) -> None:
    """What is not a number is seen in all that is made from it, and in nothing else."""
    torch.manual_seed(0)
    model, far = wan_vae.build(config).eval(), lookback(config)
    space = config["scale_factor_spatial"]
    for latents in (1, 3):
        frames = torch.zeros(1, 3, 4 * (latents + far) + 1, space, space)
        frames[:, :, : 4 * latents] = torch.nan  # a window may begin with the next frame
        seen = encode(model, frames).isnan().amax(dim=(0, 1, 3, 4)).tolist()
        assert seen == [True] * (latents + far) + [False]


def test_wan22_looks_back_28_latents() -> None:
    assert lookback(WAN22) == 28
    assert window(WAN22, (40, 8)) == (range(48, 189), 28)
    assert window(WAN22, (28, 4)) == (range(125), 28)
    assert window(WAN22, (3, 1)) == (range(13), 3)


def test_both_sides_of_every_cut_are_the_whole() -> None:
    sides = (16, 32)
    assert lookback(AUTOENCODER) == 19 < LATENTS
    for cut in range(1, LATENTS):
        parts = [encode_part(vae(), video(sides), p) for p in ((0, cut), (cut, LATENTS - cut))]
        assert apart(torch.cat(parts, dim=2), whole(sides)) < BOUND, cut


@given(st.sets(st.integers(1, LATENTS), min_size=1), st.sampled_from([(48, 16), (16, 32)]))
@settings(max_examples=8)
def test_parts_are_the_whole(cuts: set[int], sides: tuple[int, int]) -> None:
    *_, end = bounds = [0, *sorted(cuts)]
    frames = video(sides)[:, :, : 4 * end - 3]
    parts = [encode_part(vae(), frames, (first, stop - first)) for first, stop in pairwise(bounds)]
    assert apart(torch.cat(parts, dim=2), whole(sides)[:, :, :end]) < BOUND


def test_no_frame_of_the_window_is_superfluous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window one latent shorter makes another first latent, and the same rest."""
    sides, part = (16, 32), (21, 3)
    wanted = whole(sides)[:, :, 21:24]
    assert apart(encode_part(vae(), video(sides), part), wanted) < BOUND
    monkeypatch.setattr(vae_frames, "lookback", lambda config: lookback(config) - 1)
    short = encode_part(vae(), video(sides), part)
    assert apart(short[:, :, :1], wanted[:, :, :1]) > 1e-6
    assert apart(short[:, :, 1:], wanted[:, :, 1:]) < BOUND


def test_frames_outside_the_window_are_not_read() -> None:
    sides = (16, 32)
    frames, dropped = window(AUTOENCODER, (21, 2))
    assert (frames, dropped) == (range(8, 89), 19)
    other = torch.full_like(video(sides), torch.nan)
    other[:, :, frames.start : frames.stop] = video(sides)[:, :, frames.start : frames.stop]
    assert apart(encode_part(vae(), other, (21, 2)), whole(sides)[:, :, 21:23]) < BOUND


@contextmanager
def frames_seen(model: Any) -> Iterator[list[int]]:
    """How many frames each call of the encoder is given."""
    found: list[int] = []
    hook = model.encoder.register_forward_pre_hook(lambda _, given: found.append(given[0].shape[2]))
    try:
        yield found
    finally:
        hook.remove()


@given(st.integers(1, 60), st.integers(1, 8))
def test_shares_and_turns_are_all_frames_once(more: int, size: int) -> None:
    latents = size + more - 1
    for parts in (shares(latents, size), turns(latents, size)):
        counts = [count for _, count in parts]
        assert max(counts) - min(counts) <= 1 and min(counts) >= 1 and len(parts) % size == 0
        frames = [frame for part in parts for frame in own_frames(WAN22, part)]
        assert frames == list(range(4 * latents - 3))
    assert max(counts) <= 2 and len(parts) < latents / 2 + size


def test_frames_that_ranks_encode() -> None:
    """64 latents are 253 frames."""
    counted = {way: encoded_frames(WAN22, 64, 8, way) for way in WAYS}
    assert counted["whole"] == [253] * 8
    assert counted["lookback"] == [29, 61, 93, 125, 141, 141, 141, 141]
    assert counted["shared"] == [29] + [32] * 7
    assert encoded_frames(WAN22, 64, 1, "lookback") == encoded_frames(WAN22, 64, 1, "shared")
    counted = {way: encoded_frames(AUTOENCODER, LATENTS, 3, way) for way in WAYS}
    for rank, part in enumerate(shares(LATENTS, 3)):
        with frames_seen(vae()) as seen:
            encode_part(vae(), video((16, 32)), part)
        assert sum(seen) == counted["lookback"][rank]
    with frames_seen(vae()) as seen:
        encode(vae(), video((16, 32)))
    assert sum(seen) == counted["whole"][0]


def test_a_video_that_is_no_whole_number_of_latents_is_refused() -> None:
    message = refused(encode_part, vae(), video((16, 32))[:, :, :8], (0, 1))
    assert "is no whole number of latents; give 1 + k·4 frames" in message


def test_more_ranks_than_latents_are_refused() -> None:
    message = refused(turns, 3, 4)
    assert "4 ranks cannot share 3 latents; take a longer one or fewer ranks" in message
