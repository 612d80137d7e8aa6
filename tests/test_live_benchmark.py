"""The benchmark of live streams: what it makes of what a viewer sent, heard and saw."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "live.py"))
SECONDS = {"step": 0.2, "commit": 0.05, "text": 0.01, "decode": 0.125, "wait": 9.0}


def part(first: int, count: int, *events: str) -> dict[str, object]:
    return {
        "type": "video.chunk_metadata",
        "first_frame": first,
        "num_frames": count,
        "byte_length": 1000 * count,
        "started_event_ids": list(events),
        "seconds": SECONDS,
    }


def interaction(name: str) -> dict[str, object]:
    return {"type": "session.interaction", "interaction": {"event_id": name, "event": {}}}


def queued(name: str) -> dict[str, object]:
    return {"type": "session.interaction.queued", "event_id": name}


def watched(begun: float, late: float) -> object:
    """A log of 30 frames at 10 a second from a second after the start on, the last ones late."""
    config = {"fps": 10, "width": 64, "height": 32, "chunk_frames": 10}
    log = SCRIPT["Log"]()
    log.sent += [
        (begun, {"type": "session.start"}),
        (begun + 1.5, {"type": "session.ping"}),
        (begun + 1.6, interaction("a")),
        (begun + 3.6, interaction("never seen")),
    ]
    log.heard += [
        (begun + 0.4, {"type": "video.start", "config": config}),
        (begun + 0.5, part(0, 10)),
        (begun + 1.502, {"type": "session.pong"}),
        (begun + 1.61, queued("a")),
        (begun + 1.7, part(10, 10)),
        (begun + 2.6, part(20, 10, "a")),
        (begun + 3.61, queued("never seen")),
        (begun + 3.9, part(30, 10, "never seen")),
    ]
    # A browser did not tell of frame 20.
    log.shown += [(begun + 1 + k / 10 + late * (k >= 20), k) for k in range(30) if k != 20]
    return log


def test_what_a_viewer_waited_for() -> None:
    found = SCRIPT["summary"]([watched(100.0, 0.0), watched(300.0, 0.4)])
    assert found["first_frame_seconds"] == pytest.approx(1.0)
    assert found["switches"] == 2
    waits = found["switch_seconds"]
    assert waits["acknowledged"]["p50"] == pytest.approx(0.01)
    assert waits["made"]["p50"] == pytest.approx(1.0)
    assert waits["seen"] == pytest.approx({"p50": 1.5, "p90": 1.9})
    assert found["chunk"] == pytest.approx(
        {
            "video_seconds": 1.0,
            "transformer_seconds": 0.26,
            "decoder_seconds": 0.125,
            "bytes": 10_000,
        }
    )
    assert found["round_trip_seconds"] == pytest.approx(0.002)
    assert found["shown_fps"] == pytest.approx((10 + 29 / 3.3) / 2)
    assert found["late_seconds"] == pytest.approx(0.4)
    assert found["frames"] == 58
