"""The page table against the set rule, frame by frame; the cache's bytes over a whole video."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from dataclasses import replace as with_changes

import pytest
import torch
from helpers import make_recipe, runnable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lltk.graph.geometry import Geometry
from lltk.stream.pages import ChunkPages, PageTable
from lltk.stream.rollout import Rollout

pytestmark = pytest.mark.cpu


@dataclass(frozen=True)
class SetRule:
    """Which frames a chunk's keys come from, restated from the rule's own words.

    Attributes:
        chunk, window, sink: C, W and S, in frames.
        shot_sink: whether the latest shot keeps a sink.
        cuts: chunks that open a shot, besides the first.
    """

    chunk: int
    window: int
    sink: int
    shot_sink: bool
    cuts: Collection[int]

    def own(self, index: int) -> set[int]:
        """The frames of a chunk."""
        return set(range(index * self.chunk, (index + 1) * self.chunk))

    def sinks(self, index: int) -> set[int]:
        """Sink frames, as far as committed, while chunk ``index`` is in flight."""
        kept = set(range(self.sink))
        if self.shot_sink:
            latest = max([0, *(cut for cut in self.cuts if cut < index)])
            kept |= set(range(latest * self.chunk, latest * self.chunk + self.sink))
        return {frame for frame in kept if frame < index * self.chunk}

    def attended(self, chunks: int) -> list[set[int]]:
        """For each chunk, the frames it attends to, its own among them."""
        held: set[int] = set()
        result = []
        for index in range(chunks):
            seen = self.sinks(index) & held
            newest = sorted(held - seen, reverse=True)
            seen |= set(newest[: self.window - self.chunk - len(seen)])
            result.append(seen | self.own(index))
            held = result[-1]
        return result


@st.composite
def rules(draw: st.DrawFn, chunks: int, largest_chunk: int = 3) -> SetRule:
    """A geometry that is allowed, and cuts anywhere, consecutive ones among them."""
    chunk = draw(st.integers(1, largest_chunk))
    sink, shot_sink = draw(st.integers(0, 3)), draw(st.booleans())
    least = sink * (2 if shot_sink else 1) + 1
    window = draw(st.integers(least, least + 4))
    cuts = draw(st.sets(st.integers(1, chunks - 1)))
    return SetRule(chunk, window * chunk, sink * chunk, shot_sink, frozenset(cuts))


def geometry_of(rule: SetRule) -> Geometry:
    return Geometry(
        height=64,
        width=96,
        chunk=rule.chunk,
        window=rule.window,
        sink=rule.sink,
        shot_sink=rule.shot_sink,
        frames=rule.chunk,
    )


def check_video(rule: SetRule, chunks: int, make: Callable[[Geometry], PageTable]) -> None:
    """Run a page table over a video and hold it to the rule."""
    geometry = geometry_of(rule)
    table = make(geometry)
    page: dict[int, int] = {}
    before: set[int] = set()
    for index, wanted in enumerate(rule.attended(chunks)):
        pages = table.next_pages()
        assert pages == table.next_pages(), "pages change while their chunk is in flight"
        assert pages.chunk == index
        assert len(set(pages.table)) == len(pages.table), "a page is listed twice"
        assert pages.slot not in pages.table, "the chunk in flight overwrites what it attends to"
        assert {pages.slot, *pages.table} <= set(range(geometry.pages))
        held = [page[slot] for slot in pages.table]
        frames = [frame for chunk in [*held, index] for frame in sorted(rule.own(chunk))]
        assert len(set(frames)) == len(frames) <= rule.window
        assert set(frames) == wanted, f"chunk {index}"
        assert set(frames) - rule.own(index) <= before, "an evicted frame returned"
        if pages.slot in page:
            assert not rule.own(page[pages.slot]) & rule.sinks(index), "a sink is overwritten"
        assert {frame for chunk in table.sinks() for frame in rule.own(chunk)} == rule.sinks(index)
        page[pages.slot] = index
        before = set(frames)
        assert table.commit(opens_shot=index in rule.cuts) == pages


CHUNKS = 14


@given(rules(CHUNKS))
@settings(max_examples=300)
def test_page_table_follows_the_rule(rule: SetRule) -> None:
    check_video(rule, CHUNKS, PageTable)


@given(rules(CHUNKS), st.integers(0, CHUNKS))
def test_a_restored_table_goes_on_as_it_was(rule: SetRule, at: int) -> None:
    table, again = PageTable(geometry_of(rule)), PageTable(geometry_of(rule))
    for index in range(CHUNKS):
        if index == at:
            again.restore(json.loads(json.dumps(table.state)))
        pages = table.commit(index in rule.cuts)
        if index >= at:
            assert again.commit(index in rule.cuts) == pages
            assert (again.slots, again.sinks()) == (table.slots, table.sinks())


SHIPPED = SetRule(8, 32, 8, True, frozenset({1, 5, 6, 11}))


def test_shipped_geometry_by_hand() -> None:
    seen = [sorted({f // 8 for f in frames}) for frames in SHIPPED.attended(9)]
    assert seen == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 3, 4],
        [0, 1, 4, 5],
        [0, 4, 5, 6],
        [0, 5, 6, 7],
        [0, 6, 7, 8],
    ]
    check_video(SHIPPED, 13, PageTable)


def test_an_evicted_frame_never_returns() -> None:
    rule = SetRule(1, 6, 2, True, frozenset({2, 7}))
    seen = rule.attended(9)
    assert seen[6:] == [{0, 1, 2, 3, 5, 6}, {0, 1, 2, 3, 6, 7}, {0, 1, 7, 6, 3, 8}]
    check_video(rule, 9, PageTable)


class NoGlobalSink(PageTable):
    def sinks(self) -> frozenset[int]:
        return super().sinks() - {0}


class NoShotSink(PageTable):
    def sinks(self) -> frozenset[int]:
        return super().sinks() & {0}


class LateShotSink(PageTable):
    """Forgets which shot is the latest."""

    def commit(self, opens_shot: bool = False) -> ChunkPages:
        return super().commit(False)


class SmallWindow(PageTable):
    def next_pages(self) -> ChunkPages:
        pages = super().next_pages()
        return with_changes(pages, table=pages.table[: self._pages - 2])


class ListedTwice(PageTable):
    def next_pages(self) -> ChunkPages:
        pages = super().next_pages()
        return with_changes(pages, table=pages.table + pages.table[:1])


class Overwrites(PageTable):
    def next_pages(self) -> ChunkPages:
        return with_changes(super().next_pages(), slot=0)


BROKEN = [NoGlobalSink, NoShotSink, LateShotSink, SmallWindow, ListedTwice, Overwrites]


@pytest.mark.parametrize("make", BROKEN)
def test_a_broken_table_is_seen(make: type[PageTable]) -> None:
    with pytest.raises(AssertionError):
        check_video(SHIPPED, 13, make)


# Bytes


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


def watch(rollout: Rollout, rule: SetRule, chunks: int) -> None:
    """Run a video and hold every page's bytes: only a commit writes, and only its own page."""
    generator = torch.Generator().manual_seed(0)
    page: dict[int, int] = {}
    committed: dict[int, dict[str, Tensor]] = {}

    def held() -> dict[str, Tensor]:
        return {name: raw(arena) for name, arena in rollout.pages.items()}

    for index in range(chunks):
        latents = torch.randn(1, 4, rule.chunk, 4, 4, generator=generator)
        positions = torch.tensor(sorted(rule.own(index)), dtype=torch.float64)
        rollout.set_text(torch.randn(1, 5, 16, generator=generator))
        before = held()
        for time in (900.0, 300.0):
            rollout.step(latents, torch.full((1, rule.chunk), time), positions)
        assert all(torch.equal(value, before[name]) for name, value in held().items()), "a step"
        slot = rollout.table.next_pages().slot
        rollout.commit(latents, positions, opens_shot=index in rule.cuts)
        for name, value in held().items():
            for other in range(value.shape[1]):
                same = torch.equal(value[:, other], before[name][:, other])
                assert same == (other != slot), f"commit {index} to page {slot}: page {other}"
        page[index] = slot
        committed[index] = {name: value[:, slot] for name, value in held().items()}
        for sink in {frame // rule.chunk for frame in rule.sinks(index + 1)}:
            for name, value in held().items():
                assert torch.equal(value[:, page[sink]], committed[sink][name]), f"sink {sink}"


RULE = SetRule(2, 12, 4, True, frozenset({3, 7, 8}))


@pytest.fixture(scope="module")
def rollouts() -> Callable[[], Rollout]:
    sizes = {"chunk": RULE.chunk, "window": RULE.window, "sink": RULE.sink}
    program, module = runnable(make_recipe("stream", **sizes))
    return lambda: Rollout(program, module)


@torch.no_grad()
def test_pages_keep_their_bytes(rollouts: Callable[[], Rollout]) -> None:
    watch(rollouts(), RULE, 14)


@torch.no_grad()
def test_a_stray_write_is_seen(
    rollouts: Callable[[], Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = rollouts()
    step = rollout.step

    def stray(latents: Tensor, timestep: Tensor, positions: Tensor) -> Tensor:
        result = step(latents, timestep, positions)
        rollout.pages["v_pages_1"][0, 3, 0, 0, 0] += 1e-6
        return result

    monkeypatch.setattr(rollout, "step", stray)
    with pytest.raises(AssertionError, match="a step"):
        watch(rollout, RULE, 2)


@torch.no_grad()
@pytest.mark.parametrize("make", [NoGlobalSink, NoShotSink])
def test_an_overwritten_sink_is_seen(
    rollouts: Callable[[], Rollout], make: type[PageTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = rollouts()
    monkeypatch.setattr(rollout, "_table", make(geometry_of(RULE)))
    with pytest.raises(AssertionError, match="sink"):
        watch(rollout, RULE, 14)
