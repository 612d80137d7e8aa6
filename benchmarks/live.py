"""Watch a live stream of `lltk serve`, and time what its viewer waits for.

    python benchmarks/live.py
    python benchmarks/live.py --recipe wan22_5b_stream_fp8 --random-weights --viewers client \
        --seconds 60 --runs 1

The server is a process of its own, on this machine. Of the two viewers, ``chromium`` is the page in
a browser without a window, and ``client`` speaks the protocol and decodes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lltk.bench.random_pipeline import wan22_5b_pipeline
from lltk.bench.record import Record, digest, markdown, percentile, write_record
from lltk.bench.script import script_options, script_parser, script_record
from lltk.graph.recipe import open_recipe
from lltk.serve.messages import PROTOCOL

_METHOD = """\
The server and the viewer are processes of one machine, and nothing else is watched. Each run is a
session; its prompt is switched at even distances. All times are the viewer's, from when a message
is sent. First frame: from the start of the session until a frame is seen. A switch is
acknowledged once its receipt comes, made once the first chunk that shows it has come, and seen
once the first frame of that chunk is on the screen, after all frames before it. Chunk: seconds in
the transformer's graphs and the text encoder, and in the decoder's, which overlap; as the server
says. Round trip: of a ping, which is what transport costs. FPS: frames of the video over the time
that it took to see them; late: by how much that time is longer than the video. A chromium frame
is seen when the browser says that it presents it; the client has seen a frame as soon as it has
come and those before it have had their time. Values are medians; p90 is over all switches of the
row."""
_PROMPTS = ("a red circle moving left on a dark background", "a green square moving up on a light "
            "background")  # fmt: skip
_WAIT = 600.0
"""Seconds until the server has to be ready."""
_POLL = 0.01
_LOGGED = """
const log = (window.log = { sent: [], heard: [], shown: [] });
const now = () => performance.now() / 1000;
window.WebSocket = class extends WebSocket {
    constructor(...given) {
        super(...given);
        this.addEventListener("message", ({ data }) => {
            if (typeof data === "string") log.heard.push([now(), JSON.parse(data)]);
        });
    }
    send(data) {
        log.sent.push([now(), JSON.parse(data)]);
        super.send(data);
    }
};
addEventListener("DOMContentLoaded", () => {
    const video = document.getElementById("video");
    const seen = (_, { mediaTime, expectedDisplayTime }) => {
        log.shown.push([expectedDisplayTime / 1000, mediaTime]);
        video.requestVideoFrameCallback(seen);
    };
    video.requestVideoFrameCallback(seen);
});
"""
"""Keeps what the page sends, hears and shows, each with its time."""


@dataclass
class Log:
    """What a viewer sent, heard and saw, with times in seconds by one clock.

    Attributes:
        sent, heard: messages.
        shown: numbers of frames; some of those of a browser may be missing.
    """

    sent: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    heard: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    shown: list[tuple[float, int]] = field(default_factory=list)

    def of(self, kind: str, heard: bool = True) -> list[tuple[float, Mapping[str, Any]]]:
        """The messages of a type."""
        return [each for each in (self.heard if heard else self.sent) if each[1]["type"] == kind]


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=3, device=False)
    made.add_argument("--recipe", default="tiny_stream", help="what streams (default: tiny_stream)")
    made.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument(
        "--random-weights", action="store_true", help="of Wan2.2-TI2V-5B, in place of its files"
    )
    made.add_argument("--folder", type=Path, help="where to make the weights, and find them")
    made.add_argument(
        "--viewers", nargs="+", choices=VIEWERS, default=list(VIEWERS), help="(default: both)"
    )
    made.add_argument("--seconds", type=float, default=20.0, help="of video a run (default: 20)")
    made.add_argument("--switches", type=int, default=6, help="of a run (default: 6)")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(options.viewers)


@contextmanager
def serving(recipe: str, overrides: Sequence[str], folder: Path) -> Iterator[str]:
    """The address of a server, in a process of its own, that is ready."""
    line = [sys.executable, "-m", "lltk", "serve", recipe, "--port", "0", "--folder", str(folder)]
    line += [part for override in overrides for part in ("--set", override)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next((row.strip() for row in server.stdout if row.startswith("http://")), None)
            if url is None:
                raise SystemExit("the server has not started; its messages are above")
            _wait_until_ready(url)
            yield url
        finally:
            server.terminate()


def _wait_until_ready(url: str) -> None:
    end = time.monotonic() + _WAIT
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}ready"):
                return
        except urllib.error.HTTPError:
            time.sleep(0.2)
    raise SystemExit(f"the server is not ready after {_WAIT:g} s")


def _switch_times(seconds: float, switches: int) -> list[float]:
    """When to switch, in seconds from the first frame; none falls on the same place of a chunk."""
    return [seconds * (k + 1) / (switches + 1.1) for k in range(switches)]


def watch_as_client(url: str, seconds: float, switches: int) -> Log:
    """Watch a session by the protocol alone."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    log, fps, end = Log(), 0.0, 0.0
    address = f"ws{url.removeprefix('http')}v1/realtime/video"
    with connect(address, subprotocols=[PROTOCOL], max_size=None, proxy=None) as socket:  # type: ignore[list-item]

        def send(kind: str, **more: Any) -> None:
            log.sent.append((time.perf_counter(), {"type": kind, **more}))
            socket.send(json.dumps(log.sent[-1][1]))

        send("session.start", prompt=_PROMPTS[0])
        waiting, report = _switch_times(seconds, switches), 0.0
        while not log.shown or time.perf_counter() < log.shown[0][0] + seconds:
            now = time.perf_counter()
            if log.shown and now >= report:
                position = sum(when <= now for when, _ in log.shown) / fps
                buffered = len(log.shown) / fps - position
                send("client.playback", position=position, buffered=buffered)
                send("session.ping")
                report = now + 1
            if log.shown and waiting and now >= log.shown[0][0] + waiting[0]:
                count = switches - len(waiting) + 1
                event = {"event_id": str(count), "event": {"prompt": _PROMPTS[count % 2]}}
                send("session.interaction", interaction=event)
                del waiting[0]
            try:
                data = socket.recv(timeout=_POLL)
            except TimeoutError:
                continue
            now = time.perf_counter()
            if isinstance(data, str):
                log.heard.append((now, json.loads(data)))
                if (message := log.heard[-1][1])["type"] == "error":
                    raise SystemExit(message["message"])
                fps = message["config"]["fps"] if message["type"] == "video.start" else fps
            elif parts := log.of("video.chunk_metadata"):
                part = parts[-1][1]
                for number in range(part["first_frame"], part["first_frame"] + part["num_frames"]):
                    end = max(end, now)
                    log.shown.append((end, number))
                    end += 1 / fps
        send("session.stop")
        try:
            while socket.recv(timeout=_WAIT):
                pass
        except ConnectionClosed:
            pass
    log.shown = [each for each in log.shown if each[0] <= now]
    return log


def watch_in_chromium(url: str, seconds: float, switches: int) -> Log:
    """Watch a session on the page."""
    import shutil

    from playwright.sync_api import expect, sync_playwright

    program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if program is None:
        raise SystemExit("no Chromium is installed; install it, or name --viewers client")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_init_script(_LOGGED)
        page.goto(url)

        def type_prompt(text: str) -> None:
            page.fill("#prompt", text)
            page.press("#prompt", "Enter")

        type_prompt(_PROMPTS[0])
        expect(page.locator("#status")).to_have_text("Live", timeout=_WAIT * 1000)
        while not page.evaluate("log.shown.length"):
            page.wait_for_timeout(_POLL * 1000)
        begun = time.perf_counter()
        for count, when in enumerate(_switch_times(seconds, switches), 1):
            page.wait_for_timeout(max(begun + when - time.perf_counter(), 0) * 1000)
            type_prompt(_PROMPTS[count % 2])
        page.wait_for_timeout(max(begun + seconds - time.perf_counter(), 0) * 1000)
        found = page.evaluate("log")
        page.click("#stop")
        expect(page.locator("#status")).to_have_text("Over", timeout=_WAIT * 1000)
        browser.close()
    log = Log([tuple(each) for each in found["sent"]], [tuple(each) for each in found["heard"]])
    fps = log.of("video.start")[0][1]["config"]["fps"]
    log.shown = [(when, round(at * fps)) for when, at in found["shown"]]
    return log


VIEWERS: Mapping[str, Callable[[str, float, int], Log]] = {
    "chromium": watch_in_chromium,
    "client": watch_as_client,
}


def summary(logs: Sequence[Log]) -> dict[str, Any]:
    """What the viewer of some sessions waited for; see the method."""
    started = [log.of("session.start", heard=False)[0][0] for log in logs]
    config = logs[0].of("video.start")[0][1]["config"]
    switches = [times for log in logs for times in _switches(log)]
    parts = [part for log in logs for _, part in log.of("video.chunk_metadata")[1:]]
    seconds = [part["seconds"] for part in parts]
    trips = [
        pong - ping
        for log in logs
        for (ping, _), (pong, _) in zip(
            log.of("session.ping", heard=False), log.of("session.pong"), strict=False
        )
    ]
    spans = [
        (log.shown[-1][1] - log.shown[0][1], log.shown[-1][0] - log.shown[0][0]) for log in logs
    ]
    return {
        "fps": config["fps"],
        "size": f"{config['width']}×{config['height']}",
        "runs": len(logs),
        "frames": sum(frames for frames, _ in spans),
        "first_frame_seconds": median(
            log.shown[0][0] - start for log, start in zip(logs, started, strict=True)
        ),
        "switches": len(switches),
        "switch_seconds": {
            name: {
                "p50": percentile([each[name] for each in switches], 0.5),
                "p90": percentile([each[name] for each in switches], 0.9),
            }
            for name in ("acknowledged", "made", "seen")
        },
        "chunk": {
            "video_seconds": config["chunk_frames"] / config["fps"],
            "transformer_seconds": median(
                each["step"] + each["commit"] + each["text"] for each in seconds
            ),
            "decoder_seconds": median(each["decode"] for each in seconds),
            "bytes": median(part["byte_length"] for part in parts),
        },
        "round_trip_seconds": median(trips) if trips else None,
        "shown_fps": median(frames / span for frames, span in spans),
        "late_seconds": max(span - frames / config["fps"] for frames, span in spans),
    }


def _switches(log: Log) -> Iterator[dict[str, float]]:
    """For each switch that was seen: seconds until it was acknowledged, made and seen."""
    for sent, message in log.of("session.interaction", heard=False):
        name = message["interaction"]["event_id"]
        (queued,) = (t for t, m in log.of("session.interaction.queued") if m["event_id"] == name)
        made = [
            (t, m["first_frame"])
            for t, m in log.of("video.chunk_metadata")
            if name in m["started_event_ids"]
        ]
        seen = [t for t, number in log.shown if made and number >= made[0][1]]
        if seen:
            times = {"acknowledged": queued, "made": made[0][0], "seen": seen[0]}
            yield {what: t - sent for what, t in times.items()}


def main() -> None:
    """Measure every viewer and write the record."""
    options = script_options(parser())
    results = []
    with TemporaryDirectory() as folder:
        overrides = [*options.overrides]
        if options.random_weights:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            pipeline = wan22_5b_pipeline(options.folder or Path(folder), device)
            overrides.append(f"stream.pipeline={pipeline}")
        recipe = open_recipe(options.recipe, options.overrides)
        with serving(options.recipe, overrides, Path(folder) / "serve") as url:
            for name in rows(options):
                watch = VIEWERS[name]
                logs = [watch(url, options.seconds, options.switches) for _ in range(options.runs)]
                results.append(
                    {
                        "name": name,
                        "recipe": options.recipe,
                        "resolved": digest(recipe.resolved()),
                        "random_weights": options.random_weights,
                    }
                    | summary(logs)
                )
    record = script_record("live", _METHOD, results)
    write_record(options.output, record, text(record))
    print(text(record))


def text(record: Record) -> str:
    """The record as Markdown."""

    def switch(name: str, share: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: f"{row['switch_seconds'][name][share]:.2f}"

    def trip(row: Mapping[str, Any]) -> str:
        seconds = row["round_trip_seconds"]
        return "–" if seconds is None else f"{seconds * 1000:.1f}"

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "viewer": lambda row: row["name"],
        "recipe": lambda row: row["recipe"],
        "video": lambda row: f"{row['size']} at {row['fps']:g} fps",
        "first frame s": lambda row: f"{row['first_frame_seconds']:.2f}",
        "switch acknowledged s": switch("acknowledged", "p50"),
        "made s": switch("made", "p50"),
        "seen s": switch("seen", "p50"),
        "seen p90 s": switch("seen", "p90"),
        "chunk: video s": lambda row: f"{row['chunk']['video_seconds']:.2f}",
        "transformer s": lambda row: f"{row['chunk']['transformer_seconds']:.2f}",
        "decoder s": lambda row: f"{row['chunk']['decoder_seconds']:.2f}",
        "kB": lambda row: f"{row['chunk']['bytes'] / 1000:.0f}",
        "round trip ms": trip,
        "FPS": lambda row: f"{row['shown_fps']:.2f}",
        "late s": lambda row: f"{row['late_seconds']:.2f}",
    }
    return markdown(record, "Live", columns)


if __name__ == "__main__":
    main()
