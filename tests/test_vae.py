"""The VAE decoder as a Program: streamed in any split it is diffusers' whole decode."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import after, refused, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file
from streams import AUTOENCODER as CONFIG
from torch import Tensor, nn

from lltk.artefact import load_program, save_program
from lltk.compiler import transform, with_weights
from lltk.graph.edit import copy_graph
from lltk.graph.memory import activations, estimate
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.graph.stages import Stage
from lltk.models import wan_vae
from lltk.models.configs import named_config
from lltk.models.wan_vae import decoder_weights, encode, encode_image, load_vae, save_vae
from lltk.stream.decode_pipeline import DecodePipeline
from lltk.stream.decoder import Decoder, DecoderState

pytestmark = pytest.mark.cpu

UPSAMPLE = torch.ops.aten._upsample_nearest_exact2d.vec
SIDES = (2, 3)
"""Latent height and width of the tests' videos."""


def make_recipe(config: str | dict[str, Any] = CONFIG, **model: Any) -> Recipe:
    return parse_recipe(
        {
            "program": "decode",
            "model": {"config": config, "dtype": "float32"} | model,
            "geometry": {"height": 16 * SIDES[0], "width": 16 * SIDES[1]},
            "passes": ["canonicalise"],
        },
        "test recipe",
    )


@cache
def vae() -> Any:
    """diffusers' module with random weights, norms included, in float64."""
    torch.manual_seed(0)
    made = wan_vae.build(CONFIG).double().eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.endswith("gamma"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@cache
def program() -> Program:
    weights = decoder_weights({n: w.float() for n, w in vae().state_dict().items()})
    return with_weights(transform(make_recipe(), weights=False), weights)


@cache
def exact(lifted: bool) -> tuple[Program, ProgramModule]:
    """The decoder captured in float64, with the very weights of `vae`; `lifted` as `whole` says."""
    if lifted:
        made = exact(False)[0]
        made = replace(made, graphs={n: copy_graph(g) for n, g in made.graphs.items()})
        for graph in made.graphs.values():
            for node in graph.find_nodes(op="call_function", target=UPSAMPLE):
                (cast,) = node.all_input_nodes
                assert cast.args[1] is torch.float32
                cast.update_arg(1, torch.float64)
    else:
        captured = wan_vae.captured(CONFIG, make_recipe().geometry, torch.float64)
        made = with_weights(after(captured, "canonicalise"), decoder_weights(vae().state_dict()))
    return made, instantiate(made)


def decoder(lifted: bool = True) -> Decoder:
    return Decoder(*exact(lifted))


@cache
def video_latents(frames: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, frames, *SIDES, generator=generator, dtype=torch.float64)


@contextmanager
def exact_upsampling() -> Iterator[None]:
    """diffusers' upsample without its cast to float32."""
    from diffusers.models.autoencoders import autoencoder_kl_wan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder_kl_wan.WanUpsample, "forward", nn.Upsample.forward)
        yield


@cache
@torch.no_grad()
def whole(frames: int, lifted: bool = True) -> Tensor:
    """diffusers' decode of the first latents in one call, denormalised as its pipeline does.

    Its upsample casts to float32; `lifted` leaves the cast out.
    """
    mean, std = (
        torch.tensor(CONFIG[f"latents_{part}"]).view(1, 4, 1, 1, 1).double()
        for part in ("mean", "std")
    )
    latents = video_latents()[:, :, :frames] / (1 / std) + mean
    with exact_upsampling() if lifted else nullcontext():
        return vae().decode(latents).sample


def streamed(split: list[int], lifted: bool) -> Tensor:
    run = decoder(lifted)
    parts = video_latents()[:, :, : sum(split)].split(split, dim=2)
    return torch.cat([run.decode(part) for part in parts], dim=2)


def worst(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@settings(max_examples=10)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_any_split_is_the_whole_decode(split: list[int]) -> None:
    frames = sum(split)
    for lifted, bound in ((False, 1e-8), (True, 1e-12)):
        video = streamed(split, lifted)
        assert video.shape == (1, 3, 4 * frames - 3, 16 * SIDES[0], 16 * SIDES[1])
        assert worst(video, whole(frames, lifted)) <= bound


def test_the_comparison_sees_a_lost_cache() -> None:
    """Besides, the video is not constant, and most of it is not clamped."""
    run, (first, second) = decoder(), video_latents()[:, :, :4].split(2, dim=2)
    run.decode(first)
    lost = {name: torch.zeros_like(cache) for name, cache in run.state.caches.items()}
    rest = whole(4)[:, :, 5:]
    for name in lost:
        run.state = DecoderState(dict(run.state.caches) | {name: lost[name]})
        kept = run.state
        changed = worst(run.decode(second), rest)
        run.state = kept
        assert changed > 1e-6, name
    assert float(whole(4).std()) > 0.01
    assert float((whole(4).abs() == 1).double().mean()) < 0.1


def test_canonical_graphs_keep_the_bits() -> None:
    captured = transform(make_recipe(), weights=False, disable=["canonicalise"])
    captured = with_weights(captured, program().weights)
    before, behind = (Decoder(each, instantiate(each)) for each in (captured, program()))
    latents = video_latents()[:, :, :3].float()
    assert torch.equal(before.decode(latents), behind.decode(latents))
    assert same(dict(before.state.caches), dict(behind.state.caches))
    assert not same(dict(decoder_after(latents.flip(2))), dict(behind.state.caches))


def decoder_after(latents: Tensor) -> dict[str, Tensor]:
    run = Decoder(program(), instantiate(program()))
    run.decode(latents)
    return dict(run.state.caches)


def test_canonical_graphs_hold_no_idle_ops() -> None:
    targets = {
        str(node.target)
        for graph in program().graphs.values()
        for node in graph.nodes
        if node.op == "call_function"
    }
    idle = ("aten.dropout.default", "aten.alias.default", "aten.type_as.default")
    assert not targets & {*idle, "aten.to.dtype_layout", "aten._assert_tensor_metadata.default"}
    for graph in program().graphs.values():
        for clone in graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default):
            assert any(user.op == "output" for user in clone.users)


@pytest.mark.parametrize("frames", [1, 2])
def test_caches_own_their_memory(frames: int) -> None:
    """A cache that is a slice must not keep the activation it is cut from."""
    caches = decoder_after(video_latents()[:, :, :frames].float())
    for name, tensor in caches.items():
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_wan22_at_full_size() -> None:
    """Transformed without weights; the caches are 3 GiB before and as much after a latent."""
    sizes = {"height": 704, "width": 1280}
    recipe = make_recipe("wan22_vae", dtype="bfloat16")
    recipe = recipe.model_copy(update={"geometry": recipe.geometry.model_copy(update=sizes)})
    made = transform(recipe, weights=False)
    assert made.stage is Stage.CANONICAL
    assert all(weight.is_meta for weight in made.weights.values())
    assert sum(weight.numel() for weight in made.weights.values()) // 10**6 == 555
    assert sum(constant.numel() for constant in made.constants.values()) == 2 * 48
    first, step = made.contract("first"), made.contract("step")
    caches = [f"cache_{index}" for index in range(32)]
    outputs = ["video", *(f"next_{name}" for name in caches)]
    assert list(first.inputs) == ["latents"]
    assert list(step.inputs) == ["latents", *caches]
    assert list(first.outputs) == list(step.outputs) == outputs
    assert first.inputs["latents"] == step.inputs["latents"]
    assert step.inputs["latents"].shape == (1, 48, 1, 44, 80)
    assert first.outputs["video"].shape == (1, 3, 1, 704, 1280)
    assert step.outputs["video"].shape == (1, 3, 4, 704, 1280)
    for name in caches:
        assert step.inputs[name] == step.outputs[f"next_{name}"] == first.outputs[f"next_{name}"]
    assert round(estimate(made)["feature caches"] / 2**30, 1) == 3.0
    fused = after(made, "fold_upsample", "fuse_norm_silu", "channels_last")
    folded, normed, _ = (entry.matches for entry in fused.log[1:])
    assert folded == {"upsamplings": 2 * 3} and normed["convolutions"] == 2 * 29
    assert activations(fused) < 0.85 * activations(made)


def test_two_decoders_never_meet() -> None:
    """They take turns over one module, and each is as if it were alone."""
    one, other = decoder(), decoder()
    latents, reversed_ = video_latents()[:, :, :4], video_latents()[:, :, :4].flip(2)
    pairs = [
        (one.decode(a), other.decode(b))
        for a, b in zip(latents.split(2, 2), reversed_.split(2, 2), strict=True)
    ]
    alone = decoder().decode(reversed_)
    assert torch.equal(torch.cat([a for a, _ in pairs], 2), decoder().decode(latents))
    assert torch.equal(torch.cat([b for _, b in pairs], 2), alone)
    assert worst(alone, whole(4)) > 1e-3


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    first, second = video_latents()[:, :, :5].split([2, 3], dim=2)
    run, other = decoder(), decoder()
    run.decode(first)
    stored = save(dict(run.state.caches))
    rest = run.decode(second)
    other.state = DecoderState(load(stored))
    assert torch.equal(other.decode(second), rest)
    assert not torch.equal(decoder().decode(second)[:, :, -4:], rest[:, :, -4:])


def test_a_state_or_latents_of_another_size_are_refused() -> None:
    run = decoder()
    run.decode(video_latents()[:, :, :1])
    caches = {name: cache[..., :1] for name, cache in run.state.caches.items()}
    message = refused(setattr, run, "state", DecoderState(caches))
    assert message.startswith("state: cache_0 is torch.float64 (1, 4, 2, 2, 1), not torch.float64 ")
    for shape in ((1, 4, 0, *SIDES), (1, 5, 1, *SIDES), (4, 1, *SIDES), (1, 4, 1, 3, 3)):
        message = refused(run.decode, torch.zeros(shape))
        assert message.startswith(f"latents: {shape} is not [1, 4, n, 2, 3] with n ≥ 1")


def test_other_programs_are_no_decoder() -> None:
    other = replace(program(), kind="stream", model=None)  # type: ignore[arg-type]
    assert "is for stream, not for decode" in refused(Decoder, other, exact(True)[1])


# The pipeline


def test_pipeline_keeps_order_and_frames() -> None:
    latents, got = video_latents()[:, :, :8], []
    with DecodePipeline(decoder(), got.append) as pipeline:
        for part in latents.split([3, 1, 4], dim=2):
            pipeline.submit(part)
    assert [video.shape[2] for video in got] == [1, *[4] * 7]
    assert torch.equal(torch.cat(got, dim=2), decoder().decode(latents))


def test_warming_up_leaves_the_video_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs every graph, before a video begins or later.

    The next submit raises what it raised.
    """
    latents, got, run = video_latents()[:, :, :3], [], decoder()
    graphs: list[str] = []
    call = ProgramModule.forward

    def seen(self: ProgramModule, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        graphs.append(graph)
        return call(self, graph, inputs)

    monkeypatch.setattr(ProgramModule, "forward", seen)
    with DecodePipeline(run, got.append) as pipeline:
        pipeline.warm_up()
        pipeline.submit(latents)
        pipeline.rest()
        before = run.state
        run.warm_up()
    assert all(run.state.caches[name] is cache for name, cache in before.caches.items())
    assert torch.equal(torch.cat(got, dim=2), decoder().decode(latents))
    assert graphs[:6] == ["first", "step", "step"] * 2
    assert graphs[6:9] == ["first", "step", "step"]

    def broken(self: Decoder) -> None:
        raise OSError("no kernel")

    monkeypatch.setattr(Decoder, "warm_up", broken)
    with pytest.raises(OSError, match="no kernel"), DecodePipeline(decoder(), got.append) as other:
        other.warm_up()
        other.rest()
        other.submit(latents)
    other.close()  # it is told once
    with pytest.raises(OSError, match="no kernel"), DecodePipeline(decoder(), got.append) as other:
        other.warm_up()


def test_pipeline_runs_ahead_by_its_bound_and_no_further() -> None:
    """While the sink holds one video, the next is decoded, and two latents more may wait."""
    opened, last, got = threading.Event(), threading.Event(), []

    def sink(video: Tensor) -> None:
        assert opened.wait(timeout=60)
        got.append(video)

    def produce() -> None:
        with DecodePipeline(decoder(), sink, ahead=2) as pipeline:
            for part in video_latents()[:, :, :4].split(1, dim=2):
                pipeline.submit(part)
            last.set()

    producer = threading.Thread(target=produce)
    producer.start()
    assert not last.wait(timeout=0.5)
    opened.set()
    producer.join(timeout=60)
    assert last.is_set()
    assert len(got) == 4


def test_pipeline_decodes_while_the_sink_works() -> None:
    """The video of the second latent is ready before the first is taken."""
    opened, got = threading.Event(), []

    def sink(video: Tensor) -> None:
        assert opened.wait(timeout=60)
        got.append(video)

    with DecodePipeline(decoder(), sink) as pipeline:
        pipeline.submit(video_latents()[:, :, :2])
        deadline = time.monotonic() + 60
        while len(pipeline.videos) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [video.shape[2] for video in pipeline.videos] == [1, 4] and not got
        opened.set()
    assert not pipeline.videos and not pipeline.latents
    assert torch.equal(torch.cat(got, dim=2), decoder().decode(video_latents()[:, :, :2]))


def test_pipeline_waits_for_the_sink_where_it_is_told_to() -> None:
    got: list[int] = []

    def sink(video: Tensor) -> None:
        time.sleep(0.05)
        got.append(len(pipeline.videos))

    with DecodePipeline(decoder(), sink, overlap=False) as pipeline:
        pipeline.submit(video_latents()[:, :, :3])
    assert got == [1, 1, 1]


def test_pipeline_keeps_what_the_sink_has_not_taken() -> None:
    latents, got = video_latents()[:, :, :6], []

    def sink(video: Tensor) -> None:
        if len(got) == 2:
            raise OSError("disk full")
        got.append(video)

    run = decoder()
    pipeline = DecodePipeline(run, sink, ahead=8)
    for part in latents.split(3, dim=2):
        pipeline.submit(part)
    with pytest.raises(OSError, match="disk full"):
        pipeline.close()
    pipeline.rest()
    videos, left = pipeline.videos, pipeline.latents
    assert 1 <= len(videos) <= 2 and len(got) + len(videos) + len(left) == 6
    with DecodePipeline(run, got.append) as rest:
        for video in videos:
            rest.deliver(video)
        rest.submit(torch.cat(left, dim=2))
    assert torch.equal(torch.cat(got, dim=2), decoder().decode(latents))


def test_pipeline_hands_on_an_error_and_decodes_nothing_after_it() -> None:
    got: list[Tensor] = []

    def sink(video: Tensor) -> None:
        got.append(video)
        if len(got) == 2:
            raise OSError("disk full")

    pipeline = DecodePipeline(decoder(), sink, ahead=8)
    for part in video_latents()[:, :, :2].split(1, dim=2):
        pipeline.submit(part)
    with pytest.raises(OSError, match="disk full"):
        for part in video_latents()[:, :, 2:].split(1, dim=2):
            pipeline.submit(part)
        pipeline.close()
    with pytest.raises(OSError, match="disk full"):
        pipeline.close()
    assert len(got) == 2


def test_pipeline_left_with_an_error_drops_what_has_not_begun() -> None:
    begun, go_on, got = threading.Event(), threading.Event(), []

    def sink(video: Tensor) -> None:
        got.append(video)
        begun.set()
        assert go_on.wait(timeout=60)

    with pytest.raises(KeyError), DecodePipeline(decoder(), sink, ahead=4) as pipeline:
        for part in video_latents()[:, :, :4].split(1, dim=2):
            pipeline.submit(part)
        assert begun.wait(timeout=60)
        threading.Timer(0.1, go_on.set).start()
        raise KeyError
    assert len(got) <= 2
    with pytest.raises(ValueError, match="it is closed"):
        pipeline.submit(video_latents()[:, :, :1])


def test_pipeline_without_room_is_refused() -> None:
    assert "ahead: 0" in refused(DecodePipeline, decoder(), print, 0)


# Encoding


@torch.no_grad()
def test_an_image_is_the_first_latent_of_a_video() -> None:
    generator = torch.Generator().manual_seed(2)
    video = torch.rand(1, 3, 5, 32, 48, generator=generator, dtype=torch.float64) * 2 - 1
    latents = encode(vae(), video)
    assert latents.shape == (1, 4, 2, *SIDES)
    assert latents.dtype == torch.float64  # as the VAE
    half = torch.nn.Module.to(copy.deepcopy(vae()), torch.bfloat16)
    rounded = encode(half, video)
    assert rounded.dtype == torch.float32 and worst(rounded, latents) < 0.1
    image = encode_image(vae(), video[:, :, 0])
    assert image.shape == (1, 4, 1, *SIDES)
    assert worst(image, latents[:, :, :1]) <= 1e-6
    assert worst(image, latents[:, :, 1:]) > 1e-3
    mean, std = (torch.tensor(CONFIG[f"latents_{k}"]).view(1, 4, 1, 1, 1) for k in ("mean", "std"))
    posterior = vae().encode(video).latent_dist
    assert worst(latents * std + mean, posterior.mean) <= 1e-6


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 32), (1, 3, 1, 40, 32)])
def test_a_broken_video_is_refused(shape: tuple[int, ...]) -> None:
    assert refused(encode, vae(), torch.zeros(shape)).startswith(
        f"video: {shape} is no whole number of latents"
    )


# Files


def weights_of(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype) for name, weight in vae().state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_round_trip_keeps_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = weights_of(dtype)
    save_vae(tmp_path / "vae", weights, CONFIG)
    for path in (tmp_path, tmp_path / "vae"):
        back = load_vae(path)
        assert back.config == CONFIG
        assert save(back.weights) == save(weights)


def test_diffusers_reads_and_writes_the_same_folder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    weights = weights_of(torch.float32)
    save_vae(tmp_path / "ours", weights, CONFIG)
    read = AutoencoderKLWan.from_pretrained(tmp_path / "ours")
    assert same(read.state_dict(), weights)
    read.save_pretrained(tmp_path / "theirs")
    back = load_vae(tmp_path / "theirs")
    assert back.config == CONFIG
    assert same(back.weights, weights)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    weights = weights_of(torch.float32)
    name = "decoder.conv_in.weight"
    less = {n: w for n, w in weights.items() if n != name}
    path = tmp_path / "vae"
    assert f"1 missing ({name})" in refused(save_vae, path, less, CONFIG)
    assert "1 unexpected (x)" in refused(save_vae, path, weights | {"x": weights[name]}, CONFIG)
    assert f"1 misshapen ({name}" in refused(
        save_vae, path, weights | {name: weights[name][:1]}, CONFIG
    )
    broken = weights | {name: weights[name] / 0}
    assert "NaN or infinity" in refused(save_vae, path, broken, CONFIG)
    assert "has no config.json" in refused(load_vae, tmp_path)
    assert not path.exists()
    save_vae(path, weights, CONFIG)
    (path / "lltk.json").unlink()  # which knows what was written
    for state, found in (
        (less, f"1 missing ({name})"),
        (weights | {"x": torch.ones(1)}, "1 unexpected (x)"),
        (weights | {name: torch.ones(1)}, f"1 misshapen ({name}"),
        (broken, "NaN or infinity"),
    ):
        save_file(state, path / "diffusion_pytorch_model.safetensors")
        assert found in refused(load_vae, path)


def test_other_files_of_a_vae(tmp_path: Path) -> None:
    """A torch file, a variant, plain float8, and notes in the configuration."""
    weights = weights_of(torch.float8_e4m3fn)
    wide = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    save_vae(tmp_path, wide, CONFIG)
    (tmp_path / "lltk.json").unlink()
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"torch_dtype": "bfloat16"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, tmp_path / "diffusion_pytorch_model.fp8.bin")
    assert same(load_vae(tmp_path).weights, wide)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_dim": 5}, "len(latents_mean) is 4, but its other sizes make it 5"),
        ({"patch_size": 2}, "scale_factor_spatial is 16, but its other sizes make it 8"),
        ({"temperal_downsample": [True] * 3}, "scale_factor_temporal is 4"),
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL', not AutoencoderKLWan"),
        ({"widths": 3}, "AutoencoderKLWan takes no widths"),
        ({"z_dim": "4"}, "z_dim is '4'; write a int"),
    ],
)
def test_a_contradictory_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    assert message in refused(wan_vae.validate_config, CONFIG | change)


def test_what_the_published_configuration_says_beside_the_class_is_read_past() -> None:
    assert wan_vae.validate_config(CONFIG | {"clip_output": False}) == CONFIG


@pytest.mark.parametrize("name", wan_vae.CONFIGS)
def test_named_configurations_hold(name: str) -> None:
    config = wan_vae.validate_config(named_config(name, wan_vae.CONFIGS))
    assert wan_vae.spec(config).stride == (4, 16, 16)


def test_a_recipe_reads_the_folder(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", weights_of(torch.float32), CONFIG)
    made = transform(make_recipe(None, checkpoint=str(tmp_path)))  # type: ignore[arg-type]
    assert same(made.weights, program().weights)
    message = refused(transform, make_recipe(CONFIG, checkpoint=str(tmp_path), ema=True))
    assert message == (
        "model.ema: True is for a transformer, and a decode program holds a decoder; remove it"
    )


def test_program_directory_round_trip(tmp_path: Path) -> None:
    save_program(program(), tmp_path / "program")
    back = load_program(tmp_path / "program")
    assert (back.kind, back.model, back.log) == ("decode", program().model, program().log)
    assert same(back.weights, program().weights)
    assert same(back.constants, program().constants)


def test_transformer_passes_refuse_a_decoder() -> None:
    assert "this one is for decode" in refused(after, program(), "regionalise")
