"""Decoders that share a video's columns are together the one that makes all."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import AUTOENCODER as CONFIG
from streams import SHOTS, SIZES, opened, save_pipeline, streamed
from test_vae import make_recipe, vae
from torch import Tensor

from lltk.compiler import transform
from lltk.graph.recipe import open_recipe
from lltk.models import vae_columns, wan_vae
from lltk.models.vae_columns import Columns, cut, regions
from lltk.stream.state import read_state
from lltk.streaming import describe, plan_stream, stream_memory
from lltk.streaming.restoring import check_state

pytestmark = pytest.mark.cpu

WIDTH = 40
WAN22 = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}


@torch.no_grad()
def decoded(latents: Tensor, own: Columns | None) -> Tensor:
    """The video of some columns, or of all, by diffusers' decoder."""
    model = vae()
    if own is not None:
        model = copy.deepcopy(model)
        cut(model.decoder, wan_vae.validate_config(CONFIG), own, latents.shape[-1])
    video: Tensor = model.decode(latents).sample
    return video


def latents_of(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 4, 2, 1, width, generator=generator, dtype=torch.float64)


@given(st.integers(1, WIDTH - 2), st.integers(1, WIDTH - 1))
@settings(max_examples=6)
def test_parts_are_the_whole(one: int, other: int) -> None:
    latents = latents_of(WIDTH)
    first, second = sorted((one, WIDTH - 1 if one == other else other))
    cuts = [0, first, second, WIDTH]
    parts = [decoded(latents, own) for own in pairwise(cuts)]
    whole = decoded(latents, None)
    assert float((torch.cat(parts, dim=-1) - whole).abs().max()) < 1e-8


def test_no_column_beyond_is_superfluous(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, whole = latents_of(WIDTH), decoded(latents_of(WIDTH), None)
    exact = regions(wan_vae.validate_config(CONFIG), (0, 10), WIDTH)
    for place in range(len(exact) - 1):
        fewer = [(a, b - (i == place)) for i, (a, b) in enumerate(exact)]
        monkeypatch.setattr(vae_columns, "regions", lambda *_, fewer=fewer: fewer)
        short = decoded(latents, (0, 10))
        assert float((short - whole[..., : short.shape[-1]]).abs().max()) > 1e-6, place


def test_regions_of_the_published_decoder() -> None:
    assert regions(WAN22, (0, 40), 80) == [
        (0, 53), (0, 92), (0, 170), (0, 327), (0, 321), (0, 320)
    ]  # fmt: skip
    assert regions(WAN22, (40, 80), 80)[0] == (27, 80)


@pytest.mark.parametrize("columns", [[2, 2], [-1, 2], [1, 4]])
def test_columns_that_are_not_there_are_refused(columns: list[int]) -> None:
    message = refused(transform, make_recipe(columns=columns), weights=False)
    assert f"model.columns: {columns[0]} to {columns[1]} are none of latents 3 wide" in message


def test_a_stream_with_two_decoders(tmp_path: Path) -> None:
    """Frames are so wide that neither decoder makes all. The stream goes on from a state."""
    folder = save_pipeline(tmp_path / "pipeline")
    settings = (*SIZES, f"stream.pipeline={folder}", "geometry.width=128")
    plain, shared = (
        plan_stream(open_recipe("tiny_stream", (*settings, f"stream.decoder.device={devices}")))
        for devices in ("cpu", "[cpu, cpu]")
    )
    _, whole = streamed(plain, SHOTS[:1])
    _, parts = streamed(shared, SHOTS[:1])
    assert parts.shape == whole.shape and float((parts - whole).abs().max()) < 1e-4
    assert float((parts.roll(1, -1) - whole).abs().max()) > 1e-2
    stream, before = opened(shared, SHOTS[:1])
    with stream:
        next(stream.session)
        stream.save(tmp_path / "state")
        stream.session.close()
    other, rest = opened(shared, (), resume=tmp_path / "state")
    with other:
        list(other)
    assert torch.equal(torch.cat([*before, *rest], dim=2), parts)
    state = read_state(tmp_path / "state")
    caches = dict(state.delivery.caches)
    last = caches.pop("1.cache_0")
    for wrong in ({}, {"x.cache_0": last}, {"1.cache_0": last[:, :0]}, {"1.cache_0": last.half()}):
        delivery = replace(state.delivery, caches={**caches, **wrong})
        message = refused(check_state, tmp_path, replace(state, delivery=delivery), shared)
        assert message.startswith(f"{tmp_path}: decoder: 1.cache_0 is ")
    owners = stream_memory(shared)["cpu"]
    assert owners["decoder: weights"] == 2 * stream_memory(plain)["cpu"]["decoder: weights"]
    assert "cpu, float32 and cpu, float32" in describe(shared)["decoder"]
    assert "another model" in refused(opened, plain, (), resume=tmp_path / "state")
