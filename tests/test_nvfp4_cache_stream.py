"""Streams whose cache is in NVFP4: all that knows of pages works with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import difference, make_recipe, refused, runnable, tiny_config
from streams import SHOTS, opened, planned, save_pipeline, streamed
from test_pages import SetRule, watch
from torch import Tensor

from lltk.graph.memory import estimate
from lltk.stream.memory import stream_memory
from lltk.stream.rollout import Rollout
from lltk.streaming import Stream, StreamPlan

pytestmark = pytest.mark.cpu

PASSES = (
    *("canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step"),
    *("commit", "nvfp4_cache", "regionalise", "lower"),
)
NVFP4 = f"passes=[{', '.join(PASSES)}]"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def plan(pipeline: Path) -> StreamPlan:
    return planned(pipeline, NVFP4)


def raw(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in tensors.items()}


def cached(stream: Stream) -> dict[str, Tensor]:
    """A copy of the cache's bytes, [B, P, …] each."""
    return {n: t.clone() for n, t in raw(dict(stream.session.pages)).items()}


def test_a_stream_repeats_and_differs_from_the_plain_one(pipeline: Path, plan: StreamPlan) -> None:
    """The window wraps: six chunks over four pages."""
    latents, video = streamed(plan)
    again, again_video = streamed(plan)
    assert torch.equal(latents, again) and torch.equal(video, again_video)
    plain, _ = streamed(planned(pipeline))
    apart = difference({"latents": latents}, {"latents": plain})
    assert 0.001 < apart < 0.5
    first = slice(0, 2)
    assert torch.equal(latents[:, :, first], plain[:, :, first]), "the first chunk reads no page"


def test_a_state_with_broken_scales_is_refused(plan: StreamPlan) -> None:
    stream, _ = opened(plan)
    with stream:
        next(stream.session)
        state = stream.session.state()
    raw(dict(state.tensors))["cache.v_pages_scales_0"].flatten()[3] = 0x7F
    other, _ = opened(plan)
    message = refused(other.session.restore, state)
    assert "v_pages_scales_0 has block scales that are NaN or negative" in message


@pytest.mark.parametrize("at", [1, 5])
def test_a_saved_stream_goes_on_to_the_bit(plan: StreamPlan, tmp_path: Path, at: int) -> None:
    whole, video = streamed(plan)
    stream, before = opened(plan)
    with stream:
        for _ in range(at):
            next(stream.session)
        stream.save(tmp_path / "state")
        held = cached(stream)
    other, rest = opened(plan, (), resume=tmp_path / "state")
    found = cached(other)
    assert found.keys() == held.keys() == plan.transformer.pages.keys()
    assert all(torch.equal(found[name], held[name]) for name in held)
    with other:
        latents = torch.cat([report.latents for report in other], dim=2)
    assert torch.equal(latents, whole[:, :, 2 * at :])
    assert torch.equal(torch.cat([*before, *rest], dim=2), video)


def test_a_state_of_other_pages_is_refused(
    pipeline: Path, plan: StreamPlan, tmp_path: Path
) -> None:
    stream, _ = opened(plan)
    with stream:
        next(stream.session)
        stream.save(tmp_path / "state")
    message = refused(opened, planned(pipeline), (), resume=tmp_path / "state")
    assert "was made with another model, recipe or version (transformer:" in message


def test_sinks_keep_their_bytes(pipeline: Path) -> None:
    """Through a cut and a recache, which writes every other page that is held."""
    stream, _ = opened(planned(pipeline, NVFP4, "stream.recache=true"))
    before: dict[int, dict[str, Tensor]] = {}
    changed = 0
    with stream:
        while stream.session.script:
            if stream.session.chunk in (2, 5):
                stream.switch("a green star falling")
            next(stream.session)
            table, pages = stream.session.table, cached(stream)
            held = {
                chunk: {name: page[:, slot] for name, page in pages.items()}
                for chunk, slot in table.slots.items()
            }
            for chunk in before.keys() & held.keys():
                same = all(torch.equal(before[chunk][n], held[chunk][n]) for n in held[chunk])
                assert same or chunk not in table.sinks(), f"sink {chunk}"
                changed += not same
            before = held
    assert changed, "no recache wrote a page"


@torch.no_grad()
def test_only_a_commit_writes_and_only_its_page() -> None:
    rule = SetRule(2, 12, 4, True, frozenset({3, 7}))
    sizes = {"chunk": rule.chunk, "window": rule.window, "sink": rule.sink}
    config = tiny_config(attention_head_dim=16)
    watch(Rollout(*runnable(make_recipe("stream", PASSES, config=config, **sizes))), rule, 10)


def test_guidance_has_a_second_cache_in_nvfp4(pipeline: Path, plan: StreamPlan) -> None:
    guided = planned(pipeline, NVFP4, "stream.guidance=2", "stream.negative_prompt=grey")
    stream, _ = opened(guided, SHOTS[:1])
    with stream:
        for _ in range(2):
            next(stream.session)
        state = stream.session.state().tensors
    names = set(plan.transformer.pages)
    kinds = {name.rpartition("_")[0].rpartition("_pages_")[2] for name in names}
    assert kinds == {"codes", "scales", "decode_scales", "means"}
    found = {name for name in state if "_pages_" in name}
    assert found == {f"{cache}.{name}" for cache in ("cache", "unconditional") for name in names}
    codes = [state[name] for name in sorted(found) if "k_pages_codes_1" in name]
    assert len(codes) == 2 and not torch.equal(*codes)


def test_memory_is_what_is_held(pipeline: Path, plan: StreamPlan) -> None:
    stream, _ = opened(plan)
    held = sum(page.nbytes for page in stream.session.pages.values())
    assert estimate(plan.transformer)["cache pages"] == held
    assert stream_memory(plan.parts)["cpu"]["cache pages"] == held
    assert held < estimate(planned(pipeline).transformer)["cache pages"]
