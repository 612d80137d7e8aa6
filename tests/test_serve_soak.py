"""Many clients at once, good and bad ones, for a while: nobody gets another's frames."""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from serving import PROMPT, Server, Viewer, pipeline, serving, time_enough, until
from streams import planned, streamed
from torch import Tensor
from websockets.exceptions import ConnectionClosed

from lltk.stream.script import Shot
from lltk.stream.video import pixels

__all__ = ["pipeline"]
FPS = 4
GOOD, STALLED, GONE, RUBBISH = (1, 2, 3), (4, 5), (6, 7), 8
"""Eight clients, by the seeds of their videos."""
LONG = 3600.0
"""Seconds of the videos that nobody watches to their end."""
WORDS = (b"\x00\xff", "{", "null", "[" * 999, '{"type": "session.stop"}', "9" * 70_000, "\x00")
MEBIBYTE = 1 << 20


@dataclass
class Soak:
    """What the clients of a server do until it is time to stop.

    Attributes:
        server: that they watch.
        videos: what each seed's video is: float [F, H, W, 3].
        lasts: whether it goes on.
        pace: seconds of video that play in a second.
    """

    server: Server
    videos: dict[int, Tensor]
    lasts: Callable[[], bool]
    pace: float
    rounds: dict[int, int] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watching(self, seed: int, seconds: float) -> Iterator[Viewer]:
        with self.server.watching(seed=seed, max_seconds=seconds) as viewer:
            yield viewer

    def check(self, seed: int, video: Tensor) -> None:
        """Each frame is its own video's, and no other's."""
        for number, frame in enumerate(video.float()):
            distance = {
                own: (frame - made[number]).abs().mean() for own, made in self.videos.items()
            }
            assert min(distance, key=lambda own: distance[own]) == seed, (seed, number)

    def watch(self, seed: int, seconds: float) -> None:
        """Watch one video after another, each to its end."""
        while self.lasts():
            with self.watching(seed, seconds) as viewer:
                begun = time.monotonic()
                while not viewer.messages or viewer.messages[-1]["type"] != "session.done":
                    if isinstance(viewer.receive(), bytes):
                        played = viewer.parts[-1]["first_frame"] / FPS if viewer.parts else 0
                        time.sleep(max(0.0, begun + played / self.pace - time.monotonic()))
                        viewer.play()
            self.check(seed, viewer.video)
            self.rounds[seed] = self.rounds.get(seed, 0) + 1

    def stall(self, seed: int, plays: bool) -> None:
        """Play nothing, or say that all is played and read nothing."""
        with self.watching(seed, LONG) as viewer:
            viewer.until("video.chunk_metadata", 2, play=False)
            begun, id = time.monotonic(), viewer.created["session_id"]
            live = self.server.service.sessions.entries[id].live
            with suppress(ConnectionClosed):  # who answers no ping is taken for gone
                while plays and not self.over.wait(0.1):
                    position = (time.monotonic() - begun) * self.pace
                    viewer.send(type="client.playback", position=position, buffered=0)
            self.over.wait()
            assert plays or live.chunks == 2
            self.check(seed, viewer.video)

    def vanish(self, seed: int) -> None:
        """Lose one connection after another, without a word."""
        while self.lasts():
            with self.watching(seed, LONG) as viewer:
                viewer.until("video.chunk_metadata", 2)
                viewer.socket.socket.shutdown(socket.SHUT_RDWR)
            self.check(seed, viewer.video)
            self.over.wait(1 / self.pace)

    def babble(self) -> None:
        """Send what is no message, before a session begins and in it."""
        draw = random.Random(5)
        while self.lasts():
            with self.server.connect() as connection, suppress(ConnectionClosed):
                if draw.random() < 0.5:
                    Viewer(connection).send(type="session.start", prompt=PROMPT, seed=RUBBISH)
                for _ in range(20):
                    connection.send(draw.choice(WORDS))
                Viewer(connection).closed()
            self.over.wait(0.2)


def memory() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def files() -> list[str]:
    """What this process has open; of sockets and the like only what kind they are."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}").partition(":[")[0])
    return sorted(found)


def soak(pipeline: Path, folder: Path, seconds: float, video: float, pace: float) -> list[int]:
    """Let eight clients at a server for some seconds; returns its memory, each second.

    Args:
        pipeline: of the streams.
        folder: for the server.
        seconds: for which it lasts.
        video: seconds of each video that is watched to its end.
        pace: seconds of video that play in a second.
    """
    plan = planned(pipeline, f"stream.fps={FPS}")
    limits = {"sessions": 12, "per_token": 12, "expires": 1, "seconds": LONG}
    videos, used = {}, []
    for seed in (*GOOD, *STALLED, *GONE):
        own = planned(pipeline, f"stream.fps={FPS}", f"stream.seed={seed}")
        script = [Shot(caption=PROMPT, seconds=video + 2)]
        videos[seed] = pixels(streamed(own, script)[1]).float()
    with time_enough(), serving(plan, folder, **limits) as server, ThreadPoolExecutor(8) as pool:
        end = time.monotonic() + seconds
        run = Soak(server, videos, lambda: time.monotonic() < end, pace)
        watching = [pool.submit(run.watch, seed, video) for seed in GOOD]
        watching += [pool.submit(run.vanish, seed) for seed in GONE] + [pool.submit(run.babble)]
        stalled = [pool.submit(run.stall, seed, seed == STALLED[1]) for seed in STALLED]
        try:
            while not all(each.done() for each in watching):
                used.append(memory())
                time.sleep(0.1 if pace > 1 else 1)
            assert not any(each.done() for each in stalled)
        finally:
            run.over.set()
        for each in (*watching, *stalled):
            each.result()
        assert all(run.rounds[seed] >= 1 for seed in GOOD)
        until(lambda: not server.service.sessions.entries)
        assert server.service.sessions.admission._owners.total() == 0
    return used


def left(
    pipeline: Path, folder: Path, known: Collection[threading.Thread]
) -> tuple[list[str], list[str]]:
    """Threads but known ones, and open files, once a server has ended, by their names."""
    with serving(planned(pipeline), folder):
        pass
    gc.collect()

    def threads() -> list[str]:
        return sorted(each.name for each in threading.enumerate() if each not in known)

    until(lambda: "text_0" not in threads())
    return threads(), files()


@pytest.mark.cpu
def test_good_and_bad_clients_at_once(pipeline: Path, tmp_path: Path) -> None:
    """Those that stall, vanish or send rubbish keep no other from its frames, and leave nothing."""
    known = threading.enumerate()  # of other tests
    before = left(pipeline, tmp_path, known)  # with what is loaded once, and stays
    soak(pipeline, tmp_path, seconds=1, video=4, pace=100)
    assert left(pipeline, tmp_path, known) == before


@pytest.mark.manual
def test_ten_minutes_of_good_and_bad_clients(pipeline: Path, tmp_path: Path) -> None:
    """The same at the pace at which videos play; memory is flat after the first minute."""
    known = threading.enumerate()
    before = left(pipeline, tmp_path, known)
    used = soak(pipeline, tmp_path, seconds=600, video=30, pace=1)
    assert left(pipeline, tmp_path, known) == before
    by_minute = [max(used[k : k + 60]) // MEBIBYTE for k in range(0, len(used), 60)]
    logging.getLogger("soak").info("MiB by minute: %s", by_minute)  # shown by --log-cli-level=INFO
    first, last = max(used[30:60]), max(used[-60:])
    assert last < first + 64 * MEBIBYTE, f"{(last - first) / MEBIBYTE:.0f} MiB more"
