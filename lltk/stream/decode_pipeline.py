"""Decoding and delivering, each in a thread beside the one that makes latents."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch
from torch import Tensor

from lltk.stream.decoder import LatentDecoder
from lltk.stream.timing import Stopwatch


class DecodePipeline:
    """Decodes latents in one thread, and gives their video to a sink in another.

    ::

        with DecodePipeline(decoder, sink=writer.write) as pipeline:
            for latents in …:
                pipeline.submit(latents)

    Leaving the block waits for what was submitted. Leaving it with an error drops what has not
    begun. Until then nobody else may use the decoder.

    Args:
        decoder: goes on from the state that it has. It decodes in turns of its lane.
        sink: takes the video of latents as they are decoded, [B, 3, 1 or n · stride, H, W], in
            order; on a GPU, on a stream of its own. While it blocks, one more video is decoded.
        ahead: how many calls of `submit` may be undecoded, 1 or more; then the next one waits.
        overlap: whether the next video is decoded while the sink takes one. On a CPU both would
            wait for the same cores.
    """

    def __init__(
        self,
        decoder: LatentDecoder,
        sink: Callable[[Tensor], None],
        ahead: int = 3,
        overlap: bool = True,
    ) -> None:
        if ahead < 1:
            raise ValueError(f"ahead: {ahead} leaves no latents to decode; make it 1 or more")
        self._decoder = decoder
        self._sink = sink
        self._ahead = ahead
        self._overlap = overlap
        self._pending: deque[Future[None]] = deque()
        self._last: Future[None] | None = None
        self._warming: Future[None] | None = None
        self._delivery: Future[None] | None = None
        self._latents: deque[Tensor] = deque()
        self._videos: deque[Tensor] = deque()
        self._decoding, self._delivering = (
            ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("decode", "deliver")
        )
        self._watch = Stopwatch(decoder.device)
        self._seconds = {"decode": 0.0, "deliver": 0.0}
        self._closed = False
        self._sinking: int | None = None
        """The thread of the sink."""
        self._stream: torch.cuda.Stream | None = None
        """On a GPU, where the sink works."""
        if decoder.device.type == "cuda":
            self._stream = torch.cuda.Stream(decoder.device)

    @property
    def latents(self) -> list[Tensor]:
        """Submitted latents that are not decoded, as the decoder's `parts`; ask at rest.

        The decoder's state is then the one before the first of them.
        """
        return list(self._latents)

    @property
    def videos(self) -> list[Tensor]:
        """Video that the sink has not taken, as it will take it; ask at rest."""
        return list(self._videos)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far in the decoder's graphs, ``decode``, and in the sink, ``deliver``."""
        return dict(self._seconds)

    def warm_up(self) -> None:
        """Have the decoder warm up first; `submit` or `close` raises what that raised."""
        self._warming = self._decoding.submit(self._warm_up)

    @property
    def has_room(self) -> bool:
        """Whether `wait_for_room` would not wait, or raise at once."""
        return sum(not future.done() for future in self._pending) < self._ahead

    def wait_for_room(self) -> None:
        """Wait until `submit` will not; raises as it does.

        Raises:
            ValueError: the pipeline is closed.
        """
        if self._closed:
            raise ValueError("stream: it is closed; open another one, or resume a saved one")
        self._check_thread()
        if self._warming is not None and self._warming.done():
            self._end_warm_up()
        while self._pending and (len(self._pending) >= self._ahead or self._pending[0].done()):
            self._pending[0].result()
            self._pending.popleft()

    def submit(self, *latents: Tensor) -> None:
        """Queue latents for `Decoder.decode`; they must not be changed afterwards.

        Args:
            latents: [B, z, n, h, w] each; those of one argument are decoded together.

        Raises:
            Exception: what decoding or the sink raised for earlier latents; none is decoded after
                such an error.
        """
        self.wait_for_room()
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._decoder.device).record_event()
        first = self._last is None and not self._decoder.state.caches
        parts: list[Tensor] = []
        for given in latents:
            parts += self._decoder.parts(given, first and not parts)
        self._latents.extend(parts)
        self._last = self._decoding.submit(self._run, parts, ready, self._last)
        self._pending.append(self._last)

    def deliver(self, video: Tensor) -> None:
        """Queue a video for the sink that an earlier pipeline decoded; submit nothing before."""
        assert self._last is None, "latents were submitted"
        self._hand_over(video)

    def rest(self) -> None:
        """Wait until nothing is being decoded or delivered; raises no error of either.

        Raises:
            ValueError: the sink called it.
        """
        self._check_thread()
        wait([*self._pending, *([self._warming] if self._warming else [])])
        if self._delivery is not None:
            wait([self._delivery])

    def close(self) -> None:
        """Wait for what was submitted, and end the threads; raises as `submit`."""
        self._check_thread()
        try:
            self._end_warm_up()
            while self._pending:
                self._pending.popleft().result()
            if self._delivery is not None:
                self._delivery.result()
        finally:
            self._shut_down()
            self._delivery = None  # what it raised is told once

    def __enter__(self) -> DecodePipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._pending.clear()
            self._shut_down()

    def _shut_down(self) -> None:
        self._closed = True
        self._decoding.shutdown(cancel_futures=True)
        self._delivering.shutdown()

    def _run(
        self,
        latents: Sequence[Tensor],
        ready: torch.cuda.Event | None,
        before: Future[None] | None,
    ) -> None:
        if before is not None:
            before.result()  # after an error nothing more is decoded
        for latent in latents:
            with self._decoder.lane.turn():
                if ready is not None:
                    stream = torch.cuda.current_stream(latent.device)
                    stream.wait_event(ready)
                    latent.record_stream(stream)
                with self._watch.measure("decode"):
                    video = self._decoder.decode(latent)
            self._seconds["decode"] += self._watch.read()["decode"]  # once it is decoded
            self._latents.popleft()
            self._hand_over(video)

    def _check_thread(self) -> None:
        """Refuse to wait in the sink for the sink itself."""
        if threading.get_ident() == self._sinking:
            raise ValueError(
                "stream: the sink cannot save, close or go on, which would wait for the sink; do "
                "so in the thread that makes the chunks"
            )

    def _warm_up(self) -> None:
        with self._decoder.lane.turn():
            self._decoder.warm_up()

    def _end_warm_up(self) -> None:
        warming, self._warming = self._warming, None
        if warming is not None:
            warming.result()

    def _hand_over(self, video: Tensor) -> None:
        """Let the sink take a video once it has taken the one before."""
        self._videos.append(video)
        if self._delivery is not None:
            self._delivery.result()
        self._delivery = self._delivering.submit(self._deliver, video)
        if not self._overlap:
            self._delivery.result()

    def _deliver(self, video: Tensor) -> None:
        begun = time.perf_counter()
        self._sinking = threading.get_ident()
        if self._stream is None:
            self._sink(video)
        else:
            video.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                self._sink(video)
        self._videos.popleft()
        self._seconds["deliver"] += time.perf_counter() - begun
