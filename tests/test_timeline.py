"""Timelines: what events do to the chunks to come, from any thread, and when they are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from streams import SHOTS, opened, planned, save_pipeline, streamed

from lltk.stream.chunks import Chunk, Chunking
from lltk.stream.script import Shot
from lltk.stream.timeline import Timeline

pytestmark = pytest.mark.cpu

CHUNKING = Chunking(2, 8, scene_cut="CUT ")
"""A second is a chunk of 8 frames; the first has 5."""


def shot(caption: str, seconds: float, cut: bool = True) -> Shot:
    return Shot(caption=caption, seconds=seconds, cut=cut)


def timeline(*shots: Shot, chunking: Chunking = CHUNKING) -> Timeline:
    return Timeline(chunking, shots)


def make(timeline: Timeline, count: int = 1000) -> list[Chunk]:
    """Make the next chunks, or all that are left."""
    made: list[Chunk] = []
    while len(made) < count:
        with timeline.next() as chunk:
            if chunk is None:
                break
            made.append(chunk)
    return made


def told(chunks: Sequence[Chunk]) -> list[tuple[int, int, int, str, bool]]:
    return [(c.index, c.shot, c.cuts, c.prompt, c.opens_shot) for c in chunks]


def events(chunk: Chunk) -> list[tuple[str, int, int | None]]:
    return [(receipt.event, receipt.received, receipt.applied) for receipt in chunk.receipts]


# Appending


def test_an_appended_script_is_the_script_s_end() -> None:
    """It is so whatever is made before, and whether shots come at once or one by one."""
    shots = [shot("a", 2), shot("b", 2, cut=False), shot("c", 1), shot("d", 2)]
    whole = CHUNKING.chunks(shots)
    for made in range(5):
        grown = timeline(*shots[:2])
        chunks = make(grown, made)
        grown.append(shots[2:3])
        grown.append(shots[3:])
        chunks += make(grown)
        assert [replace(chunk, receipts=()) for chunk in chunks] == whole
        found = {chunk.index: events(chunk) for chunk in chunks if chunk.receipts}
        assert found == {4: [("append", made, 4)], 5: [("append", made, 5)]}


def test_a_script_that_is_over_goes_on() -> None:
    grown = timeline()
    assert not grown.wait() and make(grown) == []
    for index, caption in enumerate("ab"):
        grown.append([shot(caption, 1)])
        assert grown.wait() and [c.index for c in make(grown)] == [index]
    assert "give at least one" in refused(grown.append, ())


# Switching


def test_a_switch_is_for_the_running_shot_alone() -> None:
    running = timeline(shot("a", 3), shot("b", 2))
    make(running, 1)
    receipt = running.switch("x", recache=True)
    assert (receipt.event, receipt.received, receipt.applied) == ("switch", 1, None)
    chunks = make(running)
    assert [chunk.prompt for chunk in chunks] == ["x", "x", "CUT b", "b"]
    assert [chunk.recache for chunk in chunks] == [True, False, False, False]
    assert [chunk.receipts for chunk in chunks] == [(replace(receipt, applied=1),), (), (), ()]


def test_a_switch_without_a_chunk_to_show_it_is_refused() -> None:
    """That is between shots, while a shot's last chunk is made, and after the script's end."""
    running = timeline(shot("a", 2), shot("b", 1))
    before = running.chunks
    make(running, 1)
    with running.next():
        assert "no chunk of the running shot is left" in refused(running.switch, "x")
    assert "cut to a new shot, or append one" in refused(running.switch, "x")
    assert running.chunks == before[2:]
    make(running)
    assert "no chunk of the running shot is left" in refused(running.switch, "x")
    assert "the prompt is empty" in refused(running.switch, " ")


def test_before_the_first_chunk_the_first_shot_runs() -> None:
    running = timeline(shot("a", 2), shot("b", 1))
    running.switch("x", recache=True)
    first = make(running)[0]
    assert (first.prompt, first.opens_shot, first.recache) == ("x", True, False)


@pytest.mark.parametrize("recache", [True, False])
def test_the_chunking_says_whether_a_switch_recaches(recache: bool) -> None:
    chunking = replace(CHUNKING, recache=recache)
    running = timeline(shot("a", 3), shot("b", 1, cut=False), shot("c", 1), chunking=chunking)
    make(running, 1)
    running.switch("x")
    assert [chunk.recache for chunk in make(running)] == [recache, False, recache, False]


# Cutting


def test_a_cut_ends_the_running_shot_after_the_chunk_in_flight() -> None:
    running = timeline(shot("a", 4), shot("b", 2), shot("c", 1, cut=False))
    make(running, 1)
    with running.next() as chunk:
        receipt = running.cut("  x  y ", 2)
    assert chunk is not None and (chunk.index, chunk.prompt) == (1, "a")
    assert receipt.received == 2
    chunks = make(running)
    assert told(chunks) == [
        (2, 1, 1, "CUT x y", True),
        (3, 1, 1, "x y", False),
        (4, 2, 2, "CUT b", True),
        (5, 2, 2, "b", False),
        (6, 3, 2, "c", False),
    ]
    assert [c.frames for c in chunks] == [CHUNKING.frames(index) for index in range(2, 7)]
    assert events(chunks[0]) == [("cut", 2, 2)] and not any(c.receipts for c in chunks[1:])


def test_a_cut_between_shots_comes_before_the_next() -> None:
    running = timeline(shot("a", 1), shot("b", 1))
    make(running, 1)
    running.cut("x", 1)
    assert [chunk.prompt for chunk in make(running)] == ["CUT x", "CUT b"]
    running.cut("y", 1)
    assert told(make(running)) == [(3, 3, 3, "CUT y", True)]


def test_a_cut_before_the_first_chunk_begins_the_video() -> None:
    running = timeline(shot("a", 3), shot("b", 1))
    running.cut("x", 1)
    assert told(make(running)) == [(0, 0, 0, "x", True), (1, 1, 1, "CUT b", True)]


@pytest.mark.parametrize("in_flight", [False, True])
def test_events_after_a_cut_act_on_its_shot(in_flight: bool) -> None:
    """Also before it begins: another cut is shown in its place, and a switch changes it."""
    running = timeline(shot("a", 4), shot("b", 1))
    make(running, 1)
    with running.next() if in_flight else nullcontext():
        running.cut("x", 3)
        running.cut("y", 2)
        running.switch("z")
    begun = 1 + in_flight
    chunks = make(running)
    assert [chunk.prompt for chunk in chunks] == ["CUT z", "z", "CUT b"]
    assert [chunk.opens_shot for chunk in chunks] == [True, False, True]
    assert events(chunks[0]) == [("cut", begun, begun)] * 2 + [("switch", begun, begun)]


def test_a_cut_acknowledges_the_switch_that_it_overtakes() -> None:
    running = timeline(shot("a", 3))
    make(running, 1)
    running.switch("x")
    running.cut("y", 1)
    (chunk,) = make(running)
    assert chunk.prompt == "CUT y"
    assert events(chunk) == [("switch", 1, 1), ("cut", 1, 1)]
    assert [receipt.number for receipt in chunk.receipts] == [0, 1]


@pytest.mark.parametrize(
    ("caption", "seconds", "message"),
    [(" ", 2, "cut: caption: is empty"), ("x", 0, "cut: seconds: a shot cannot last 0 s")],
)
def test_misfit_cuts(caption: str, seconds: float, message: str) -> None:
    running = timeline(shot("a", 3))
    before = running.state
    assert refused(running.cut, caption, seconds).startswith(message)
    assert running.state == before


# Pausing


def test_a_pause_holds_the_next_chunk() -> None:
    running = timeline(shot("a", 3))
    with running.next() as chunk:
        held = running.pause()
    assert chunk is not None and chunk.index == 0, "the chunk in flight is made"
    assert (held.event, held.received, held.applied) == ("pause", 1, 1)
    assert make(running) == []
    running.switch("x")
    played = running.play()
    assert (played.event, played.applied, played.number) == ("play", 1, 2)
    assert [chunk.prompt for chunk in make(running)] == ["x", "x"]


def test_a_thread_waits_for_the_end_of_a_pause() -> None:
    running = timeline(shot("a", 1))
    running.pause()
    waiting = threading.Event()

    def wait() -> bool:
        waiting.set()
        return running.wait()

    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(wait)
        waiting.wait()
        assert not waited.done()
        running.play()
        assert waited.result(timeout=60)
    make(running)
    running.pause()
    assert not running.wait(), "nothing is left to wait for"


def test_closing_ends_the_wait_for_the_end_of_a_pause() -> None:
    running = timeline(shot("a", 1))
    running.pause()
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(running.wait)
        running.close()
        assert not waited.result(timeout=60)


def test_two_chunks_are_not_made_at_once() -> None:
    running = timeline(shot("a", 2))
    with running.next(), pytest.raises(ValueError, match="another thread"), running.next():
        pass
    assert [chunk.index for chunk in make(running)] == [1]


# Failures and states


def test_a_chunk_that_fails_is_still_to_be_made() -> None:
    """Its events stay with it. Events that come meanwhile act after them."""
    running = timeline(shot("a", 4))
    running.switch("x")
    with pytest.raises(MemoryError), running.next():
        running.switch("y")
        raise MemoryError
    assert [chunk.prompt for chunk in running.chunks] == ["x", "y", "y", "y"]
    running.switch("z")
    first, second, *_ = make(running)
    assert (first.index, first.prompt, second.prompt) == (0, "z", "z")
    assert [receipt.number for receipt in first.receipts] == [0, 2]
    assert [receipt.number for receipt in second.receipts] == [1]


def test_a_state_goes_on() -> None:
    def act(running: Timeline) -> None:
        running.switch("x")
        running.append([shot("c", 1)])

    whole, first, other = (timeline(shot("a", 3), shot("b", 2)) for _ in range(3))
    made = make(first, 2)
    act(first)
    other.restore(first.state)
    assert other.index == 2
    other.cut("y", 1)
    made += make(other)
    make(whole, 2)
    act(whole)
    whole.cut("y", 1)
    assert made[2:] == make(whole)
    assert other.prompts == [] and first.prompts == ["x", "CUT b", "b", "CUT c"]


@given(st.lists(st.sampled_from(["make", "switch", "append", "cut"]), max_size=12))
def test_chunks_follow_one_another_whatever_happens(actions: list[str]) -> None:
    running = timeline(shot("a", 2), shot("b", 2, cut=False))
    made: list[Chunk] = []
    receipts = 0
    for action in actions:
        if action == "make":
            made += make(running, 1)
            continue
        try:
            if action == "switch":
                running.switch("x")
            elif action == "append":
                running.append([shot("c", 2), shot("d", 1, cut=False)])
            else:
                running.cut("y", 2)
            receipts += 1
        except ValueError:
            assert action == "switch"
    made += make(running)
    assert [chunk.index for chunk in made] == list(range(len(made)))
    assert [c.frames for c in made] == [CHUNKING.frames(chunk.index) for chunk in made]
    for before, after in pairwise(made):
        assert after.shot - before.shot in (0, 1)
        assert after.cuts - before.cuts == after.opens_shot <= after.shot - before.shot
        assert after.prompt.startswith("CUT ") == after.opens_shot
    numbers = [receipt.number for chunk in made for receipt in chunk.receipts]
    assert sorted(numbers) == list(range(receipts))


def test_threads_lose_no_event() -> None:
    """Four threads append while a fifth makes chunks."""
    running = timeline(shot("a", 1))
    begin, done = threading.Barrier(5), threading.Event()
    made: list[Chunk] = []

    def act(name: str) -> list[int]:
        begin.wait()
        numbers = []
        for index in range(50):
            numbers.append(running.append([shot(f"{name}{index}", 2)]).number)
        return numbers

    def drive() -> None:
        begin.wait()
        while not done.is_set() or running.chunks:
            made.extend(make(running, 1))

    with ThreadPoolExecutor(5) as pool:
        driver = pool.submit(drive)
        acted = [pool.submit(act, name) for name in "bcde"]
        numbers = [number for each in acted for number in each.result(timeout=60)]
        done.set()
        driver.result(timeout=60)
    assert sorted(numbers) == list(range(200))
    assert [chunk.index for chunk in made] == list(range(401))
    shown = [receipt.number for chunk in made for receipt in chunk.receipts]
    assert sorted(shown) == sorted(numbers)
    captions = [chunk.prompt.removeprefix("CUT ") for chunk in made if chunk.opens_shot]
    for name in "bcde":
        own = [int(caption[1:]) for caption in captions if caption[0] == name]
        assert own == list(range(50)), "a thread's shots are in its order"


# In a session


def from_another_thread(act: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(act).result(timeout=60)


def test_a_session_shows_what_other_threads_ask_for(tmp_path: Path) -> None:
    """They append, cut, pause and play. The video is that of a script which says so at first."""
    plan = planned(save_pipeline(tmp_path), "stream.shot_offset=1")
    green = Shot(caption="a green star falling", seconds=2)
    script = [SHOTS[0].model_copy(update={"seconds": 2}), green, SHOTS[1]]
    wanted, wanted_video = streamed(plan, script)
    stream, video = opened(plan, SHOTS[:1])
    line, latents = stream.session.timeline, []
    player = threading.Timer(0.05, line.play)
    with stream:
        latents.append(next(stream.session).latents)
        from_another_thread(lambda: line.append(SHOTS[1:]))
        latents.append(next(stream.session).latents)
        from_another_thread(lambda: line.cut(green.caption, green.seconds))
        from_another_thread(line.pause)
        assert stream.session.make() is None
        player.start()
        latents += [report.latents for report in stream]
        player.join()
    assert torch.equal(torch.cat(latents, dim=2), wanted)
    assert torch.equal(torch.cat(video, dim=2), wanted_video)


def test_a_session_goes_on_after_its_script(tmp_path: Path) -> None:
    plan = planned(save_pipeline(tmp_path))
    wanted, _ = streamed(plan)
    stream, _ = opened(plan, SHOTS[:1])
    with stream:
        latents = [report.latents for report in stream]
        assert stream.session.make() is None and list(stream) == []
        stream.session.timeline.append(SHOTS[1:])
        latents += [report.latents for report in stream]
    assert torch.equal(torch.cat(latents, dim=2), wanted)
