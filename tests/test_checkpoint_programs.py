"""The same weights give the same Program from every kind of file, and go back byte for byte."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers import GEOMETRY, PASSES, randomise, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from lltk.compiler import transform
from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.graph.text import print_graph
from lltk.models.checkpoint import load_checkpoint, save_checkpoint
from lltk.models.layouts import WEIGHT_LAYOUTS

pytestmark = pytest.mark.cpu

CONFIG = tiny_config()
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@cache
def stored() -> dict[str, Tensor]:
    """Weights under diffusers' names; the blocks' matrices are bfloat16, all else float32."""
    with torch.device("meta"):
        shapes = WanTransformer3DModel(**CONFIG).state_dict()
    made = randomise({name: torch.empty(tensor.shape) for name, tensor in shapes.items()})
    return {
        name: value.bfloat16() if name.startswith("blocks") and value.dim() == 2 else value
        for name, value in made.items()
    }


def named(layout: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under a layout's names."""
    keys = WEIGHT_LAYOUTS[layout].write(weights, "test")
    return {keys[name]: value for name, value in weights.items()}


def wrapped(key: str) -> str:
    """The names that FSDP, activation checkpointing and compilation leave in a state."""
    outer, inner, compiled = WRAPPERS
    key = key.replace("model.", f"model.{outer}{compiled}", 1)
    return key.replace(".blocks.0.", f".blocks.0.{inner}{outer}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as a diffusers folder, original Wan files and LongLive files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = WanTransformer3DModel(**CONFIG)
    for name, parameter in model.named_parameters():
        parameter.data = stored()[name].clone()
    model.save_pretrained(folder / "diffusers")

    wan = named("wan", stored())
    save_file(wan, folder / "wan.safetensors")
    (folder / "wan_folder").mkdir()
    save_file(wan, folder / "wan_folder" / "diffusion_pytorch_model.safetensors")
    note = {
        "_class_name": "WanModel",
        "model_type": "ti2v",
        "dim": CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"],
        "num_heads": CONFIG["num_attention_heads"],
        "in_dim": CONFIG["in_channels"],
        "out_dim": CONFIG["out_channels"],
    }
    note |= {key: CONFIG[key] for key in ("ffn_dim", "freq_dim", "num_layers", "text_dim", "eps")}
    (folder / "wan_folder" / "config.json").write_text(json.dumps(note))

    generator = named("longlive", stored())
    torch.save({"generator": generator}, folder / "longlive.pt")
    other = {key: torch.zeros_like(value) for key, value in generator.items()}
    averaged = {wrapped(key): value for key, value in generator.items()}
    torch.save({"generator": other, "generator_ema": averaged}, folder / "longlive_ema.pt")
    return {path.stem: path for path in folder.iterdir()}


FROM_RECIPE = {"wan", "longlive", "longlive_ema"}
"""Files that state no configuration."""


PLAIN = {"longlive_ema": "longlive", "wan_folder": "wan"} | {
    name: name for name in ("diffusers", "wan", "longlive")
}
"""What each file's weights look like when they are saved."""


def recipe(
    path: Path | None, kind: Kind = "stream", passes: list[Any] | None = None, **model: Any
) -> Recipe:
    return parse_recipe(
        {
            "program": kind,
            "model": {"dtype": "bfloat16", "checkpoint": path and str(path)} | model,
            "geometry": GEOMETRY,
            "passes": list(PASSES[kind] if passes is None else passes),
        },
        "test recipe",
    )


def program_of(name: str, files: dict[str, Path], kind: Kind) -> Program:
    config = CONFIG if name in FROM_RECIPE else None
    return transform(recipe(files[name], kind, config=config, ema=name == "longlive_ema"))


@cache
def expected(kind: Kind) -> Program:
    """The program without a file: its configuration is the recipe's, and it has no weights."""
    return transform(recipe(None, kind, config=CONFIG), weights=False)


def raw(tensor: Tensor) -> tuple[torch.dtype, list[int], list[int]]:
    flat = tensor.contiguous().view(torch.uint8).flatten()
    return tensor.dtype, list(tensor.shape), flat.tolist()


def same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(raw(ours[n]) == raw(theirs[n]) for n in ours)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """A file's own keys and tensors."""
    if path.suffix == ".pt":
        content: dict[str, Tensor] = torch.load(path)["generator"]
        return content
    if path.is_dir():
        return load_file(path / "diffusion_pytorch_model.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("diffusers", "stream"),
        ("wan", "stream"),
        ("longlive", "stream"),
        ("longlive_ema", "stream"),
        ("diffusers", "train"),
        ("wan_folder", "train"),
    ],
)
def test_every_file_gives_the_same_program_and_its_bytes_back(
    name: str, kind: Kind, files: dict[str, Path], tmp_path: Path
) -> None:
    program, plain = program_of(name, files, kind), expected(kind)
    assert program.spec == plain.spec
    assert program.geometry == plain.geometry
    texts, wanted = (
        {n: print_graph(graph, n) for n, graph in p.every_graph()} for p in (program, plain)
    )
    assert texts == wanted
    assert same_bytes(program.constants, plain.constants)
    assert same_bytes(program.weights, stored())
    assert {t.dtype for t in program.weights.values()} == {torch.float32, torch.bfloat16}

    source = files[PLAIN[name]]
    target = tmp_path / source.name
    layout = load_checkpoint(source).layout
    save_checkpoint(target, program.unmap_state(program.weights), layout, CONFIG)
    assert same_bytes(tensors_of(target), tensors_of(source))


@pytest.mark.parametrize("name", ["diffusers", "wan", "longlive"])
def test_a_changed_bit_is_seen(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    weights = dict(stored())
    key = next(key for key, value in weights.items() if value.dtype == torch.bfloat16)
    weights[key] = weights[key].clone()
    weights[key].view(torch.int16)[0, 0] ^= 1
    target = tmp_path / files[name].name
    save_checkpoint(target, weights, load_checkpoint(files[name]).layout, CONFIG)
    assert not same_bytes(tensors_of(target), tensors_of(files[name]))


def test_the_averaged_weights_are_chosen(files: dict[str, Path]) -> None:
    plain = transform(recipe(files["longlive_ema"], passes=["canonicalise"], config=CONFIG))
    assert not same_bytes(plain.weights, stored())
    assert not any(tensor.any() for tensor in plain.weights.values())


# Errors


def refused(wanted: Recipe, weights: bool = True) -> str:
    with pytest.raises(ValueError) as caught:
        transform(wanted, weights=weights)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(FROM_RECIPE - {"longlive_ema"}))
def test_a_configuration_must_come_from_somewhere(name: str, files: dict[str, Path]) -> None:
    message = refused(recipe(files[name]))
    assert f"{files[name]} ({name}) states no configuration; name one in the recipe" in message
    assert "model.config: name one" in refused(recipe(None), weights=False)


@pytest.mark.parametrize("name", ["diffusers", "wan_folder"])
def test_a_configuration_that_contradicts_the_file_is_refused(
    name: str, files: dict[str, Path]
) -> None:
    other = CONFIG | {"ffn_dim": 48, "eps": 1e-5}
    message = refused(recipe(files[name], config=other))
    assert f"model.config: differs from {files[name]} in eps, ffn_dim; " in message
    same = transform(recipe(files[name], passes=["canonicalise"], config=CONFIG))
    assert same_bytes(same.weights, stored())


def test_weights_that_do_not_fit_the_configuration_are_refused(files: dict[str, Path]) -> None:
    path = files["wan"]
    message = refused(recipe(path, config=CONFIG | {"num_layers": 3}))
    assert message.startswith(f"{path}: weights 27 missing (blocks.2.")
    message = refused(recipe(path, config=CONFIG | {"num_layers": 1}))
    assert "27 unexpected (blocks.1." in message
    message = refused(recipe(path, config=CONFIG | {"ffn_dim": 48}))
    assert "misshapen" in message and "ffn.net" in message


def test_weights_must_be_named_and_there(files: dict[str, Path], tmp_path: Path) -> None:
    message = refused(recipe(None, config=CONFIG))
    assert "model.checkpoint: the recipe names no weights" in message
    absent = tmp_path / "absent.safetensors"
    assert f"{absent}: does not exist" in refused(recipe(absent, config=CONFIG))
    message = refused(recipe(files["longlive"], config=CONFIG, ema=True))
    assert "has no generator_ema" in message


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = named("wan", stored())
    broken["head.head.bias"] = torch.full_like(broken["head.head.bias"], torch.nan)
    path = tmp_path / "broken.safetensors"
    save_file(broken, path)
    assert "proj_out.bias holds NaN" in refused(recipe(path, config=CONFIG))
