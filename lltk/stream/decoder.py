"""Latents to video, call by call: a decode Program over its feature caches, and a pipeline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.graph.spec import DecoderSpec
from lltk.stream.timing import Stopwatch


@dataclass(frozen=True)
class DecoderState:
    """What a decoder keeps of the latents so far; plain tensors, to be saved with any format.

    Attributes:
        caches: by the names under which the ``step`` graph reads them; empty before a video's
            first latent.
    """

    caches: Mapping[str, Tensor] = field(default_factory=dict)


class LatentDecoder(Protocol):
    """What a pipeline decodes with."""

    state: DecoderState

    @property
    def device(self) -> torch.device:
        """Where it takes latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Video of the next latents."""


class DecodedElsewhere:
    """The decoder of a rank whose latents another rank decodes: it gives no video."""

    def __init__(self, device: torch.device) -> None:
        self.state = DecoderState()
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self._device

    def decode(self, latents: Tensor) -> Tensor:
        """Nothing: [0]."""
        return latents.new_empty(0)


class Decoder:
    """Decodes a video's latents in any split of calls; its state is its own.

    Args:
        program: a decode Program.
        module: the same Program, runnable; decoders may share it.

    Raises:
        ValueError: the Program is for something else.
    """

    def __init__(self, program: Program, module: ProgramModule) -> None:
        if not isinstance(program.model, DecoderSpec):
            raise ValueError(
                f"the program is for {program.kind}, not for decode; make one from a recipe with "
                "program: decode"
            )
        self._spec = program.model
        self._module = module
        self._latents = program.contract("first").inputs[self._spec.latent_input].shape
        self._caches = {
            name: program.contract("step").inputs[name].shape for name in self._spec.cache_inputs
        }
        self._state = DecoderState()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self._module.parameters()).device

    @property
    def state(self) -> DecoderState:
        """The state after the latents so far; decoding goes on without changing its tensors."""
        return self._state

    @state.setter
    def state(self, state: DecoderState) -> None:
        found = {name: tuple(cache.shape) for name, cache in state.caches.items()}
        if found and found != self._caches:
            raise ValueError(
                f"state: caches {found} are not this program's, {self._caches}; restore a state of "
                "the same decoder and resolution"
            )
        self._state = DecoderState({n: c.to(self.device) for n, c in state.caches.items()})

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video of the next latents.

        Args:
            latents: [B, z, n, h, w] with any n ≥ 1, normalised, on the decoder's device.

        Returns:
            [B, 3, n·stride, H, W] in [-1, 1]; a video's first latent is one frame, not ``stride``.

        Raises:
            ValueError: the latents are of another shape.
        """
        batch, channels, _, *sides = self._latents
        if latents.dim() != 5 or latents.shape[2] < 1 or (
            latents.shape[:2] != (batch, channels) or latents.shape[3:] != tuple(sides)
        ):  # fmt: skip
            raise ValueError(
                f"latents: {tuple(latents.shape)} is not [{batch}, {channels}, n, "
                f"{sides[0]}, {sides[1]}] with n ≥ 1; decode what the program was captured for"
            )
        video = [self._decode_one(latent) for latent in latents.split(1, dim=2)]
        return torch.cat(video, dim=2)

    def _decode_one(self, latent: Tensor) -> Tensor:
        spec, caches = self._spec, self._state.caches
        if latent.is_cuda:
            for cache in caches.values():  # they may come from another stream
                cache.record_stream(torch.cuda.current_stream(latent.device))
        graph = "step" if caches else "first"
        result = self._module(graph, **{spec.latent_input: latent}, **caches)
        self._state = DecoderState(
            {
                read: result[given]
                for read, given in zip(spec.cache_inputs, spec.cache_outputs, strict=True)
            }
        )
        return result[spec.output]


class DecodePipeline:
    """Decodes in a worker thread, on a GPU on a stream of its own, while the caller goes on.

    ::

        with DecodePipeline(decoder, sink=writer.write) as pipeline:
            for chunk in …:
                pipeline.submit(latents)

    Leaving the block waits for what was submitted; leaving it with an error drops what has not
    begun. In between the decoder belongs to the pipeline.

    Args:
        decoder: what decodes; its state goes on from where it is.
        sink: takes the video of each latent, [B, 3, 1 or stride, H, W], in order, in the worker
            thread; on a GPU, on the worker's stream. While it blocks, decoding waits.
        ahead: submitted latents that may be unfinished, 1 or more; at that many, `submit` waits.
    """

    def __init__(
        self, decoder: LatentDecoder, sink: Callable[[Tensor], None], ahead: int = 2
    ) -> None:
        if ahead < 1:
            raise ValueError(f"ahead: {ahead} leaves no latents to decode; make it 1 or more")
        self._decoder = decoder
        self._sink = sink
        self._ahead = ahead
        self._pending: deque[Future[None]] = deque()
        self._last: Future[None] | None = None
        self._undelivered: deque[Tensor] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._watch = Stopwatch(decoder.device)
        self._seconds = {"decode": 0.0, "deliver": 0.0}
        self._stream: torch.cuda.Stream | None = None
        if decoder.device.type == "cuda":
            self._stream = torch.cuda.Stream(decoder.device)

    @property
    def undelivered(self) -> list[Tensor]:
        """Submitted latents, [B, z, 1, h, w] each, whose video the sink has not taken.

        The decoder's state is that before the first of them whenever the pipeline is at rest.
        """
        return list(self._undelivered)

    @property
    def seconds(self) -> dict[str, float]:
        """What decoding and the sink took so far: ``decode`` and ``deliver``."""
        return dict(self._seconds)

    def submit(self, latents: Tensor) -> None:
        """Queue latents for `Decoder.decode`; they must not be changed afterwards.

        Raises:
            Exception: what decoding or the sink raised for earlier latents; none is decoded after
                such an error.
        """
        while self._pending and (len(self._pending) >= self._ahead or self._pending[0].done()):
            self._pending[0].result()
            self._pending.popleft()
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._decoder.device).record_event()
        single = latents.split(1, dim=2)
        self._undelivered.extend(single)
        self._last = self._worker.submit(self._run, single, ready, self._last)
        self._pending.append(self._last)

    def rest(self) -> None:
        """Wait until nothing is being decoded, for what was submitted or after an error."""
        wait(self._pending)

    def close(self) -> None:
        """Wait for what was submitted; raises as `submit`."""
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._worker.shutdown(cancel_futures=True)

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
            self._worker.shutdown(cancel_futures=True)

    def _run(
        self,
        latents: Sequence[Tensor],
        ready: torch.cuda.Event | None,
        before: Future[None] | None,
    ) -> None:
        if before is not None:
            before.result()  # after an error nothing more is decoded
        if self._stream is None or ready is None:
            self._decode(latents)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for latent in latents:
                latent.record_stream(self._stream)
            self._decode(latents)
            self._stream.synchronize()

    def _decode(self, latents: Sequence[Tensor]) -> None:
        for latent in latents:
            before = self._decoder.state
            try:
                with self._watch.measure("decode"):
                    video = self._decoder.decode(latent)
                self._seconds["decode"] += self._watch.read()["decode"]
                begun = time.perf_counter()
                self._sink(video)
            except BaseException:
                self._decoder.state = before
                raise
            self._undelivered.popleft()
            self._seconds["deliver"] += time.perf_counter() - begun
