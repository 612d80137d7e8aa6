"""Servers of which two ranks make each chunk: rank 0 leads, and the other follows."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
import torch
import torch.distributed as dist
from av.error import ExternalError
from helpers import Run
from ranks import LIMIT, alike, free_port
from safetensors.torch import load_file, save_file
from serving import OTHER, PROMPT, WAIT, Server, as_reported, pipeline, time_enough, until
from streams import SHOTS, SIZES, planned, streamed
from torch import OutOfMemoryError, Tensor
from websockets.exceptions import ConnectionClosed

from lltk import streaming
from lltk.cli.main import main as cli
from lltk.graph.recipe import open_recipe
from lltk.parallel.groups import LostRank
from lltk.parallel.orders import Orders
from lltk.serve import live
from lltk.stream.fragments import FragmentWriter
from lltk.stream.script import Shot
from lltk.stream.video import pixels
from lltk.streaming import LeadingModels, Stream, StreamPlan, plan_stream

pytestmark = pytest.mark.cpu
__all__ = ["pipeline"]

SIZE = 2
WIDE = "geometry.width=128"
"""So that no decoder of two makes all columns."""
_PASSES = [*open_recipe("tiny_stream", ()).passes]
_PASSES.insert(6, {"ulysses_stream": {"exchange": "compute"}})
PASSES = f"passes={json.dumps(_PASSES)}"


@pytest.fixture(scope="module")
def plan(pipeline: Path) -> StreamPlan:
    """A stream for two ranks, each of which decodes a part of the columns."""
    return planned(pipeline, WIDE, PASSES, "stream.decoder.device=ranks", "stream.text.after=keep")


@pytest.fixture(scope="module")
def shared(pipeline: Path, plan: StreamPlan) -> StreamPlan:
    """A stream for two ranks, of which rank 0 decodes."""
    given = *SIZES, WIDE, PASSES, f"stream.pipeline={pipeline}", "stream.text.after=keep"
    return plan_stream(open_recipe("tiny_stream", given), transformer=plan.transformer)


def alone(pipeline: Path, seed: int, act: Callable[[Stream, int], None] | None = None) -> Tensor:
    """The frames that one process makes."""
    plan = planned(pipeline, WIDE, f"stream.seed={seed}")
    return pixels(streamed(plan, [Shot(caption=PROMPT, seconds=9)], act or (lambda *_: None))[1])


def run_rank(rank: int, port: int, plan: StreamPlan, folder: Path, run: str) -> None:
    """Run ``lltk serve`` as a rank, in a process of its own.

    Rank 0 keeps the frames that it encodes, by the seeds of its sessions, as it ends.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(SIZE)}
    os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    made: list[list[Tensor]] = []

    class Recorder(FragmentWriter):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            made.append([])
            self.own = made[-1]
            super().__init__(*arguments, **named)

        def write(self, frames: Tensor, keyframe: bool = True) -> None:
            self.own.append(frames.clone())
            super().write(frames, keyframe)

    given = ["serve", "tiny_stream", "--port", "0", "--folder", str(folder / "state")]
    with (
        time_enough(),
        as_reported(),
        patch.object(live, "FragmentWriter", Recorder),
        patch.object(streaming, "plan_stream", lambda *given, **options: plan),
        patch.object(sys, "argv", ["lltk", *given, "--device", "cpu"]),
        open(folder / f"{run}.err{rank}", "w", buffering=1) as sys.stderr,
        open(folder / f"{run}.out{rank}", "w", buffering=1) as sys.stdout,
    ):
        try:
            cli()
        finally:
            if rank == 0:
                kept = {f"{k}": torch.cat(own) for k, own in enumerate(made) if own}
                save_file(kept, folder / f"{run}.frames")


@contextmanager
def serving(plan: StreamPlan, folder: Path, run: str) -> Iterator[tuple[Server, list[Any]]]:
    """A server of two ranks, ready; they are killed in the end."""
    port, fork = free_port(), multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=run_rank, args=(rank, port, plan, folder, run)) for rank in range(SIZE)
    ]
    for rank in ranks:
        rank.start()
    try:
        place: list[str] = []

        def is_ready() -> bool:
            assert all(rank.is_alive() for rank in ranks), said(folder, run)
            out = folder / f"{run}.out0"
            if not place and out.exists():
                place.extend(re.findall(r"^(http:\S+)/$", out.read_text(), re.MULTILINE))
            return bool(place) and httpx.get(f"{place[0]}/ready", timeout=WAIT).is_success

        until(is_ready, 60, 0.1)
        yield Server(place[0], None, None), ranks  # type: ignore[arg-type]
    finally:
        for rank in ranks:
            rank.kill()


def said(folder: Path, run: str) -> str:
    """What the ranks said after the server's address."""
    files = [folder / f"{run}.{kind}{rank}" for kind in ("out", "err") for rank in range(SIZE)]
    shown = "".join(file.read_text() for file in files)
    return shown.partition("http://")[2].partition("\n")[2]


def ended(ranks: Sequence[Any], limit: float = LIMIT) -> list[int | None]:
    """The exit codes of ranks that end within so many seconds."""
    end = time.monotonic() + limit
    for rank in ranks:
        rank.join(max(0.1, end - time.monotonic()))
    return [rank.exitcode for rank in ranks]


def nearly(ours: Tensor, theirs: Tensor) -> bool:
    """Whether frames are the same, but for rounding: sums of several ranks have another order."""
    distance = (ours.int() - theirs[: len(ours)].int()).abs()
    return bool(distance.max() <= 1) and float((distance > 0).float().mean()) < 1e-3


def test_ranks_serve_what_one_process_does(
    plan: StreamPlan, pipeline: Path, tmp_path: Path
) -> None:
    """Two sessions by turns, with events; a signal to all ranks keeps sessions; they go on.

    A session of which a rank's part is damaged is refused, and the others go on.
    """
    with serving(plan, tmp_path, "one") as (server, ranks):
        with (
            server.watching(max_seconds=6, seed=1) as first,
            server.watching(max_seconds=6, seed=2) as second,
        ):
            for viewer in (first, second):
                viewer.until("video.chunk_metadata", 2, play=False)
            for name, event in (("switch", {"prompt": OTHER, "recache": True}),
                                ("cut", {"prompt": "a green star", "cut": True})):  # fmt: skip
                first.event(name, **event)
                first.until("session.interaction.queued", play=False)
                first.play(left=1)
                first.until("video.chunk_metadata", play=False)
                second.play(left=1)
                second.until("video.chunk_metadata", play=False)
            first.play()
            first.until("session.done")
            id = second.created["session_id"]
            refused = server.http().get(f"/v1/sessions/{id}/state")
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "refused")
            for rank in ranks:  # as torchrun does
                os.kill(rank.pid, signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                while True:
                    second.receive()
        kept = f"Stopped. The next start goes on with the sessions in {tmp_path / 'state'}.\n"
        assert ended(ranks) == [0, 0] and said(tmp_path, "one") == kept
    started = {part["generation_chunk_index"]: part["started_event_ids"] for part in first.parts}
    assert {k: ids for k, ids in started.items() if ids} == {2: ["switch"], 3: ["cut"]}

    def act(stream: Stream, index: int) -> None:
        if index == 2:
            stream.switch(OTHER, recache=True)
        if index == 3:
            stream.cut("a green star", 9)

    made = load_file(tmp_path / "one.frames")  # the first two are the warm-up's and the check's
    by_seed = {1: alone(pipeline, 1, act), 2: alone(pipeline, 2)}
    own = {
        seed: next(m for m in made.values() if nearly(m[:5], wanted[:5]))
        for seed, wanted in by_seed.items()
    }
    assert all(nearly(own[seed], by_seed[seed]) for seed in own)
    assert len(own[1]) == 5 + 8 * 6 and len(own[2]) >= 5 + 8 * 3
    assert not nearly(own[2], by_seed[1])
    states = [*(tmp_path / "state" / "sessions").glob("*/state*")]
    assert len(states) == SIZE

    with serving(plan, tmp_path, "two") as (server, ranks):
        (damaged,) = (tmp_path / "state" / "sessions").glob("*/state.rank1*")
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-9])
        with server.watching(**second.resuming()) as viewer:
            code, last = viewer.closed()
        assert (code, last["code"]) == (1008, "refused") and "ranks' files" in last["message"]
        damaged.write_bytes(whole)
        with server.watching(**second.resuming()) as viewer:
            viewer.until("session.created")
            viewer.send(type="client.playback", position=100, buffered=0)
            viewer.until("session.done")
        with server.watching() as viewer:
            viewer.until("video.chunk_metadata", 2)
            os.kill(ranks[1].pid, signal.SIGKILL)
            codes = ended(ranks, 10)
    assert codes[0] in (1, 2) and codes[1] == -signal.SIGKILL
    told = said(tmp_path, "two")
    assert told.count("has stopped") == 1 and "Traceback" not in told


def test_one_process_serves_no_recipe_for_two(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: StreamPlan
) -> None:
    monkeypatch.setattr(streaming, "plan_stream", lambda *given, **options: plan)
    code, _, errors = run("serve", "--port", 0, "--folder", tmp_path / "state", "--device", "cpu")
    assert code == 2 and "the recipe is for 2, and 1 ran it; start torchrun" in errors
    assert not (tmp_path / "state").exists()


class Noted(Orders):
    """Orders that nobody takes, as if all other ranks could do them."""

    def __init__(self, refusal: str = "") -> None:
        self.given: list[Any] = []
        self._broken = False
        self._refusal = refusal

    def _told(self, order: list[object]) -> None:
        self.given += order

    @contextmanager
    def together(self) -> Iterator[None]:
        yield
        if self._refusal:
            raise ValueError(f"rank 1: {self._refusal}")

    @property
    def calls(self) -> list[list[str]]:
        """Of each order the names of the calls."""
        return [[name for name, _ in order.calls] or ["open"] for order in self.given]


def test_the_others_are_told_each_event_before_the_chunk_that_it_acts_from(
    shared: StreamPlan, tmp_path: Path
) -> None:
    orders = Noted()
    with alike():
        models = LeadingModels(shared, orders)
        models.load()
        stream: Stream

        def begun(chunk: Any) -> None:
            if chunk.index == 1:
                stream.switch(OTHER)  # while it is made: it acts from the next one

        with models.open(lambda video: None, SHOTS[:1], begun=begun, endless=True) as stream:
            stream.make()
            stream.make()
            stream.pause()
            assert stream.make() is None, "which is nothing to the others"
            stream.play()
            stream.make()
            stream.cut(PROMPT, 2)
            stream.save(tmp_path / "state")
    assert orders.calls == [
        ["open"], ["__enter__"], ["make"], ["make"], ["switch", "pause", "play", "make"],
        ["cut", "save"], ["__exit__"],
    ]  # fmt: skip


@pytest.mark.parametrize("error", [ValueError, OSError, OutOfMemoryError])
def test_what_rank_0_cannot_do_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """It meets them, also where it only knows what kind of failure it was."""
    told: list[str] = []

    def gathered(said: list[str], own: str, group: Any) -> None:
        told.append(own)

    monkeypatch.setattr(dist, "new_group", lambda **options: None)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(error), Orders(SIZE).together():
        raise error
    assert told == [error.__name__]


def test_what_one_rank_cannot_open_none_has(shared: StreamPlan) -> None:
    with alike():
        models = LeadingModels(shared, Noted("no room"), sessions=1)
        models.load()
        for _ in range(2):  # its slot is free again
            with pytest.raises(ValueError, match="rank 1: no room"):
                models.open(lambda video: None, SHOTS)


@pytest.mark.parametrize(
    "error", [OSError(28, "no space left"), ExternalError(1, "no space left")], ids=str
)
def test_a_sink_that_fails_ends_its_session_between_two_chunks(
    shared: StreamPlan, error: Exception
) -> None:
    """The others never wait within a chunk of it."""
    orders = Noted()

    def broken(video: Tensor) -> None:
        raise error

    with alike():
        models = LeadingModels(shared, orders)
        models.load()
        with pytest.raises(type(error), match="no space"), models.open(broken, SHOTS) as stream:
            stream.make()
            stream.session.delivery.rest()
            stream.make()
        with models.open(lambda video: None, SHOTS) as stream:
            assert stream.make() is not None
    assert orders.calls.count(["make"]) == 2


@pytest.mark.parametrize("kind", [ValueError, OutOfMemoryError])
def test_a_chunk_that_fails_on_rank_0_alone_ends_all(
    shared: StreamPlan, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    orders = Noted()
    with alike():
        models = LeadingModels(shared, orders)
        models.load()
        other = models.open(lambda video: None, SHOTS)
        stream = models.open(lambda video: None, SHOTS)

        def unreadable(prompt: str) -> Tensor:
            raise kind("text_encoder: is damaged")

        monkeypatch.setattr(stream.session, "_encode", unreadable)
        with pytest.raises(LostRank, match=r"failed on rank 0 \(text_encoder: is damaged\)"):
            stream.make()
        with pytest.raises(LostRank, match="they have parted"):
            other.make()
