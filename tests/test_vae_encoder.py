"""The VAE encoder as a Program: a video's latents are diffusers', by any passes, in any calls."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import after, refused, texts
from streams import AUTOENCODER
from test_vae_frames import CONFIGS as OTHERS
from test_vae_frames import WAN22
from torch import Tensor, fx

from lltk.artefact import load_program, save_program
from lltk.bench.record import Record
from lltk.compiler import transform, with_weights
from lltk.graph.geometry import Geometry
from lltk.graph.memory import activations, estimate
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.passes import run_passes
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, open_recipe, parse_recipe
from lltk.graph.spec import EncoderSpec
from lltk.graph.stages import Stage
from lltk.models import wan_vae
from lltk.models.vae_encoder import captured, encoder_weights, spec
from lltk.ops.implementations import Implementation
from lltk.passes import make_pass
from lltk.stream.encoder import Encoder
from lltk.tasks.encoder import encoder_passes

cpu, gpu = pytest.mark.cpu, pytest.mark.gpu

aten = torch.ops.aten
FUSED = ("canonicalise", "fuse_norm_silu", "channels_last", "lower")
CONFIGS: list[dict[str, Any]] = [
    AUTOENCODER,
    WAN22,
    OTHERS[3],
    AUTOENCODER | {"dim_mult": [1, 4, 4]},
]
"""The second's shapes are Wan2.2's, the third's kind is Wan2.1's. The last averages two pixels."""
HEIGHT, WIDTH = 32, 48
FRAMES = (1, 5, 9, 13)


@cache
def vae(number: int) -> Any:
    """diffusers' module in float64. What its convolutions see first counts as much as the rest."""
    torch.manual_seed(0)
    made = wan_vae.build(CONFIGS[number]).double().eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if weight.dim() == 5:
            weight[:, :, :-1] *= 3
        if name.endswith("gamma"):
            weight.add_(0.3 * torch.randn_like(weight))
    return made


@cache
def as_captured(number: int, latents: int, batch: int) -> Program:
    """The encoder captured in float64."""
    geometry = Geometry.model_validate({"batch": batch, "height": HEIGHT, "width": WIDTH})
    return captured(CONFIGS[number], geometry, torch.float64, latents)


@cache
def exact(
    number: int = 0, passes: tuple[str, ...] = FUSED, latents: int = 2, batch: int = 1
) -> Program:
    """The encoder captured in float64 and rewritten, with the very weights of `vae`."""
    program = after(as_captured(number, latents, batch), *passes)
    return with_weights(program, encoder_weights(vae(number).state_dict()))


def encoder(program: Program) -> Encoder:
    return Encoder(program, instantiate(program))


@cache
def video(frames: int = FRAMES[-1], batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    made = torch.rand(batch, 3, frames, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return 2 * made - 1


@torch.no_grad()
def wanted(number: int, frames: Tensor) -> Tensor:
    """diffusers' latents in one call, normalised as its pipelines do."""
    config = CONFIGS[number]
    mean, std = (
        torch.tensor(config[f"latents_{part}"], dtype=torch.float32).double().view(1, -1, 1, 1, 1)
        for part in ("mean", "std")
    )
    latents: Tensor = vae(number).encode(frames).latent_dist.mode()
    return (latents - mean) / std


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest latent."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@cpu
@pytest.mark.parametrize("passes", [FUSED[:1], (FUSED[0], FUSED[2]), FUSED], ids="+".join)
@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_videos_latents_are_diffusers(number: int, passes: tuple[str, ...]) -> None:
    run = encoder(exact(number, passes))
    latents = run.encode(video())
    assert latents.shape == (1, 4, 4, HEIGHT // 16, WIDTH // 16)
    for frames in FRAMES:
        part = video()[:, :, :frames]
        assert apart(run.encode(part), wanted(number, part)) < 1e-12
    assert apart(latents.flip(2), wanted(number, video())) > 0.05
    assert apart(latents.flip(3), wanted(number, video())) > 0.05


@cpu
def test_clips_of_a_batch_are_apart_in_any_calls() -> None:
    """A batch, and more latents in a call than a clip has."""
    clips = video(9, 2)
    for latents, graphs in ((2, ["first", "steps"]), (3, ["first", "step", "step"])):
        run = encoder(exact(latents=latents, batch=2))
        assert [graph for graph, _ in run.parts(9)] == graphs
        assert apart(run.encode(clips), wanted(0, clips)) < 1e-12
    assert apart(run.encode(clips.flip(0)), wanted(0, clips)) > 0.05


@cpu
def test_levels_are_encoded_as_their_signal() -> None:
    run, levels = encoder(exact()), ((video() + 1) * 127.5).round().byte()
    latents = run.encode(levels)
    assert torch.equal(latents, run.encode(levels.float() / 127.5 - 1))
    assert not torch.equal(latents, run.encode(video()))


@cpu
def test_float32_and_bfloat16_are_near() -> None:
    """With one latent a call."""
    weights = encoder_weights(vae(0).state_dict())
    for dtype, least, most in ((torch.float32, 0, 1e-5), (torch.bfloat16, 1e-3, 0.1)):
        geometry = Geometry.model_validate({"height": HEIGHT, "width": WIDTH})
        program = after(captured(CONFIGS[0], geometry, dtype), *FUSED)
        run = encoder(with_weights(program, {name: w.to(dtype) for name, w in weights.items()}))
        assert [graph for graph, _ in run.parts(9)] == ["first", "step", "step"]
        latents = run.encode(video().float())
        assert latents.dtype == torch.float32
        assert least < apart(latents.double(), wanted(0, video())) < most


@cpu
@pytest.mark.parametrize("number", [0, 1])
def test_the_comparison_sees_a_lost_cache(number: int) -> None:
    run, program, clip = encoder(exact(number)), exact(number), video(9)
    module, names = run._module, program.model.cache_inputs  # type: ignore[attr-defined]
    whole = wanted(number, clip)
    for lost in names:

        def losing(graph: str, given: dict[str, Tensor], lost: str = lost) -> dict[str, Tensor]:
            if lost in given:
                given[lost] = torch.zeros_like(given[lost])
            return module(graph, given)

        run._module = losing  # type: ignore[assignment]
        assert apart(run.encode(clip), whole) > 1e-7, lost


@cpu
def test_every_cache_is_as_long_as_its_convolution_looks_back() -> None:
    for number in range(len(CONFIGS)):
        program = exact(number, FUSED[:1])
        caches = program.contract("steps").inputs
        frames = [each.shape[2] for name, each in caches.items() if name.startswith("cache_")]
        halved = sum(CONFIGS[number]["temperal_downsample"])
        assert sorted(frames) == [1] * halved + [2] * (len(frames) - halved)
        assert isinstance(program.model, EncoderSpec) and program.model == spec(CONFIGS[number])


@cpu
def test_what_is_rewritten() -> None:
    """Wan2.2's three blocks that make images smaller average where the pixels are."""
    program = exact(1)
    fused, last, _ = (entry.matches for entry in program.log[1:])
    convolutions = 2 * 2 * 4 + 4 + 1
    assert fused["convolutions"] == 3 * convolutions
    assert last["averages"] == 3 * 3 and last["averages of one pixel"] == 3
    assert program.stage is Stage.LOWERED
    assert program.implementations == {"cached_norm_silu": "reference"}
    for graph in program.graphs.values():
        targets = {node.target for node in graph.nodes}
        assert not targets & {aten.silu.default, aten.dropout.default}
        copied = graph.find_nodes(op="call_function", target=aten.contiguous.default)
        assert all(len(node.meta["val"].shape) < 8 for node in copied)
    plain = exact(1, FUSED[:1])
    assert activations(program) < activations(plain)
    assert estimate(program)["feature caches"] == estimate(plain)["feature caches"] > 0


@cpu
def test_passes_for_decoders_alone_are_refused() -> None:
    message = refused(run_passes, exact(0, FUSED[:1]), [make_pass("fold_upsample", {})])
    assert message.startswith("fold_upsample: is for decode programs, this one is for encode")


@cpu
def test_fp8_keeps_the_last_convolution() -> None:
    recipe = open_recipe("tiny_encode", ["geometry.height=32", "geometry.width=48"])
    fp8 = ["canonicalise", "fuse_norm_silu", "fp8_convolve", "channels_last", "lower"]
    made = [
        transform(recipe.model_copy(update={"passes": passes}), weights=False)
        for passes in (["canonicalise"], fp8)
    ]
    (entry,) = (entry for entry in made[1].log if entry.name == "fp8_convolve")
    assert entry.matches["convolutions"] == 2 * (3 * 2 * 2 + 4)
    assert [*entry.kept.values()] == [["encoder.conv_out"]]
    torch.manual_seed(0)
    weights = wan_vae.build(wan_vae.CONFIGS["tiny_vae"]).state_dict()
    plain, rounded = (
        encoder(with_weights(each, encoder_weights(weights))).encode(video(9).float())
        for each in made
    )
    error = float((rounded - plain).std() / plain.std())
    assert 0.01 < error < 0.2 < float((rounded.flip(2) - plain).std() / plain.std())


@cpu
def test_wan22_at_full_size() -> None:
    """Transformed without weights; the feature caches are 1 GiB."""
    made = transform(open_recipe("wan22_encode"), weights=False)
    assert made.implementations == {"cached_norm_silu": "triton"}
    assert sum(weight.numel() for weight in made.weights.values()) // 10**6 == 149
    assert sum(constant.numel() for constant in made.constants.values()) == 2 * 48
    caches = [f"cache_{index}" for index in range(24)]
    first, step, steps = (made.contract(name) for name in ("first", "step", "steps"))
    assert list(first.inputs) == ["video"]
    assert list(step.inputs) == list(steps.inputs) == ["video", *caches]
    assert [each.inputs["video"].shape[2] for each in (first, step, steps)] == [1, 4, 8]
    assert [each.outputs["latents"].shape[2] for each in (first, step, steps)] == [1, 1, 2]
    assert steps.outputs["latents"].shape == (1, 48, 2, 44, 80)
    for name in caches:
        read = step.inputs[name]
        assert all(each.outputs[f"next_{name}"] == read for each in (first, step, steps))
    assert round(estimate(made)["feature caches"] / 2**30, 2) == 0.99


@cpu
def test_a_saved_program_is_read_again(tmp_path: Path) -> None:
    program = transform(make_recipe(), weights=False)
    save_program(program, tmp_path / "program")
    assert texts(load_program(tmp_path / "program")) == texts(program)


@cpu
def test_a_checkpoint_is_read(tmp_path: Path) -> None:
    weights = {name: weight.float() for name, weight in vae(0).state_dict().items()}
    wan_vae.save_vae(tmp_path / "vae", weights, AUTOENCODER)
    recipe = make_recipe(checkpoint=str(tmp_path), config=None)
    latents = encoder(transform(recipe)).encode(video().float())
    assert apart(latents.double(), wanted(0, video())) < 1e-5


def make_recipe(**model: Any) -> Recipe:
    return parse_recipe(
        {
            "program": "encode",
            "model": {"config": AUTOENCODER, "dtype": "float32"} | model,
            "geometry": {"height": HEIGHT, "width": WIDTH},
            "passes": ["canonicalise"],
        },
        "test recipe",
    )


@cpu
def test_misfits_are_refused() -> None:
    run = encoder(exact())
    for shape in (
        (1, 3, 4, HEIGHT, WIDTH),
        (1, 3, 0, HEIGHT, WIDTH),
        (1, 3, 5, WIDTH, HEIGHT),
        (2, 3, 5, HEIGHT, WIDTH),
        (1, 4, 5, HEIGHT, WIDTH),
        (3, 5, HEIGHT, WIDTH),
    ):
        message = refused(run.encode, torch.zeros(shape))
        assert message.startswith(f"video: {shape} is not [1, 3, 1 + k·4, {HEIGHT}, {WIDTH}]")
    other = replace(exact(), kind="stream", model=None)  # type: ignore[arg-type]
    assert "is for stream, not for encode" in refused(Encoder, other, run._module)
    assert refused(transform, make_recipe(columns=[0, 1]), weights=False) == (
        "model.columns: (0, 1) is for a decoder, and a encode program holds a encoder; remove it"
    )
    odd = make_recipe().model_copy(update={"geometry": Geometry.model_validate(SIZES)})
    message = refused(transform, odd, weights=False)
    assert message.startswith("geometry.width: 40 pixels is not a multiple of 16")
    assert "CUDA" in refused(Encoder, exact(), run._module, True) or not torch.cuda.is_available()


SIZES = {"height": HEIGHT, "width": 40}


@cpu
def test_steady_calls_are_compiled_once() -> None:
    """The caches of a video's first frame lie in memory as those of later calls."""
    torch._dynamo.reset()
    for passes in (FUSED, (FUSED[0], FUSED[2])):
        program, compiled = exact(passes=passes), []

        def backend(
            graph: fx.GraphModule, inputs: list[Tensor], seen: list[Any] = compiled
        ) -> fx.GraphModule:
            seen.append(graph)
            return graph

        module = instantiate(program)
        module.compile_graph("steps", backend=backend)
        run, frames = Encoder(program, module), torch.cat([video(), video()[:, :, 1:5]], dim=2)
        assert [graph for graph, _ in run.parts(17)] == ["first", "steps", "steps"]
        assert apart(run.encode(frames), wanted(0, frames)) < 1e-12
        assert len(compiled) == 1


@cpu
def test_a_device_gets_the_passes_that_it_gains_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(device: str, dtype: torch.dtype) -> list[str]:
        return [each.name for each in encoder_passes(torch.device(device), dtype)]

    onednn = ["channels_last", "onednn_conv3d"] if torch.backends.mkldnn.is_available() else []
    assert names("cpu", torch.float32) == ["canonicalise", *onednn]
    assert names("cpu", torch.bfloat16) == ["canonicalise"]
    for reason, wanted in ((None, list(FUSED)), ("needs Triton", ["canonicalise", FUSED[2]])):
        monkeypatch.setattr(Implementation, "missing", lambda *_, reason=reason: reason)
        assert names("cuda", torch.bfloat16) == wanted


@cpu
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(make_recipe().resolved()))
    script = Path(__file__).parents[1] / "benchmarks" / "encode.py"
    names = ["diffusers", "diffusers, channels last", "fused, 2 latents"]
    flags = [
        "--device=cpu",
        f"--recipe={tmp_path / 'encode.yaml'}",
        f"--output={tmp_path / 'encode'}",
    ]
    flags += ["--runs=1", "--frames=9", "--rows", *names]
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    runpy.run_path(str(script), run_name="__main__")
    record = Record.model_validate_json((tmp_path / "encode.json").read_text())
    assert [row["name"] for row in record.results] == names
    assert record.results[0]["error"] == 0
    assert all(0 < row["error"] < 1e-4 for row in record.results[2:])
    assert len({round(row["tflop"], 12) for row in record.results}) == 1
    assert "| fused, 2 latents |" in (tmp_path / "encode.md").read_text()


# On a GPU


@cache
def wide(dtype: str, passes: tuple[str, ...]) -> Program:
    """The tiny family's encoder with random weights."""
    triton = {"lower": {"prefer": ["triton"]}}
    update = {"passes": [triton if name == "lower" else name for name in passes]}
    recipe = make_recipe(config="tiny_vae", dtype=dtype, latents=2)
    torch.manual_seed(0)
    weights = wan_vae.build(wan_vae.CONFIGS["tiny_vae"]).state_dict()
    made = transform(recipe.model_copy(update=update), weights=False)
    return with_weights(made, encoder_weights(weights))


@gpu
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("how", ["eager", "compiled", "replayed"])
def test_fused_encode_on_cuda(
    dtype: str, bound: float, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the plain encoder on the CPU in float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    clip = video(21).float()
    plain = encoder(wide("float32", FUSED[:1])).encode(clip)
    program = wide(dtype, FUSED)
    module: ProgramModule = instantiate(program, "cuda")
    if how == "compiled":
        module.compile_graph("steps")
    run = Encoder(program, module, how == "replayed")
    latents = run.encode(clip)
    assert latents.device.type == "cuda" and torch.equal(run.encode(clip), latents)
    error = float((latents.cpu() - plain).std() / plain.std())
    assert error < bound
    assert float((latents.cpu().flip(2) - plain).std() / plain.std()) > 0.2
