"""Live sessions over a real socket: what is seen, what events do, and what survives a stop."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from serving import (
    OTHER,
    PROMPT,
    WAIT,
    Server,
    Viewer,
    as_reported,
    completed,
    encoded,
    pipeline,
    serving,
    time_enough,
    until,
)
from streams import planned, streamed
from torch import Tensor

from lltk.serve.running import listening, make_server, serve
from lltk.serve.service import Service
from lltk.serve.settings import Limits
from lltk.stream.fragments import CODECS
from lltk.stream.script import Shot
from lltk.stream.video import pixels, read_video
from lltk.streaming import Models, Stream

pytestmark = pytest.mark.cpu
__all__ = ["encoded", "pipeline"]

CHUNKS = 7
LONG = (Shot(caption=PROMPT, seconds=CHUNKS + 1),)
"""At the tests' sizes a chunk is a second."""


@cache
def alone(pipeline: Path, script: Sequence[Shot] = LONG, seed: int = 0) -> Tensor:
    """The frames of a plain stream."""
    return pixels(streamed(planned(pipeline, f"stream.seed={seed}"), script)[1])


def test_before_it_is_ready_a_server_fills_the_window_and_evicts(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no session waits for what is compiled or recorded for a number of pages."""
    made = list[int]()
    monkeypatch.setattr(Service, "_measure", lambda self, report: made.append(report.chunk.index))
    plan = planned(pipeline)
    with serving(plan, tmp_path):
        assert made == list(range(plan.geometry.window // plan.geometry.chunk + 1))


def test_a_stream_goes_on_until_its_limit(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]]
) -> None:
    """It is the plain stream of the same seed, and what a player decodes is what was made."""
    shots = [{"caption": PROMPT, "seconds": 2}]
    with (
        serving(planned(pipeline), tmp_path) as server,
        server.watching(prompt=None, shots=shots, seed=3, max_seconds=CHUNKS) as viewer,
    ):
        done = viewer.until("session.done")
        code, _ = viewer.closed()
    assert (code, done["chunks"], done["reason"]) == (1000, CHUNKS + 1, "limit")
    wanted = alone(pipeline, seed=3)
    assert torch.equal(torch.cat(encoded[0]), wanted)
    assert viewer.video.shape == wanted.shape
    starts = [part["first_frame"] for part in viewer.parts]
    assert starts == [0, *range(5, len(wanted), 8)]
    assert [part["sequence"] for part in viewer.parts] == list(range(CHUNKS + 1))
    assert [part["byte_length"] for part in viewer.parts] == [len(d) for d in viewer.data[1:]]
    assert viewer.config | {"fps": 8} == {
        "width": 64, "height": 32, "fps": 8, "chunk_frames": 8, "first_frame": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for tests that look at none of its files and frames."""
    folder, limits = tmp_path_factory.mktemp("server"), {"sessions": 9, "per_token": 9}
    with time_enough(), as_reported(), serving(planned(pipeline), folder, **limits) as made:
        yield made


def test_nothing_is_made_beyond_a_chunk_ahead_of_the_viewer(server: Server) -> None:
    """Without a report the first two chunks are made; each chunk that plays lets one more in."""
    with server.watching() as viewer:
        viewer.until("video.chunk_metadata", 2, play=False)
        live = server.service.sessions.entries[viewer.created["session_id"]].live
        with pytest.raises(TimeoutError):
            viewer.receive(wait=0.3)
        assert live.chunks == 2
        viewer.send(type="client.playback", position=4.9 / 8, buffered=0)
        with pytest.raises(TimeoutError):
            viewer.receive(wait=0.2)
        viewer.send(type="client.playback", position=5 / 8, buffered=0)
        viewer.until("video.chunk_metadata", play=False)
        with pytest.raises(TimeoutError):
            viewer.receive(wait=0.2)
        assert live.chunks == 3
        viewer.send(type="client.playback", position=1e308, buffered=1e308)  # a lie gains nothing
        viewer.until("video.chunk_metadata", 2, play=False)
        with pytest.raises(TimeoutError):
            viewer.receive(wait=0.2)
        assert "lltk_client_buffer_seconds_sum 0.0\n" in server.http().get("/metrics").text


def test_events_act_from_the_chunk_that_their_receipts_name(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]]
) -> None:
    """A switch, a cut and appended shots give what the same calls give to a plain stream."""
    received: dict[str, int] = {}
    with (
        as_reported(),
        serving(planned(pipeline), tmp_path) as server,
        server.watching(max_seconds=8) as viewer,
    ):
        viewer.until("video.chunk_metadata", 2, play=False)
        for name, event in (
            ("one", {"prompt": OTHER, "recache": True}),
            ("two", {"prompt": "a green star", "cut": True, "seconds": 1}),
            ("three", {"append": [{"caption": "a cyan triangle", "seconds": 1, "cut": False}]}),
        ):
            viewer.event(name, **event)
            answer = viewer.until("session.interaction.queued", play=False)
            assert answer["event_id"] == name
            received[name] = answer["received"]
            viewer.play(left=1)
            viewer.until("video.chunk_metadata", play=False)
        assert [m["event"] for m in viewer.messages if "event" in m] == ["switch", "cut", "append"]
        viewer.play()
        viewer.until("session.done")
        told = server.http().get("/metrics").text
    assert "lltk_first_frame_seconds_count 1.0\n" in told
    assert "lltk_switch_visible_seconds_count 3.0\n" in told
    assert received == {"one": 2, "two": 3, "three": 4}
    started = {part["generation_chunk_index"]: part["started_event_ids"] for part in viewer.parts}
    assert {k: ids for k, ids in started.items() if ids} == {2: ["one"], 3: ["two"], 4: ["three"]}

    def act(stream: Stream, index: int) -> None:
        if index == 2:
            stream.switch(OTHER, recache=True)
        if index == 3:
            stream.cut("a green star", 1)
            stream.append([Shot(caption="a cyan triangle", seconds=5, cut=False)])

    _, video = streamed(planned(pipeline), [Shot(caption=PROMPT, seconds=5)], act)
    assert torch.equal(torch.cat(encoded[0]), pixels(video))


def test_a_paused_session_makes_nothing(server: Server) -> None:
    with server.watching() as viewer:
        viewer.until("video.chunk_metadata", 2, play=False)
        viewer.send(type="session.pause", event_id="p")
        assert viewer.until("session.interaction.queued")["event"] == "pause"
        viewer.play()
        with pytest.raises(TimeoutError):
            viewer.receive(wait=0.3)
        viewer.send(type="session.play", event_id="q")
        assert viewer.until("session.interaction.queued")["received"] == 2
        viewer.until("video.chunk_metadata")


def test_a_lost_connection_is_resumed_where_it_was_lost(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]]
) -> None:
    """The parts that did not come are sent again, after the init segment, byte for byte."""
    with serving(planned(pipeline), tmp_path) as server:
        with server.watching(max_seconds=CHUNKS) as first:
            first.until("video.chunk_metadata", 4)
        with server.watching(**first.resuming(after=1)) as second:
            second.until("session.done")
            parts = [part["sequence"] for part in second.parts]
            assert parts == list(range(2, CHUNKS + 1))
        assert second.data[0] == first.data[0]
        assert second.data[1:3] == first.data[3:5]
        with server.watching(**second.resuming()) as third:  # it is over, and can say so again
            assert third.until("session.done")["chunks"] == CHUNKS + 1
            assert not third.parts
    assert torch.equal(torch.cat(encoded[0]), alone(pipeline)[: 5 + 8 * CHUNKS])


def test_a_state_goes_on_in_a_plain_stream(pipeline: Path, tmp_path: Path) -> None:
    """What `GET …/state` gives; the session itself goes on."""
    with serving(planned(pipeline), tmp_path / "served") as server, server.watching() as viewer:
        id = viewer.until("session.created")["session_id"]
        viewer.until("video.chunk_metadata", 2, play=False)
        answer = server.http().get(f"/v1/sessions/{id}/state")
        assert answer.headers["content-type"] == "application/octet-stream"
        viewer.play()
        viewer.until("video.chunk_metadata")
        viewer.send(type="session.stop")
        viewer.until("session.done")
        over = server.http().get(f"/v1/sessions/{id}/state")
        assert (over.status_code, over.json()["error"]["code"]) == (400, "refused")
    (tmp_path / "state").write_bytes(answer.content)
    _, video = streamed(planned(pipeline), (), resume=tmp_path / "state")
    wanted = alone(pipeline, (Shot(caption=PROMPT, seconds=5),))
    assert torch.equal(pixels(video), wanted[13:]) and len(wanted) > 30


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_served(pipeline: Path, tmp_path: Path, codec: str) -> None:
    """Live and in the file of a job, as the recipe says."""
    names = {"h264": "avc1.", "vp9": "vp09.", "av1": "av01."}
    plan = planned(pipeline, f"stream.serve.codec={codec}")
    with serving(plan, tmp_path) as server, server.http() as http:
        with server.watching(max_seconds=2) as viewer:
            start = viewer.until("video.start")
            viewer.until("session.done")
        job = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 3}).json()
        job = completed(http, job["id"])
        content = http.get(f"/v1/videos/{job['id']}/content").content
    assert start["mime"].startswith(f'video/mp4; codecs="{names[codec]}')
    assert viewer.video.shape == (21, 32, 64, 3)
    (tmp_path / "job.mp4").write_bytes(content)
    frames = read_video(tmp_path / "job.mp4")
    assert frames.shape == (21, 32, 64, 3)
    same, reversed_ = (
        (frames.float() - made.float()).abs().mean()
        for made in (viewer.video, viewer.video.flip(0))
    )
    assert same < reversed_ / 2
    for data in (b"".join(viewer.data), content):
        with av.open(BytesIO(data)) as file:
            assert file.streams.video[0].codec_context.codec.canonical_name == codec


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "lost"])
def test_a_session_s_memory_goes_with_it(pipeline: Path, tmp_path: Path, ends: bool) -> None:
    """It does not wait for Python's collector of cycles, which comes rarely."""
    with serving(planned(pipeline), tmp_path, expires=0.05) as server:
        gc.collect()
        gc.disable()
        try:
            with server.watching(max_seconds=2 if ends else 60) as viewer:
                viewer.until("video.chunk_metadata", 2, play=False)
                (entry,) = server.service.sessions.entries.values()
                kept = weakref.ref(entry.live)
                del entry
                if ends:
                    viewer.play()
                    viewer.until("session.done")
            until(lambda: kept() is None)
        finally:
            gc.enable()


def test_a_session_that_fails_ends_alone(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(planned(pipeline), tmp_path) as server, server.watching() as first:
        first.until("video.chunk_metadata")
        with server.watching() as second:
            id = second.until("session.created")["session_id"]
            stream = server.service.sessions.entries[id].live.stream

            def broken() -> None:
                raise ValueError("latents are not finite")

            monkeypatch.setattr(stream, "make", broken)
            second.send(type="client.playback", position=100, buffered=0)
            code, last = second.closed()
        assert (code, last["code"]) == (1011, "internal") and "not finite" not in last["message"]
        first.until("video.chunk_metadata", 2)


def test_a_session_that_cannot_be_opened_is_told_so(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **options: Any) -> Stream:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with serving(planned(pipeline), tmp_path) as server:
        with monkeypatch.context() as patched, server.watching() as viewer:
            patched.setattr(Models, "open", full)
            code, last = viewer.closed()
        assert (code, last["code"]) == (1011, "internal") and "CUDA" not in last["message"]
        with server.watching() as viewer:
            viewer.until("video.chunk_metadata")


def test_a_device_that_fails_ends_the_server(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients are told to come back, and whoever runs the server gets the error."""

    def broken(stream: Stream) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    service = Service(planned(pipeline), "toy", Limits(), tmp_path)
    server = make_server(service)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            serve(server, service, listener)
        except RuntimeError as error:
            raised.append(error)

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # is for the main thread
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: service.ready)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Server(url, service, server).watching() as viewer:
            viewer.until("video.chunk_metadata", 2, play=False)
            monkeypatch.setattr(Stream, "make", broken)
            viewer.play()
            assert viewer.closed()[0] == 1012
        thread.join(WAIT)
    assert not thread.is_alive() and "illegal memory access" in str(raised)
    assert not [*(tmp_path / "sessions").iterdir()]


def test_a_second_connection_takes_a_session_over(server: Server) -> None:
    with server.watching() as first:
        first.until("video.chunk_metadata")
        with server.watching(**first.resuming()) as second:
            code, last = first.closed()
            assert (code, last["code"]) == (1008, "taken_over")
            second.play()
            second.until("video.chunk_metadata")


def test_connections_that_resume_a_session_at_once_share_it(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]]
) -> None:
    """It is opened from disk once, and takes one place."""
    with serving(planned(pipeline), tmp_path, expires=0.05) as server:
        sessions = server.service.sessions
        with server.watching(max_seconds=CHUNKS) as first:
            first.until("video.chunk_metadata", 2)
        until(lambda: not sessions.entries)
        with server.connect() as one, server.connect() as another:
            viewers = Viewer(one), Viewer(another)
            for viewer in viewers:
                viewer.send(**first.resuming())
            for viewer in viewers:
                viewer.until("session.created", play=False)
            assert sessions.admission._owners.total() == 1
            assert len(encoded) == 2


@pytest.mark.parametrize("wrong", ["session_id", "resume_token", "after_sequence"])
def test_only_its_client_resumes_a_session(server: Server, wrong: str) -> None:
    with server.watching() as viewer:
        viewer.until("video.chunk_metadata", 2)
        other = {"session_id": "../sessions", "resume_token": "x" * 43, "after_sequence": 99}
        given = {**viewer.resuming(), wrong: other[wrong]}
        with server.watching(**given) as stranger:
            code, last = stranger.closed()
        assert code == 1008
        assert last["code"] == (
            "refused"
            if wrong == "after_sequence"
            else "not_found"
            if wrong == "resume_token"
            else "invalid_message"
        )
        viewer.until("video.chunk_metadata")  # it is as it was


def test_a_session_that_is_left_goes_to_disk_and_comes_back(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]]
) -> None:
    """The same frames as without a break; events that wait keep their names."""
    with serving(planned(pipeline), tmp_path, expires=0.05, sessions=1) as server:
        with server.watching(max_seconds=CHUNKS) as first:
            first.until("video.chunk_metadata", 2, play=False)
            first.event("late", append=[{"caption": OTHER, "seconds": 3}])
            first.until("session.interaction.queued", play=False)
        until(lambda: not server.service.sessions.entries)
        with server.watching() as other:  # its memory is another's meanwhile
            other.until("video.chunk_metadata")
            other.send(type="session.stop")
            other.until("session.done")
        with server.watching(**first.resuming()) as second:
            second.until("session.created")
            second.send(type="client.playback", position=13 / 8, buffered=0)
            second.until("session.done")
        assert second.config["first_frame"] == 13
        assert not list((tmp_path / "sessions").iterdir())
    script = Shot(caption=PROMPT, seconds=5), Shot(caption=OTHER, seconds=3)
    frames = torch.cat([*encoded[0], *encoded[2]])
    assert torch.equal(frames, alone(pipeline, script)[: len(frames)])
    assert len(frames) == 5 + 8 * CHUNKS
    (late,) = (part for part in second.parts if part["started_event_ids"] == ["late"])
    assert late["generation_chunk_index"] == 5


def test_a_server_that_ends_keeps_its_sessions(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]]
) -> None:
    """The next one goes on to the frames of an undisturbed stream, and has what was not sent."""
    with serving(planned(pipeline), tmp_path) as server:
        with server.watching(max_seconds=CHUNKS, seed=5) as first:
            first.until("video.chunk_metadata", 3)
            before = len(first.parts)
        # The connection is lost, and chunks are made that nobody has got.
        until(lambda: len(encoded[0]) > before)
    with serving(planned(pipeline), tmp_path) as server:
        with server.watching(**first.resuming()) as second:
            second.until("session.done")
        assert [part["sequence"] for part in second.parts] == list(range(3, CHUNKS + 1))
    frames = torch.cat([frames for encoder in encoded for frames in encoder])
    assert torch.equal(frames, alone(pipeline, seed=5)[: len(frames)])
    assert len(frames) == 5 + 8 * CHUNKS
    starts = [m["config"]["first_frame"] for m in second.messages if m["type"] == "video.start"]
    assert starts == [0, sum(map(len, encoded[0]))]


def test_sessions_see_their_own_frames(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]]
) -> None:
    """Those of one that stalls, and of one that vanishes, are not another's."""
    with serving(planned(pipeline), tmp_path) as server:
        with (
            server.watching(max_seconds=CHUNKS, seed=1) as first,
            server.watching(max_seconds=CHUNKS, seed=2) as stalled,
            server.watching(max_seconds=CHUNKS, seed=3) as last,
        ):
            with server.watching(seed=4) as gone:
                gone.until("video.chunk_metadata")
            for _ in range(CHUNKS + 1):
                for viewer in (first, last):
                    viewer.until("video.chunk_metadata")
            stalled.until("video.chunk_metadata", 2, play=False)
        by_id = {id: entry.live for id, entry in server.service.sessions.entries.items()}
        assert by_id[stalled.created["session_id"]].chunks == 2
    seen = {tuple(torch.cat(own)[0].flatten()[:9].tolist()): torch.cat(own) for own in encoded}
    for seed in (1, 2, 3, 4):
        wanted = alone(pipeline, seed=seed)
        frames = seen[tuple(wanted[0].flatten()[:9].tolist())]
        assert torch.equal(frames, wanted[: len(frames)])
