"""A session: one video, made chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from lltk.parallel.transfer import upload
from lltk.stream.cache import Cache
from lltk.stream.chunks import Chunk
from lltk.stream.decoder import LatentDecoder
from lltk.stream.delivery import Delivery
from lltk.stream.denoise import Denoiser, chunk_noise
from lltk.stream.pages import PageTable
from lltk.stream.report import ChunkReport
from lltk.stream.runtimes import Runtime
from lltk.stream.sampler import Schedule
from lltk.stream.state import SessionState
from lltk.stream.timeline import Timeline
from lltk.stream.timing import Stopwatch


@dataclass(frozen=True)
class Sampling:
    """How chunks are sampled; a recipe's ``stream`` section describes the fields."""

    steps: int = 4
    shift: float = 5.0
    guidance: float = 1.0
    negative_prompt: str = ""
    shot_offset: float = 0.0


class Session:
    """Streams one video; iterating makes a chunk at a time.

    ::

        with Session(runtime, decoder, sink, encode, timeline, sampling) as session:
            for report in session:
                …

    A chunk's latents go to a `DecodePipeline` before its commit, so decoding overlaps the next
    chunk. Leaving the block waits for the last frames. One thread at a time makes chunks, while any
    thread may change what is to come by the events of `timeline`. After the script's end an
    appended shot can be made by iterating again.

    Args:
        runtime: the transformer's, for this session alone.
        decoder: for this session alone.
        sink: takes the video of latents as they are decoded, in a thread of its own; see
            `DecodePipeline`.
        encode: a prompt's embedding, [1, S, E] on the runtime's device, the same every time.
        timeline: the chunks to be made.
        sampling: how chunks are sampled.
        seed: of the noise; see `chunk_noise`.
        unconditional: a second runtime, if and only if there is guidance.
        image: normalised latent of the video's first frame, float32 [B, C, 1, h, w]; see `denoise`.
        begun: called with each chunk when it begins, before the sink has any of its frames.
    """

    def __init__(
        self,
        runtime: Runtime,
        decoder: LatentDecoder,
        sink: Callable[[Tensor], None],
        encode: Callable[[str], Tensor],
        timeline: Timeline,
        sampling: Sampling,
        seed: int = 0,
        unconditional: Runtime | None = None,
        image: Tensor | None = None,
        begun: Callable[[Chunk], None] = lambda chunk: None,
    ) -> None:
        self.timeline = timeline
        """The chunks that are still to be made, and their events."""
        self.delivery = Delivery(decoder, sink, runtime.spec.stride[0])
        """The video on its way to the sink."""
        self._runtime = runtime
        self._runtimes = [runtime] if unconditional is None else [runtime, unconditional]
        self._encode = encode
        self._negative_prompt = sampling.negative_prompt
        self._seed = seed
        self._image = image
        self._begun = begun
        self._watch = Stopwatch(runtime.device)
        schedule = Schedule.make(sampling.steps, sampling.shift, runtime.device)
        self._denoiser = Denoiser(self._runtimes, schedule, sampling.guidance, self._watch)
        self._cache = Cache(self._runtimes, sampling.shot_offset, self._watch)
        self._prompt: str | None = None
        """The latest chunk's, or the one in flight's."""
        self._conditioned = False
        """Whether the runtimes hold that prompt."""
        self._stale = False
        """Whether held chunks have to be committed again under it."""
        self._decoding = self.delivery.seconds

    @property
    def pages(self) -> Mapping[str, Tensor]:
        """The cache, by name; not copies."""
        return self._runtime.pages

    @property
    def table(self) -> PageTable:
        """Which chunks the cache holds."""
        return self._cache.table

    def __iter__(self) -> Session:
        return self

    def __next__(self) -> ChunkReport:
        """Make the next chunk; during a pause, wait for its end.

        Raises:
            StopIteration: the script is over.
            ValueError: a value is not finite; says in which pass or commit, and where.
            Exception: what decoding or the sink raised for earlier chunks.
        """
        while self.timeline.wait():
            if report := self.make():
                return report
        raise StopIteration

    @torch.no_grad()
    def make(self) -> ChunkReport | None:
        """Make the next chunk without waiting: None during a pause, and when the script is over.

        Raises:
            ValueError, Exception: see `__next__`.
        """
        with self.timeline.next() as chunk:
            return None if chunk is None else self._make(chunk)

    def _make(self, chunk: Chunk) -> ChunkReport:
        begun = time.perf_counter()
        self._begun(chunk)
        embeddings = self._embeddings(chunk.prompt)
        encoded = time.perf_counter()
        self.delivery.wait_for_room()
        # Nothing within its turn makes a chunk wait for another session, or for a slow sink.
        with self._runtime.lane.turn():
            waited = time.perf_counter() - encoded
            self._take_prompt(chunk, embeddings)
            listed = self.table.next_pages().table
            clean = self._denoised(chunk, listed)
            self.delivery.submit(clean)
            self._cache.commit(chunk, clean)
            graphs = self._watch.read()
        seconds, text = time.perf_counter() - begun, encoded - begun
        before, self._decoding = self._decoding, self.delivery.seconds
        decoding = {name: now - before[name] for name, now in self._decoding.items()}
        return ChunkReport(chunk, clean, len(listed), seconds, text, graphs, waited, decoding)

    def _embeddings(self, prompt: str) -> list[Tensor]:
        """What the runtimes have to take for a prompt, which is nothing where they hold it."""
        if self._conditioned and prompt == self._prompt:
            return []
        texts = [prompt] if self._conditioned else [prompt, self._negative_prompt]
        return [self._encode(text) for text, _ in zip(texts, self._runtimes, strict=False)]

    def _take_prompt(self, chunk: Chunk, embeddings: Sequence[Tensor]) -> None:
        """Show a chunk's prompt from here on."""
        new = chunk.prompt != self._prompt
        if embeddings:
            self._conditioned = False  # until all have taken the new one
            for runtime, embedding in zip(self._runtimes, embeddings, strict=False):
                with self._watch.measure("prologue"):
                    runtime.set_prompt(embedding.expand(runtime.geometry.batch, -1, -1))
            self._prompt, self._conditioned = chunk.prompt, True
        self._stale |= new and chunk.recache
        if self._stale:
            self._cache.recache()
            self._stale = False

    def _denoised(self, chunk: Chunk, table: Sequence[int]) -> Tensor:
        """A chunk's clean latents, float32 [B, C, F, h, w]."""
        runtime = self._runtime
        spec, geometry = runtime.spec, runtime.geometry
        shape = (geometry.batch, spec.channels, geometry.chunk, *geometry.latent(spec))
        noise = upload(chunk_noise(self._seed, chunk.index, shape), runtime.device)
        image = self._image if chunk.index == 0 else None
        given = noise, self._cache.positions(chunk), table, image
        clean = self._denoiser(*given)
        self._cache.check(chunk.index)  # first: the passes read the pages that a recache wrote
        if not bool(clean.isfinite().all()):
            raise self._denoiser.blame(chunk.index, *given)
        return clean

    def close(self) -> None:
        """Wait for the last frames; raises what decoding or the sink raised."""
        self.timeline.close()
        self.delivery.close()

    def __enter__(self) -> Session:
        self.delivery.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.timeline.close()
        self.delivery.__exit__(kind, error, trace)

    def state(self) -> SessionState:
        """All it needs to go on from here, bit for bit; after an error of the sink too.

        Waits for the decoder. The tensors are the session's own: store them before the next chunk.

        Raises:
            ValueError: it was interrupted within a chunk, or in decoding one, a page is broken, or
                the sink called it.
        """
        self.delivery.rest()
        timeline = self.timeline.state
        if self._stale or self.delivery.latents != timeline.index * self._runtime.geometry.chunk:
            raise ValueError(
                f"session: chunk {timeline.index} was interrupted; save between two chunks"
            )
        return SessionState(
            seed=self._seed,
            timeline=timeline,
            prompt=self._prompt,
            cache=self._cache.state,
            pages=[runtime.state() for runtime in self._runtimes],
            delivery=self.delivery.state(),
            image=self._image if timeline.index == 0 else None,
        )

    def restore(self, state: SessionState) -> None:
        """Go on from a state of the same model and sampling, before the first chunk is made.

        Timeline, seed and image become the state's. Entering the session's block sets its decoder
        to work on what the state has left.

        Raises:
            ValueError: its tensors are another model's, or a page is broken.
        """
        assert self.delivery.latents == 0, "the session has begun"
        for runtime, pages in zip(self._runtimes, state.pages, strict=True):
            runtime.restore(pages)
        self.delivery.restore(state.delivery)
        self._cache.restore(state.cache)
        self.timeline.restore(state.timeline)
        self._seed, self._prompt = state.seed, state.prompt
        self._image = None if state.image is None else state.image.to(self._runtime.device)
