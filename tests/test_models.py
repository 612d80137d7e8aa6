"""Sessions that share loaded models: each as if it were alone, and what they cost."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import refused
from streams import SHOTS, planned, save_pipeline, streamed
from torch import Tensor, nn

from lltk.graph.capture import capture
from lltk.graph.contract import TensorSpec
from lltk.graph.memory import total
from lltk.graph.module import instantiate
from lltk.models import wan_vae
from lltk.stream.decode_pipeline import DecodePipeline
from lltk.stream.decoder import DecodedElsewhere
from lltk.stream.lanes import Lane
from lltk.stream.prompts import Prompts, PromptWorker
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.stream.script import Shot
from lltk.stream.session import Session
from lltk.stream.text import TextEncoder
from lltk.streaming import Models, StreamPlan, load_models, memory, session_memory

pytestmark = pytest.mark.cpu

LIMIT = 20.0
"""Seconds after which a thread is stuck."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:
    folder = save_pipeline(tmp_path_factory.mktemp("pipeline"))
    return planned(folder, "stream.guidance=1.5", "stream.shot_offset=1", "stream.steps=2")


@dataclass(frozen=True)
class Wanted:
    """A session: its noise and its shots; a switch comes before its second chunk."""

    seed: int
    script: Sequence[Shot]
    switch: str | None = None
    image: Tensor | None = None


def shot(caption: str, seconds: float, cut: bool = True) -> Shot:
    return Shot(caption=caption, seconds=seconds, cut=cut)


SESSIONS = (
    Wanted(3, [shot("a red circle", 2), shot("a blue square", 1)]),
    Wanted(4, [shot("a red circle", 3)], switch="a green star falling"),
    Wanted(3, [shot("a green star", 1), shot("a red square", 2, cut=False)]),
    Wanted(5, [shot("a blue square", 3)], image=torch.linspace(-1, 1, 6144).view(1, 3, 32, 64)),
    Wanted(6, [shot("a red circle", 1)]),  # fewer chunks than the one whose slot it takes
)


def made(models: Models, wanted: Wanted, state: Path) -> tuple[Tensor, Tensor, bytes]:
    """A session's latents, its video, and the file that it can go on from."""
    video: list[Tensor] = []
    latents = []
    options = {"seed": wanted.seed, "image": wanted.image}
    with models.open(video.append, wanted.script, **options) as stream:  # type: ignore[arg-type]
        for report in stream:
            latents.append(report.latents)
            if len(latents) == 1 and wanted.switch:
                stream.switch(wanted.switch, recache=True)
        stream.save(state)
    return torch.cat(latents, dim=2), torch.cat(video, dim=2), state.read_bytes()


@contextmanager
def one_at_a_time(kind: type, method: str) -> Iterator[None]:
    """Fail where two calls of a method overlap within the block."""
    call, busy = getattr(kind, method), threading.Lock()

    def checked(*given: Any) -> Any:
        assert busy.acquire(blocking=False), f"{method} is called twice at once"
        try:
            return call(*given)
        finally:
            busy.release()

    with patch.object(kind, method, checked):
        yield


def test_sessions_are_as_alone(plan: StreamPlan, tmp_path: Path) -> None:
    """Four run at once in four threads. Then another takes a used slot."""
    alone = [
        made(load_models(plan), wanted, tmp_path / f"alone{i}") for i, wanted in enumerate(SESSIONS)
    ]
    models = load_models(plan)
    with one_at_a_time(TorchRuntime, "step"), ThreadPoolExecutor(4) as threads:
        paths = [tmp_path / f"shared{i}" for i in range(4)]
        shared = list(threads.map(made, [models] * 4, SESSIONS[:4], paths))
    shared.append(made(models, SESSIONS[4], tmp_path / "shared4"))
    for (latents, video, state), wanted in zip(shared, alone, strict=True):
        assert torch.equal(latents, wanted[0]) and torch.equal(video, wanted[1])
        assert state == wanted[2]
    assert not any(torch.equal(each[0][:, :, :2], alone[0][0][:, :, :2]) for each in alone[1:])


class SlowDecoder(DecodedElsewhere):
    """Takes a while, and must be the only one at work in its lane."""

    def __init__(self, lane: Lane) -> None:
        super().__init__(lane.device)
        self.lane = lane

    def decode(self, latents: Tensor) -> Tensor:
        time.sleep(0.05)
        return super().decode(latents)


def test_decoders_take_turns() -> None:
    lane = Lane(torch.device("cpu"))
    with one_at_a_time(SlowDecoder, "decode"):
        pipelines = [DecodePipeline(SlowDecoder(lane), lambda video: None) for _ in range(2)]
        for pipeline in pipelines:
            pipeline.submit(torch.zeros(1, 4, 2, 2, 4))
        for pipeline in pipelines:
            pipeline.close()


def storages() -> dict[int, int]:
    """Bytes of all tensors that live, by address."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    held = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def test_weights_are_held_once_and_a_session_costs_what_is_said(plan: StreamPlan) -> None:
    """What a second session adds to the tensors that live, besides its latents and embeddings."""
    models = load_models(plan)
    used, streams = [], []
    for wanted in SESSIONS[:2]:
        streams.append(models.open(lambda video: None, [shot("a red circle", 9)], seed=wanted.seed))
        streams[-1].__enter__()
        for _ in range(5):
            next(streams[-1])
        streams[-1].session.delivery.rest()
        used.append(storages())
    modules = [stream.session._runtimes[0]._module for stream in streams]  # type: ignore[attr-defined]
    first, second = ([p.data_ptr() for p in module.parameters()] for module in modules)
    assert first == second and set(first) <= used[0].keys()
    need = total(session_memory(plan)["cpu"])
    grown = sum(used[1].values()) - sum(used[0].values())
    embeddings, latents = 2 * 12 * 64 * 4, 8 * 4 * 2 * 2 * 4 * 4
    assert need <= grown <= need + embeddings + latents < 1.2 * need
    for stream in streams:
        stream.__exit__(None, None, None)
    assert not any("weights" in owner for owner in session_memory(plan)["cpu"])


def test_a_limit_of_sessions(plan: StreamPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    models = load_models(plan, sessions=1)

    def sink(video: Tensor) -> None:
        pass

    with models.open(sink, SHOTS) as stream:
        message = refused(models.open, sink, SHOTS)
        assert message.startswith("sessions: 1 are open, as many as load_models allows; leave the")
        assert message.endswith("KiB on cpu)")
        next(stream)
    abandoned = models.open(sink, SHOTS)
    del abandoned
    gc.collect()
    with models.open(sink, SHOTS) as stream:
        next(stream)
    more, free = load_models(plan), [1 << 40]
    monkeypatch.setattr(memory, "available", lambda device: free[0])
    with more.open(sink, SHOTS):
        free[0] = 1000
        message = refused(more.open, sink, SHOTS)
    assert message.startswith("memory: a session needs ") and "(cache pages " in message
    assert message.endswith("close another session first")
    with more.open(sink, SHOTS):
        pass


def test_a_slow_sink_holds_nobody_else_up(plan: StreamPlan) -> None:
    """Only its own session's thread waits for it."""
    models, go_on = load_models(plan), threading.Event()

    def slow(video: Tensor) -> None:
        assert go_on.wait(LIMIT)

    def held_up() -> int:
        with models.open(slow, [shot("a red circle", 6)]) as stream:
            return sum(1 for _ in stream)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(held_up)
        try:
            with models.open(lambda video: None, [shot("a blue square", 6)]) as stream:
                assert sum(1 for _ in stream) == 6
            assert not other.done()
        finally:
            go_on.set()
        assert other.result() == 6


def test_what_does_not_go_together_is_refused(plan: StreamPlan, tmp_path: Path) -> None:
    models = load_models(plan)
    assert refused(models.open, None, SHOTS) == "sink: rank 0 has the video; give rank 0 a sink"
    message = refused(models.open, print, SHOTS, resume=tmp_path / "state")
    assert message == "resume: the state knows script, image and seed; give none of them"
    with models.open(lambda video: None, SHOTS) as stream:
        next(stream)
    assert "it is closed" in refused(next, stream)
    assert "the stream is closed" in refused(stream.save, tmp_path / "state")


def test_a_session_s_slot_is_free_where_opening_fails(plan: StreamPlan, tmp_path: Path) -> None:
    models = load_models(plan, sessions=1)
    with models.open(lambda video: None, SHOTS) as stream:
        next(stream)
        stream.save(tmp_path / "state")
    with (
        patch.object(Session, "restore", side_effect=ZeroDivisionError),
        pytest.raises(ZeroDivisionError),
    ):
        models.open(lambda video: None, resume=tmp_path / "state")
    assert len(models._slots._free) == 1
    models.open(lambda video: None, resume=tmp_path / "state")


# Prompts


def test_prompts_are_encoded_ahead_of_the_chunk(plan: StreamPlan) -> None:
    """Another thread encodes them as soon as an event brings them."""
    encoder = TextEncoder(plan.folder, plan.transformer.geometry.text_tokens)
    asked: list[str] = []
    came = threading.Condition()

    def embed(prompt: str) -> Tensor:
        assert threading.current_thread() is not threading.main_thread()
        with came:
            asked.append(prompt)
            came.notify_all()
        return encoder.encode([prompt])

    def act(stream: object, chunk: int) -> None:
        if chunk == 1:
            stream.switch("a green star falling")  # type: ignore[attr-defined]
            with came:
                assert came.wait_for(lambda: "a green star falling" in asked, LIMIT)

    latents, _ = streamed(plan, SHOTS, act, prompts=embed)
    assert len(asked) == len(set(asked)) == 5  # three captions, the negative one, the switch's

    def switch(stream: object, chunk: int) -> None:
        if chunk == 1:
            stream.switch("a green star falling")  # type: ignore[attr-defined]

    wanted, _ = streamed(plan, SHOTS, switch)
    assert torch.equal(latents, wanted)


def test_prompts_are_forgotten_and_failures_are_not_kept() -> None:
    asked: list[str] = []

    def embed(prompt: str) -> Tensor:
        asked.append(prompt)
        if asked.count("broken") == 1:
            raise OSError("no such file")
        return torch.full((1, 2, 3), float(len(prompt)))

    rested = threading.Event()
    prompts = Prompts(PromptWorker(embed, rested.set), always=["negative"])
    prompts.expect(["a", "bc"])
    prompts.wait()
    assert rested.wait(LIMIT) and asked == ["a", "bc", "negative"]
    assert float(prompts("bc").mean()) == 2
    prompts.expect(["bc"])
    prompts.wait()
    assert asked == ["a", "bc", "negative"]
    assert float(prompts("a").mean()) == 1 and asked[-1] == "a"
    prompts.expect(["broken"])
    with pytest.raises(OSError, match="no such file"):
        prompts("broken")
    assert float(prompts("broken").mean()) == 6


def test_prompts_that_nobody_wants_any_more_are_not_encoded() -> None:
    """Those of a session that changes its mind keep no other session's waiting."""
    asked: list[str] = []
    begun, may_end, rested = threading.Event(), threading.Event(), threading.Event()

    def embed(prompt: str) -> Tensor:
        asked.append(prompt)
        begun.set()
        assert may_end.wait(LIMIT)
        return torch.zeros(1, 2, 3)

    worker = PromptWorker(embed, rested.set)
    hasty, patient = Prompts(worker), Prompts(worker)
    hasty.expect(["a"])
    assert begun.wait(LIMIT)
    for prompts in (["b", "c"], ["c", "d"], ["d"]):
        hasty.expect(prompts)
    patient.expect(["e"])
    hasty.expect([])
    may_end.set()
    patient.wait()
    assert asked == ["a", "e"] and rested.wait(LIMIT)


# Loading


def test_encoders_have_ended_before_weights_are_loaded(
    plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So encoders need no room beside the models."""
    order: list[str] = []
    encoder = TextEncoder(plan.folder, plan.transformer.geometry.text_tokens)

    def embed(prompt: str) -> Tensor:
        time.sleep(0.05)
        made = encoder.encode([prompt])
        order.append("prompt")
        return made

    def noted(what: str, call: Any) -> Any:
        return lambda *given: (call(*given), order.append(what))[0]

    monkeypatch.setattr("lltk.streaming.torch_engine.instantiate", noted("weights", instantiate))
    monkeypatch.setattr(wan_vae, "encode_image", noted("image", wan_vae.encode_image))
    geometry = plan.transformer.geometry
    image = torch.zeros(geometry.batch, 3, geometry.height, geometry.width)
    script = [shot("a red circle", 1), shot("a green star", 1)]
    Models(plan, embed).open(lambda video: None, script, image=image)
    assert order == ["prompt", "prompt", "prompt", "image", "weights"]  # one is the negative prompt


def test_threads_capture_at_once() -> None:
    """torch.export changes the process while it traces."""
    start = threading.Barrier(4)

    def captured(width: int) -> tuple[int, ...]:
        start.wait(LIMIT)
        graph, _, _ = capture(
            lambda: nn.Linear(width, width + 1),
            {"input": TensorSpec((2, width), torch.float32)},
            ["made"],
            lambda name, parameter: torch.float32,
        )
        (value,) = graph.find_nodes(op="output")[0].all_input_nodes
        return tuple(value.meta["val"].shape)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(captured, (2, 3, 4, 5))) == [(2, n) for n in (3, 4, 5, 6)]
