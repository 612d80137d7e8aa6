"""Servers of small streams, and clients that watch them, for the tests of serving."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import torch
import uvicorn
from streams import save_pipeline
from torch import Tensor
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from lltk.serve import jobs, live, scheduling
from lltk.serve.messages import PROTOCOL, TOKEN
from lltk.serve.running import listening, make_server
from lltk.serve.scheduling import Capacity
from lltk.serve.service import Service
from lltk.serve.settings import Limits
from lltk.stream.fragments import FragmentWriter
from lltk.stream.video import VideoWriter
from lltk.streaming import Plan

WAIT = 30.0
"""Seconds until a test gives up."""
PROMPT = "a red circle moving left"
OTHER = "a blue square moving up"


@dataclass
class Server:
    """A server that runs."""

    url: str
    service: Service
    uvicorn: uvicorn.Server
    token: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.token is None else {"authorization": f"Bearer {self.token}"}

    def http(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=WAIT, **more)

    def connect(self, *names: str, **more: Any) -> ClientConnection:
        """A connection that names these subprotocols; by default the right ones."""
        own = [PROTOCOL] if self.token is None else [PROTOCOL, TOKEN + self.token]
        url = f"ws{self.url.removeprefix('http')}/v1/realtime/video"
        return connect(url, subprotocols=list(names) or own, max_size=None, proxy=None, **more)

    @contextmanager
    def watching(self, **first: Any) -> Iterator[Viewer]:
        """A viewer whose first message is given; by default it starts a stream of `PROMPT`."""
        with self.connect() as socket:
            viewer = Viewer(socket)
            viewer.send(**({"type": "session.start", "prompt": PROMPT} | first))
            yield viewer


@dataclass
class Viewer:
    """A client of one session."""

    socket: ClientConnection
    messages: list[dict[str, Any]] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)

    def send(self, **message: Any) -> None:
        given = {name: value for name, value in message.items() if value is not None}
        self.socket.send(json.dumps(given))

    def event(self, name: str, **event: Any) -> None:
        self.send(type="session.interaction", interaction={"event_id": name, "event": event})

    def receive(self, wait: float = WAIT) -> dict[str, Any] | bytes:
        """The next message; after a part it reports that all that came has played."""
        made = self.socket.recv(timeout=wait)
        if isinstance(made, bytes):
            self.data.append(made)
            return made
        message: dict[str, Any] = json.loads(made)
        self.messages.append(message)
        return message

    def until(self, kind: str, count: int = 1, play: bool = True) -> dict[str, Any]:
        """Receive until so many messages of a type came; returns the last of them."""
        while count:
            message = self.receive()
            if isinstance(message, bytes):
                if play:
                    self.play()
                continue
            assert message["type"] in (kind, *_EXPECTED), message
            count -= message["type"] == kind
            last = message
        if kind == "video.chunk_metadata":
            self.receive()
            if play:
                self.play()
        return last

    def play(self, left: int = 0) -> None:
        """Report that all that came has played, but for some frames."""
        if self.parts:
            last = self.parts[-1]
            position = (last["first_frame"] + last["num_frames"] - left) / self.config["fps"]
            with suppress(ConnectionClosed):  # after the last part
                self.send(type="client.playback", position=position, buffered=0)

    @property
    def config(self) -> dict[str, Any]:
        (*_, last) = (m["config"] for m in self.messages if m["type"] == "video.start")
        config: dict[str, Any] = last
        return config

    @property
    def parts(self) -> list[dict[str, Any]]:
        return [m for m in self.messages if m["type"] == "video.chunk_metadata"]

    @property
    def created(self) -> dict[str, Any]:
        (*_, last) = (m for m in self.messages if m["type"] == "session.created")
        return last

    def resuming(self, after: int | None = None) -> dict[str, Any]:
        """The message that resumes its session."""
        return {
            "type": "session.resume",
            "prompt": None,
            "session_id": self.created["session_id"],
            "resume_token": self.created["resume_token"],
            "after_sequence": self.parts[-1]["sequence"] if after is None else after,
        }

    def closed(self) -> tuple[int, dict[str, Any]]:
        """The number that the server closes with, and its last message, if any."""
        try:
            while True:
                self.receive()
        except ConnectionClosed as error:
            assert error.rcvd is not None
            return error.rcvd.code, self.messages[-1] if self.messages else {}

    @property
    def video(self) -> Tensor:
        """All frames that came: uint8 [F, H, W, 3]."""
        with av.open(BytesIO(b"".join(self.data))) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return torch.stack([torch.from_numpy(frame) for frame in frames])


_EXPECTED = ("session.created", "video.start", "video.chunk_metadata", "session.queued",
             "session.interaction.queued")  # fmt: skip


@contextmanager
def serving(
    plan: Plan,
    folder: Path,
    tokens: Sequence[str] = (),
    hosts: Sequence[str] = ("127.0.0.1",),
    port: int = 0,
    **limits: Any,
) -> Iterator[Server]:
    """A server over a real socket; leaving the block ends it as a signal would."""
    service = Service(plan, "toy", Limits(**limits), folder)
    server = make_server(service, tokens, hosts)
    with listening("127.0.0.1", port) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            until(lambda: service.ready or service.failure is not None)
            assert service.failure is None, service.failure
            yield Server(url, service, server, tokens[0] if tokens else None)
        finally:
            server.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


def until(true: Callable[[], bool], wait: float = WAIT, every: float = 0.005) -> None:
    """Wait until something is true."""
    end = time.monotonic() + wait
    while not true():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(every)


def completed(http: httpx.Client, id: str) -> dict[str, Any]:
    """A job once it is over."""
    until(lambda: http.get(f"/v1/videos/{id}").json()["status"] in ("completed", "failed"))
    job: dict[str, Any] = http.get(f"/v1/videos/{id}").json()
    return job


@contextmanager
def time_enough() -> Iterator[None]:
    """Let a server have time for any number of sessions, however slow the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Capacity, "measure", lambda self, stages, frames: None)
        patch.setattr(Capacity, "share", lambda self, fps: 1e-3)
        yield


@contextmanager
def as_reported() -> Iterator[None]:
    """Let chunks depend on what players report alone, not on the time that anything takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling, "REPORT", 0.0)
        patch.setattr(scheduling, "_SPARE", 0.0)
        yield


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of random weights, which all tests of serving share, with its plans."""
    return _pipeline(tmp_path_factory.getbasetemp())


@cache
def _pipeline(folder: Path) -> Path:
    return save_pipeline(folder / "served_pipeline")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The frames that jobs write, a tensor for each write."""
    made: list[Tensor] = []

    class Recorder(VideoWriter):
        def write(self, frames: Tensor) -> None:
            made.append(frames.clone())
            super().write(frames)

    monkeypatch.setattr(jobs, "VideoWriter", Recorder)
    return made


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The frames that live sessions encode: a list of writes for each encoder, in order."""
    made: list[list[Tensor]] = []

    class Recorder(FragmentWriter):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.own: list[Tensor] = []
            made.append(self.own)
            super().__init__(*arguments, **named)

        def write(self, frames: Tensor, keyframe: bool = True) -> None:
            self.own.append(frames.clone())
            super().write(frames, keyframe)

    monkeypatch.setattr(live, "FragmentWriter", Recorder)
    return made
