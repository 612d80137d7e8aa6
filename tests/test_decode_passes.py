"""Passes that make decoding fast: the same video, in any split, from the same weights."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import streams
import torch
import yaml
from helpers import after, refused, same
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import AUTOENCODER as CONFIG
from test_vae import exact, make_recipe, streamed, video_latents, worst
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lltk.bench.record import Record
from lltk.compiler import transform, with_weights
from lltk.graph.facts import ChannelsLastWeights
from lltk.graph.memory import activations, estimate
from lltk.graph.module import instantiate
from lltk.graph.passes import run_passes
from lltk.graph.program import Program
from lltk.graph.recipe import load_recipe, open_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.graph.stages import Stage
from lltk.models import wan_vae
from lltk.ops.implementations import overload
from lltk.passes import make_pass
from lltk.stream.decode_pipeline import DecodePipeline
from lltk.stream.decoder import Decoder, DecoderState
from lltk.stream.recipe import stream_section
from lltk.streaming import describe, plan_stream

cpu, gpu = pytest.mark.cpu, pytest.mark.gpu

aten = torch.ops.aten
ALL = ("fold_upsample", "fuse_norm_silu", "channels_last", "lower")
SETS = [(), ALL[:1], ALL[1:2], ALL[2:3], ALL]
UPSAMPLINGS, CAUSAL = 2, 1 + 2 * 2 + 3 * 2 * 2
"""Of the tests' autoencoder: three blocks of two resnets; all causal convolutions but the first."""


@cache
def rewritten(passes: tuple[str, ...]) -> Program:
    """The rewritten decoder in float64, with the very weights of `test_vae.vae`."""
    return run_passes(exact(False)[0], [make_pass(name, {}) for name in passes])


def decoder(program: Program) -> Decoder:
    return Decoder(program, instantiate(program))


def decoded(run: Decoder, split: list[int]) -> Tensor:
    parts = video_latents()[:, :, : sum(split)].split(split, dim=2)
    return torch.cat([run.decode(part) for part in parts], dim=2)


@cpu
@settings(max_examples=3, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=3))
def test_any_split_is_the_plain_decode(split: list[int]) -> None:
    """Where the upsampling is folded, its cast to float32 goes too."""
    for passes in SETS:
        plain = streamed([sum(split)], lifted="fold_upsample" in passes)
        assert worst(decoded(decoder(rewritten(passes)), split), plain) <= 1e-12


@cache
def several() -> Program:
    """A decoder whose later calls take three latents at once, where there are so many."""
    geometry = make_recipe().geometry
    program = after(wan_vae.captured(CONFIG, geometry, torch.float64, 3), "canonicalise", *ALL)
    return with_weights(program, exact(False)[0].weights)


@cpu
@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(2, 4), min_size=1, max_size=2))
def test_several_latents_at_once_are_the_plain_decode(split: list[int]) -> None:
    assert worst(decoded(decoder(several()), split), streamed([sum(split)], lifted=True)) <= 1e-12


@cpu
def test_latents_are_taken_together_as_far_as_they_reach() -> None:
    """A pipeline that goes on from what was left decodes it in the same parts."""
    run, latents, got = decoder(several()), video_latents()[:, :, :9], []
    assert several().contract("steps").outputs["video"].shape[2] == 3 * 4
    with DecodePipeline(run, got.append, ahead=3) as pipeline:
        pipeline.submit(latents[:, :, :3])
        pipeline.submit(latents[:, :, 3:])
    assert [video.shape[2] for video in got] == [1, 4, 4, 12, 12]
    plain, rest = decoder(several()), []
    assert torch.equal(torch.cat(got, 2), decoded(plain, [3, 6]))
    again = decoder(several())
    again.decode(latents[:, :, :2])
    with DecodePipeline(again, rest.append) as pipeline:
        pipeline.submit(*latents[:, :, 2:].split([1, 3, 3], dim=2))
    assert torch.equal(torch.cat(rest, 2), torch.cat(got[2:], 2))
    late, more = decoder(several()), []
    decoded(late, [3])
    with DecodePipeline(late, more.append) as pipeline:
        pipeline.submit(latents[:, :, 3:6])
    assert len(more) == 1 and torch.equal(more[0], got[3])


@cpu
def test_warming_up_runs_every_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    run, ran = decoder(several()), []
    spec = several().model
    results = {name: torch.zeros(1) for name in (spec.output, *spec.cache_outputs)}

    def forward(graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ran.append(graph)
        inputs.clear()
        return results

    monkeypatch.setattr(run._module, "forward", forward)
    run.warm_up()
    assert ran == ["first", "steps", "steps", "step"] and not run.state.caches


class Live(TorchDispatchMode):
    """The most bytes that tensors hold at once after any op, those given among them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._see(tensors)

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self._see(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _see(self, tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        held = (size for storage, size in self._storages.values() if not storage.expired())
        self.most = max(self.most, sum(held))


@cpu
@torch.no_grad()
@pytest.mark.parametrize("passes", [(), ALL], ids=["plain", "fused"])
def test_memory_is_the_estimated_one(passes: tuple[str, ...]) -> None:
    """To the byte: caches go as those after them are made. Held to the end, they take more."""
    program = after(transform(make_recipe(), weights=False), *passes)
    program = with_weights(program, {n: w.float() for n, w in exact(False)[0].weights.items()})
    module = instantiate(program)
    run = Decoder(program, module)
    latents = video_latents()[:, :, :3].float()
    run.decode(latents[:, :, :2])
    given = {"latents": latents[:, :, 2:].contiguous()}
    given |= {name: cache.clone() for name, cache in run.state.caches.items()}
    sizes, kept = estimate(program)["feature caches"], dict(given)
    with Live(given.values()) as held:
        module("step", dict(kept))
    kept.clear()
    with Live(given.values()) as live:
        module("step", given)
    assert live.most == sizes + activations(program) and not given
    latents = latents[:, :, 2:]
    assert held.most == sizes + activations(program, held=True) + latents.nbytes
    assert held.most > live.most + sizes / 2


@cpu
def test_a_failure_takes_the_state_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not begin a new video, and a saved state can go on."""
    run, latents = decoder(rewritten(())), video_latents()[:, :, :4]
    run.decode(latents[:, :, :2])
    saved = run.state
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.aten.silu.default, "_op", None)
        with pytest.raises(TypeError):
            run.decode(latents[:, :, 2:])
    assert "failed at a latent" in refused(lambda: run.state)
    assert "failed at a latent" in refused(run.decode, latents[:, :, 2:])
    run.state = saved
    rest = decoder(rewritten(())).decode(latents)[:, :, 5:]
    assert torch.equal(run.decode(latents[:, :, 2:]), rest)


@cpu
def test_what_warming_up_compiles_is_what_streams_run() -> None:
    """The latents of a longer clip lie otherwise in memory."""
    torch._dynamo.reset()
    program, compiled = rewritten(ALL), []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        compiled.append(graph)
        return graph

    module = instantiate(program)
    module.compile_graph("step", backend=backend)
    run = Decoder(program, module)
    run.warm_up()
    warm = len(compiled)
    latents = video_latents()[:, :, :4].float()
    assert worst(run.decode(latents), decoder(program).decode(latents)) <= 1e-12
    assert len(compiled) == warm > 0
    run.decode(latents.double())
    assert len(compiled) > warm


@cpu
def test_the_comparison_sees_lost_caches_and_other_weights() -> None:
    """Every cache that a fused convolution keeps matters, and every folded weight."""
    program = rewritten(ALL)
    run, plain = decoder(program), decoded(decoder(program), [4])[:, :, 5:]
    run.decode(video_latents()[:, :, :2])
    state = run.state
    for name, tensor in state.caches.items():
        run.state = DecoderState({**state.caches, name: torch.zeros_like(tensor)})
        assert worst(run.decode(video_latents()[:, :, 2:4]), plain) > 1e-6, name
    for name in program.weights:
        if name.endswith("phases"):
            turned = {**program.weights, name: program.weights[name].flip(-1)}
            other = decoded(decoder(with_weights(program, turned)), [4])
            assert worst(other[:, :, 5:], plain) > 1e-6, name


@cpu
def test_what_is_rewritten() -> None:
    program = rewritten(ALL)
    matches = {entry.name: entry.matches for entry in program.log[1:]}
    assert matches["fold_upsample"] == {"upsamplings": 2 * UPSAMPLINGS}
    assert matches["fuse_norm_silu"]["convolutions"] == 2 * CAUSAL
    assert matches["channels_last"]["interleaved frames"] == 2
    assert matches["channels_last"]["weights"] == len(program.fact(ChannelsLastWeights).names)
    assert program.stage is Stage.LOWERED
    assert program.implementations == dict.fromkeys(
        ("cached_norm_silu", "upsample_residual"), "reference"
    )
    for graph in program.graphs.values():
        left = {node.target for node in graph.nodes}
        assert not left & {aten.silu.default, aten._upsample_nearest_exact2d.vec}
        assert not left & {aten.repeat_interleave.self_int, aten.stack.default}
        (first,) = (n for n in graph.nodes if str(n.target) == "decoder.conv_in.weight")
        padded = graph.find_nodes(op="call_function", target=aten.pad.default)
        (end,) = graph.find_nodes(op="output")
        assert {user for node in padded for user in node.users} <= {
            *first.users, *end.all_input_nodes
        }  # fmt: skip
    assert activations(program) < activations(exact(False)[0])


@cpu
@pytest.mark.parametrize("passes", SETS[1:], ids=" ".join)
def test_state_dicts_map_both_ways(passes: tuple[str, ...]) -> None:
    """Only folding changes names. What unfolding gives differs by the rounding of sums."""
    program, original = rewritten(passes), exact(False)[0].weights
    mapped = program.map_state(original)
    assert same(mapped, program.weights)
    back = program.unmap_state(mapped)
    assert back.keys() == original.keys()
    assert max(worst(back[name], original[name]) for name in original) < 1e-15
    folded = {name for name in program.weights if name.endswith("phases")}
    assert len(folded) == (UPSAMPLINGS if "fold_upsample" in passes else 0)
    loaded = with_weights(program, original)
    assert torch.equal(decoded(decoder(loaded), [2]), decoded(decoder(program), [2]))


@cpu
def test_weights_lie_with_channels_last_once_loaded() -> None:
    """The caller's own weights stay as they were."""
    program = rewritten(ALL)
    module = instantiate(program)
    for name in program.fact(ChannelsLastWeights).names:
        held = module.get_parameter(name)
        layout = torch.channels_last if held.dim() == 4 else torch.channels_last_3d
        assert held.is_contiguous(memory_format=layout), name
        assert program.weights[name].is_contiguous()
    assert not module.get_parameter("decoder.conv_in.weight").is_contiguous()


@cpu
def test_results_own_their_memory() -> None:
    run = decoder(rewritten(ALL))
    decoded(run, [2])
    for name, tensor in run.state.caches.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@cpu
def test_a_compiled_step_is_the_step() -> None:
    """The ops are nodes that a compiler takes as they are, without a break."""
    torch._dynamo.reset()
    program = rewritten(ALL)
    module = instantiate(program)
    module.compile_graph("step", backend="aot_eager")
    ours, plain = decoded(Decoder(program, module), [3]), decoded(decoder(program), [3])
    assert worst(ours, plain) <= 1e-12
    assert worst(ours.flip(2), plain) > 1e-3


@cpu
def test_nothing_to_fuse_is_an_error() -> None:
    program = rewritten(("fuse_norm_silu",))
    program = run_passes(program, [])
    program.log.clear()
    message = refused(run_passes, program, [make_pass("fuse_norm_silu", {})])
    assert message.startswith("fuse_norm_silu: matched nothing: conv3d (post_quant_conv): does not")
    for graph in program.graphs.values():
        for node in graph.find_nodes(op="call_function", target=aten.conv2d.default):
            node.args = node.args[:3]
    message = refused(run_passes, program, [make_pass("fold_upsample", {})])
    assert message.startswith("fold_upsample: matched nothing: conv2d (decoder.mid_block.attent")


@cpu
def test_a_stream_decodes_by_its_recipes_passes(tmp_path: Path) -> None:
    folder = streams.save_pipeline(tmp_path)
    passes = f"stream.decoder.passes=[canonicalise, {', '.join(ALL)}]"
    overrides = (*streams.SIZES, f"stream.pipeline={folder}", passes)
    overrides += ("stream.decoder.compile=true", "stream.decoder.latents=2")
    plan = plan_stream(open_recipe("tiny_stream", overrides))
    program = plan.decoders[0].program
    assert [entry.name for entry in program.log] == ["canonicalise", *ALL]
    assert f"compiled, passes canonicalise, {', '.join(ALL)}" in describe(plan)["decoder"]
    assert set(program.graphs) == {"first", "step", "steps"}
    shape = program.contract("steps").inputs["latents"].shape
    assert shape[2] == 2
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2, 1, 1)
    whole, run = decoder(program).decode(latents), decoder(program)
    apart = torch.cat([run.decode(latent) for latent in latents.split(1, dim=2)], dim=2)
    assert worst(whole, apart) <= 1e-5 < float(whole.std())


@cpu
@pytest.mark.parametrize("key", ["latents=2", "columns=[0, 4]"])
def test_what_only_decoders_take(key: str) -> None:
    recipe = load_recipe(find_recipe("tiny_stream"), [f"model.{key}"])
    name = key.partition("=")[0]
    assert refused(transform, recipe).startswith(f"model.{name}: ")
    assert "is for a decoder" in refused(transform, recipe)


@cpu
def test_the_5b_stream_names_passes_and_kernels_that_exist() -> None:
    section = stream_section(load_recipe(find_recipe("wan22_5b_stream")).stream, "test")
    names = []
    for entry in section.decoder.passes or []:
        (name, options), *_ = {entry: {}}.items() if isinstance(entry, str) else entry.items()
        names.append(make_pass(name, options or {}).name)
    assert names == ["canonicalise", *ALL]


@cpu
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe().resolved()
    (tmp_path / "decode.yaml").write_text(yaml.safe_dump(recipe))
    script = Path(__file__).parents[1] / "benchmarks" / "decode.py"
    flags = [
        "--device=cpu",
        f"--recipe={tmp_path / 'decode.yaml'}",
        f"--output={tmp_path / 'decode'}",
    ]
    monkeypatch.setattr(sys, "argv", [str(script), *flags, "--runs=1", "--rows", "plain", "fused"])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    runpy.run_path(str(script), run_name="__main__")
    record = Record.model_validate_json((tmp_path / "decode.json").read_text())
    plain, fused = record.results
    assert plain["error_first"] == 0 < fused["error_first"] < 1e-5 and fused["error"] < 1e-5
    assert fused["tflop"] < plain["tflop"]
    assert "| fused |" in (tmp_path / "decode.md").read_text()


# On a GPU

LOWERED = {"lower": {"cached_norm_silu": "triton", "upsample_residual": "triton"}}


FP8 = {"lower": {**LOWERED["lower"], "fp8_cached_norm_silu": "triton", "fp8_conv3d": "triton"}}
WAYS = {
    "plain": ["canonicalise"],
    "fused": ["canonicalise", *ALL[:-1], LOWERED],
    "FP8": ["canonicalise", *ALL[:2], "fp8_convolve", "channels_last", FP8],
}


@cache
def wide(dtype: str, way: str) -> Program:
    """The tiny family's decoder with random weights."""
    passes = WAYS[way]
    recipe = make_recipe("tiny_vae", dtype=dtype)
    sizes = {"height": 96, "width": 160}
    recipe = recipe.model_copy(
        update={"passes": passes, "geometry": recipe.geometry.model_copy(update=sizes)}
    )
    torch.manual_seed(0)
    weights = wan_vae.build(wan_vae.CONFIGS["tiny_vae"]).state_dict()
    return with_weights(transform(recipe, weights=False), wan_vae.decoder_weights(weights))


def wide_latents() -> Tensor:
    return torch.randn(1, 24, 4, 6, 10, generator=torch.Generator().manual_seed(1))


@gpu
@pytest.mark.parametrize(
    ("way", "dtype", "bound"),
    [("fused", "float32", 1e-4), ("fused", "bfloat16", 0.05), ("FP8", "bfloat16", 0.15)],
)
@pytest.mark.parametrize("how", ["eager", "compiled", "replayed"])
def test_fused_decode_on_cuda(
    way: str, dtype: str, bound: float, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the plain decoder on the CPU in float32.

    Caches lie with channels last.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    program, plain = wide(dtype, way), wide("float32", "plain")
    wanted = decoder(plain).decode(wide_latents())
    module = instantiate(program, "cuda")
    if how == "compiled":
        module.compile_graph("step")
    run, latents = Decoder(program, module, how == "replayed"), wide_latents().cuda()
    video = run.decode(latents)
    if how == "replayed":
        again = Decoder(program, module)
        assert torch.equal(video, again.decode(latents))
        state = run.state
        run.decode(latents[:, :, :1])
        assert all(torch.equal(state.caches[n], c) for n, c in again.state.caches.items())
    error = float((video.cpu().float() - wanted).std() / wanted.std())
    assert error < bound
    assert float((video.cpu().float().flip(2) - wanted).std() / wanted.std()) > 0.2
    read = [str(node.args[4]) for node in program.graphs["step"].nodes if is_fused(node)]
    assert len(read) == 1 + 2 * 2 + 3 * 3 * 2
    for name in read:
        assert run.state.caches[name].is_contiguous(memory_format=torch.channels_last_3d), name


def is_fused(node: fx.Node) -> bool:
    return node.meta.get("op") in (overload("cached_norm_silu"), overload("fp8_cached_norm_silu"))


@gpu
@pytest.mark.parametrize("way", ["fused", "FP8"])
def test_a_state_from_a_file_goes_on_bit_for_bit(way: str) -> None:
    """It does so although it comes back with channels first."""
    program = wide("bfloat16", way)
    module, latents = instantiate(program, "cuda"), wide_latents().cuda()
    run, other = Decoder(program, module), Decoder(program, module)
    run.decode(latents[:, :, :2])
    other.state = DecoderState({n: c.contiguous() for n, c in run.state.caches.items()})
    assert torch.equal(run.decode(latents[:, :, 2:]), other.decode(latents[:, :, 2:]))
