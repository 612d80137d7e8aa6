"""Lowered programs on a GPU against the same programs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import replay_longlive
import torch
from torch import Tensor

from lltk.compiler import transform, with_weights
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.stream.rollout import Rollout
from lltk.train.flow_matching import FlowMatching

pytestmark = pytest.mark.gpu

DATA = Path(__file__).parent / "data" / "longlive"
WIDE = {"layers": 2, "height": 128, "width": 128, "chunk": 2, "window": 8, "sink": 2}
HEADS = helpers.tiny_config(2, num_attention_heads=2, attention_head_dim=64)


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def compiled_for(kind: str, dtype: str, **lower: str) -> Program:
    """A tiny program whose heads are as wide as fast kernels want them."""
    passes = [*helpers.PASSES[kind][:-1], {"lower": lower}]
    sizes = {key: value for key, value in WIDE.items() if key != "layers"}
    return helpers.make_program(
        helpers.make_recipe(kind, passes, config=HEADS, dtype=dtype, **sizes)
    )


@pytest.mark.parametrize("name", ["rollout_multi_shot", "teacher_forcing"])
def test_recorded_runs(name: str) -> None:
    assert replay_longlive.replay(DATA / f"{name}.safetensors", "cuda") <= replay_longlive.BOUND


@torch.no_grad()
def rollout(program: Program, device: str, compiled: bool = False) -> Tensor:
    """Run the steps of five chunks with fixed noise, and commit each chunk."""
    module = instantiate(program, device)
    if compiled:
        module.compile_blocks()
    run = Rollout(program, module)
    generator = torch.Generator().manual_seed(1)
    geometry, spec = program.geometry, program.spec
    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    text = torch.randn(1, geometry.text_tokens, spec.text_dim, generator=generator)
    run.set_text(text.to(device, program.dtype))
    results = []
    for chunk in range(5):
        latents = torch.randn(shape, generator=generator).to(device, program.dtype)
        positions = torch.arange(geometry.chunk, dtype=torch.float64) + chunk * geometry.chunk
        level = torch.full((1, geometry.chunk), 700.0)
        results.append(run.step(latents, level.to(device), positions.to(device)).cpu().float())
        run.commit(latents, positions.to(device), opens_shot=chunk == 2)
    return torch.stack(results)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "cudnn"])
def test_bfloat16_stream(attention: str, compiled: bool) -> None:
    program = compiled_for("stream", "bfloat16", paged_attention=attention)
    reference = rollout(compiled_for("stream", "float32", paged_attention="reference"), "cpu")
    ours = rollout(program, "cuda", compiled)
    scale = reference.std()
    assert (ours - reference).std() / scale < 0.02
    assert (ours.roll(1, 0) - reference).std() / scale > 0.2


ROW_OPS = ("row_pipeline", "rms_norm_rope")


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_stream(compiled: bool) -> None:
    """It is as near to float32 as the unfused W8A8 stream is, and nearer to that stream."""
    plain = compiled_for("stream", "float32", paged_attention="reference")

    def in_fp8(*passes: str, **lower: str) -> Program:
        steps = [*helpers.PASSES["stream"][:6], *passes, "regionalise"]
        chosen = {"paged_attention": "arena", "fp8_matmul": "scaled_mm", **lower}
        sizes = {key: value for key, value in WIDE.items() if key != "layers"}
        recipe = helpers.make_recipe(
            "stream", [*steps, {"lower": chosen}], config=HEADS, dtype="bfloat16", **sizes
        )
        return with_weights(transform(recipe, weights=False), plain.weights)

    wanted = rollout(plain, "cpu")
    unfused = rollout(in_fp8("fp8_infer", row_pipeline="torch"), "cuda")
    passes = ("hoist_modulation", "merge_qkv", "fuse_norm_rope", "fp8_infer", "fuse_rows")
    ours = rollout(in_fp8(*passes, **dict.fromkeys(ROW_OPS, "triton")), "cuda", compiled)
    scale, error = wanted.std(), (unfused - wanted).std()
    assert 0.01 < error / scale < 0.15
    assert (ours - wanted).std() < 1.2 * error
    assert (ours - unfused).std() < error
    assert (ours.roll(1, 0) - wanted).std() / scale > 0.2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_gradients_of_training(attention: str, compiled: bool) -> None:
    program = compiled_for("train", "float32", block_causal_attention=attention)
    oracle = compiled_for("train", "float32", block_causal_attention="reference")
    given = helpers.inputs(program, "train")
    theirs = gradients(oracle, given, "cpu", compiled=False)
    ours = gradients(program, given, "cuda", compiled)
    assert helpers.difference(ours, theirs) < 2e-4
    given["positions"] = given["positions"].flip(0)
    assert helpers.difference(gradients(program, given, "cuda", compiled), theirs) > 1e-2


def gradients(
    program: Program, given: dict[str, Tensor], device: str, compiled: bool
) -> dict[str, Tensor]:
    """Every parameter's gradient of the mean square of the result."""
    torch._dynamo.reset()
    module = instantiate(program, device)
    if compiled:
        module.compile_blocks()
    moved = {name: value.to(device) for name, value in given.items()}
    module("train", moved)["sample"].square().mean().backward()
    return {n: p.grad.cpu() for n, p in module.named_parameters() if p.grad is not None}


def test_replayed_training_is_eager() -> None:
    """Loss and gradients are the same while weights, clips and noise change."""
    program = compiled_for("train", "float32", block_causal_attention="sdpa")
    eager, replayed = (trained(program, "cuda", graphs) for graphs in (False, True))
    for theirs, ours in zip(eager, replayed, strict=True):
        assert helpers.difference(ours, theirs) < 1e-4
    assert helpers.difference(replayed[1], eager[0]) > 1e-2


def trained(program: Program, device: str, graphs: bool) -> list[dict[str, Tensor]]:
    """Losses and gradients of three steps of gradient descent, then a loss by itself."""
    module = instantiate(program, device)
    objective = FlowMatching(program, module, context_noise=0.3, gap=64.0, graphs=graphs)
    found = []
    for step in range(3):
        loss = objective.loss(replace(helpers.clips(program, seed=step), seed=step))
        loss.backward()
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        found.append({n: t.detach().cpu().clone() for n, t in (grads | {"loss": loss}).items()})
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                parameter.grad = None
    with torch.no_grad():
        found.append({"loss": objective.loss(helpers.clips(program)).cpu()})
    return found


def test_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session on a GPU is the CPU's, waits for nothing within passes and commits, and resumes."""
    import streams

    from lltk.streaming import plan_stream

    folder = streams.save_pipeline(tmp_path / "pipeline")
    recipe = streams.open_recipe("tiny_stream", (*streams.SIZES, f"stream.pipeline={folder}"))
    wanted, wanted_video = streams.streamed(plan_stream(recipe))

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            session.delivery.rest()  # the decoder's thread may wait, and the mode is every thread's
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*given)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    plan = plan_stream(recipe, "cuda")
    streams.streamed(plan, streams.SHOTS[:1])  # warm-up: libraries are loaded with waiting
    stream, parts = streams.opened(plan)
    session = stream.session
    monkeypatch.setattr(session, "_denoiser", watched(session._denoiser))
    monkeypatch.setattr(session._cache, "_write", watched(session._cache._write))
    with stream:
        latents = torch.cat([report.latents for report in stream], dim=2)
    video = torch.cat(parts, dim=2)
    assert float((latents.cpu() - wanted).abs().max() / wanted.abs().max()) < 1e-2
    assert float((video.cpu() - wanted_video).abs().mean()) < 1e-2
    stream, before = streams.opened(plan)
    with stream:
        for _ in range(4):
            report = next(stream.session)
        stream.save(tmp_path / "state")
    assert report.graphs["step"] > 0 and report.decoding["decode"] > 0
    other, rest = streams.opened(plan, (), resume=tmp_path / "state")
    with other:
        list(other)
    assert torch.equal(torch.cat([*before, *rest], dim=2), video)


def test_cuda_graphs_change_nothing(tmp_path: Path) -> None:
    """The stream goes over every count of listed pages, and each shot switches the prompt."""
    import streams

    from lltk.streaming import plan_stream

    folder = streams.save_pipeline(tmp_path / "pipeline")
    settings = (*streams.SIZES, f"stream.pipeline={folder}")

    def streamed(*on: str) -> tuple[Tensor, Tensor]:
        keys = [f"{key}=true" for key in on]
        recipe = streams.open_recipe("tiny_stream", (*settings, *keys))
        return streams.streamed(plan_stream(recipe, "cuda"))

    transformer, decoder = "stream.cuda_graphs", "stream.decoder.cuda_graphs"
    plain = streamed()
    for keys in ((transformer,), (decoder,), (transformer, decoder)):
        assert all(torch.equal(a, b) for a, b in zip(plain, streamed(*keys), strict=True)), keys


def test_cuda_graphs_make_the_same_clips(tmp_path: Path) -> None:
    """The critic's, over two updates: the second replays what the first has recorded."""
    import streams
    import test_distillation as distillation

    from lltk.tasks.distillation import plan_distillation
    from lltk.train.data import Batches

    pipeline = streams.save_pipeline(tmp_path / "pipeline")

    def clips(*changes: str) -> list[Tensor]:
        recipe = distillation.recipe(pipeline, "train.batch=2", *changes)
        plan = plan_distillation(recipe, torch.device("cuda"), "test")
        simulation = distillation.objective_of(plan).simulation
        batches, made = Batches(distillation.Prompts(), 0, plan.program.geometry.batch), []
        for _ in range(4):
            given = next(batches)
            with torch.no_grad():
                made.append(simulation.clips(given, "critic", simulation.scene(given, "critic")))
        return made

    assert all(map(torch.equal, clips(), clips("train.graphs=true")))


def test_replayed_distillation_is_eager(tmp_path: Path) -> None:
    """Two steps of the tiny recipe: the first records what the second replays."""
    from lltk.graph.recipe import read_recipe
    from lltk.graph.recipe_files import shipped
    from lltk.training import open_training, plan_training

    changes = (
        "geometry.batch=2", "train.batch=2", "train.data.clips=2", "train.steps=2",
        "train.warmup=0", "train.ema_start=1", "train.sample_every=null", "distil.fake.lead=2",
        "distil.fake.updates=1", "distil.steps=[2,1]", "passes.lora.rank=4",
    )  # fmt: skip
    found = []
    for name, dtype, graphs in (
        ("eager", "float32", "false"), ("graphs", "float32", "true"),
        ("bfloat16", "bfloat16", "true"),
    ):  # fmt: skip
        own = (*changes, f"model.dtype={dtype}", f"train.graphs={graphs}")
        plan = plan_training(read_recipe(shipped()["tiny_distil"], own), "cuda")
        with open_training(plan, tmp_path / name) as run:
            steps = list(run)
            losses = [value for step in steps for value in (step.loss, step.losses["critic"])]
            found.append((torch.tensor(losses), steps[0].grad_norm, run.trainer.weights))
    eager, graphs, narrow = found
    assert float(eager[0][0]) > 0 and eager[1] > 0
    assert torch.allclose(graphs[0], eager[0], rtol=5e-2)
    assert abs(graphs[1] / eager[1] - 1) < 1e-2
    assert torch.allclose(
        narrow[0][1::2], eager[0][1::2], rtol=0.1
    )  # the critic's alone: g is small
    changed = [name for name, value in eager[2].items() if "lora_B" in name and value.any()]
    assert changed
    assert all(_alike(graphs[2][name], eager[2][name]) > 0.9 for name in changed)


def _alike(ours: Tensor, theirs: Tensor) -> float:
    """The cosine of the angle between two tensors."""
    return float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))


def test_a_second_session_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the slot of the first with its CUDA graphs, and is as if it were alone."""
    import streams

    from lltk.stream.runtimes import cuda_graph
    from lltk.streaming import load_models, plan_stream

    folder = streams.save_pipeline(tmp_path / "pipeline")
    settings = (*streams.SIZES, f"stream.pipeline={folder}", "stream.cuda_graphs=true")
    plan = plan_stream(streams.open_recipe("tiny_stream", settings), "cuda")
    recorded: list[cuda_graph._Recorded] = []
    record = cuda_graph._Recorded.__init__

    def counted(self: cuda_graph._Recorded, *given: Any) -> None:
        recorded.append(self)
        record(self, *given)

    monkeypatch.setattr(cuda_graph._Recorded, "__init__", counted)
    wanted = streams.shared(load_models(plan), seed=7)
    models = load_models(plan)
    other = streams.shared(models, seed=3)
    count = len(recorded)
    again = streams.shared(models, seed=7)
    assert count > 0 and len(recorded) == count
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
    assert not torch.equal(other[0], wanted[0])


def test_sessions_share_a_gpu(tmp_path: Path) -> None:
    """Four sessions in four threads, with graphs in one pool, are each as if they were alone."""
    from concurrent.futures import ThreadPoolExecutor

    import streams

    from lltk.streaming import load_models, plan_stream

    folder = streams.save_pipeline(tmp_path / "pipeline")
    for graphs in ("false", "true"):
        keys = (f"stream.pipeline={folder}", f"stream.cuda_graphs={graphs}", "stream.guidance=1.5")
        plan = plan_stream(streams.open_recipe("tiny_stream", (*streams.SIZES, *keys)), "cuda")
        alone = [streams.shared(load_models(plan), seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as threads:
            made = list(threads.map(streams.shared, [load_models(plan)] * 4, range(4)))
        for ours, wanted in zip(made, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_a_session_costs_what_is_said(tmp_path: Path) -> None:
    """On top come latents, embeddings, and a library's workspace for the decoder's thread."""
    import streams

    from lltk.graph.memory import total
    from lltk.streaming import Stream, load_models, plan_stream, session_memory

    folder = streams.save_pipeline(tmp_path / "pipeline")
    large = ("geometry.height=512", "geometry.width=512", "geometry.window=512")
    keys = (*streams.SIZES, *large, f"stream.pipeline={folder}", "stream.guidance=1.5")
    plan = plan_stream(streams.open_recipe("tiny_stream", keys), "cuda")
    models, need = load_models(plan), total(session_memory(plan)["cuda"])

    def used(stream: Stream) -> int:
        for _ in range(3):
            next(stream)
        stream.session.delivery.rest()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    with models.open(lambda video: None, streams.SHOTS) as first:
        before = used(first)
        with models.open(lambda video: None, streams.SHOTS) as second:
            assert need <= used(second) - before < 1.5 * need
