"""Who makes the next chunk, who gets in, and what is kept for a client that comes back."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lltk.serve.admission import Admission, Full
from lltk.serve.messages import ChunkMetadata, SessionQueued, VideoConfig, VideoStart
from lltk.serve.ring import Beginning, Part, Ring
from lltk.serve.scheduling import Capacity, Demand, Playhead, ahead, choose
from lltk.serve.settings import Limits

pytestmark = pytest.mark.cpu


def test_a_player_is_taken_to_play_what_it_had_buffered() -> None:
    head = Playhead(position=4.0, buffered=0.75, reported=100.0)
    assert [head.at(now) for now in (99.0, 100.25, 100.75, 130.0)] == [4.0, 4.25, 4.75, 4.75]
    assert head.reaches(4.0) == -math.inf
    assert head.reaches(4.5) == 100.5
    assert head.reaches(5.0) == math.inf
    assert Playhead(4.0, 60.0, 100.0).at(130.0) == 5.0  # no report came for too long


def test_a_session_is_due_when_less_than_a_chunk_is_ahead() -> None:
    head = Playhead(position=4.0, buffered=0.9, reported=100.0)
    assert Demand(5.5, 1.25, head).due() == 100.25
    assert Demand(5.25, 1.25, head).due() == -math.inf
    assert Demand(6.5, 1.25, head).due() == math.inf
    assert Demand(6.5, 1.25, head).deadline(100.5) == 102.5
    assert Demand(6.5, 1.25, None).due() == -math.inf


def test_a_player_that_never_reported_has_not_begun() -> None:
    assert Playhead(buffered=5.0).at(1e9) == 0.0
    assert Demand(2.5, 1.25, Playhead(buffered=2.5)).due() == math.inf


def test_a_slow_chunk_begins_earlier() -> None:
    assert ahead(1.25, 0.5) == 1.25 and ahead(1.25, 2.0) == 2.5


def test_the_chunk_that_is_needed_first_is_made_first() -> None:
    """Not that of who asked first; jobs, which nobody waits for, come last."""
    job, late, soon = (
        Demand(9.0, 1.0),
        Demand(5.0, 1.0, Playhead(4.5)),
        Demand(2.0, 1.0, Playhead(1.75)),
    )
    full = Demand(8.0, 1.0, Playhead(1.0, 5.0, 0.0))
    works = [("job", job), ("late", late), ("soon", soon), ("full", full)]
    assert choose(works, 0.0) == ("soon", 0.0)
    assert choose(works[:2] + works[3:], 0.0) == ("late", 0.0)
    assert choose([works[0], works[3]], 0.0) == ("job", 0.0)
    assert choose([works[3]], 0.0) == (None, math.inf)
    soon_due = Demand(2.5, 1.0, Playhead(1.0, 0.75, 3.0))
    assert choose([works[3], ("x", soon_due)], 3.125) == (None, 0.375)
    assert choose([], 3.0) == (None, math.inf)


@pytest.mark.parametrize(("seconds", "stalls"), [(1.9, False), (2.1, True)])
def test_what_is_slow_to_make_still_plays(seconds: float, stalls: bool) -> None:
    """A simulation: half of the making goes on beside the next chunk; 2 s of video a chunk."""
    chunk, made, sent, seen, waited, now, free = 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    coming: list[float] = []
    making, head = 0.0, Playhead()
    while now < 120:
        if coming and coming[0] <= now:
            making, sent = 2 * seconds, sent + chunk
            head = replace(head, buffered=sent - head.position)
            coming.pop(0)
        if now % 1 < 0.01 and sent:
            head = Playhead(seen, sent - seen, now)
        if now >= free and Demand(made, ahead(chunk, making), head).due() <= now:
            made, free = made + chunk, now + seconds
            coming.append(now + 2 * seconds)
        step = min(0.01, sent - seen)
        seen, now = seen + step, now + 0.01
        waited += (0.01 - step) * (now > 20)
    assert (waited > 1) == stalls


@given(
    rates=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=5),
    cost=st.floats(0.01, 0.3),
)
def test_viewers_never_wait_where_there_is_time_for_all(rates: list[float], cost: float) -> None:
    """A simulation: players at some rates, paused ones among them, and a device of some speed."""
    chunk = 1.0
    share = sum(rates) * cost
    made, seen, stalls, now = [0.0] * len(rates), [0.0] * len(rates), 0, 0.0
    work = [0] * len(rates)
    while now < 20:
        buffered = [m - s for m, s in zip(made, seen, strict=True)]
        demands = [
            (k, Demand(made[k], chunk, Playhead(seen[k], buffered[k] * (rates[k] > 0), now)))
            for k in range(len(rates))
        ]
        chosen, _ = choose(demands, now)
        step = 0.01 if chosen is None else cost
        for k, rate in enumerate(rates):
            wanted = rate * step
            stalls += now > 3 and rate > 0 and wanted > made[k] - seen[k] + 1e-9
            seen[k] = min(seen[k] + wanted, made[k])
        now += step
        if chosen is not None:
            made[chosen] += chunk
            work[chosen] += 1
        assert all(m - s <= 2 * chunk + 1e-9 for m, s in zip(made, seen, strict=True))
    assert share > 0.9 or len(rates) * cost > 0.9 or not stalls
    assert all(count <= 2 for count, rate in zip(work, rates, strict=True) if rate == 0)


def test_capacity_is_what_the_slowest_stage_takes() -> None:
    capacity = Capacity()
    assert capacity.fits(0, 24.0) and capacity.fits(3, 24.0)  # nothing is known yet
    capacity.measure([0.5, 0.25], 10)
    assert capacity.frame == 0.05
    assert capacity.fits(0, 24.0)  # the first one is always let in
    assert capacity.fits(1, 10.0) and not capacity.fits(2, 10.0)
    capacity.measure([0.25, 1.0], 10)
    assert capacity.frame == pytest.approx(0.06)


def part(sequence: int, frames: int = 4, keyframe: bool = True) -> Part:
    config = VideoConfig(width=2, height=2, fps=4, chunk_frames=4)
    start = VideoStart(request_id="x", mime="video/mp4", config=config)
    message = ChunkMetadata(
        sequence=sequence,
        generation_chunk_index=sequence,
        first_frame=frames * sequence,
        num_frames=frames,
        keyframe=keyframe,
        byte_length=1,
    )
    return Part(Beginning(start, b"i"), message, bytes([sequence]))


def test_a_ring_keeps_the_newest_frames() -> None:
    ring = Ring(10)
    assert ring.after(-1) is None
    for k in range(6):
        ring.add(part(k, keyframe=k != 5))
    assert [each.message.sequence for each in ring.parts] == [3, 4, 5]
    assert [ring.after(k) and ring.after(k).data[0] for k in range(2, 6)] == [3, 4, 5, None]  # type: ignore[union-attr]
    lost = ring.after(1)
    assert lost is not None and lost.message.sequence == 4  # the newest keyframe


def test_sessions_get_in_in_the_order_in_which_they_came() -> None:
    async def scene() -> None:
        open_now: list[str] = []
        limits = Limits(sessions=1, queue=2, per_token=3, seconds=100)
        admission = Admission(
            limits, lambda beginning: len(open_now) + beginning < 1, lambda: [40.0]
        )
        places: dict[str, list[tuple[int, int, float]]] = {}

        async def enter(name: str, owner: str) -> None:
            async def tell(message: SessionQueued) -> None:
                place = message.position, message.length, message.estimate_s
                places.setdefault(name, []).append(place)

            await admission.enter(owner, tell)
            open_now.append(name)
            admission.begun()

        def leave(name: str, owner: str) -> None:
            open_now.remove(name)
            admission.left(owner)

        await enter("a", "one")
        waiting = [asyncio.create_task(enter(name, "one")) for name in ("b", "c")]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(Full, match="as many as a token may") as full:
            await enter("d", "one")
        assert full.value.retry_after == 40
        with pytest.raises(Full, match="2 wait already"):
            await enter("d", "two")
        leave("a", "one")
        await waiting[0]
        assert open_now == ["b"] and not waiting[1].done()
        waiting[1].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert len(admission) == 0
        leave("b", "one")
        await enter("e", "two")
        assert open_now == ["e"]
        assert places == {
            "b": [(1, 1, 40.0), (1, 2, 40.0)],
            "c": [(2, 2, 140.0), (1, 1, 40.0)],
        }

    asyncio.run(scene())
