"""Recipes with adapters: merged into every kind of weights, trained on, written and read again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers import (
    Run,
    after,
    captured,
    difference,
    inputs,
    randomise,
    reached,
    refused,
    run,
    same,
    tiny_config,
)
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streams import SIZES as TINY_SIZES
from streams import TRANSFORMER, save_pipeline
from torch import Tensor

from lltk.compiler import transform, with_weights
from lltk.graph.facts import Trainable
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, open_recipe, parse_recipe
from lltk.graph.recipe_files import shipped
from lltk.models.adapters import load_adapter, merge_adapters
from lltk.models.checkpoint import load_checkpoint, save_checkpoint, save_lora
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_quantise.reference import BLOCK, nvfp4_quantise
from lltk.passes.lora import Adapters, is_adapter
from lltk.stream.video import read_video
from lltk.tasks.transformer import TransformerPlan, plan_transformer
from lltk.train.recipe import TrainSection

pytestmark = pytest.mark.cpu

CONFIG = tiny_config(layers=1, attention_head_dim=16)
STREAMS = [name for name in shipped() if "_stream" in name]
SIZES = [
    "geometry.height=32", "geometry.width=64", "geometry.chunk=2", "geometry.window=6",
    "geometry.sink=2", "geometry.text_tokens=8",
]  # fmt: skip
SMALL = [part for size in SIZES for part in ("--set", size)]
Q, DOWN = "blocks.0.attn1.to_q", "blocks.0.ffn.net.2"


def base() -> dict[str, Tensor]:
    return captured("score", layers=1, head_dim=16).weights


def tensors(rank: int = 4, modules: tuple[str, ...] = (Q, DOWN)) -> dict[str, Tensor]:
    """A state dict of pairs of these modules."""
    state = {}
    for module in modules:
        out, into = base()[f"{module}.weight"].shape
        state[f"{module}.lora_A.weight"] = torch.ones(rank, into)
        state[f"{module}.lora_B.weight"] = torch.ones(out, rank)
    return {name: 0.3 * tensor for name, tensor in randomise(state, seed=rank).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "transformer"
    save_checkpoint(folder, base(), "diffusers", CONFIG)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a scale of 3 / 4."""
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    save_lora(path, tensors(), "diffusers", {"r": 4, "lora_alpha": 3, "target_modules": [Q, DOWN]})
    return path


def recipe(
    checkpoint: Path, *passes: Any, lora: Any = None, kind: str = "score", **model: Any
) -> Recipe:
    lora = str(lora) if isinstance(lora, Path) else lora
    return parse_recipe(
        {
            "program": kind,
            "model": {"checkpoint": str(checkpoint), "dtype": "float32", "lora": lora, **model},
            "geometry": {"height": 64, "width": 64, "chunk": 2, "window": 8, "sink": 2}
            | {"frames": 6, "text_tokens": 5},
            "passes": ["canonicalise", *passes],
        },
        "test",
    )


def merged(file: Path, strength: float = 1.0) -> dict[str, Tensor]:
    return merge_adapters(base(), [(load_adapter(file), strength)])


# Merging


@pytest.mark.parametrize("passes", [(), ("lora", "merge_lora")])
def test_a_recipe_needs_no_pass_to_merge(
    passes: tuple[str, ...], checkpoint: Path, file: Path
) -> None:
    program = transform(recipe(checkpoint, *passes, lora=file, lora_strength=-0.5))
    assert same(program.weights, merged(file, -0.5))
    assert program.recipe["model"]["lora_strength"] == -0.5


def test_several_adapters_have_a_strength_each(checkpoint: Path, file: Path) -> None:
    both = recipe(checkpoint, lora=[str(file), str(file)], lora_strength=[1.0, -0.25])
    assert difference(transform(both).weights, merged(file, 0.75)) < 1e-6
    one = recipe(checkpoint, lora=[str(file), str(file)], lora_strength=0.5)
    assert difference(transform(one).weights, merged(file, 1.0)) < 1e-6
    for strength in ([1.0], [1.0, 1.0, 1.0]):
        wanted = recipe(checkpoint, lora=[str(file), str(file)], lora_strength=strength)
        assert "for 2 adapters in model.lora" in refused(transform, wanted)
    assert "for 0 adapters" in refused(transform, recipe(checkpoint, lora_strength=0.5))
    assert "not finite" in refused(recipe, checkpoint, lora_strength=float("nan"))


@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_recipe_takes_an_adapter(name: str, checkpoint: Path, file: Path) -> None:
    sets = ["model.config=null", f"model.checkpoint={checkpoint}", f"model.lora={file}"]
    program = transform(open_recipe(name, [*sets, *SIZES]))
    dtype_of = {n: t.dtype for n, t in program.weights.items()}
    wanted = program.map_state(merged(file))
    assert same(program.weights, wanted)
    plain = program.map_state(base())
    changed = {n for n in wanted if not torch.equal(wanted[n], plain[n])}
    assert changed and dtype_of == {n: t.dtype for n, t in wanted.items()}


def packed(checkpoint: Path, folder: Path) -> Program:
    """A program in NVFP4, whose weights are in a folder too."""
    program = transform(recipe(checkpoint, *NVFP4))
    save_checkpoint(folder, program.weights, "modelopt", CONFIG)
    return program


NVFP4 = ("per_frame_timesteps", "frame_positions", "text_per_chunk", "block_causal", "nvfp4_infer")


def test_weights_in_nvfp4_are_quantised_again(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    before = packed(checkpoint, tmp_path / "nvfp4").weights
    program = transform(recipe(tmp_path / "nvfp4", *NVFP4, lora=file))
    entries = (".weight_codes", ".weight_scales", ".weight_decode_scale")
    changed = {n for n in before if not torch.equal(program.weights[n], before[n])}
    assert {name.rpartition(".")[0] for name in changed} == {Q, DOWN}
    for module in (Q, DOWN):
        name = f"{module}.weight"
        decoded = nvfp4_dequantise(*(before[module + entry] for entry in entries))
        change = load_adapter(file).changes[name]
        wanted = nvfp4_quantise(decoded + change.dense(), BLOCK, "none")
        assert all(
            torch.equal(program.weights[module + entry], part)
            for entry, part in zip(entries, wanted, strict=True)
        )
    unchanged = transform(recipe(tmp_path / "nvfp4", *NVFP4, lora=file, lora_strength=0.0))
    assert same(unchanged.weights, before)


def test_weights_in_nvfp4_may_become_fp8(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    packed(checkpoint, tmp_path / "nvfp4")
    passes = (*NVFP4[:-1], "fp8_infer")
    program = transform(recipe(tmp_path / "nvfp4", *passes, lora=file))
    plain = transform(recipe(tmp_path / "nvfp4", *passes))
    changed = {n for n, t in plain.weights.items() if not torch.equal(program.weights[n], t)}
    assert {name.rpartition(".")[0] for name in changed} == {Q, DOWN}


def test_a_misfit_is_named(checkpoint: Path, tmp_path: Path) -> None:
    wide = {f"{Q}.lora_A.weight": torch.ones(2, 48), f"{Q}.lora_B.weight": torch.ones(48, 2)}
    save_file(wide, tmp_path / "a.safetensors")
    message = refused(transform, recipe(checkpoint, lora=tmp_path / "a.safetensors"))
    assert message.startswith(f"{tmp_path / 'a.safetensors'}: changes {Q}.weight of (48, 48), ")


def test_decoders_take_no_adapter() -> None:
    for key, value in (("lora", "a.safetensors"), ("lora_strength", "2")):
        wanted = open_recipe("tiny_decode", [f"model.{key}={value}"])
        assert f"model.{key}: {value}" in refused(transform, wanted, weights=False)


# The lora pass


def test_lora_goes_on_from_the_file(checkpoint: Path, file: Path) -> None:
    """Rank, alpha and modules are the file's; the strength is in B."""
    program = transform(recipe(checkpoint, "lora", lora=file, lora_strength=0.5))
    learned = {n: t for n, t in program.weights.items() if is_adapter(n)}
    wanted = {n: 0.5 * t if ".lora_B." in n else t for n, t in tensors().items()}
    assert same(learned, wanted)
    assert program.fact(Adapters) == Adapters((Q, DOWN), 4, 3.0, 0)
    assert program.fact(Trainable).names == wanted.keys()
    given = inputs(program, "forward")
    folded = with_weights(
        reached("score", "canonicalise", layers=1, head_dim=16), merged(file, 0.5)
    )
    assert difference(run(program, "forward", given), run(folded, "forward", given)) < 1e-5
    # The recipe that the Program keeps says it all.
    again = transform(parse_recipe(program.recipe, "kept"), weights=False)
    assert again.weights.keys() == program.weights.keys()


@pytest.mark.parametrize("after_it", [(), ("merge_lora",)])
@pytest.mark.parametrize(
    ("key", "value", "found"),
    [("rank", 8, "4"), ("alpha", 4.0, "3.0"), ("include", r".*\.attn1\..*", DOWN)],
)
def test_options_that_the_file_contradicts_are_refused(
    key: str, value: Any, found: str, after_it: tuple[str, ...], checkpoint: Path, file: Path
) -> None:
    wanted = recipe(checkpoint, {"lora": {key: value}}, *after_it, lora=file)
    message = refused(transform, wanted)
    assert message.startswith(f"model.lora: {file} has {key} {found} for ")
    assert f"passes.lora.{key} is {value}; remove that" in message
    same_options = {"rank": 4, "alpha": 3.0, "include": rf"{re.escape(Q)}|{re.escape(DOWN)}"}
    transform(recipe(checkpoint, {"lora": same_options}, *after_it, lora=file))


def test_lora_goes_on_from_one_rank_and_scale(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    save_file(tensors(4, (Q,)) | tensors(2, (DOWN,)), tmp_path / "mixed.safetensors")
    difference_too = {"blocks.0.norm2.diff": base()["blocks.0.norm2.weight"]}
    save_file(tensors() | difference_too, tmp_path / "diff.safetensors")
    for lora, found in (
        (tmp_path / "mixed.safetensors", "has rank 2 with a scale of 1, "),
        (tmp_path / "diff.safetensors", "has 1 differences"),
        ([str(file), str(file)], "2 adapters"),
    ):
        message = refused(transform, recipe(checkpoint, "lora", lora=lora))
        assert "lora goes on from one adapter of one rank and scale" in message
        assert found in message


def test_lora_does_not_go_on_over_nvfp4(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    packed(checkpoint, tmp_path / "nvfp4")
    message = refused(transform, recipe(tmp_path / "nvfp4", "lora", *NVFP4, lora=file))
    assert f"{tmp_path / 'nvfp4'} is in NVFP4; add merge_lora, or drop lora" in message


# What training writes


def exported(tmp_path: Path) -> tuple[Program, Path]:
    """A program with trained adapters, and the file that training writes of them."""
    bare = reached("score", "canonicalise", layers=1, head_dim=16)
    program = after(bare, {"lora": {"rank": 2, "alpha": 8.0, "include": r"blocks\.\d\.attn1.*"}})
    learned = randomise({n: t for n, t in program.weights.items() if is_adapter(n)}, seed=3)
    program = with_weights(program, program.weights | learned)
    section = TrainSection.model_validate({"steps": 1, "lr": 1.0})
    plan = TransformerPlan(cast(Any, None), section, program, torch.device("cpu"))
    return program, plan.export(cast(Any, None), cast(Any, None), learned, tmp_path)


def test_what_training_writes_says_rank_alpha_and_modules(tmp_path: Path) -> None:
    program, path = exported(tmp_path)
    assert path == tmp_path / "lora.safetensors"
    with safe_open(path, "pt") as opened:
        stated = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert all(name.startswith("transformer.blocks.") for name in load_file(path))
    assert (stated["transformer.r"], stated["transformer.lora_alpha"]) == (2, 8)
    assert stated["transformer.target_modules"] == list(program.fact(Adapters).modules)
    assert len(program.fact(Adapters).modules) == 4


@torch.no_grad()
@pytest.mark.parametrize("reader", ["lltk", "diffusers", "peft"])
def test_what_training_writes_does_the_same_elsewhere(reader: str, tmp_path: Path) -> None:
    program, path = exported(tmp_path)
    bare, given = (
        reached("score", "canonicalise", layers=1, head_dim=16),
        inputs(program, "forward"),
    )
    wanted = run(program, "forward", given)
    if reader == "lltk":
        assert difference(run(with_weights(bare, merged(path)), "forward", given), wanted) < 1e-5
        return
    model: Any = WanTransformer3DModel(**CONFIG)
    model.load_state_dict(base())
    if reader == "diffusers":
        model.load_lora_adapter(tmp_path, weight_name=path.name)
    else:
        # As docs/adapters.md shows.
        with safe_open(path, "pt") as opened:
            stated = json.loads(opened.metadata()["lora_adapter_metadata"])
        config = LoraConfig(**{k.removeprefix("transformer."): v for k, v in stated.items()})
        model = get_peft_model(model, config)
        state = {
            k.replace("transformer.", "base_model.model."): v for k, v in load_file(path).items()
        }
        loaded = set_peft_model_state_dict(model, state)
        assert not loaded.unexpected_keys
    found = {"sample": model.eval()(**given, return_dict=False)[0]}
    assert difference(found, wanted) < 1e-5
    assert (
        difference(
            found, run(reached("score", "canonicalise", layers=1, head_dim=16), "forward", given)
        )
        > 0.01
    )


def test_training_from_scratch_takes_no_adapter(file: Path) -> None:
    data = open_recipe("tiny_train", [f"model.lora={file}"]).model_dump()
    message = refused(plan_transformer, data, torch.device("cpu"), "r.yaml")
    assert message.startswith("r.yaml: model.lora: there are no weights to add it to")


# The command


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["a.safetensors"], [("a.safetensors", 1.0)]),
        (["a.safetensors:0.8", "b:-1", "c:0"], [("a.safetensors", 0.8), ("b", -1.0), ("c", 0.0)]),
        (["a:b.pt:0.5", "C:\\a.pt:2"], [("a:b.pt", 0.5), ("C:\\a.pt", 2.0)]),
        (["C:folder", "ключ é.pt:2"], [("C:folder", 1.0), ("ключ é.pt", 2.0)]),
        (["there:2"], [("there:2", 1.0)]),
        ([], [("recipe's", 0.5)]),
    ],
)
def test_stream_takes_adapters(
    given: list[str],
    wanted: list[tuple[str, float]],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    recipes = []

    def plan(recipe: Recipe, *_: object, **__: object) -> None:
        recipes.append(recipe)
        raise ValueError("planned")

    monkeypatch.setattr("lltk.streaming.plan_stream", plan)
    monkeypatch.chdir(tmp_path)
    Path("there:2").touch()
    options = [part for adapter in given for part in ("--lora", adapter)]
    own = ["--set", "model.lora=recipe's", "--set", "model.lora_strength=0.5"]
    code, _, err = run("stream", "tiny_stream", "--prompt", "x", "-o", "v.mp4", *own, *options)
    assert code == 2 and "planned" in err
    assert recipes[0].model.adapters() == wanted


@pytest.mark.parametrize(
    ("adapter", "found"),
    [
        ("none.safetensors", "does not exist"),
        ("a:nan", "nan is no strength"),
        ("a:1e400", "1e400 is no strength"),
    ],
)
def test_stream_refuses_what_is_no_adapter(
    adapter: str, found: str, run: Run, tmp_path: Path
) -> None:
    what = ["--prompt", "x", "-o", tmp_path / "v.mp4", "--lora", adapter, "--device", "cpu"]
    code, _, err = run("stream", "tiny_stream", *what)
    assert code == 2 and found in err and "Traceback" not in err


def test_a_dry_run_reads_and_shows_the_adapters(file: Path, run: Run, tmp_path: Path) -> None:
    what = ["stream", "tiny_stream", "--prompt", "x", "--dry-run", "--device", "cpu", *SMALL]
    code, out, err = run(
        *what, "--set", f"model.config={json.dumps(CONFIG)}", "--lora", f"{file}:-0.5"
    )
    assert code == 0 and "× -0.5" in " ".join(out.split()), err
    misfit = f"{file}: changes {Q}.weight of (32, 32), and the model has it as (64, 64)"
    wide = ["--set", f"model.config={json.dumps(CONFIG | {'attention_head_dim': 32})}"]
    transform = ["transform", "tiny_stream", "--dry-run", "--set", f"model.lora={file}", *SMALL]
    for command in ([*what, *wide, "--lora", file], [*transform, *wide]):
        code, _, err = run(*command)
        assert code == 2 and misfit in " ".join(err.split())
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-8])
    code, _, err = run(*what, "--lora", broken)
    assert code == 2 and f"{broken}: differs from its checksum" in " ".join(err.split())


def test_frames_with_an_adapter_are_those_of_merged_weights(run: Run, tmp_path: Path) -> None:
    """In NVFP4, so that they are merged before they are quantised."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    own = load_checkpoint(pipeline).weights
    state = {}
    for module in (f"blocks.{block}.attn1.to_{to}" for block in (0, 1) for to in "qv"):
        out, into = own[f"{module}.weight"].shape
        state[f"{module}.lora_A.weight"] = torch.ones(4, into)
        state[f"{module}.lora_B.weight"] = torch.ones(out, 4)
    adapter, whole = tmp_path / "a.safetensors", tmp_path / "merged"
    save_file(randomise(state), adapter)
    save_checkpoint(
        whole, merge_adapters(own, [(load_adapter(adapter), 0.8)]), "diffusers", TRANSFORMER
    )

    def frames(*more: object) -> Tensor:
        sets = [part for key in TINY_SIZES for part in ("--set", key)]
        sets += ["--set", f"stream.pipeline={pipeline}", "--device", "cpu", "--overwrite"]
        video = tmp_path / "v.mkv"
        code, _, err = run(
            "stream",
            "tiny_stream_w4a4",
            "--prompt",
            "a red circle",
            "--seconds",
            1,
            "-o",
            video,
            *sets,
            *more,
        )
        assert code == 0, err
        return read_video(video)

    plain, added = frames(), frames("--lora", f"{adapter}:0.8")
    assert not torch.equal(plain, added)
    assert torch.equal(added, frames("--set", f"model.checkpoint={whole}"))
    assert torch.equal(plain, frames("--lora", f"{adapter}:0"))
