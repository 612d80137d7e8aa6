"""The commands `lltk serve` and `lltk watch`, each in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from bundles import Exported
from helpers import Run
from serving import Server, encoded, pipeline, serving, until
from streams import planned, streamed
from torch import Tensor

from lltk.stream.script import Shot
from lltk.stream.video import pixels, read_video
from lltk.streaming import plan_bundle

pytestmark = pytest.mark.cpu
__all__ = ["encoded", "pipeline"]

RED = "a red circle moving right on a dark background"
DOCS = Path(__file__).parents[1] / "docs" / "serving.md"


@contextmanager
def running(
    folder: Path, *arguments: object, token: str | None = None
) -> Iterator[tuple[Server, subprocess.Popen[str]]]:
    """`lltk serve` at any port, ready; leaving the block terminates it."""
    command = [sys.executable, "-m", "lltk", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},  # one for the transformer, as in this process
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"(http:\S+)/", line):
                break
        else:
            pytest.fail("".join(said))
        with httpx.Client() as http:
            until(lambda: http.get(f"{found[1]}/ready").status_code == 200, 60, 0.1)
        yield Server(found[1], None, None, token), process  # type: ignore[arg-type]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_a_bundle_is_served_until_a_signal_and_goes_on(
    exported: Exported, tmp_path: Path, encoded: list[list[Tensor]]
) -> None:
    """The client of the docs watches it, run as it stands there but for port, token and length.

    The next server makes the frames that an undisturbed stream has; nothing is traced back.
    """
    (client,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    changes = {'"max_seconds": 20': '"max_seconds": 4', '["sequence"] == 4': '["sequence"] == 1'}
    changes['NAMES = ["lltk.v1"]'] = 'NAMES = ["lltk.v1", "lltk.token.sesame"]'
    (tmp_path / "tokens.txt").write_text("sesame\n")
    arguments = ["--token-file", "tokens.txt", "--public-host", "video.test", "--folder", "kept"]
    arguments += ["--set", "stream.seed=4"]
    with running(tmp_path, exported.bundle, *arguments, token="sesame") as (server, process):
        changes[":8000"] = f":{server.url.rpartition(':')[2]}"
        for old, new in changes.items():
            assert client.count(old) == 1
            client = client.replace(old, new)
        done = subprocess.run(
            [sys.executable, "-c", client], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "['cut']" in done.stdout and done.stdout.startswith("0 []\n1 []\n")
        assert len(read_video(tmp_path / "live.mp4")) == 37
        host = {"host": "video.test", **server.headers}
        assert httpx.get(f"{server.url}/v1/models", headers=host).status_code == 200
        host["host"] = "evil.test"
        assert httpx.get(f"{server.url}/v1/models", headers=host).status_code == 421
        with server.watching(prompt=RED, max_seconds=6) as first:
            first.until("video.chunk_metadata", 2)
            process.send_signal(signal.SIGINT)
            assert first.closed()[0] in (1001, 1012)
        assert process.wait(30) == 0
        assert process.stdout is not None
        said = process.stdout.read()
        assert "Traceback" not in said and "Aborted" not in said and "sesame" not in said
        assert "Stopped. The next start goes on with the sessions in kept." in said
    plan = plan_bundle(exported.bundle, ["stream.seed=4", "stream.text.after=keep"])
    with (
        serving(plan, tmp_path / "kept", ["sesame"]) as server,
        server.watching(**first.resuming()) as second,
    ):
        second.until("session.created")
        second.send(type="client.playback", position=100, buffered=0)
        second.until("session.done")
    parts = [*first.parts, *second.parts]
    assert [part["sequence"] for part in parts] == list(range(len(parts)))
    _, video = streamed(plan, [Shot(caption=RED, seconds=7)])
    made = torch.cat(encoded[0])
    start = second.config["first_frame"]
    assert start >= 13 and len(made) >= 12
    assert torch.equal(made, pixels(video)[start : start + len(made)])


def test_watch_writes_what_it_sees(run: Run, pipeline: Path, tmp_path: Path) -> None:
    file = tmp_path / "seen.mp4"
    given = ["--prompt", RED, "--seconds", "1", "--seed", "3", "-o", file]
    with serving(planned(pipeline), tmp_path / "served", ["sesame"]) as server:
        code, _, errors = run("watch", server.url, *given)
        assert code == 2 and "unauthorized" in errors
        code, _, errors = run("watch", server.url, *given, "--token", "a b")
        assert code == 2 and "write it in letters" in errors
        code, out, _ = run("watch", server.url, *given, "--token", "sesame")
        assert code == 0 and "chunk 1, frame 5" in out
        code, _, errors = run("watch", server.url, *given, "--token", "sesame")
        assert code == 2 and "--overwrite" in errors
        assert run("watch", server.url, *given, "--token", "sesame", "--overwrite")[0] == 0
        made = [entry.live.chunks for entry in server.service.sessions.entries.values()]
        assert made == [2, 2]
    assert read_video(file).shape == (13, 32, 64, 3)
    webm = tmp_path / "seen.webm"
    code, _, errors = run("watch", server.url, "--prompt", RED, "-o", webm)
    assert code == 2 and "name it .mp4" in " ".join(errors.split()) and not webm.exists()
    code, _, errors = run("watch", "http://127.0.0.1:1", "--prompt", "x")
    assert code == 2
