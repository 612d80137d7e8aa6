"""A session: one video, planned in chunks, made chunk by chunk."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lltk.stream.decoder import DecodePipeline, DecoderState, LatentDecoder
from lltk.stream.pages import PageTable
from lltk.stream.positions import frame_positions
from lltk.stream.runtimes import Runtime
from lltk.stream.runtimes.torch import upload
from lltk.stream.sampler import Sampler, Schedule, guided
from lltk.stream.script import ChunkPlan
from lltk.stream.timing import Stopwatch


@dataclass(frozen=True)
class Sampling:
    """What a session needs of a recipe's ``stream`` section; the fields are described there."""

    steps: int = 4
    shift: float = 5.0
    guidance: float = 1.0
    negative_prompt: str = ""
    shot_offset: float = 0.0
    recache: bool = False


@dataclass(frozen=True)
class Receipt:
    """A prompt switch on its way.

    Attributes:
        prompt: what the rest of the shot shows.
        recache: whether pages that are no sinks are committed again under the prompt.
        received: the first chunk that was not begun when it came.
        applied: the chunk it acts from, once it does.
    """

    prompt: str
    recache: bool
    received: int
    applied: int | None = None


@dataclass(frozen=True)
class ChunkReport:
    """What became of one chunk.

    Attributes:
        plan: what was planned.
        prompt: what it was made from.
        latents: float32 [B, C, F, h, w], clean.
        receipts: the switches that act from this chunk.
        pages: pages it attended to, besides itself.
        seconds: wall time of the session's thread, from its beginning to its commit.
        text: of these, encoding its prompt.
        graphs: of these, in the transformer's graphs: ``prologue``, ``step``, ``commit``,
            ``recache``; on a GPU the device's time.
        waited: of these, until the decoder had room.
        decoding: seconds in other threads since the report before: ``decode`` in the decoder's
            graphs, ``deliver`` in the sink.
    """

    plan: ChunkPlan
    prompt: str
    latents: Tensor
    receipts: tuple[Receipt, ...]
    pages: int
    seconds: float
    text: float
    graphs: Mapping[str, float]
    waited: float
    decoding: Mapping[str, float]

    @property
    def outside(self) -> float:
        """Seconds of its own that were spent neither in models nor in waiting for one."""
        return self.seconds - self.text - sum(self.graphs.values()) - self.waited


@dataclass(frozen=True)
class SessionState:
    """A session between two chunks.

    Attributes:
        tensors: pages, decoder caches, clean latents of held chunks, and latents that are not yet
            video; by name.
        facts: the rest, as plain data.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass
class _Progress:
    """Where a session is.

    Attributes:
        chunk: the next one.
        cuts: scene cuts so far, the next chunk's not counted.
        spoken: the prompt that a switch put in the place of the script's, and its shot.
        cuts_at: the cuts before each held chunk, its own counted.
    """

    chunk: int = 0
    cuts: int = 0
    spoken: tuple[int, str] | None = None
    cuts_at: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Committed:
    """A page that was written and not looked at yet.

    Attributes:
        what: ``commit`` or ``recache``.
        runtime: whose page it is.
        given: latents, positions, table and slot.
        magnitudes: the page's.
    """

    what: str
    runtime: Runtime
    given: tuple[Tensor, Tensor, Sequence[int], int]
    magnitudes: Tensor


class Session:
    """Streams a planned video; iterating makes a chunk at a time.

    ::

        with Session(runtime, decoder, sink, encode, script, sampling) as session:
            for report in session:
                …

    A chunk's latents go to a `DecodePipeline` before its commit, so decoding overlaps the next
    chunk. Leaving the block waits for the last frames. Noise of chunk i of batch item b follows
    from (seed + b, i) alone, so sessions and batch items never meet.

    Args:
        runtime: the transformer's, for this session alone.
        decoder: for this session alone.
        sink: takes the video of latents as they are decoded, in a thread of its own; see
            `DecodePipeline`.
        encode: a prompt's embedding, [1, S, E] on the runtime's device, the same every time.
        script: every chunk.
        sampling: how chunks are sampled.
        seed: of the noise.
        unconditional: a second runtime, if and only if there is guidance.
        image: normalised latent of the video's first frame, float32 [B, C, 1, h, w]; held at t = 0
            and put back after every step of the first chunk.
    """

    def __init__(
        self,
        runtime: Runtime,
        decoder: LatentDecoder,
        sink: Callable[[Tensor], None],
        encode: Callable[[str], Tensor],
        script: Sequence[ChunkPlan],
        sampling: Sampling,
        seed: int = 0,
        unconditional: Runtime | None = None,
        image: Tensor | None = None,
    ) -> None:
        assert (unconditional is not None) == (sampling.guidance != 1.0)
        self._runtime = runtime
        self._unconditional = unconditional
        self._decoder = decoder
        self._sink = sink
        self._encode = encode
        self._script = deque(script)
        self._sampling = sampling
        self._seed = seed
        self._image = image
        spec, geometry = runtime.spec, runtime.geometry
        self._shape = (spec.channels, geometry.chunk, *geometry.latent(spec))
        self._schedule = Schedule.make(sampling.steps, sampling.shift, runtime.device)
        self._table = PageTable(geometry)
        self._progress = _Progress()
        self._prompt: str | None = None
        """What the runtimes are conditioned on."""
        self._stale = False
        """Whether held pages have to be committed again under the prompt."""
        self._clean: dict[int, Tensor] = {}
        self._committed: list[_Committed] = []
        self._switches: deque[Receipt] = deque()
        self._switching = threading.Lock()
        self._begun = 0
        self._watch = Stopwatch(runtime.device)
        overlap = decoder.device.type != "cpu"
        self._pipeline = DecodePipeline(decoder, sink, overlap=overlap)
        self._submitted = 0
        self._left: Sequence[Tensor] = ()
        self._left_videos: Sequence[Tensor] = ()
        """What a restored session has to decode, and before it to deliver, ahead of its own."""
        self._decoding = self._pipeline.seconds

    @property
    def script(self) -> Sequence[ChunkPlan]:
        """The chunks that are still to be made."""
        return tuple(self._script)

    @property
    def chunk(self) -> int:
        """The next chunk's index."""
        return self._progress.chunk

    @property
    def undelivered(self) -> int:
        """How many video frames, of chunks that were made, the sink has not taken."""
        return self._frames(self.chunk * self._runtime.geometry.chunk) - self.frame

    @property
    def frame(self) -> int:
        """The video frame that the sink is to take next."""
        undecoded = sum(part.shape[2] for part in (*self._left, *self._pipeline.latents))
        waiting = sum(part.shape[2] for part in (*self._left_videos, *self._pipeline.videos))
        made = self.chunk * self._runtime.geometry.chunk
        return self._frames(made - undecoded) - waiting

    def _frames(self, latents: int) -> int:
        """Video frames of a video's first latents."""
        return max(0, (latents - 1) * self._runtime.spec.stride[0] + 1)

    @property
    def pages(self) -> Mapping[str, Tensor]:
        """The cache, by name; not copies."""
        return self._runtime.pages

    @property
    def table(self) -> PageTable:
        """Which chunks the cache holds."""
        return self._table

    @property
    def decoding(self) -> Mapping[str, float]:
        """Seconds in the decoder and the sink so far; see `ChunkReport`."""
        return self._pipeline.seconds

    def switch(self, prompt: str, recache: bool | None = None) -> Receipt:
        """Show something else from the next chunk that begins to the end of its shot.

        Any thread may call it. The report of the chunk it acts from has the receipt, applied.

        Args:
            prompt: the text to encode, as it stands.
            recache: whether to commit held chunks again under the prompt, from their clean latents,
                oldest first, except sinks; None as the recipe says.

        Raises:
            ValueError: an empty prompt, or no chunk is left.
        """
        if not prompt.strip():
            raise ValueError("switch: the prompt is empty; say what the video shows from here on")
        recache = self._sampling.recache if recache is None else recache
        with self._switching:
            if not self._script or self._script[-1].chunk < self._begun:
                raise ValueError("switch: the script is over; nothing is left that could show it")
            receipt = Receipt(prompt, recache, received=self._begun)
            self._switches.append(receipt)
        return receipt

    def __iter__(self) -> Session:
        return self

    @torch.no_grad()
    def __next__(self) -> ChunkReport:
        """Make the next chunk.

        Raises:
            StopIteration: the script is over.
            ValueError: a value is not finite; says in which pass or commit, and where.
            Exception: what decoding or the sink raised for earlier chunks.
        """
        assert not self._left and not self._left_videos, (
            "a restored session is iterated within its block"
        )
        if not self._script:
            raise StopIteration
        begun = time.perf_counter()
        plan, at = self._script[0], self._progress
        cuts = at.cuts + (plan.opens_shot and plan.chunk > 0)
        receipts = self._receipts(plan)
        spoken = (plan.shot, receipts[-1].prompt) if receipts else at.spoken
        prompt = spoken[1] if spoken is not None and spoken[0] == plan.shot else plan.prompt
        recache = receipts[-1].recache if receipts else plan.switches and self._sampling.recache
        text = self._set_prompt(prompt, recache and not plan.opens_shot)
        positions = self._positions(plan.chunk, cuts)
        pages = self._table.plan()
        clean = self._denoise(positions, pages.table)
        waited = time.perf_counter()
        self._pipeline.submit(clean.to(self._decoder.device))
        self._submitted += 1
        waited = time.perf_counter() - waited
        latents = clean.to(self._runtime.dtype)
        for runtime in self._runtimes():
            self._commit("commit", runtime, latents, positions, pages.table, pages.slot)
        self._check_committed()
        self._table.commit(plan.opens_shot)
        self._keep(plan.chunk, clean, cuts)
        at.spoken = spoken
        self._answer(receipts)
        self._script.popleft()
        graphs = self._watch.read()
        seconds = time.perf_counter() - begun
        before, self._decoding = self._decoding, self._pipeline.seconds
        decoding = {name: now - before[name] for name, now in self._decoding.items()}
        return ChunkReport(
            plan, prompt, clean, receipts, len(pages.table), seconds, text, graphs, waited, decoding
        )

    def rest(self) -> None:
        """Wait until the chunks so far are video that the sink has taken, or until one fails."""
        self._pipeline.rest()

    def close(self) -> None:
        """Wait for the last frames; raises what decoding or the sink raised."""
        self._pipeline.close()

    def __enter__(self) -> Session:
        owed = self._script or self._left
        if owed and self._decoder.device.type == "cuda":  # which compiles kernels as they first run
            self._pipeline.warm_up()
        for video in self._left_videos:
            self._pipeline.deliver(video.to(self._decoder.device))
        self._left_videos = ()
        if self._left:
            self._pipeline.submit(*(part.to(self._decoder.device) for part in self._left))
            self._left = ()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipeline.__exit__(kind, error, trace)

    # State

    def state(self) -> SessionState:
        """All it needs to go on from here, bit for bit; after an error of the sink too.

        Waits for the decoder. The tensors are the session's own: store them before the next chunk.

        Raises:
            ValueError: it was interrupted within a chunk, or in decoding one, or a page is broken.
        """
        if self._stale or self._submitted != self.chunk:
            raise ValueError(
                f"session: chunk {self.chunk} was interrupted; save between two chunks"
            )
        self._pipeline.rest()
        at = self._progress
        tensors = {f"latents.{chunk}": clean for chunk, clean in self._clean.items()}
        for prefix, runtime in zip(("cache", "unconditional"), self._runtimes(), strict=False):
            tensors |= {f"{prefix}.{name}": page for name, page in runtime.state().items()}
        tensors |= {f"decoder.{n}": cache for n, cache in self._decoder.state.caches.items()}
        for prefix, left, own in (
            ("undecoded", self._left, self._pipeline.latents),
            ("undelivered", self._left_videos, self._pipeline.videos),
        ):
            tensors |= {f"{prefix}.{i}": part for i, part in enumerate((*left, *own))}
        if self._image is not None and self.chunk == 0:
            tensors["image"] = self._image
        facts = {
            "seed": self._seed,
            "prompt": self._prompt,
            "chunk": at.chunk,
            "cuts": at.cuts,
            "cuts_at": list(at.cuts_at.items()),
            "spoken": at.spoken,
            "table": self._table.state,
            "switches": [asdict(receipt) for receipt in self._switches],
            "script": [
                {**asdict(plan), "frames": [plan.frames.start, plan.frames.stop]}
                for plan in self._script
            ],
        }
        return SessionState(tensors, facts)

    @torch.no_grad()
    def restore(self, state: SessionState) -> None:
        """Go on from a state of the same model and sampling, before the first chunk is made.

        Script, seed and image become the state's. Entering the session's block sets its decoder to
        work on what the state has left.

        Raises:
            ValueError: its tensors are another model's, or a page is broken.
        """
        assert self.chunk == 0 and self._submitted == 0, "the session has begun"
        facts, tensors, device = state.facts, state.tensors, self._runtime.device

        def named(prefix: str) -> dict[str, Tensor]:
            start = f"{prefix}."
            return {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}

        for prefix, runtime in zip(("cache", "unconditional"), self._runtimes(), strict=False):
            runtime.restore(named(prefix))
        self._decoder.state = DecoderState(named("decoder"))
        self._clean = {int(chunk): t.to(device) for chunk, t in named("latents").items()}
        self._image = tensors["image"].to(device) if "image" in tensors else None
        self._seed = facts["seed"]
        spoken = facts["spoken"]
        self._progress = _Progress(
            facts["chunk"],
            facts["cuts"],
            None if spoken is None else (spoken[0], spoken[1]),
            {int(chunk): cuts for chunk, cuts in facts["cuts_at"]},
        )
        self._table.restore(facts["table"])
        self._switches.extend(Receipt(**receipt) for receipt in facts["switches"])
        self._script = deque(
            ChunkPlan(**{**plan, "frames": range(*plan["frames"])}) for plan in facts["script"]
        )
        self._submitted = self._begun = facts["chunk"]
        if facts["prompt"] is not None:
            self._set_prompt(facts["prompt"], recache=False)
        self._left, self._left_videos = (
            [part for _, part in sorted(named(prefix).items(), key=lambda item: int(item[0]))]
            for prefix in ("undecoded", "undelivered")
        )

    # One chunk

    def _runtimes(self) -> list[Runtime]:
        return [r for r in (self._runtime, self._unconditional) if r is not None]

    def _receipts(self, plan: ChunkPlan) -> tuple[Receipt, ...]:
        """The switches that came since the last chunk; the latest one speaks.

        They wait until the chunk is made: where it fails, they are for the next attempt.
        """
        with self._switching:
            self._begun = plan.chunk + 1
            return tuple(replace(receipt, applied=plan.chunk) for receipt in self._switches)

    def _answer(self, receipts: Sequence[Receipt]) -> None:
        """Forget the oldest switches, which a chunk has shown."""
        with self._switching:
            for _ in receipts:
                self._switches.popleft()

    def _set_prompt(self, prompt: str, recache: bool) -> float:
        """Take a prompt if it is another; seconds that its embedding took."""
        seconds = 0.0
        if prompt != self._prompt:
            seconds = self._condition(prompt)
            self._stale |= recache
        if self._stale:
            self._recache()
            self._stale = False
        return seconds

    def _condition(self, prompt: str) -> float:
        """Give the runtimes a prompt; seconds that its embedding took."""
        begun = time.perf_counter()
        texts = [prompt]
        if self._unconditional is not None and self._prompt is None:
            texts.append(self._sampling.negative_prompt)
        batch = self._runtime.geometry.batch
        embeddings = [self._encode(text).expand(batch, -1, -1) for text in texts]
        seconds = time.perf_counter() - begun
        self._prompt = None  # until all have taken the new one
        for runtime, embedding in zip(self._runtimes(), embeddings, strict=False):
            with self._watch.measure("prologue"):
                runtime.set_prompt(embedding)
        self._prompt = prompt
        return seconds

    def _recache(self) -> None:
        """Commit what is held, except sinks, again under the prompt; each after the older ones."""
        slots, sinks = self._table.slots, self._table.sinks()
        for chunk, slot in slots.items():
            if chunk in sinks:
                continue
            older = [page for other, page in slots.items() if other < chunk]
            latents = self._clean[chunk].to(self._runtime.dtype)
            positions = self._positions(chunk, self._progress.cuts_at[chunk])
            self._commit("recache", self._runtime, latents, positions, older, slot)

    def _commit(
        self,
        what: str,
        runtime: Runtime,
        latents: Tensor,
        positions: Tensor,
        table: Sequence[int],
        slot: int,
    ) -> None:
        """Write a page, for `_check_committed` to look at once the device is waited for."""
        with self._watch.measure(what):
            runtime.commit(latents, positions, table, slot)
        given = latents, positions, table, slot
        self._committed.append(_Committed(what, runtime, given, runtime.magnitudes(slot)))

    def _check_committed(self) -> None:
        """Wait for the pages that were written; where one is not finite, say where that begins."""
        committed, self._committed = self._committed, []
        if not committed or bool(torch.stack([c.magnitudes for c in committed]).isfinite().all()):
            return
        first = next(c for c in committed if not c.magnitudes.isfinite().all())
        found = first.runtime.first_bad_commit(*first.given, first.magnitudes)
        raise self._not_finite(first.what, found)

    def _not_finite(self, during: str, where: str) -> ValueError:
        return ValueError(
            f"chunk {self.chunk}, {during}: {where} is not finite; keep its layer in high "
            "precision, or use other weights"
        )

    def _denoise(self, positions: Tensor, table: Sequence[int]) -> Tensor:
        """A chunk of clean latents, float32 [B, C, F, h, w].

        If they are not finite, the passes are made once more, to say where that begins.
        """
        clean = self._passes(positions, table)
        self._check_committed()
        if bool(clean.isfinite().all()):
            return clean
        self._passes(positions, table, look=True)
        raise ValueError(f"chunk {self.chunk}: the sampler's latents are not finite")

    def _passes(self, positions: Tensor, table: Sequence[int], look: bool = False) -> Tensor:
        """What the passes end with; to ``look`` for what is not finite waits for the device."""
        runtime, image = self._runtime, self._image if self.chunk == 0 else None
        sampler = Sampler(self._schedule, self._noise())
        for index in range(self._sampling.steps):
            latents = _with_first(image, sampler.latents).to(runtime.dtype)
            timestep = sampler.timestep(index).repeat(len(latents), latents.shape[2])
            if image is not None:
                timestep[:, 0] = 0
            given = (latents, timestep, positions, table, index)
            bad = (r.first_bad(*given) for r in self._runtimes() if look)
            if found := next(filter(None, bad), None):
                raise self._not_finite(f"pass {index}", found)
            with self._watch.measure("step"):
                samples = [r.step(*given) for r in self._runtimes()]
            velocity = samples[0]
            if self._unconditional is not None:
                velocity = guided(samples[0], samples[1], self._sampling.guidance)
            sampler.step(index, velocity)
        return _with_first(image, sampler.result)

    def _noise(self) -> Tensor:
        items = range(self._runtime.geometry.batch)
        noise = [
            torch.randn(self._shape, generator=_generator(self._seed + item, self.chunk))
            for item in items
        ]
        return upload(torch.stack(noise), self._runtime.device)

    def _positions(self, chunk: int, cuts: int) -> Tensor:
        size = self._runtime.geometry.chunk
        offset = self._sampling.shot_offset
        return upload(frame_positions([cuts], size, offset, chunk), self._runtime.device)

    def _keep(self, chunk: int, clean: Tensor, cuts: int) -> None:
        """Note a committed chunk, and forget those that the cache no longer holds."""
        held, at = self._table.slots, self._progress
        at.chunk, at.cuts = chunk + 1, cuts
        self._clean = {c: t for c, t in {**self._clean, chunk: clean}.items() if c in held}
        at.cuts_at = {c: n for c, n in {**at.cuts_at, chunk: cuts}.items() if c in held}


def _with_first(image: Tensor | None, latents: Tensor) -> Tensor:
    """The latents with the image as their first frame, if there is one."""
    return latents if image is None else torch.cat([image, latents[:, :, 1:]], dim=2)


def _generator(seed: int, chunk: int) -> torch.Generator:
    """Of a chunk's noise, on the CPU."""
    digest = hashlib.sha256(f"noise {seed} {chunk}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
