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

from lltk.graph.contract import Role, TensorSpec
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.graph.spec import DecoderSpec
from lltk.stream.lanes import Lane
from lltk.stream.runtimes.cuda_graph import CudaGraphs
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

    @property
    def lane(self) -> Lane:
        """Where decoders over the same weights take turns: a call decodes within one turn."""

    def parts(self, latents: Tensor, first: bool) -> list[Tensor]:
        """Latents as they are decoded; ``first`` says whether they are a video's first."""

    def decode(self, latents: Tensor) -> Tensor:
        """Video of the next latents."""

    def warm_up(self) -> None:
        """Decode zeros, so that all that decoding runs is compiled and loaded; keeps the state."""


class DecodedElsewhere:
    """The decoder of a rank whose latents another rank decodes: it gives no video."""

    def __init__(self, device: torch.device) -> None:
        self.state = DecoderState()
        self.lane = Lane(device)

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self.lane.device

    def parts(self, latents: Tensor, first: bool) -> list[Tensor]:
        return [latents]

    def decode(self, latents: Tensor) -> Tensor:
        """No frames: [B, 3, 0, 0, 0]."""
        return latents.new_empty((len(latents), 3, 0, 0, 0))

    def warm_up(self) -> None:
        """Nothing to do."""


class Decoder:
    """Decodes a video's latents in any split of calls; its state is its own.

    Args:
        program: a decode Program.
        module: the same Program, runnable; decoders may share it.
        cuda_graphs: whether steady calls are recorded once, and then replayed.
        lane: where the calls take turns; by default a lane for this decoder alone.

    Raises:
        ValueError: the Program is for something else, or CUDA graphs where there is no GPU.
    """

    def __init__(
        self,
        program: Program,
        module: ProgramModule,
        cuda_graphs: bool = False,
        lane: Lane | None = None,
    ) -> None:
        if not isinstance(program.model, DecoderSpec):
            raise ValueError(
                f"the program is for {program.kind}, not for decode; make one from a recipe with "
                "program: decode"
            )
        self._spec = program.model
        self._module = module
        self._contracts = {name: program.contract(name) for name in program.graphs}
        self._latents = self._contracts["first"].input(Role.LATENTS)
        inputs = self._contracts["step"].inputs
        self._caches = {name: inputs[name] for name in self._spec.cache_inputs}
        steady = self._contracts.get("steps", self._contracts["step"])
        self._several = steady.input(Role.LATENTS).shape[2]
        self._held: dict[str, Tensor] | None = {}  # caches; None where decoding failed
        option = "stream.decoder.cuda_graphs"
        self.lane = lane or decoder_lane(module)
        self._graphs = CudaGraphs(self.lane, option) if cuda_graphs else None
        self._warm = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.lane.device

    @property
    def state(self) -> DecoderState:
        """The state after the latents so far; decoding goes on without changing its tensors.

        Raises:
            ValueError: decoding failed, and with it went the caches before it.
        """
        if self._held is None:
            raise ValueError(
                "decoder: it failed at a latent, and its caches are gone; go on from a state that "
                "was saved before"
            )
        return DecoderState(dict(self._held))

    @state.setter
    def state(self, state: DecoderState) -> None:
        caches = state.caches
        if caches and caches.keys() != self._caches.keys():
            raise ValueError(
                f"state: caches {', '.join(caches)} are not this program's, "
                f"{', '.join(self._caches)}; restore a state of the same decoder"
            )
        for name, cache in caches.items():
            found, wanted = TensorSpec.of(cache), self._caches[name]
            if found != wanted:
                raise ValueError(
                    f"state: {name} is {found.dtype} {found.shape}, not {wanted.dtype} "
                    f"{wanted.shape}; restore a state of the same decoder and resolution"
                )
        self._held = {n: c.to(self.device) for n, c in caches.items()}

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
        batch, channels, _, *sides = self._latents.shape
        if latents.dim() != 5 or latents.shape[2] < 1 or (
            latents.shape[:2] != (batch, channels) or latents.shape[3:] != tuple(sides)
        ):  # fmt: skip
            raise ValueError(
                f"latents: {tuple(latents.shape)} is not [{batch}, {channels}, n, "
                f"{sides[0]}, {sides[1]}] with n ≥ 1; decode what the program was captured for"
            )
        video = [self._decode(part) for part in self.parts(latents, not self.state.caches)]
        return torch.cat(video, dim=2)

    def parts(self, latents: Tensor, first: bool) -> list[Tensor]:
        """Latents as they are decoded: a video's first alone, then as many as the program takes at
        once, and those that are left one by one.

        Args:
            latents: [B, z, n, h, w].
            first: whether they are a video's first.
        """
        opening = int(first)
        together = (latents.shape[2] - opening) // self._several * self._several
        alone = latents.shape[2] - opening - together
        sizes = [1] * opening + [self._several] * (together // self._several) + [1] * alone
        return list(latents.split(sizes, dim=2))

    def warm_up(self) -> None:
        """See `LatentDecoder.warm_up`; a decoder that is warm stays so."""
        if self._warm:
            return
        batch, channels, _, *sides = self._latents.shape
        # A steady graph's second call reads what it gave, which may lie otherwise than its first's.
        count = 1 + 2 * self._several + int(self._several > 1)
        size = (batch, channels, count, *sides)
        zeros = torch.zeros(size, dtype=self._latents.dtype, device=self.device)
        caches: dict[str, Tensor] = {}
        for part in self.parts(zeros, first=True):
            _, caches = self._decoded(part, caches)
        self._warm = True

    def _decode(self, latents: Tensor) -> Tensor:
        held, self._held = dict(self.state.caches), None
        video, self._held = self._decoded(latents, held)
        return video

    @torch.no_grad()
    def _decoded(
        self, latents: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Video of latents that one graph takes, and the caches after them.

        The caches before, which are emptied, go as these are made: memory has room for one set.
        """
        spec, begun = self._spec, bool(caches)
        steady = "step" if latents.shape[2] == 1 else "steps"
        graph = steady if begun else "first"
        if latents.is_cuda:
            _record(caches, torch.cuda.current_stream(latents.device))
        # Compilers tell strides apart.
        caches |= self._contracts[graph].named({Role.LATENTS: latents.contiguous()})
        if begun and self._graphs is not None:
            result = self._graphs(graph, lambda inputs: self._module(graph, dict(inputs)), caches)
        else:
            result = self._module(graph, caches)
        names = zip(spec.cache_inputs, spec.cache_outputs, strict=True)
        return result[spec.output], {read: result[given] for read, given in names}


def decoder_lane(module: ProgramModule) -> Lane:
    """Where decoders over a module take turns; on a GPU on a stream beside the transformer's."""
    return Lane(next(module.parameters()).device, own_stream=True)


def _record(caches: Mapping[str, Tensor], stream: torch.cuda.Stream) -> None:
    """Caches may have been made on another stream."""
    for cache in caches.values():
        cache.record_stream(stream)


class DecodePipeline:
    """Decodes in a thread, on a GPU on a stream of its own, and delivers in another.

    ::

        with DecodePipeline(decoder, sink=writer.write) as pipeline:
            for chunk in …:
                pipeline.submit(latents)

    Leaving the block waits for what was submitted; leaving it with an error drops what has not
    begun. In between the decoder belongs to the pipeline.

    Args:
        decoder: what decodes; its state goes on from where it is.
        sink: takes the video of latents as they are decoded, [B, 3, 1 or n · stride, H, W], in
            order, in a thread of its own; on a GPU, on a stream of its own. While it blocks, one
            video more is decoded.
        ahead: submitted latents that may be undecoded, 1 or more; at that many, `submit` waits.
        overlap: whether the next video is decoded while the sink takes one; on a CPU both would
            wait for its cores.
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
        self._stream: torch.cuda.Stream | None = None
        """On a GPU, where the sink works."""
        if decoder.device.type == "cuda":
            self._stream = torch.cuda.Stream(decoder.device)

    @property
    def latents(self) -> list[Tensor]:
        """Submitted latents that are not decoded, [B, z, n, h, w] as they will be; ask at rest.

        The decoder's state is then that before the first of them.
        """
        return list(self._latents)

    @property
    def videos(self) -> list[Tensor]:
        """What is decoded and the sink has not taken, a latent's each; ask at rest."""
        return list(self._videos)

    @property
    def seconds(self) -> dict[str, float]:
        """What decoding and the sink took so far: ``decode`` and ``deliver``."""
        return dict(self._seconds)

    def warm_up(self) -> None:
        """Have the decoder warm up before it decodes; `submit` or `close` raises what that does."""
        self._warming = self._decoding.submit(self._warm_up)

    def wait_for_room(self) -> None:
        """Wait until `submit` will not; raises as it does.

        Raises:
            ValueError: the pipeline is closed.
        """
        if self._closed:
            raise ValueError("stream: it is closed; open another one, or resume a saved one")
        if self._warming is not None and self._warming.done():
            self._end_warm_up()
        while self._pending and (len(self._pending) >= self._ahead or self._pending[0].done()):
            self._pending[0].result()
            self._pending.popleft()

    def submit(self, *latents: Tensor) -> None:
        """Queue latents for `Decoder.decode`; they must not be changed afterwards.

        Args:
            latents: [B, z, n, h, w]; what is given apart is decoded apart.

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
        """Queue a video for the sink, decoded before anything was submitted."""
        assert self._last is None, "latents were submitted"
        self._hand_over(video)

    def rest(self) -> None:
        """Wait until nothing is being decoded or delivered, after an error too."""
        wait([*self._pending, *([self._warming] if self._warming else [])])
        if self._delivery is not None:
            wait([self._delivery])

    def close(self) -> None:
        """Wait for what was submitted; raises as `submit`."""
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
        if self._stream is None:
            self._sink(video)
        else:
            video.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                self._sink(video)
        self._videos.popleft()
        self._seconds["deliver"] += time.perf_counter() - begun
