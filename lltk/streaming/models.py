"""Loaded models, and the sessions that share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from lltk.graph.fingerprint import tensors_digest
from lltk.graph.memory import readable, total
from lltk.parallel.groups import SEQUENCE, same_on_all
from lltk.stream.chunks import Chunk
from lltk.stream.prompts import Embed, Prompts, PromptWorker, pipeline_worker
from lltk.stream.script import Shot
from lltk.stream.session import Session
from lltk.stream.state import SessionState, load_state
from lltk.stream.timeline import Timeline
from lltk.streaming.checks import check_plan
from lltk.streaming.engines import Engine, load_engine
from lltk.streaming.identity import identity
from lltk.streaming.memory import check_session_memory, session_memory
from lltk.streaming.plan import Plan
from lltk.streaming.restoring import check_state
from lltk.streaming.slots import Slots
from lltk.streaming.stream import Stream, own_file


class Models:
    """A plan's models: weights, compiled code and text encoder, loaded once for all sessions.

    ::

        models = load_models(plan)
        with models.open(sink, script) as stream:
            for report in stream:
                …

    Sessions may be opened, and driven, from any thread. On a device they make one chunk at a time,
    in turn. A session takes a slot: memory for what is its own and, on a GPU, CUDA graphs that are
    recorded as they are first needed. Leaving the stream's block gives the slot to the next
    session, which records nothing anew. A slot is made where none is free.

    Of several ranks each opens the same sessions, and makes their chunks in the same order.

    Args:
        plan: with weights.
        prompts: a prompt's embedding, in place of the pipeline's text encoder.
        sessions: how many may be open at once; None for as many as fit into memory.
    """

    def __init__(
        self, plan: Plan, prompts: Embed | None = None, sessions: int | None = None
    ) -> None:
        self.plan = plan
        self._rank = plan.rank
        self._worker = _worker(plan) if prompts is None else PromptWorker(prompts)
        self._negative = [plan.section.negative_prompt] if plan.guided else []
        need = session_memory(plan, self._rank).items()
        cost = " and ".join(f"{readable(total(own))} on {device}" for device, own in need)
        check = partial(check_session_memory, plan, self._rank)
        self._slots = Slots(lambda: self._loaded().slot(), check, sessions, cost)
        self._engine: Engine | None = None
        self._loading = Lock()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What saved streams of these models have in common; reads every weight once."""
        return identity(self.plan)

    def load(self) -> None:
        """Put the weights on their devices, if they are not there yet.

        Raises:
            ValueError: the plan has no weights.
        """
        with self._loading:
            if self._engine is None:
                self._engine = load_engine(self.plan, self._rank)

    @property
    def engine(self) -> Engine:
        """What all sessions share, which is loaded by now."""
        return self._loaded()

    def _loaded(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def open(
        self,
        sink: Callable[[Tensor], None] | None,
        script: Sequence[Shot] = (),
        *,
        image: Tensor | None = None,
        seed: int | None = None,
        resume: Path | None = None,
        endless: bool = False,
        begun: Callable[[Chunk], None] = lambda chunk: None,
    ) -> Stream:
        """Open a session.

        Prompts are encoded in another thread, ahead of the chunks that need them. As long as the
        weights are not loaded, opening waits until prompts and image are encoded, so that their
        encoders need no room beside the models.

        Args:
            sink: takes the video of latents as they are decoded, [B, 3, 1 or n · stride, H, W] in
                [-1, 1], in a thread of its own. None in every rank but rank 0, which has the video.
            script: the shots to begin with.
            image: the first frame, [B, 3, H, W] in [-1, 1].
            seed: of the noise; None for the recipe's.
            resume: a state that `Stream.save` wrote, which knows script, image and seed.
            endless: whether the last shot goes on until other shots follow.
            begun: called with each chunk when it begins, in the thread that makes it.

        Raises:
            ValueError: a file is damaged or does not fit, or there is no slot for the session.
        """
        opened = self._opened(sink, script, image, seed, resume, endless, begun)
        return Stream(self, *opened)

    def _opened(
        self,
        sink: Callable[[Tensor], None] | None,
        script: Sequence[Shot],
        image: Tensor | None,
        seed: int | None,
        resume: Path | None,
        endless: bool,
        begun: Callable[[Chunk], None],
    ) -> tuple[Session, Prompts, Callable[[], None]]:
        """A session that is ready to run, its prompts, and what is called when it is over."""
        if (sink is None) == (self._rank == 0):
            given = "None" if self._rank else "a sink"
            raise ValueError(f"sink: rank 0 has the video; give rank {self._rank} {given}")
        if resume is not None and (script or image is not None or seed is not None):
            raise ValueError("resume: the state knows script, image and seed; give none of them")
        state = None if resume is None else self._state(resume)
        timeline = Timeline(self.plan.chunking, script, endless)
        if state is not None:
            timeline.restore(state.timeline)
        prompts = Prompts(self._worker, self._negative)
        prompts.expect(timeline.prompts)
        if self._engine is None:
            prompts.wait()
        latent = None if image is None else self._encoded(image)
        self.load()
        slot = self._slots.take()
        try:
            session = Session(
                slot.runtimes[0],
                slot.decoder,
                sink or (lambda video: None),
                prompts,
                timeline,
                self.plan.sampling,
                self.plan.section.seed if seed is None else seed,
                slot.runtimes[1] if self.plan.guided else None,
                latent,
                begun,
            )
            if state is not None:
                session.restore(state)
        except BaseException:
            self._slots.give_back(slot)
            raise
        return session, prompts, lambda: self._slots.give_back(slot)

    def _state(self, path: Path) -> SessionState:
        own = own_file(path, self._rank)
        video: tuple[Any, ...] | None = None
        try:
            state = load_state(own, self.identity)
            check_state(own, state, self.plan)
            latents = {str(held.chunk.index): held.clean for held in state.cache.held}
            if state.image is not None:
                latents["image"] = state.image
            made = tensors_digest(latents)  # every rank has made the same
            video = state.seed, state.prompt, state.timeline, state.cache.table, made
        finally:  # the others wait for it, whatever is wrong with this one's
            alike = same_on_all(video, SEQUENCE, self.plan.ranks)
        if not alike:
            raise ValueError(
                f"{path}: its ranks' files are of different videos or chunks; resume another"
            )
        return state

    def _encoded(self, image: Tensor) -> Tensor:
        """The image's latent, on the transformer's device."""
        from lltk.models import wan_vae  # diffusers' encoder, which other streams do without

        plan, engine = self.plan, self._engine
        if not (plan.folder / "vae").is_dir():
            raise ValueError(
                f"image: {plan.folder} has no vae/, which encodes a video's first frame; name a "
                "pipeline that has, as with --set stream.pipeline=FOLDER"
            )
        loaded = wan_vae.load_vae(plan.folder)
        lane = None if engine is None else engine.decoder_lane
        with nullcontext() if lane is None else lane.turn():
            device, dtype = plan.decoder_device, plan.video_dtype
            weights = {name: weight.to(device, dtype) for name, weight in loaded.weights.items()}
            vae = wan_vae.make_vae(loaded.config or {}, weights)
            latent = wan_vae.encode_image(vae, image.to(device)).cpu()
        return latent.to(plan.device)


def load_models(plan: Plan, *, prompts: Embed | None = None, sessions: int | None = None) -> Models:
    """Load a plan's models, for any number of sessions.

    Args:
        plan: with weights.
        prompts: a prompt's embedding, [1, S, E] where the transformer runs; None for the
            pipeline's text encoder.
        sessions: how many may be open at once; None for as many as fit into memory.

    Raises:
        ValueError: a file is damaged or does not fit, there is not enough memory, a device lacks
            what the recipe wants, or there are not as many ranks as it is for.
    """
    check_plan(plan)
    models = Models(plan, prompts, sessions)
    models.load()
    return models


def _worker(plan: Plan) -> PromptWorker:
    """Encodes prompts with the plan's text encoder, where the recipe says."""
    text = plan.section.text
    encoder = plan.text_encoder(None if text.cache is None else Path(text.cache))
    return pipeline_worker(encoder, text.after, plan.device)
