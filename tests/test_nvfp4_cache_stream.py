"""Streams whose cache is in NVFP4: all that knows of pages works with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, make_recipe, refused, runnable, tiny_config
from streams import SHOTS, opened, planned, streamed
from test_pages import SetRule, watch
from torch import Tensor

from lltk.graph.memory import estimate
from lltk.stream.rollout import Rollout
from lltk.stream.script import Shot
from lltk.streaming import Stream, StreamPlan, stream_memory

pytestmark = pytest.mark.cpu

PASSES = (
    *("canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step"),
    *("commit", "nvfp4_cache", "regionalise", "lower"),
)
NVFP4 = f"passes=[{', '.join(PASSES)}]"


@pytest.fixture(scope="module")
def plan(pipeline: Path) -> StreamPlan:
    return planned(pipeline, NVFP4)


def raw(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in tensors.items()}


def cached(stream: Stream) -> dict[str, Tensor]:
    """A copy of the cache's bytes, each part [B, P, …]."""
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


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("v_pages_scales_0", torch.nan, "block scales that are NaN or negative"),
        ("v_pages_scales_0", -1.0, "block scales that are NaN or negative"),
        ("k_pages_decode_scales_1", torch.nan, "values that are not finite"),
        ("k_pages_decode_scales_1", torch.inf, "values that are not finite"),
        ("k_pages_decode_scales_1", -1.0, "decode scales that are negative"),
        ("v_pages_means_0", torch.nan, "values that are not finite"),
        ("v_pages_means_0", -1.0, None),
        ("v_pages_scales_0", 1.0, None),
        ("k_pages_decode_scales_1", 1.0, None),
    ],
)
def test_a_state_with_broken_scales_is_refused(
    plan: StreamPlan, tmp_path: Path, name: str, value: float, what: str | None
) -> None:
    """It is refused where it is restored, and where it would be saved."""
    stream, _ = opened(plan)
    other, _ = opened(plan)
    with stream:
        next(stream.session)
        state = stream.session.state()
        page = state.pages[0][name]
        page[0, stream.session.table.slots[0]].view(-1)[1] = value
        if what is None:
            other.session.restore(state)
            stream.save(tmp_path / "state")
            return
        for action in (lambda: other.session.restore(state), lambda: stream.save(tmp_path / "s")):
            assert refused(action).startswith(f"state: {name} has {what}; ")
    assert not list(tmp_path.iterdir())
    assert not other.session.pages[name].float().any(), "nothing was taken over"


DECODED = (
    *("canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step"),
    *("commit", "fuse_norm_rope", "nvfp4_cache", "fp8_infer", "{}", "regionalise"),
    "lower: {{fp8_quantise_attention: fp8_decode_torch}}",
)


def decoded(pipeline: Path, keep: bool) -> StreamPlan:
    """A stream whose attention decodes pages to E4M3, kept from commit to commit or not."""
    fused = f"fuse_attention_quantise: {{keep_decoded: {str(keep).lower()}}}"
    return planned(pipeline, f"passes=[{', '.join(DECODED).format(fused)}]")


def test_pages_that_are_kept_decoded_change_no_bit(pipeline: Path, tmp_path: Path) -> None:
    """The window wraps, a shot begins, a prompt is switched and chunks are committed again."""
    made = []
    for keep in (False, True):
        stream, video = opened(decoded(pipeline, keep))
        with stream:
            for index in range(6):
                if index == 4:
                    stream.switch("a green star falling", recache=True)
                    stream.save(tmp_path / f"{keep}")
                next(stream)
        resumed, rest = opened(decoded(pipeline, keep), (), resume=tmp_path / f"{keep}")
        with resumed:
            next(resumed)
        made.append((torch.cat(video, 2), torch.cat(rest, 2)))
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_leaves_out_decoded_pages_and_they_are_made_again(
    pipeline: Path, tmp_path: Path
) -> None:
    """Those of every chunk that is held, to the bit; `lltk stream --resume` reads it too."""
    stream, _ = opened(decoded(pipeline, True))
    with stream:
        for _ in range(5):
            next(stream)
        stream.save(tmp_path / "state")
        state, held = stream.session.state(), list(stream.session.table.slots.values())
        wanted = cached(stream)
    made = sorted(wanted.keys() - state.pages[0].keys())
    assert made == sorted(
        f"{kind}_pages_{part}_{layer}"
        for kind in "kv" for part in ("decoded", "largest") for layer in (0, 1)
    )  # fmt: skip
    plain, _ = opened(decoded(pipeline, False))
    assert plain.session.pages.keys() == state.pages[0].keys()
    resumed, _ = opened(decoded(pipeline, True), (), resume=tmp_path / "state")
    found = cached(resumed)
    for name in made:
        assert torch.equal(found[name][:, held], wanted[name][:, held])
        first, *others = held
        assert not any(torch.equal(wanted[name][:, first], wanted[name][:, o]) for o in others)


def breaking(stream: Stream, weight: str, recached: bool = False) -> None:
    """Let the next commit or recache meet a weight that makes its values overflow."""
    runtime: Any = stream.session._runtime
    commit = runtime.commit

    def broken(latents: Tensor, positions: Tensor, table: Sequence[int], slot: int) -> None:
        if recached == (slot in stream.session.table.slots.values()):
            with torch.no_grad():
                runtime._module.get_parameter(weight).fill_(3e38)
        commit(latents, positions, table, slot)

    runtime.commit = broken


@pytest.mark.parametrize("passes", [NVFP4, "stream.seed=0"], ids=["nvfp4", "plain"])
@pytest.mark.parametrize("weight", ["blocks.1.attn1.norm_k.weight", "blocks.0.ffn.net.2.weight"])
def test_a_commit_that_is_not_finite_stops_it(
    pipeline: Path, tmp_path: Path, passes: str, weight: str
) -> None:
    """The error comes at once and names chunk and layer. The state is not saved."""
    stream, _ = opened(planned(pipeline, passes))
    with stream:
        next(stream.session)
        breaking(stream, weight)
        message = refused(next, stream.session)
        assert re.match(
            r"chunk 1, commit: \w+ \(blocks\.[01]\b.*\) is not finite; keep its", message
        )
        assert message.count(weight.rpartition(".")[0]) == 1
        assert "chunk 1 was interrupted" in refused(stream.save, tmp_path / "state")
        assert refused(stream.session._runtime.state).startswith("state: k_pages_")
    assert not list(tmp_path.iterdir())


def test_what_a_commit_does_not_read_does_not_stop_it(plan: StreamPlan, tmp_path: Path) -> None:
    stream, _ = opened(plan)
    with stream:
        next(stream.session)
        breaking(stream, "blocks.1.ffn.net.2.weight")
        next(stream.session)
        stream.save(tmp_path / "state")
        assert refused(next, stream.session).startswith("chunk 2, pass 0: ")


def test_a_recache_that_is_not_finite_stops_it(plan: StreamPlan, tmp_path: Path) -> None:
    """Before the chunk that would attend to it goes to the decoder, the oldest page first."""
    stream, video = opened(plan, [Shot(caption="a red circle moving left", seconds=6)])
    with stream:
        for _ in range(4):
            next(stream.session)
        breaking(stream, "blocks.1.attn1.norm_k.weight", recached=True)
        stream.switch("a green star falling", recache=True)
        pages = stream.session.table.slots
        message = refused(next, stream.session)
        assert stream.session.table.slots == pages
        assert message.startswith("chunk 4, recache: ") and "(blocks.1.attn1.norm_k)" in message
        message = refused(stream.save, tmp_path / "state")
    assert message.startswith("state: k_pages_decode_scales_1 has values that are not finite; ")
    assert sum(part.shape[2] for part in video) == 29


def test_a_page_tells_what_no_node_does(plan: StreamPlan) -> None:
    """A page may overflow in a kernel only: it rounds otherwise than the graph, node by node."""
    stream, _ = opened(plan)
    with stream:
        runtime: Any = stream.session._runtime
        commit = runtime.commit

        def broken(latents: Tensor, positions: Tensor, table: Sequence[int], slot: int) -> None:
            commit(latents, positions, table, slot)
            runtime.pages["v_pages_decode_scales_0"][:, slot, 1] = torch.nan

        next(stream.session)
        runtime.commit = broken
        message = refused(next, stream.session)
    assert message.startswith("chunk 1, commit: v_pages_decode_scales_0 is not finite; ")


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
    """They do through a cut, and through a recache that writes every other held page."""
    stream, _ = opened(planned(pipeline, NVFP4, "stream.recache=true"))
    before: dict[int, dict[str, Tensor]] = {}
    changed = 0
    with stream:
        while stream.session.timeline.chunks:
            if stream.session.timeline.index in (2, 5):
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
        state = stream.session.state()
    names = set(plan.transformer.pages)
    kinds = {name.rpartition("_")[0].rpartition("_pages_")[2] for name in names}
    assert kinds == {"codes", "scales", "decode_scales", "means"}
    assert [set(pages) for pages in state.pages] == [names, names]
    assert not torch.equal(*(pages["k_pages_codes_1"] for pages in state.pages))


def test_memory_is_what_is_held(pipeline: Path, plan: StreamPlan) -> None:
    stream, _ = opened(plan)
    held = sum(page.nbytes for page in stream.session.pages.values())
    assert estimate(plan.transformer)["cache pages"] == held
    assert stream_memory(plan)["cpu"]["cache pages"] == held
    assert held < estimate(planned(pipeline).transformer)["cache pages"]
