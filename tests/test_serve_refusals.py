"""What a server refuses, and how it says so: bad messages, strangers, too many, and rubbish."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import schemathesis
import torch
from helpers import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import OTHER, PROMPT, Server, Viewer, encoded, pipeline, serving, until, written
from streams import planned
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from lltk.serve import realtime
from lltk.serve.messages import FROM_SERVER, LONGEST_PROMPT, LONGEST_TEXT, PROTOCOL, TOKEN
from lltk.serve.service import Service
from lltk.streaming import check_sessions

pytestmark = pytest.mark.cpu
__all__ = ["encoded", "pipeline", "written"]


@pytest.fixture(scope="module")
def server(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with room for two sessions, and for two that wait."""
    folder = tmp_path_factory.mktemp("server")
    limits = {"sessions": 2, "queue": 2, "per_token": 4, "expires": 0.05}
    with serving(planned(pipeline), folder, ["sesame", "other"], **limits) as made:
        yield made


def png(width: int = 8, height: int = 6, form: str = "PNG") -> bytes:
    data = BytesIO()
    Image.new("RGB", (width, height), "orange").save(data, form)
    return data.getvalue()


def address(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return host, int(port)


# Strangers


@pytest.mark.parametrize(
    "names", [[PROTOCOL], [PROTOCOL, f"{TOKEN}sesam"], [PROTOCOL, f"{TOKEN}"], []]
)
def test_a_wrong_token_is_told_so(server: Server, names: list[str]) -> None:
    with server.connect(*(names or ["chat"])) as socket:
        code, last = Viewer(socket).closed()
    assert (code, last["code"]) == (1008, "unauthorized")
    assert "sesam" not in json.dumps(last)


def test_the_token_may_come_as_a_header(server: Server) -> None:
    with server.connect(PROTOCOL, additional_headers=server.headers) as socket:
        socket.send(json.dumps({"type": "session.ping"}))
        assert json.loads(socket.recv(timeout=5))["code"] == "invalid_message"
        assert socket.response is not None
        assert "sec-websocket-extensions" not in socket.response.headers  # nothing compresses video


def test_another_version_is_told_so(server: Server) -> None:
    with server.connect("lltk.v0", f"{TOKEN}sesame") as socket:
        code, last = Viewer(socket).closed()
    assert (code, last["code"]) == (1002, "protocol_version")
    assert PROTOCOL in last["message"]


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://[::1"},
     {"Host": "evil.example"}],
)  # fmt: skip
def test_another_page_is_refused(server: Server, headers: dict[str, str]) -> None:
    own = server.headers | headers
    answer = server.http().post("/v1/videos", json={"prompt": "x"}, headers=own)
    assert answer.status_code == (403 if "Origin" in headers else 421)
    if "Origin" in headers:
        with pytest.raises(InvalidStatus, match="403"), server.connect(origin=headers["Origin"]):
            pass


def test_another_name_of_the_host_opens_no_connection(server: Server) -> None:
    """As of a page whose name was made to lead here (DNS rebinding); its origin is that name."""
    host, port = address(server)
    names: list[Any] = [PROTOCOL, f"{TOKEN}sesame"]
    for name, refused in ((host, False), ("evil.example", True)):
        place = f"{name}:{port}"
        with suppress(InvalidStatus):
            with connect(
                f"ws://{place}/v1/realtime/video",
                sock=socket.create_connection((host, port)),
                origin=f"http://{place}",  # type: ignore[arg-type]
                subprotocols=names,
                proxy=None,
            ):
                assert not refused
            continue
        assert refused


def test_its_own_page_is_not(server: Server) -> None:
    with server.connect(origin=server.url) as socket:
        socket.send(json.dumps({"type": "session.start", "prompt": PROMPT}))
        assert json.loads(socket.recv(timeout=5))["type"] == "session.created"


def test_every_route_wants_the_token(server: Server) -> None:
    """But for those that a balancer asks, and the page."""
    paths = server.http().get("/openapi.json").json()["paths"]
    routes = [(path, method) for path, methods in paths.items() for method in methods]
    free = {"/health", "/ready"}
    assert {"/v1/videos", "/v1/sessions", "/v1/files", "/metrics"} <= set(paths)
    for path, method in routes:
        answer = server.http().request(
            method, path.replace("{id}", "x"), headers={"authorization": "Bearer no"}
        )
        assert (answer.status_code == 401) == (path not in free), path


def begin_a_body(server: Server, path: str, token: str) -> socket.socket:
    """A request whose body does not come."""
    host, port = address(server)
    begun = socket.create_connection((host, port), timeout=5)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {token}\r\n"
    begun.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n[".encode())
    return begun


@pytest.mark.parametrize("path", ["/v1/sessions", "/v1/files", "/v1/videos"])
def test_a_stranger_s_body_is_not_waited_for(server: Server, path: str) -> None:
    with begin_a_body(server, path, "no") as begun:
        assert begun.recv(12) == b"HTTP/1.1 401"


def test_a_client_that_goes_within_a_body_is_no_error(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])
    for path in ("/v1/sessions", "/v1/videos"):
        begin_a_body(server, path, "sesame").close()
    for _ in range(5):
        assert server.http().get("/health").status_code == 200
    assert not caplog.records


def test_answers_tell_a_browser_what_it_may_do(server: Server) -> None:
    headers = server.http().get("/health").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "script" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_one_token_does_not_see_anothers(server: Server) -> None:
    mine = server.http().post("/v1/videos", json={"prompt": "x", "seconds": 1}).json()
    image = server.http().post("/v1/files", files={"file": png()}).json()
    theirs = {"authorization": "Bearer other"}
    with server.http() as http:
        http.headers.update(theirs)
        assert http.get(f"/v1/videos/{mine['id']}").status_code == 404
        assert http.delete(f"/v1/videos/{mine['id']}").status_code == 404
        assert http.get("/v1/videos").json()["data"] == []
        with server.watching() as viewer:
            id = viewer.until("session.created")["session_id"]
            for method, path in (("GET", id), ("GET", f"{id}/state"), ("DELETE", id)):
                assert http.request(method, f"/v1/sessions/{path}").status_code == 404
            viewer.until("video.chunk_metadata")
            assert server.http().get(f"/v1/sessions/{id}").json()["state"] == "playing"
        asked = {"prompt": "x", "input_reference": {"file_id": image["id"]}}
        assert "is not kept" in http.post("/v1/videos", json=asked).json()["error"]["message"]


# Bad messages


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({}, "type"),
        ({"type": "session.begin", "prompt": "x"}, "session.begin"),
        ({"type": "session.start"}, "exactly one of prompt and shots"),
        ({"type": "session.start", "prompt": "x", "shots": []}, "shots"),
        ({"type": "session.start", "prompt": "x", "fps": 3}, "fps"),
        ({"type": "session.start", "prompt": "x" * (LONGEST_PROMPT + 1)}, "2000"),
        ({"type": "session.start", "prompt": " \n"}, "prompt"),
        ({"type": "session.start", "prompt": "x", "seed": -1}, "seed"),
        ({"type": "session.start", "prompt": "x", "seed": "1"}, "seed"),
        ({"type": "session.start", "prompt": "x", "size": "64x33"}, "64x32"),
        ({"type": "session.start", "prompt": "x", "model": "sora"}, "toy"),
        ({"type": "session.start", "shots": [{"caption": "x", "seconds": 0}]}, "seconds"),
        ({"type": "session.start", "prompt": "x", "image_reference": {}}, "exactly one"),
        (
            {"type": "session.start", "prompt": "x",
             "image_reference": {"image_url": "http://example.com/x.png"}},
            "image_url",
        ),
        (
            {"type": "session.start", "prompt": "x", "image_reference": {"file_id": "file-1"}},
            "is not kept",
        ),
        (
            {"type": "session.start", "prompt": "x",
             "image_reference": {"image_url": "data:image/png;base64,QUJD"}},
            "is not an image",
        ),
        ({"type": "session.stop"}, "no session has begun"),
    ],
)  # fmt: skip
def test_a_wrong_first_message_is_told_so(
    server: Server, message: dict[str, Any], said: str
) -> None:
    with server.watching(**{"type": None, "prompt": None, **message}) as viewer:
        code, last = viewer.closed()
    assert (code, last["type"]) == (1008, "error")
    assert said in last["message"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": "x", "seconds": -2}, "seconds: write more than 0 and at most 3600"),
        ({"seconds": 2}, "video: give exactly one of prompt and shots"),
        ({"prompt": "x", "fps": 3}, "fps: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_job_is_told_so(server: Server, asked: dict[str, Any], said: str) -> None:
    """In one sentence, which names the key once."""
    answer = server.http().post("/v1/videos", json=asked)
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, said)


@pytest.mark.parametrize(
    "rubbish",
    ["", "x", "null", "[]", '{"type":', "[" * 5000, "\x00", '{"type": "session.ping"} x',
     '{"type": "session.start", "prompt": "x", "max_seconds": NaN}', b"\x00\xff", "9" * 5000,
     "y" * (LONGEST_TEXT + 1)],
)  # fmt: skip
def test_rubbish_ends_a_connection_and_nothing_else(server: Server, rubbish: str | bytes) -> None:
    with server.watching() as other:
        other.until("video.chunk_metadata")
        with server.watching(type="session.start", prompt=None) as viewer:
            code, _ = viewer.closed()
            assert code == 1008
        with server.connect() as socket:
            socket.send(rubbish)
            expected = {bytes: 1003}.get(
                type(rubbish), 1009 if len(rubbish) > LONGEST_TEXT else 1008
            )
            assert Viewer(socket).closed()[0] == expected
        other.until("video.chunk_metadata", 3)


def test_wrong_events_are_refused_by_name_and_the_stream_goes_on(server: Server) -> None:
    with server.watching(max_seconds=4) as viewer:
        viewer.until("video.chunk_metadata", 2, play=False)
        viewer.send(type="session.interaction", interaction={"event_id": "x y", "event": {}})
        assert viewer.receive()["code"] == "invalid_message"  # type: ignore[index]
        viewer.send(type="session.start", prompt="x")
        assert "the session has begun" in viewer.receive()["message"]  # type: ignore[index]
        viewer.event("a", append=[{"caption": OTHER, "seconds": 1}], cut=True)
        assert "for a prompt" in viewer.receive()["message"]  # type: ignore[index]
        viewer.play()
        viewer.until("session.done")
        assert viewer.parts[-1]["generation_chunk_index"] == 4


def test_an_event_after_the_end_is_refused(server: Server) -> None:
    with server.watching(max_seconds=1) as viewer:
        id = viewer.until("session.created")["session_id"]
        sessions = server.service.sessions
        loop, ends = sessions._loop, sessions.entries[id].moving
        asyncio.run_coroutine_threadsafe(ends.acquire(), loop).result()
        viewer.until("video.chunk_metadata", 2, play=False)  # all that it may have
        viewer.event("late", prompt=OTHER)
        message = viewer.receive()
        loop.call_soon_threadsafe(ends.release)
        assert isinstance(message, dict)
        assert (message["code"], message["event_id"]) == ("refused", "late")
        assert "as long as it may be" in message["message"]
        viewer.until("session.done")


def test_an_event_that_comes_again_is_applied_once(server: Server) -> None:
    """Also after a lost connection, and from disk; another event of the same name is refused."""
    cut = {"prompt": OTHER, "cut": True, "seconds": 1}
    with server.watching(max_seconds=6) as viewer:
        viewer.until("video.chunk_metadata", 2, play=False)
        viewer.event("once", **cut)
        first = viewer.until("session.interaction.queued")
        viewer.event("once", **cut)
        assert viewer.until("session.interaction.queued") == first
    until(lambda: not server.service.sessions.entries)
    with server.watching(**viewer.resuming()) as again:
        again.until("session.created")
        again.event("once", **cut)
        assert again.until("session.interaction.queued") == first
        again.event("once", **cut | {"seconds": 2})
        while again.messages[-1]["type"] != "error":
            again.receive()
        refused = again.messages[-1]
        assert (refused["code"], refused["event_id"]) == ("refused", "once")
        again.send(type="session.pause", event_id="p")
        again.until("session.interaction.queued")
        again.send(type="session.play", event_id="q")
        again.until("session.interaction.queued")
        again.send(type="session.pause", event_id="p")  # late: it plays on
        assert again.until("session.interaction.queued")["event"] == "pause"
        again.send(type="client.playback", position=100, buffered=0)
        again.until("session.done")
    assert [each for part in again.parts for each in part["started_event_ids"]] == ["once"]


def test_a_session_has_so_many_events_ahead(server: Server) -> None:
    """Or one client's events and shots would grow for ever, and keep the others waiting."""

    def asked(name: str, **event: Any) -> dict[str, Any]:
        viewer.event(name, **event)
        message = viewer.receive()
        assert isinstance(message, dict)
        return message

    shots = [{"caption": f"{PROMPT} {k}", "seconds": 1} for k in range(64)]
    with server.watching(prompt=None, shots=shots, max_seconds=300) as viewer:
        viewer.until("video.chunk_metadata", 2, play=False)
        assert "received" in asked("fits", append=shots)
        assert "128 shots are ahead" in asked("many", append=shots[:4])["message"]
        for k in range(63):
            assert "received" in asked(f"{k}", prompt=OTHER, cut=True)
        assert "64 wait already" in asked("one-more", prompt=OTHER, cut=True)["message"]
        viewer.play()
        viewer.until("video.chunk_metadata")
        assert "received" in asked("now", prompt=OTHER, cut=True)


def test_shots_that_could_not_be_seen_are_refused(server: Server) -> None:
    shots = [{"caption": PROMPT, "seconds": 9}]
    with server.watching(prompt=None, shots=shots, max_seconds=4) as viewer:
        viewer.until("video.chunk_metadata", 2, play=False)
        viewer.event("late", append=shots)
        message = viewer.receive()
        assert isinstance(message, dict)
        assert "last until the stream's end" in message["message"]


def test_a_client_that_sends_too_much_waits(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(realtime, "_RATE", 10.0)
    with server.watching() as viewer:
        viewer.until("session.created")
        begun = time.monotonic()
        for _ in range(14):
            viewer.send(type="session.ping")
        while [m["type"] for m in viewer.messages].count("session.pong") < 14:
            viewer.receive()
    assert time.monotonic() - begun > 0.4  # ten at once, and one each 0.1 s


def test_many_wrong_messages_end_a_connection(server: Server) -> None:
    with server.watching() as viewer:
        viewer.until("video.chunk_metadata")
        for _ in range(17):
            viewer.send(type="nonsense")
        assert viewer.closed()[0] == 1008


# Too many


def test_who_does_not_fit_waits_and_then_is_told_when_to_come_back(
    pipeline: Path, tmp_path: Path
) -> None:
    limits = {"sessions": 1, "queue": 1, "per_token": 9, "seconds": 50}
    with (
        serving(planned(pipeline), tmp_path, **limits) as server,
        server.watching() as first,
    ):
        first.until("video.chunk_metadata")
        with server.watching() as second:
            queued = second.until("session.queued")
            assert (queued["position"], queued["length"]) == (1, 1)
            second.send(type="client.playback", position=0, buffered=0)  # of a hasty player
            second.event("early", prompt=OTHER)
            answer = second.receive()
            assert isinstance(answer, dict) and answer["event_id"] == "early"
            assert "has not begun" in answer["message"]
            assert 0 < queued["estimate_s"] <= 50
            with server.watching() as third:
                code, last = third.closed()
            assert (code, last["code"], last["retryable"]) == (1013, "over_capacity", True)
            assert 0 < last["retry_after"] <= 50
            answer = server.http().post("/v1/sessions", json={"prompt": "x"})
            assert answer.status_code == 429
            assert 0 < int(answer.headers["retry-after"]) <= 50
            first.send(type="session.stop")
            second.until("video.chunk_metadata")
        rejected = server.http().get("/metrics").text
        assert 'lltk_rejected_total{why="over_capacity"} 2.0' in rejected


def test_who_stops_waiting_makes_room(pipeline: Path, tmp_path: Path) -> None:
    with (
        serving(planned(pipeline), tmp_path, sessions=1, queue=1) as server,
        server.watching() as first,
    ):
        first.until("video.chunk_metadata")
        with server.watching() as second:
            second.until("session.queued")
            second.send(type="session.stop")
            assert second.closed()[0] == 1000
        with server.watching() as third:
            third.until("session.queued")
        until(lambda: not len(server.service.sessions.admission))


def test_what_the_device_has_no_time_for_waits(pipeline: Path, tmp_path: Path) -> None:
    """Frames that cost 0.1 s each leave time for one session of 8 a second."""
    with (
        serving(planned(pipeline), tmp_path) as server,
        server.watching() as first,
    ):
        first.until("video.chunk_metadata")
        server.service.capacity.frame = 0.1
        with server.watching() as second:
            second.until("session.queued")
            first.send(type="session.pause")  # a paused session takes no time
            second.until("session.created")


def test_a_paused_session_gives_way_to_one_that_waits(pipeline: Path, tmp_path: Path) -> None:
    """It keeps its memory as long as nobody waits, and goes on later where it was."""
    limits = {"sessions": 1, "expires": 0.1}
    with (
        serving(planned(pipeline), tmp_path, **limits) as server,
        server.watching(max_seconds=4) as first,
    ):
        first.until("video.chunk_metadata", 2)
        first.send(type="session.pause")
        with pytest.raises(TimeoutError):
            while True:
                first.receive(wait=0.5)
        with server.watching(max_seconds=1) as second:
            second.until("session.done")
        code, last = first.closed()
        assert (code, last["code"], last["retryable"]) == (1013, "over_capacity", True)
        assert "it was paused while others wait" in last["message"]
        with server.watching(**first.resuming()) as third:
            third.until("session.created")
            third.send(type="session.play")
            third.send(type="client.playback", position=100, buffered=0)
            third.until("session.done")
        made = [part["sequence"] for part in (*first.parts, *third.parts)]
        assert made == list(range(len(made))) and len(made) == 5


def test_jobs_that_are_too_many_or_too_long_are_refused(pipeline: Path, tmp_path: Path) -> None:
    with serving(planned(pipeline), tmp_path, jobs=1, seconds=60) as server:
        with server.http() as http:
            asked = {"prompt": "x", "seconds": 61}
            assert "at most 60" in http.post("/v1/videos", json=asked).json()["error"]["message"]
            answers = [
                http.post("/v1/videos", json={"prompt": "x", "seconds": "50"}) for _ in range(3)
            ]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[2].headers["retry-after"] == "30"


# Images


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is not an image"),
        (png(form="GIF"), "is not an image"),
        (png(300, 200)[:80], "is not an image that can be read"),
        (png(5000, 4000), "16 Mi"),
        (png() + bytes(10 << 20), "send at most 10485760"),
        (png() + bytes(20 << 20), "more than 20971520 bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
    ],
    ids=["nothing", "gif", "cut short", "pixels", "bytes", "body", "svg"],
)
def test_what_is_no_image_is_refused(server: Server, data: bytes, said: str) -> None:
    answer = server.http().post("/v1/files", files={"file": ("../../x.png", data)})
    whole = len(data) > 20 << 20
    assert answer.status_code == (413 if whole else 400)
    assert said in (answer.text if whole else answer.json()["error"]["message"])


def test_a_body_beyond_all_limits_is_not_read(server: Server) -> None:
    """It names no length, so that only reading tells."""
    body = (b" " * (1 << 20) for _ in range(40))
    kind = {"content-type": "application/json"}
    assert server.http().post("/v1/videos", content=body, headers=kind).status_code == 413


def test_an_image_is_the_first_frame(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]], written: list[Tensor]
) -> None:
    """An uploaded one, one in a message, and a job's in a form give the same video."""
    with serving(planned(pipeline), tmp_path) as server:
        id = server.http().post("/v1/files", files={"file": ("x.png", png())}).json()["id"]
        url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
        for reference in ({"file_id": id}, {"image_url": url}, None):
            with server.watching(image_reference=reference, max_seconds=2) as viewer:
                viewer.until("session.done")
        asked = {"prompt": PROMPT, "seconds": "2"}
        with server.http() as http:
            made = http.post("/v1/videos", data=asked, files={"input_reference": png()}).json()
            until(lambda: http.get(f"/v1/videos/{made['id']}").json()["status"] == "completed")
    with_file, with_url, without = (torch.cat(frames) for frames in encoded)
    assert torch.equal(with_file, with_url)
    assert not torch.equal(with_file, without)
    by_job = torch.cat(written)
    assert len(by_job) >= 13 and torch.equal(by_job, with_file[: len(by_job)])


# Rubbish of every kind

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ("prompt", "shots", "seed", "size", "max_seconds", "interaction", "event_id", "position",
        "buffered", "session_id", "resume_token", "after_sequence", "image_reference")  # fmt: skip
TYPES = st.sampled_from(
    ["session.start", "session.resume", "session.interaction", "session.pause", "session.play",
     "session.ping", "client.playback", "session.created"]
)  # fmt: skip
MESSAGE = st.builds(
    lambda kind, more: json.dumps({"type": kind, **more}),
    TYPES,
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
) | JSON.map(json.dumps)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6))
def test_no_message_breaks_the_server(server: Server, messages: list[str]) -> None:
    """Every answer is one of the protocol's, says no traceback, and the next client is served."""
    with server.connect() as socket:
        socket.send(json.dumps({"type": "session.start", "prompt": PROMPT, "max_seconds": 2}))
        with suppress(ConnectionClosed):
            for message in (*messages, json.dumps({"type": "session.stop"})):
                socket.send(message)
        answers = []
        with suppress(ConnectionClosed):
            answers += [data for data in socket if isinstance(data, str)]
    for data in answers:
        FROM_SERVER.validate_json(data)
        assert "Traceback" not in data and "internal" not in data


def test_no_request_breaks_the_server(server: Server, pipeline: Path) -> None:
    """What the OpenAPI says is true of every answer, and none is a 5xx."""
    checks = [response_schema_conformance, status_code_conformance, content_type_conformance]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=12, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            answer = case.call(headers=server.headers)
            assert answer.status_code < 500, answer.text
            assert "Traceback" not in answer.text
            case.validate_response(answer, checks=checks)

        check()


# Files

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
NO_FOLDER = (-1, None)
"""Of a call whose path is not relative to an open folder."""


@contextmanager
def files_changed() -> Iterator[set[Path]]:
    """The files that Python writes, makes or removes in the block, by any thread."""
    changed: set[Path] = set()
    listening = True

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & WRITING
        if listening and (writes or (event in CHANGES and arguments[-1] in NO_FOLDER)):
            paths = arguments[:1] if writes else arguments
            changed.update(Path(os.fsdecode(p)) for p in paths if isinstance(p, str | bytes))

    sys.addaudithook(hear)  # it stays, and is deaf after the block
    try:
        yield changed
    finally:
        listening = False


def test_nothing_is_written_outside_the_folder(pipeline: Path, tmp_path: Path) -> None:
    """Whatever names clients give: of files, of sessions and of videos."""
    folder = tmp_path / "deep" / "state"
    wrong = ["..", "../..", "../x", "../sessions", "/etc/passwd", "x\0", "a" * 300]
    with serving(planned(pipeline), folder, expires=0.05) as server, files_changed() as changed:
        with server.http() as http, closing(HTTPConnection(*address(server))) as raw:
            for name in wrong:
                files = {"file": (name, png())}
                assert http.post("/v1/files", files=files).status_code == 200
                for method, route in (
                    ("GET", "sessions/{}"), ("GET", "sessions/{}/state"), ("DELETE", "sessions/{}"),
                    ("GET", "videos/{}"), ("GET", "videos/{}/content"), ("DELETE", "videos/{}"),
                ):  # fmt: skip
                    # Not by httpx, which resolves dots. 307 leads to the page.
                    for path in (quote(name), quote(name, safe="").replace(".", "%2e")):
                        raw.request(method, f"/v1/{route.format(path)}")
                        with raw.getresponse() as answer:
                            assert answer.status in (307, 404, 405), (method, route, path)
                            answer.read()
            asked = {"prompt": PROMPT, "seconds": "1"}
            files = {"input_reference": ("../../x.png", png())}
            id = http.post("/v1/videos", data=asked, files=files).json()["id"]
            until(lambda: http.get(f"/v1/videos/{id}").json()["status"] == "completed")
        for name in ("../x", "..", "a" * 64):
            given = {"session_id": name, "resume_token": "../x", "after_sequence": -1}
            with server.watching(type="session.resume", prompt=None, **given) as stranger:
                assert stranger.closed()[0] == 1008
        with server.watching() as viewer:
            viewer.until("video.chunk_metadata")
        until(lambda: (folder / "sessions").is_dir() and not server.service.sessions.entries)
    assert any(path.is_relative_to(folder / "sessions") for path in changed)
    assert any(path.is_relative_to(folder / "videos") for path in changed)
    assert not [path for path in changed if not path.is_relative_to(folder)]
    assert not [path for path in changed if ".." in path.parts]


# The command


def test_another_host_wants_a_token(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("serve", "--host", "0.0.0.0", "--folder", tmp_path)
    assert code == 2 and "add --token" in errors


def test_a_port_in_use_is_told_so(run: Run, server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    code, _, errors = run("serve", "--port", port, "--folder", tmp_path)
    assert code == 2 and "name another --port" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny_stream", "--set", "stream.text.after=free"], "write keep or offload"),
        (["tiny_stream", "--device", "cuda:7"], "cuda:7"),
        (["tiny_decode"], "stream"),
        (["tiny_stream", "--token", "a b"], "token: write it in"),
        (["tiny_stream", "--host", "0.0.0.0", "--token", ""], "token: write it in"),
        (["tiny_stream", "--token", "a/b=="], "token: write it in"),
        (["tiny_stream", "--set", "stream.serve.codec=hevc"], "serve.codec: Input should"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    run: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, _, errors = run("serve", *arguments, "--folder", tmp_path)
    assert code == 2 and said in errors


def test_more_sessions_than_fit_are_refused(pipeline: Path) -> None:
    plan = planned(pipeline)
    check_sessions(plan, 2)
    with pytest.raises(ValueError, match=r"free: [1-9]\d* fit"):
        check_sessions(plan, 10**9)


def test_without_an_encoder_nothing_is_served(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lltk.stream import fragments

    broken = fragments.CODECS["h264"].__class__("libnone", {}, b"avcC", lambda box: "")
    monkeypatch.setattr(fragments, "CODECS", {"h264": broken})
    from lltk.serve.settings import Limits

    with pytest.raises(ValueError, match="libnone"):
        Service(planned(pipeline), "toy", Limits(), tmp_path)
