"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

_WORK = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4, 5, 10)
_WAIT = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 10, 30, 60)
STATES = ("playing", "paused", "waiting", "ended")


class Metrics:
    """A server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.sessions = Gauge(
            "lltk_sessions", "Live sessions, by state.", ["state"], registry=registry
        )
        self.jobs = Gauge("lltk_jobs", "Video jobs that are queued or made.", registry=registry)
        self.chunk_seconds = Histogram(
            "lltk_chunk_seconds",
            "Seconds of a chunk, by part.",
            ["part"],
            buckets=_WORK,
            registry=registry,
        )
        self.frames = Counter("lltk_frames", "Video frames made.", registry=registry)
        self.realtime_ratio = Gauge(
            "lltk_realtime_ratio",
            "Seconds of video that the device makes in a second.",
            registry=registry,
        )
        self.first_frame_seconds = Histogram(
            "lltk_first_frame_seconds",
            "Seconds from when a session has room until its first frames are encoded.",
            buckets=_WAIT,
            registry=registry,
        )
        self.switch_visible_seconds = Histogram(
            "lltk_switch_visible_seconds",
            "Seconds from an event to the frame from which the viewer sees it.",
            buckets=_WAIT,
            registry=registry,
        )
        self.client_buffer_seconds = Histogram(
            "lltk_client_buffer_seconds",
            "Seconds of video that a player has buffered, by its reports.",
            buckets=_WAIT,
            registry=registry,
        )
        self.rejected = Counter(
            "lltk_rejected", "What was refused, by why.", ["why"], registry=registry
        )
        self.device_bytes = Gauge(
            "lltk_device_bytes", "Bytes of the device's memory in use.", registry=registry
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
