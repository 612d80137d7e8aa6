"""A decoder that convolves in FP8: the same video but for rounding, in any split."""

from __future__ import annotations

import operator
from functools import cache

import pytest
import torch
from helpers import refused, same
from test_decode_passes import ALL, decoder
from test_vae import make_recipe
from torch import Tensor

from lltk.bench.quality import draw_stories
from lltk.compiler import transform, with_weights
from lltk.graph.memory import activations
from lltk.graph.packed import FP8_ENDINGS
from lltk.graph.passes import run_passes
from lltk.graph.program import Program
from lltk.models import wan_vae
from lltk.models.pipelines import find_pipeline
from lltk.models.tiny.world import render
from lltk.ops.implementations import overload
from lltk.passes import make_pass
from lltk.stream.decoder import Decoder, DecoderState

CONVOLVE = overload("fp8_conv3d")

cpu = pytest.mark.cpu
FUSED = ("canonicalise", *ALL)
FP8 = (*FUSED[:3], "fp8_convolve", *FUSED[3:])
CONVOLUTIONS = 2 * 2 + 3 * 3 * 2
"""Of the tiny decoder: those of its resnets."""


@cache
def tiny(
    passes: tuple[str, ...],
    dtype: str = "float32",
    height: int = 32,
    width: int = 48,
    columns: tuple[int, int] | None = None,
) -> Program:
    """The tiny family's decoder for small images, with random weights."""
    part = {} if columns is None else {"columns": list(columns)}
    recipe = make_recipe("tiny_vae", dtype=dtype, **part)
    sizes = recipe.geometry.model_copy(update={"height": height, "width": width})
    program = transform(
        recipe.model_copy(update={"passes": list(passes), "geometry": sizes}), weights=False
    )
    torch.manual_seed(0)
    weights = wan_vae.build(wan_vae.CONFIGS["tiny_vae"]).state_dict()
    return with_weights(program, wan_vae.decoder_weights(weights))


def latents(frames: int = 4) -> Tensor:
    return torch.randn(1, 24, frames, 2, 3, generator=torch.Generator().manual_seed(1))


def error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.float() - wanted).std() / wanted.std())


@cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_decodes_as_the_plain_decoder_but_for_rounding(dtype: str) -> None:
    """Eight bits cost more than sixteen do, and less than any lost cache."""
    wanted = decoder(tiny(("canonicalise",))).decode(latents())
    video = decoder(tiny(FP8, dtype)).decode(latents())
    assert 0.01 < error(video, wanted) < 0.12
    assert error(video.flip(2), wanted) > 0.3


@cpu
@torch.no_grad()
def test_a_trained_decoder_loses_little() -> None:
    """The tiny model's decoder loses far less by FP8 than it lost of the world it learnt."""
    truth = render(draw_stories(5, 1, 2, 1, 3)).transpose(1, 2)
    files = wan_vae.load_vae(find_pipeline("tiny") / "vae")
    given = wan_vae.encode(wan_vae.make_vae(files.config, files.weights), truth)
    videos = []
    for passes in (("canonicalise",), FP8):
        program = tiny(passes, height=truth.shape[-2], width=truth.shape[-1])
        trained = with_weights(program, wan_vae.decoder_weights(files.weights))
        videos.append(decoder(trained).decode(given))
    plain, ours = videos
    assert 50 < psnr(ours, plain) < 60
    assert psnr(plain, truth) - psnr(ours, truth) < 0.05
    assert psnr(plain, truth) < 30


def psnr(ours: Tensor, wanted: Tensor) -> float:
    """The peak signal-to-noise ratio of videos in [-1, 1], in decibels."""
    return float(10 * torch.log10(4 / (ours - wanted).square().mean()))


@cpu
def test_any_split_is_the_same() -> None:
    run = decoder(tiny(FP8))
    whole = run.decode(latents())
    other = decoder(tiny(FP8))
    parts = [other.decode(part) for part in latents().split([1, 2, 1], dim=2)]
    assert torch.equal(whole, torch.cat(parts, dim=2))
    state = run.state
    other.state = DecoderState({name: part.contiguous() for name, part in state.caches.items()})
    assert torch.equal(run.decode(latents(1)), other.decode(latents(1)))
    name = next(n for n, part in state.caches.items() if part.dtype is torch.float8_e4m3fn)
    other.state = DecoderState({**state.caches, name: torch.zeros_like(state.caches[name])})
    assert not torch.equal(other.decode(latents(1)), decoded_again(state))


def decoded_again(state: DecoderState) -> Tensor:
    run = decoder(tiny(FP8))
    run.state = state
    return run.decode(latents(1))


@cpu
def test_parts_of_the_columns_are_the_whole() -> None:
    """The parts equal the whole, but where a sum rounds to another code."""
    size = (16, 16 * 40)
    given = torch.randn(1, 24, 2, 1, 40, generator=torch.Generator().manual_seed(2))
    whole = decoder(tiny(FP8, "float32", *size)).decode(given)
    own = ((0, 17), (17, 40))
    parts = [decoder(tiny(FP8, "float32", *size, columns)).decode(given) for columns in own]
    assert parts[0].shape[-1] == 16 * 17
    assert error(torch.cat(parts, dim=-1), whole) < 0.005
    plain = decoder(tiny(("canonicalise",), "float32", *size)).decode(given)
    assert error(whole, plain) > 0.01


@cpu
def test_what_is_rewritten() -> None:
    """All convolutions behind a norm are, but the one that makes pixels. All memory shrinks."""
    program, plain = tiny(FP8), tiny(FUSED)
    (entry,) = (entry for entry in program.log if entry.name == "fp8_convolve")
    assert entry.matches == {"convolutions": 2 * CONVOLUTIONS}
    assert [*entry.kept.values()] == [["decoder.conv_out"]]
    for name, graph in program.graphs.items():
        convolutions = graph.find_nodes(op="call_function", target=CONVOLVE)
        assert len(convolutions) == CONVOLUTIONS, name
        for node in convolutions:
            frames, scale = node.args[:2]
            assert frames.target is scale.target is operator.getitem
            assert frames.args[0] is scale.args[0]
    given, read = program.contract("first").outputs, program.contract("step").inputs
    narrow = [n for n, cache in read.items() if cache.dtype is torch.float8_e4m3fn]
    assert len(narrow) == CONVOLUTIONS
    for name in read.keys() - {"latents"}:
        assert given[f"next_{name}"].dtype is read[name].dtype, name
        assert given[f"next_{name}"].shape == plain.contract("step").inputs[name].shape
    assert activations(program) < activations(plain)


@cpu
def test_state_dicts_map_both_ways() -> None:
    program, original = tiny(FP8), tiny(("canonicalise",)).weights
    mapped = program.map_state(original)
    assert same(mapped, program.weights)
    values = [name for name in mapped if name.endswith(FP8_ENDINGS[0])]
    assert len(values) == CONVOLUTIONS
    back = program.unmap_state(mapped)
    assert back.keys() == original.keys()
    for name, weight in original.items():
        far = (back[name] - weight).norm() / weight.norm()
        packed = name.removesuffix(".weight") + FP8_ENDINGS[0] in mapped
        assert (0.01 < far < 0.04) if packed else far < 1e-6, name
    again = program.map_state(back)
    assert all(torch.equal(again[name].float(), mapped[name].float()) for name in values)


@cpu
def test_exclude_keeps_convolutions() -> None:
    fused = tiny(FUSED[:3])
    step = make_pass("fp8_convolve", {"exclude": [r"decoder\.(mid_block|up_blocks).*"]})
    program = run_passes(fused, [step])
    assert program.log[-1].matches == {"convolutions": 2}
    assert f"decoder.conv_out{FP8_ENDINGS[0]}" in program.weights
    step = make_pass("fp8_convolve", {"exclude": [".*"]})
    assert "excluded by '.*'" in refused(run_passes, fused, [step])
    assert "is not a regular expression" in refused(make_pass, "fp8_convolve", {"exclude": ["("]})


@cpu
def test_it_follows_fused_norms() -> None:
    step = make_pass("fp8_convolve", {})
    message = refused(run_passes, tiny(("canonicalise",)), [step])
    assert "does not read what fuse_norm_silu made; run that before" in message
    message = refused(run_passes, tiny(("canonicalise", "onednn_conv3d")), [step])
    assert "is chosen by another pass; run that behind fp8_convolve" in message


@cpu
def test_weights_that_are_not_finite_are_refused() -> None:
    weights = dict(tiny(("canonicalise",)).weights)
    name = "decoder.mid_block.resnets.0.conv1.weight"
    weights[name] = weights[name] * float("nan")
    assert (
        refused(with_weights, tiny(FP8), weights) == f"{name}: is not finite; repair the checkpoint"
    )


@cpu
def test_a_state_of_another_precision_is_refused() -> None:
    plain = decoder(tiny(FUSED))
    plain.decode(latents(1))
    assert "is torch.float32 (1, 64, 2, 2, 3), not torch.float8_e4m3fn (1, 64" in refused(
        restore, decoder(tiny(FP8)), plain.state
    )


def restore(run: Decoder, state: DecoderState) -> None:
    run.state = state
