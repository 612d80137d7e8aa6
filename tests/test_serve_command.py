"""The commands `lltk serve` and `lltk watch`, each in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from helpers import Run
from serving import Server, serving, until
from streams import planned

from lltk.stream.video import read_video

pytestmark = pytest.mark.cpu

RED = "a red circle moving right on a dark background"
BLUE = "a blue square rising on a light background"


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[Server, subprocess.Popen[str]]]:
    """`lltk serve tiny_stream` at any port, ready; leaving the block terminates it."""
    command = [sys.executable, "-m", "lltk", "serve", "--port", "0", "--folder", "kept", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        url = next(found[1] for line in process.stdout if (found := re.match(r"(http:\S+)/", line)))

        with httpx.Client() as http:
            until(lambda: http.get(f"{url}/ready").status_code == 200, 60, 0.1)
        yield Server(url, None), process  # type: ignore[arg-type]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_a_terminated_server_goes_on_with_its_sessions(tmp_path: Path) -> None:
    """The frames of the second process follow those of the first, and nothing is traced back."""
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("sesame\n")
    arguments = ["--token-file", str(tokens), "--public-host", "video.test"]
    arguments += ["--set", "stream.fps=4"]
    with running(tmp_path, *arguments) as (server, process):
        server.token = "sesame"
        host = {"host": "video.test", **server.headers}
        assert httpx.get(f"{server.url}/v1/models", headers=host).status_code == 200
        host["host"] = "evil.test"
        assert httpx.get(f"{server.url}/v1/models", headers=host).status_code == 421
        with server.watching(prompt=RED, seed=4, max_seconds=12) as first:
            first.until("video.chunk_metadata", 2)
            process.send_signal(signal.SIGTERM)
            assert first.closed()[0] in (1001, 1012)
        process.wait(30)
        assert process.stdout is not None
        said = process.stdout.read()
        assert "Traceback" not in said and "sesame" not in said
    with running(tmp_path, *arguments) as (server, _):
        server.token = "sesame"
        with server.watching(**first.resuming()) as second:
            second.until("session.created")
            second.send(type="client.playback", position=100, buffered=0)
            second.until("session.done")
        job = {"prompt": RED, "seed": 4, "seconds": 11}
        with server.http() as http:
            id = http.post("/v1/videos", json=job).json()["id"]
            until(lambda: http.get(f"/v1/videos/{id}").json()["status"] == "completed", every=0.1)
            content = http.get(f"/v1/videos/{id}/content").content
    parts = [*first.parts, *second.parts]
    assert [part["sequence"] for part in parts] == list(range(len(parts)))
    (tmp_path / "job.mp4").write_bytes(content)
    whole = read_video(tmp_path / "job.mp4").float()
    start = second.parts[-1]["first_frame"] - second.video.shape[0] + second.parts[-1]["num_frames"]
    resumed = second.video[: len(whole) - start].float()
    wanted = whole[start : start + len(resumed)]
    assert len(resumed) >= 12
    assert (resumed - wanted).abs().mean() < 3  # both are encoded
    assert (resumed - wanted.flip(0)).abs().mean() > 2 * (resumed - wanted).abs().mean()


def test_watch_writes_what_it_sees(run: Run, pipeline: Path, tmp_path: Path) -> None:
    file = tmp_path / "seen.mp4"
    given = ["--prompt", RED, "--seconds", "2", "--seed", "3", "-o", file]
    with serving(planned(pipeline), tmp_path / "served", ["sesame"]) as server:
        code, _, errors = run("watch", server.url, *given)
        assert code == 2 and "unauthorized" in errors
        code, _, errors = run("watch", server.url, *given, "--token", "sesame")
        assert code == 2 and "--overwrite" in errors
        code, out, _ = run("watch", server.url, *given, "--token", "sesame", "--overwrite")
        assert code == 0 and "chunk 2, frame 13" in out
        (entry,) = (e for e in server.service.sessions.entries.values() if e.done)
        assert entry.live.chunks == 3
    assert read_video(file).shape == (21, 32, 64, 3)
    code, _, errors = run("watch", "http://127.0.0.1:1", "--prompt", "x")
    assert code == 2
