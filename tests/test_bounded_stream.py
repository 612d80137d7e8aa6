"""Streams whose positions are counted within the window, for videos of any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import make_recipe, refused, runnable
from hypothesis import given
from hypothesis import strategies as st
from streams import SHOTS, opened, planned, streamed
from test_pages import CHUNKS, SetRule, geometry_of, rules
from torch import Tensor

from lltk.graph.contract import Role
from lltk.graph.geometry import Geometry
from lltk.graph.module import instantiate
from lltk.stream.pages import PageTable
from lltk.stream.positions import bounded_positions, frame_positions, largest_position
from lltk.stream.rollout import Rollout
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.stream.script import Shot
from lltk.stream.text import TextEncoder
from lltk.streaming import describe, load_models

pytestmark = pytest.mark.cpu

_CAUSAL = (
    *("canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step"),
    "commit",
)


def listed(*passes: str) -> str:
    """The override that sets a stream's passes after those that make it causal."""
    return f"passes=[{', '.join((*_CAUSAL, *passes, 'regionalise', 'lower'))}]"


BOUNDED = listed("bounded_positions")
LONG = [SHOTS[0], SHOTS[1].model_copy(update={"seconds": 6.0})]
"""Nine chunks, of which the fourth opens a shot. Chunk 4 is the first that misses an older one."""


# Where frames stand


@given(rules(CHUNKS), st.sampled_from([0.0, 0.25, 1.5, 8.0]))
def test_positions_stay_within_the_window(rule: SetRule, offset: float) -> None:
    """They are those of the whole video until a chunk is evicted; neighbours stay neighbours."""
    geometry, size = geometry_of(rule), rule.chunk
    table, cuts = PageTable(geometry), [0]
    cuts += [sum(cut <= chunk for cut in rule.cuts) for chunk in range(1, CHUNKS)]
    for chunk in range(CHUNKS):
        seen = [*table.slots, chunk]
        made = bounded_positions([cuts[each] for each in seen], size, offset)
        assert made.shape == (len(seen) * size,) and made.dtype == torch.float64
        assert made[0] == 0 and bool((made.diff() >= 1).all())
        assert made[-1] <= largest_position(geometry, offset)
        absolute = frame_positions(cuts[: chunk + 1], size, offset).view(-1, size)[seen]
        if seen == list(range(chunk + 1)):
            assert torch.equal(made, absolute.flatten())
        firsts = made.view(-1, size)[:, 0]
        for index in range(1, len(seen)):
            if seen[index] == seen[index - 1] + 1:
                apart = absolute[index, 0] - absolute[index - 1, 0]
                assert firsts[index] - firsts[index - 1] == apart
        table.commit(chunk in rule.cuts)


def test_the_largest_position_is_reached() -> None:
    """In a video that is cut at every chunk, without sinks of shots."""
    geometry = Geometry(height=64, width=64, chunk=2, window=8, sink=2, shot_sink=False, frames=2)
    assert largest_position(geometry) == 7 and largest_position(geometry, 1.5) == 11.5
    assert bounded_positions([0, 5, 6, 7], 2, 1.5).tolist() == [0, 1, 3.5, 4.5, 7, 8, 10.5, 11.5]
    assert bounded_positions([0, 5, 5], 2).tolist() == [0, 1, 2, 3, 4, 5]


# Sessions


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("more", [(), ("stream.guidance=2", "stream.negative_prompt=grey")])
def test_until_the_first_eviction_nothing_changes(
    pipeline: Path, dtype: str, more: tuple[str, ...]
) -> None:
    """Bit for bit, with an offset at the cut; afterwards sinks are nearer than they were."""
    options = (f"model.dtype={dtype}", "stream.shot_offset=1.5", *more)
    wanted, _ = streamed(planned(pipeline, *options), LONG)
    latents, _ = streamed(planned(pipeline, BOUNDED, *options), LONG)
    assert torch.equal(latents[:, :, :8], wanted[:, :, :8])
    changed = (latents - wanted)[:, :, 8:].unflatten(2, (-1, 2)).abs().amax((0, 1, 3, 4, 5))
    assert bool((changed > 1e-3).all())


def given_positions(stream: Any, chunks: int) -> list[list[float]]:
    """The positions that each call of an endless stream gets, through switches and a cut."""
    found: list[list[float]] = []
    run = TorchRuntime._run

    def spy(runtime: TorchRuntime, graph: str, inputs: dict[Role, Tensor], table: Any) -> Any:
        found.append(inputs[Role.POSITIONS].tolist())
        return run(runtime, graph, inputs, table)

    with stream, patch.object(TorchRuntime, "_run", spy):
        for index in range(chunks):
            if index in (3, 9):
                stream.switch("a green star falling", recache=True)
            if index in (6, 7, 14):
                stream.cut("a blue square moving up", 1)
            next(stream)
    return found


def test_an_endless_streams_positions_stay_bounded(pipeline: Path) -> None:
    options = ("stream.shot_offset=1.5",)
    largest = {}
    for passes in ((BOUNDED,), ()):
        plan = planned(pipeline, *passes, *options)
        stream = load_models(plan).open(lambda video: None, SHOTS[:1], endless=True)
        largest[passes] = max(max(each) for each in given_positions(stream, 20))
    assert largest[BOUNDED,] <= largest_position(plan.geometry, 1.5) == 11.5
    assert largest[()] == 39 + 3 * 1.5


def test_positions_by_hand(pipeline: Path) -> None:
    """The chunk's, after those of the pages that it sees, in the order of the table."""
    stream, _ = opened(planned(pipeline, BOUNDED, "stream.shot_offset=0.5"), LONG)
    cache = stream.session._cache
    with stream:
        for _ in range(6):
            next(stream)
        assert list(stream.session.table.slots) == [0, 3, 5]
        held = cache.positions(stream.session.timeline.chunks[0]).tolist()
    assert held == [0, 1, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


@pytest.mark.parametrize("offset", [0.0, 1.5])
def test_chunks_are_what_the_parts_give(pipeline: Path, offset: float) -> None:
    """A chunk that misses older ones, made again over the pages that it saw."""
    plan = planned(pipeline, BOUNDED, f"stream.shot_offset={offset}", "stream.steps=1")
    stream, _ = opened(plan, LONG)
    program = plan.transformer
    with stream, torch.no_grad():
        for _ in range(6):
            next(stream)
        runtime = Rollout(program, instantiate(program))._runtime
        for name, page in runtime.pages.items():
            page.copy_(stream.session.pages[name])
        slots = stream.session.table.slots
        report = next(stream)
    encoder = TextEncoder(plan.folder, program.geometry.text_tokens)
    runtime.set_prompt(encoder.encode([report.chunk.prompt]))
    positions = torch.arange(8.0, dtype=torch.float64)
    positions[2:] += offset
    table = [slots[chunk] for chunk in (0, 3, 5)]
    slot = stream.session.table.slots[6]
    runtime.commit(report.latents, positions, table, slot)
    for name, page in runtime.pages.items():
        assert torch.equal(page[:, slot], stream.session.pages[name][:, slot]), name
    other = positions.clone()
    other[:2] -= 3
    runtime.commit(report.latents, other, table, slot)
    name = "k_pages_1"
    assert not torch.equal(runtime.pages[name][:, slot], stream.session.pages[name][:, slot])


def test_recache_is_committing_from_scratch(pipeline: Path) -> None:
    """The second chunk that is written again sees the first one as it is then."""
    plan = planned(pipeline, BOUNDED)
    script = [Shot(caption="a red circle moving left", seconds=6)]
    stream, _ = opened(plan, script)
    program, prompt, latents = plan.transformer, "a green star falling", []
    with stream, torch.no_grad():
        latents = [next(stream).latents for _ in range(5)]
        slots = stream.session.table.slots
        runtime = Rollout(program, instantiate(program))._runtime
        for name, page in runtime.pages.items():
            page[:, slots[0]] = stream.session.pages[name][:, slots[0]]
        stream.switch(prompt, recache=True)
        next(stream)
    assert sorted(slots) == [0, 3, 4]
    runtime.set_prompt(TextEncoder(plan.folder, program.geometry.text_tokens).encode([prompt]))
    runtime.commit(latents[3], torch.arange(4.0, dtype=torch.float64), [slots[0]], slots[3])
    older = [slots[0], slots[3]]
    runtime.commit(latents[4], torch.arange(6.0, dtype=torch.float64), older, slots[4])
    for name, page in runtime.pages.items():
        assert torch.equal(page[:, slots[4]], stream.session.pages[name][:, slots[4]]), name


def test_pages_in_nvfp4_are_near_those_of_absolute_positions(pipeline: Path) -> None:
    wanted, _ = streamed(planned(pipeline, listed("nvfp4_cache")), LONG)
    plan = planned(pipeline, listed("nvfp4_cache", "bounded_positions"))
    latents, _ = streamed(plan, LONG)
    assert torch.isfinite(latents).all()
    assert torch.equal(latents[:, :, :2], wanted[:, :, :2]), "the first chunk reads no pages"
    before = (latents - wanted)[:, :, 2:8].norm() / wanted[:, :, 2:8].norm()
    assert 0 < float(before) < 0.1, "keys are rounded before they are turned"


def test_a_resumed_stream_goes_on_as_it_was(pipeline: Path, tmp_path: Path) -> None:
    plan = planned(pipeline, BOUNDED, "stream.shot_offset=1.5")
    wanted, _ = streamed(plan, LONG)
    stream, _ = opened(plan, LONG)
    with stream:
        for _ in range(6):
            next(stream)
        stream.save(tmp_path / "state")
    again, _ = opened(plan, (), resume=tmp_path / "state")
    with again:
        latents = torch.cat([report.latents for report in again], dim=2)
    assert torch.equal(latents, wanted[:, :, 12:])
    absolute = planned(pipeline, "stream.shot_offset=1.5")
    message = refused(opened, absolute, (), resume=tmp_path / "state")
    assert "was made with another model, recipe or version (transformer:" in message


def test_a_plan_says_how_positions_are_counted(pipeline: Path) -> None:
    plan = planned(pipeline, BOUNDED, "stream.shot_offset=1.5")
    assert describe(plan)["positions"] == "counted within the window, up to 11.5 latent frames"
    assert describe(planned(pipeline))["positions"] == "absolute"


# Runs of single passes


def test_a_rollout_counts_its_positions() -> None:
    made: dict[tuple[str, ...], list[list[float]]] = {}
    for passes in (("bounded_positions",), ()):
        steps = (*_CAUSAL, *passes, "regionalise", "lower")
        run = Rollout(*runnable(make_recipe("stream", steps)))
        latents = torch.randn(1, 4, 2, 4, 4)
        run.set_text(torch.randn(1, 5, 16))
        made[passes] = []
        for _ in range(6):
            made[passes].append(run.positions().tolist())
            run.commit(latents, run.positions())
    assert made[()] == [[2 * chunk, 2 * chunk + 1] for chunk in range(6)]
    counts = [2, 4, 6, 8, 8, 8]
    assert made[("bounded_positions",)] == [list(range(count)) for count in counts]


@torch.no_grad()
def test_positions_go_to_the_pages_that_the_table_lists() -> None:
    """The table's order is not the pages'; a page that is not listed has any position."""
    steps = (*_CAUSAL, "bounded_positions", "regionalise", "lower")
    program, module = runnable(make_recipe("stream", steps))
    runtime = TorchRuntime(program, module)
    for page in runtime.pages.values():
        page.copy_(torch.randn(page.shape))
    latents, time = torch.randn(1, 4, 2, 4, 4), torch.full((1, 2), 500.0)
    runtime.set_prompt(torch.randn(1, 5, 16))
    places = torch.tensor([0, 1, 5.5, 6.5, 9, 10], dtype=torch.float64)
    made = runtime.step(latents, time, places, (2, 0))
    given = runtime._given("step", runtime._moving("step", {
        Role.LATENTS: latents, Role.TIME: time, Role.POSITIONS: places,
    }, (2, 0)))  # fmt: skip
    by_slot = [5.5, 6.5, 77, 78, 0, 1, 77, 78]
    given["page_positions"] = torch.tensor(by_slot, dtype=torch.float64)
    given["positions"] = places[4:]
    assert torch.equal(module("step", dict(given))["sample"], made)
    given["page_positions"] = given["page_positions"].roll(4)
    assert not torch.allclose(module("step", given)["sample"], made, atol=1e-3)


def test_positions_that_do_not_fit_the_table_are_a_defect() -> None:
    steps = (*_CAUSAL, "bounded_positions", "regionalise", "lower")
    run = Rollout(*runnable(make_recipe("stream", steps)))
    run.set_text(torch.randn(1, 5, 16))
    with pytest.raises(AssertionError, match="are not the listed pages' and its own"):
        run.commit(torch.randn(1, 4, 2, 4, 4), torch.arange(4.0, dtype=torch.float64))
