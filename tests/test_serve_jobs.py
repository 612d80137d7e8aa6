"""Video jobs: the frames of a live stream, in a file that says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from serving import OTHER, PROMPT, completed, encoded, pipeline, serving, until, written
from streams import planned
from torch import Tensor

pytestmark = pytest.mark.cpu
__all__ = ["encoded", "pipeline", "written"]

SHOTS = [{"caption": PROMPT, "seconds": 2}, {"caption": OTHER, "seconds": 3, "cut": False}]


def test_a_job_has_the_frames_of_a_live_stream(
    pipeline: Path, tmp_path: Path, encoded: list[list[Tensor]], written: list[Tensor]
) -> None:
    with serving(planned(pipeline), tmp_path) as server, server.http() as http:
        asked = {"shots": SHOTS, "seed": 7, "size": "64x32"}
        job = completed(http, http.post("/v1/videos", json=asked).json()["id"])
        assert (job["status"], job["progress"], job["seconds"]) == ("completed", 100, "4.625")
        with server.watching(prompt=None, shots=SHOTS, seed=7, max_seconds=4.6) as viewer:
            viewer.until("session.done")
        content = http.get(f"/v1/videos/{job['id']}/content")
        picture = http.get(f"/v1/videos/{job['id']}/content", params={"variant": "thumbnail"})
        assert content.headers["content-type"] == "video/mp4"
        assert picture.content[8:12] == b"WEBP"
        assert http.delete(f"/v1/videos/{job['id']}").json()["deleted"]
        assert http.get(f"/v1/videos/{job['id']}").status_code == 404
        assert not list((tmp_path / "videos").iterdir())
    assert torch.equal(torch.cat(written), torch.cat(encoded[0]))
    (tmp_path / "video.mp4").write_bytes(content.content)
    with av.open(tmp_path / "video.mp4") as file:
        about = json.loads(file.metadata["description"])
    assert (about["seed"], [shot["caption"] for shot in about["shots"]]) == (7, [PROMPT, OTHER])


def test_jobs_are_listed_a_page_at_a_time(pipeline: Path, tmp_path: Path) -> None:
    with serving(planned(pipeline), tmp_path) as server, server.http() as http:
        made = [
            http.post("/v1/videos", data={"prompt": name, "seconds": "1"}, files={"x": b""}).json()
            if name == "bad"
            else http.post("/v1/videos", json={"prompt": name, "seconds": "1"}).json()
            for name in ("a", "b", "c", "bad")
        ]
        assert made.pop()["error"]["message"] == "x: is no file"
        ids = [each["id"] for each in made]
        page = http.get("/v1/videos", params={"limit": 2}).json()
        assert [each["id"] for each in page["data"]] == ids[:0:-1]
        assert page["has_more"] and page["last_id"] == ids[1]
        rest = http.get("/v1/videos", params={"after": ids[1], "order": "desc"}).json()
        assert [each["id"] for each in rest["data"]] == ids[:1] and not rest["has_more"]


def test_a_job_that_was_stopped_is_made_by_the_next_server(pipeline: Path, tmp_path: Path) -> None:
    plan = planned(pipeline)
    with serving(plan, tmp_path) as server, server.http() as http:
        id = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 60}).json()["id"]
        until(lambda: http.get(f"/v1/videos/{id}").json()["progress"] > 0)
        assert http.get(f"/v1/videos/{id}/content").status_code == 409
    with serving(plan, tmp_path) as server, server.http() as http:
        assert http.get(f"/v1/videos/{id}").json()["status"] in ("queued", "in_progress")
        http.delete(f"/v1/videos/{id}")  # also while it is made
        until(lambda: len(server.service.jobs) == 0)
        assert not list((tmp_path / "videos").iterdir())
