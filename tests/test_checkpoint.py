"""Checkpoints come back byte for byte in every layout, and what is wrong with one is named."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from lltk.graph.weights import check_weights
from lltk.models.adapters import load_adapter
from lltk.models.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    save_lora,
)
from lltk.models.configs import CONFIGS, config_from_wan, named_config, validate_config
from lltk.models.layouts import LORA_LAYOUTS, WEIGHT_LAYOUTS, weight_layout

pytestmark = pytest.mark.cpu

LAYERS = 2
CONFIG = named_config("tiny") | {
    "num_layers": LAYERS,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
}
WAN_CONFIG = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.33.0",
    "dim": 48,
    "eps": 1e-06,
    "ffn_dim": 32,
    "freq_dim": 64,
    "in_dim": 16,
    "model_type": "ti2v",
    "num_heads": 4,
    "num_layers": LAYERS,
    "out_dim": 16,
    "text_dim": 64,
    "text_len": 512,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
SUFFIX = {"diffusers": "", "wan": ".safetensors", "longlive": ".pt"}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors, every other one bfloat16, one with values that arithmetic would lose."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).to((torch.float32, torch.bfloat16)[i % 2])
        for i, (name, shape) in enumerate(shapes.items())
    }
    next(iter(weights.values())).view(-1)[:3] = torch.tensor([float("nan"), -0.0, 1e-42])
    return weights


SHAPES = shapes_of(CONFIG)
WEIGHTS = random_weights(SHAPES)
LORA = random_weights(
    {
        f"{name.removesuffix('.weight')}.lora_{x}.weight": (2, shape[1])
        if x == "A"
        else (shape[0], 2)
        for name, shape in SHAPES.items()
        if re.fullmatch(rf"blocks\..*({'|'.join(TARGETS)})\.weight", name)
        for x in "AB"
    }
)
ADAPTER = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS}


def raw(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: (weight.dtype, tuple(weight.shape), weight.contiguous().view(torch.uint8).tolist())
        for name, weight in weights.items()
    }


def named(layout: str, weights: dict[str, Tensor] = WEIGHTS) -> dict[str, Tensor]:
    """The weights under the names that a layout gives them."""
    names = WEIGHT_LAYOUTS[layout].write(weights, "test")
    return {names[name]: weight for name, weight in weights.items()}


def write_folder(folder: Path, layout: str = "diffusers", config: Any = CONFIG) -> Path:
    folder.mkdir(parents=True)
    save_file(named(layout), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        action(*arguments, **options)
    return str(caught.value)


# Names


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_a_bijection_and_agree_with_diffusers(name: str) -> None:
    keys = list(shapes_of(named_config(name)))
    assert len(keys) == 27 * CONFIGS[name]["num_layers"] + 15
    for layout in WEIGHT_LAYOUTS.values():
        names = layout.write(keys, "test")
        assert len(set(names.values())) == len(keys)
        back = layout.read(names.values(), "test")
        assert [back[names[key]] for key in keys] == keys
        assert weight_layout(names.values(), "test") == layout
    wan = WEIGHT_LAYOUTS["wan"].write(keys, "test")
    theirs = convert_wan_transformer_to_diffusers({wan[key]: key for key in keys})
    assert theirs == {key: key for key in keys}


def test_original_names() -> None:
    wan = WEIGHT_LAYOUTS["wan"].write(SHAPES, "test")
    assert wan["scale_shift_table"] == "head.modulation"
    assert wan["blocks.1.scale_shift_table"] == "blocks.1.modulation"
    assert wan["blocks.1.norm2.bias"] == "blocks.1.norm3.bias"
    assert wan["blocks.1.attn2.to_out.0.weight"] == "blocks.1.cross_attn.o.weight"
    assert wan["blocks.1.ffn.net.0.proj.weight"] == "blocks.1.ffn.0.weight"


WRAPPERS = [
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "_forward_module.",
    "module.",
]


@given(st.data())
def test_wrapper_segments_are_read_past_anywhere(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    key = WEIGHT_LAYOUTS["longlive"].write([name], "test")[name]
    segments = [
        "".join(data.draw(st.lists(st.sampled_from(WRAPPERS), max_size=2))) + segment
        for segment in key.split(".")
    ]
    wrapped = ".".join(segments)
    assert WEIGHT_LAYOUTS["longlive"].read([wrapped], "test") == {wrapped: name}


@pytest.mark.parametrize("layout", ["diffusers", "wan"])
@given(
    st.lists(
        st.sampled_from(["module", "_forward_module", "model", "diffusion_model", "transformer"]),
        max_size=4,
    )
)
def test_a_prefix_that_all_names_share_is_read_past(layout: str, parts: list[str]) -> None:
    prefix = "".join(f"{part}." for part in parts)
    names = WEIGHT_LAYOUTS[layout].write(SHAPES, "test")
    keys = {prefix + name: own for own, name in names.items()}
    assert weight_layout(keys, "test").read(keys, "test") == keys


def test_two_transformers_in_a_file_are_refused() -> None:
    keys = [f"{part}.{name}" for part in ("generator", "critic") for name in SHAPES]
    message = refused(weight_layout(keys, "a.pt").read, keys, "a.pt")
    assert f"{len(SHAPES)} of {len(keys)} keys are not of the layout 'diffusers'" in message
    assert "critic." in message and "one Wan transformer" in message


@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(["x", ".bias", "_orig_mod", ".#"]))
def test_a_foreign_key_is_named(name: str, tail: str) -> None:
    message = refused(WEIGHT_LAYOUTS["diffusers"].read, [*SHAPES, name + tail], "a.pt")
    assert message.startswith(f"a.pt: 1 of {len(SHAPES) + 1} keys are not of the layout")
    assert name + tail in message


@pytest.mark.parametrize(
    "key", ["blocks.#.modulation", "blocks.01.modulation", "blocks.modulation"]
)
def test_block_numbers_are_plain(key: str) -> None:
    assert "1 of 1 keys" in refused(WEIGHT_LAYOUTS["wan"].read, [key], "a.pt")


def test_two_keys_of_one_weight_are_refused() -> None:
    keys = ["model.head.modulation", "model._orig_mod.head.modulation"]
    assert "2 keys share a name" in refused(WEIGHT_LAYOUTS["longlive"].read, keys, "a.pt")


def test_lora_names_are_peft_names() -> None:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS)
    wrapped = get_peft_model(WanTransformer3DModel.from_config(CONFIG), config)
    peft_keys = set(get_peft_model_state_dict(wrapped))
    assert set(LORA_LAYOUTS["peft"].write(LORA, "test").values()) == peft_keys


def test_longlive_lora_names() -> None:
    names = LORA_LAYOUTS["longlive"].write(LORA, "test")
    modules = [f"{a}_attn.{x}" for a in ("self", "cross") for x in "qkvo"] + ["ffn.0", "ffn.2"]
    assert set(names.values()) == {
        f"base_model.model.blocks.{i}.{module}.lora_{x}.weight"
        for i in range(LAYERS)
        for module in modules
        for x in "AB"
    }


# Round trips


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_round_trip(layout: str, tmp_path: Path) -> None:
    first, second = (tmp_path / f"{name}{SUFFIX[layout]}" for name in ("first", "second"))
    save_checkpoint(first, WEIGHTS, layout, CONFIG)
    loaded = load_checkpoint(first)
    assert loaded.layout == layout
    assert loaded.config == (CONFIG if layout == "diffusers" else None)
    assert raw(loaded.weights) == raw(WEIGHTS)
    save_checkpoint(second, loaded.weights, layout, loaded.config)
    if layout == "longlive":
        content = torch.load(second, weights_only=True)
        assert list(content) == ["generator"]
        assert raw(content["generator"]) == raw(named(layout))
    else:
        file = second / "diffusion_pytorch_model.safetensors" if layout == "diffusers" else second
        assert raw(load_file(file)) == raw(named(layout))


def test_sharded_folder_round_trip_and_diffusers_reads_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", WEIGHTS, "diffusers", CONFIG, max_shard_size=50_000)
    assert len(list((tmp_path / "a").glob("*-of-*.safetensors"))) > 2
    assert raw(load_checkpoint(tmp_path / "a").weights) == raw(WEIGHTS)
    index = tmp_path / "a" / "diffusion_pytorch_model.safetensors.index.json"
    assert raw(load_checkpoint(index).weights) == raw(WEIGHTS)

    single = {name: weight.float() for name, weight in WEIGHTS.items()}
    save_checkpoint(tmp_path / "b", single, "diffusers", CONFIG, max_shard_size=50_000)
    model = WanTransformer3DModel.from_pretrained(tmp_path / "b")
    assert raw(model.state_dict()) == raw(single)
    model.save_pretrained(tmp_path / "c")
    assert raw(load_checkpoint(tmp_path / "c").weights) == raw(single)


def test_config_json_is_the_one_diffusers_writes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours", WEIGHTS, "diffusers", CONFIG)
    with torch.device("meta"):
        WanTransformer3DModel.from_config(CONFIG).save_config(tmp_path / "theirs")
    ours, theirs = (tmp_path / name / "config.json" for name in ("ours", "theirs"))
    assert ours.read_text() == theirs.read_text()


def test_pipeline_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "transformer", config=CONFIG | {"_class_name": "WanTransformer3DModel"})
    loaded = load_checkpoint(tmp_path)
    assert (loaded.layout, loaded.config) == ("diffusers", CONFIG)
    assert raw(loaded.weights) == raw(WEIGHTS)


def test_original_folder(tmp_path: Path) -> None:
    loaded = load_checkpoint(write_folder(tmp_path / "a", "wan", WAN_CONFIG))
    assert (loaded.layout, loaded.config) == ("wan", CONFIG)
    assert raw(loaded.weights) == raw(WEIGHTS)


def test_plain_files(tmp_path: Path) -> None:
    save_file(named("diffusers"), tmp_path / "a.safetensors")
    save_file(named("longlive"), tmp_path / "b.safetensors")
    torch.save(named("wan"), tmp_path / "c.pth")
    expected = {"a.safetensors": "diffusers", "b.safetensors": "longlive", "c.pth": "wan"}
    for file, layout in expected.items():
        loaded = load_checkpoint(tmp_path / file)
        assert (loaded.layout, loaded.config) == (layout, None)
        assert raw(loaded.weights) == raw(WEIGHTS)


def test_longlive_ema_behind_wrappers(tmp_path: Path) -> None:
    averaged = {name: weight + 1 for name, weight in WEIGHTS.items()}
    ema = {
        key.replace("model.", "model._fsdp_wrapped_module.").replace(
            ".self_attn.", "._checkpoint_wrapped_module._orig_mod.self_attn."
        ): weight
        for key, weight in named("longlive", averaged).items()
    }
    path = tmp_path / "a.pt"
    torch.save({"generator": named("longlive"), "generator_ema": ema, "step": 600}, path)
    assert raw(load_checkpoint(path).weights) == raw(WEIGHTS)
    assert raw(load_checkpoint(path, ema=True).weights) == raw(averaged)
    torch.save({"generator": named("longlive")}, path)
    assert "has no generator_ema, only generator; " in refused(load_checkpoint, path, ema=True)
    torch.save({"generator_ema": ema}, path)
    assert "load it with ema=True" in refused(load_checkpoint, path)


@pytest.mark.parametrize("layout", ["wan", "longlive"])
def test_a_file_is_replaced_while_its_tensors_are_mapped(layout: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{SUFFIX[layout]}"
    save_checkpoint(path, WEIGHTS, layout)
    before, mapped = path.read_bytes(), load_checkpoint(path).weights
    save_checkpoint(path, mapped, layout)
    assert path.read_bytes() == before
    assert raw(mapped) == raw(WEIGHTS)


def test_views_are_saved_without_their_neighbours(tmp_path: Path) -> None:
    flat = torch.zeros(10_000_000)
    views = {"patch_embedding.bias": flat[:10], "proj_out.bias": flat[10:40:2]}
    for layout in ("wan", "longlive"):
        path = tmp_path / f"a{SUFFIX[layout]}"
        save_checkpoint(path, views, layout)
        assert path.stat().st_size < 10_000
        assert raw(load_checkpoint(path).weights) == raw(views)


# What other tools write


def cast(dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that the dtype holds."""
    return {name: weight.nan_to_num().to(dtype) for name, weight in WEIGHTS.items()}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["50KB", "1GB"])
def test_folders_of_diffusers(safe: bool, variant: str | None, size: str, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_config(CONFIG)
    model.load_state_dict(cast(torch.float16))
    model.half().save_pretrained(
        tmp_path, safe_serialization=safe, variant=variant, max_shard_size=size
    )
    assert len(list(tmp_path.iterdir())) > 2 or size == "1GB"
    assert raw(load_checkpoint(tmp_path).weights) == raw(model.state_dict())


def test_the_usual_name_goes_before_a_variant(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    for variant in ("fp16", "bf16"):
        other = {name: torch.zeros_like(weight) for name, weight in WEIGHTS.items()}
        save_file(other, tmp_path / f"a/diffusion_pytorch_model.{variant}.safetensors")
    assert raw(load_checkpoint(tmp_path / "a").weights) == raw(WEIGHTS)
    (tmp_path / "a/diffusion_pytorch_model.safetensors").unlink()
    message = refused(load_checkpoint, tmp_path / "a")
    assert "2 files (diffusion_pytorch_model.bf16.safetensors, " in message
    assert "name one of them" in message


@pytest.mark.parametrize("name", ["a.pt", "a.PTH", "a.bin", "a.ckpt"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("holder", [None, "state_dict", "model", "model_state_dict", "module"])
def test_torch_files(name: str, old: bool, holder: str | None, tmp_path: Path) -> None:
    beside = {"epoch": 1, "optimizer": {"state": {}}, "step": torch.tensor(3)}
    content = named("wan") if holder is None else {holder: named("wan"), **beside}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not old)
    assert raw(load_checkpoint(tmp_path / name).weights) == raw(WEIGHTS)


def test_files_are_what_they_begin_with(tmp_path: Path) -> None:
    torch.save(named("wan"), tmp_path / "a.safetensors")
    message = refused(load_checkpoint, tmp_path / "a.safetensors")
    assert "is a file of torch.save; rename it to a.pt" in message
    save_file(named("wan"), tmp_path / "b.pt")
    assert raw(load_checkpoint(tmp_path / "b.pt").weights) == raw(WEIGHTS)


def test_holders_within_holders(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"model": {"state_dict": named("wan"), "name": "wan"}}, path)
    assert raw(load_checkpoint(path).weights) == raw(WEIGHTS)
    torch.save({"model": named("wan"), "state_dict": named("wan")}, path)
    assert "a state dict under each of state_dict, model; " in refused(load_checkpoint, path)


def test_the_transformer_of_a_whole_pipelines_file(tmp_path: Path) -> None:
    parts = {f"model.diffusion_model.{name}": weight for name, weight in named("wan").items()}
    parts |= {"vae.conv1.weight": torch.zeros(1), "text_encoders.t5.shared.weight": torch.zeros(1)}
    save_file(parts, tmp_path / "a.safetensors")
    assert raw(load_checkpoint(tmp_path / "a.safetensors").weights) == raw(WEIGHTS)


def test_notes_in_a_configuration_are_read_past(tmp_path: Path) -> None:
    notes = {"torch_dtype": "bfloat16", "dtype": "bfloat16", "transformers_version": "5.0"}
    for layout, config in (("diffusers", CONFIG), ("wan", WAN_CONFIG)):
        folder = write_folder(tmp_path / layout, layout, config | notes)
        assert load_checkpoint(folder).config == CONFIG
    assert "takes no dtype, torch_dtype" in refused(validate_config, CONFIG | notes)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_plain_float8_is_widened_without_a_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()]
    narrow = {"proj_out.weight": codes, "proj_out.bias": torch.ones(2)}
    save_file(narrow, tmp_path / "a.safetensors")
    wide = load_checkpoint(tmp_path / "a.safetensors").weights
    assert wide["proj_out.weight"].dtype is torch.bfloat16
    assert torch.equal(wide["proj_out.weight"].float(), codes.float())
    assert raw({"b": wide["proj_out.bias"]}) == raw({"b": torch.ones(2)})


SCALES = {
    "tensor": (),
    "tensor [1]": (1,),
    "row": (48, 1),
    "row [N]": (48,),
    "block": (3, 4),
}
CONVENTIONS_OF_FLOAT8: dict[str, tuple[str, dict[str, Tensor], dict[str, Any]]] = {
    "ComfyUI, older": ("scale_weight", {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, {}),
    "ComfyUI": ("weight_scale", {}, {}),
    "modelopt": ("weight_scale", {}, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "compressed-tensors": (
        "weight_scale",
        {},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
    "fp8": ("weight_scale_inv", {}, {"quant_method": "fp8", "weight_block_size": [16, 12]}),
}


def scaled(ending: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Wan's names, with q in scaled float8; and what it stands for, in float64."""
    generator = torch.Generator().manual_seed(1)
    state = {name: weight.nan_to_num() for name, weight in named("wan").items()}
    name = "blocks.1.self_attn.q.weight"
    codes = torch.randn(48, 48, generator=generator).mul(99).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=generator) + 0.01
    state[name] = codes
    state[name.removesuffix("weight") + ending] = scale
    state[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
    rows = [scale.shape[0] if scale.dim() and scale.numel() > 1 else 1, 1]
    if scale.dim() == 2:
        rows[1] = scale.shape[1]
    grid = scale.double().reshape(rows)
    wanted = codes.double()
    for i in range(48):
        for j in range(48):
            wanted[i, j] *= grid[i * rows[0] // 48, j * rows[1] // 48]
    return state, {"blocks.1.attn1.to_q.weight": wanted}


@pytest.mark.parametrize("granularity", SCALES)
@pytest.mark.parametrize("convention", CONVENTIONS_OF_FLOAT8)
def test_scales_of_float8_are_applied(convention: str, granularity: str, tmp_path: Path) -> None:
    ending, marker, note = CONVENTIONS_OF_FLOAT8[convention]
    state, wanted = scaled(ending, SCALES[granularity])
    folder = write_folder(tmp_path / "a", "wan", WAN_CONFIG | {"quantization_config": note or None})
    save_file(state | marker, folder / "diffusion_pytorch_model.safetensors")
    found = load_checkpoint(folder).weights
    assert found.keys() == WEIGHTS.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=2**-8, atol=0)
    for name in WEIGHTS.keys() - wanted.keys():
        assert torch.equal(found[name], WEIGHTS[name].nan_to_num())


def test_a_header_that_names_float8_layers(tmp_path: Path) -> None:
    state, wanted = scaled("weight_scale", ())
    state["blocks.1.self_attn.q.comfy_quant"] = torch.zeros(30, dtype=torch.uint8)
    layers = {"blocks.1.self_attn.q": {"format": "float8_e4m3fn"}}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(state, tmp_path / "a.safetensors", header)
    found = load_checkpoint(tmp_path / "a.safetensors").weights
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=2**-8, atol=0)


def test_a_scale_acts_on_a_wide_weight_too(tmp_path: Path) -> None:
    state, _ = scaled("scale_weight", ())
    name = "blocks.1.self_attn.q"
    state[f"{name}.weight"] = torch.full((48, 48), 3.0)
    state[f"{name}.scale_weight"] = torch.tensor(0.5)
    save_file(state, tmp_path / "a.safetensors")
    found = load_checkpoint(tmp_path / "a.safetensors").weights
    assert raw({"q": found["blocks.1.attn1.to_q.weight"]}) == raw({"q": torch.full((48, 48), 1.5)})


Q = "blocks.1.self_attn.q."


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({Q + "scale_weight": None}, f"1 of its matrices have no scale ({Q}weight)"),
        ({Q + "weight": None}, f"{Q}scale_weight is a scale without {Q}weight"),
        ({Q + "scale_weight": torch.ones(7)}, f"{Q}scale_weight is (7,), but its weight (48, 48)"),
        ({Q + "scale_weight": torch.ones(2, 1, 1)}, "is (2, 1, 1), but its weight"),
        ({Q + "scale_weight": torch.ones(48, 3, dtype=torch.uint8)}, "holds quantised weights"),
        ({Q + "weight": torch.ones(48, 48, dtype=torch.int8)}, "of a weight in torch.int8"),
        ({Q + "scale_weight": torch.tensor(float("nan"))}, "to_q.weight holds NaN"),
        ({Q + "zero_point": torch.ones(1)}, f"keys are not of the layout 'wan': {Q}zero_point"),
    ],
)
def test_scales_that_do_not_fit(
    change: dict[str, Tensor | None], found: str, tmp_path: Path
) -> None:
    state, _ = scaled("scale_weight", ())
    state |= {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    state = {key: value for key, value in (state | change).items() if value is not None}
    save_file(state, tmp_path / "a.safetensors")

    def load() -> None:
        check_weights(load_checkpoint(tmp_path / "a.safetensors").weights, SHAPES, "a.safetensors")

    message = refused(load)
    assert "a.safetensors: " in message and found in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e8m0fnu])
def test_other_quantised_weights_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file(
        {"proj_out.weight": torch.ones(2, 2).to(dtype), "proj_out.bias": torch.ones(2)},
        tmp_path / "a.safetensors",
    )
    message = refused(load_checkpoint, tmp_path / "a.safetensors")
    assert "holds quantised weights (proj_out.weight)" in message


@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors", "folder"])
def test_gguf_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "a.gguf").write_bytes(b"GGUF" + bytes(64))
    else:
        path.write_bytes(b"GGUF" + bytes(64))
    message = refused(load_checkpoint, path)
    assert "is a GGUF file" in message and "use the safetensors" in message


def test_a_pointer_to_a_file_elsewhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    assert "git lfs pull" in refused(load_checkpoint, tmp_path / "a.safetensors")


# Strictness


def test_the_right_weights_pass() -> None:
    weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    weights["proj_out.bias"] = weights["proj_out.bias"].to(torch.float8_e4m3fn)
    check_weights(weights, SHAPES, "a.pt")
    check_weights({"empty": torch.zeros(0)}, {"empty": (0,)}, "a.pt")
    weights["proj_out.bias"][-1] = float("nan")
    assert "proj_out.bias holds NaN" in refused(check_weights, weights, SHAPES, "a.pt")


@given(st.data())
def test_wrong_weights_are_counted(data: st.DataObject) -> None:
    weights = {name: torch.zeros(()).expand(shape) for name, shape in SHAPES.items()}
    names = st.lists(st.sampled_from(sorted(SHAPES)), unique=True, max_size=8)
    dropped = data.draw(names)
    misshapen = [name for name in data.draw(names) if name not in dropped]
    extra = data.draw(st.lists(st.text(min_size=1).filter(lambda n: n not in SHAPES), unique=True))
    for name in dropped:
        del weights[name]
    weights |= {name: torch.zeros(SHAPES[name] + (1,)) for name in misshapen}
    weights |= {name: torch.zeros(1) for name in extra}
    kinds = {"missing": dropped, "unexpected": extra, "misshapen": misshapen}
    if not any(kinds.values()):
        return check_weights(weights, SHAPES, "a.pt")
    message = refused(check_weights, weights, SHAPES, "a.pt")
    assert message.startswith("a.pt: weights ")
    for kind, wrong in kinds.items():
        assert (f"{len(wrong)} {kind} (" in message) == bool(wrong)
    if len(misshapen) == 1:
        shape = SHAPES[misshapen[0]]
        assert f"{misshapen[0]} {(*shape, 1)} instead of {shape}" in message


@given(
    st.lists(st.sampled_from(sorted(SHAPES)), unique=True, min_size=1, max_size=5),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(0, 1, exclude_max=True),
)
def test_non_finite_weights_are_named(
    names: list[str], value: float, dtype: torch.dtype, place: float
) -> None:
    weights = {name: torch.zeros(()).expand(shape) for name, shape in SHAPES.items()}
    for name in names:
        weights[name] = torch.zeros(SHAPES[name], dtype=dtype)
        weights[name].view(-1)[int(place * weights[name].numel())] = value
    message = refused(check_weights, weights, SHAPES, "a.pt")
    first = next(name for name in SHAPES if name in names)
    assert message.startswith(f"a.pt: {first} holds NaN or infinity ({len(names)} of ")


# Refusals


class Trap:
    """Writes a file if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_of_code_is_refused_unread(tmp_path: Path) -> None:
    for save in (
        torch.save,
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
    ):
        save({"generator": Trap(tmp_path / "sprung")}, tmp_path / "a.pt")
        for load in (load_checkpoint, load_adapter):
            message = refused(load, tmp_path / "a.pt")
            assert "refused unread" in message
            assert "convert it to safetensors" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(1)], "holds a list, not a state dict"),
        ({"generator": torch.zeros(1)}, "its weights are a Tensor, not a state dict"),
        (
            {"state": {"x": torch.zeros(1)}, 3: torch.zeros(1)},
            "2 entries are not named tensors: state",
        ),
        ({"conv.weight": torch.zeros(1)}, "none of its 1 keys (conv.weight) is of a known layout"),
        ({}, "none of its 0 keys"),
        (named("wan") | {"img_emb.proj.0.weight": torch.zeros(1)}, "1 of 70 keys"),
        ({"generator_lora": {}}, "has no generator, only generator_lora"),
    ],
)
def test_files_of_something_else(content: Any, found: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert found in refused(load_checkpoint, tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_cut_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save_checkpoint(path, WEIGHTS, "wan" if suffix == ".safetensors" else "longlive")
    whole = path.read_bytes()

    @given(st.integers(0, len(whole) - 1))
    def check(size: int) -> None:
        path.write_bytes(whole[:size])
        message = refused(load_checkpoint, path)
        assert re.match(rf"{path}: .*(damaged|cut short)", message)
        assert "download it again" in message or "restore it" in message

    check()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_file_is_refused_or_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save_checkpoint(path, WEIGHTS, "wan" if suffix == ".safetensors" else "longlive")
    whole = path.read_bytes()

    @given(st.integers(0, 6000) | st.integers(-6000, -1), st.integers(1, 255))
    def check(place: int, change: int) -> None:
        content = bytearray(whole)
        content[place] ^= change
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")

    check()


def test_a_damaged_old_file_is_refused_or_read(tmp_path: Path) -> None:
    """It has no checksums, so that some damage is not seen here."""
    path = tmp_path / "a.pt"
    torch.save({"proj_out.bias": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()

    @given(st.integers(0, len(whole) - 1), st.integers(1, 255), st.booleans())
    def check(place: int, change: int, cut: bool) -> None:
        content = bytearray(whole[:place] if cut else whole)
        if not cut:
            content[place] ^= change
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")

    check()


def test_damaged_folders(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, WEIGHTS, "diffusers", CONFIG, max_shard_size=50_000)
    shards = sorted(path.glob("*.safetensors"))
    index = path / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("metadata", "metadate"))
    message = refused(load_checkpoint, path)
    assert message.startswith(f"{index}: was changed") and "delete lltk.json to use it" in message
    (path / "lltk.json").unlink()

    moved = shards[1].rename(tmp_path / "moved")
    assert f"shard {shards[1].name} is missing" in refused(load_checkpoint, path)
    save_file({"x": torch.zeros(1)}, shards[1])
    assert "1 unexpected (x); download both again" in refused(load_checkpoint, path)
    moved.rename(shards[1])
    for broken in ("[]", "{", '{"weight_map": {"x": 3}}', "{}"):
        index.write_text(broken)
        message = refused(load_checkpoint, path)
        assert message.startswith(f"{index}: ")
        assert message.endswith(("download it again", "restore it"))
    index.write_text('{"weight_map": {"x": "../a.safetensors"}}')
    assert "shard '../a.safetensors' is no file beside it" in refused(load_checkpoint, path)
    index.unlink()
    assert "restore the missing index" in refused(load_checkpoint, path)
    index.write_text(text)
    (path / "config.json").write_text('{"num_layers": ')
    assert "config.json: damaged JSON" in refused(load_checkpoint, path)


def test_wrong_paths(tmp_path: Path) -> None:
    assert "does not exist; check the path" in refused(load_checkpoint, tmp_path / "none")
    assert "does not exist; check the path" in refused(load_adapter, tmp_path / "none.pt")
    assert "no weights; name a folder or file" in refused(load_checkpoint, tmp_path)
    (tmp_path / "a.onnx").touch()
    assert "not a .safetensors, .sft, .pt," in refused(load_checkpoint, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "'AutoencoderKLWan', not WanTransformer3DModel"),
        (
            {"vace_layers": [0]},
            "a model diffusers cannot describe: WanTransformer3DModel takes no vace",
        ),
        ({"image_dim": 1280}, "image_dim=1280: lltk does not cover image branches"),
        ({"added_kv_proj_dim": 48}, "added_kv_proj_dim=48: lltk does not cover"),
        ({"eps": "1e-6"}, "eps is '1e-6'; write a float"),
    ],
)
def test_folders_of_other_models(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", config=CONFIG | change)
    message = refused(load_checkpoint, folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert found in message


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model_type": "i2v"}, "model_type is 'i2v'; lltk covers only ('t2v', 'ti2v')"),
        ({"window_size": [8, 8]}, "window_size is [8, 8]"),
        ({"num_heads": 5}, "dim is not a size"),
        ({"num_layers": None}, "num_layers is not a size"),
        ({"vace_layers": [0]}, "takes no vace_layers"),
    ],
)
def test_original_folders_of_other_models(
    change: dict[str, Any], found: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "a", "wan", WAN_CONFIG | change)
    assert found in refused(load_checkpoint, folder)


# Configurations


def test_named_configs_are_complete() -> None:
    for name in CONFIGS:
        config = named_config(name)
        assert validate_config(config) == config
        config["num_layers"] = 1
        assert named_config(name) != config
    assert "did you mean 'wan22_5b'?" in refused(named_config, "wan22-5b")
    assert "use one of wan22_5b, tiny" in refused(named_config, "?")


def test_the_published_configuration_is_wan22_5b() -> None:
    published = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": 3072,
        "eps": 1e-06,
        "ffn_dim": 14336,
        "freq_dim": 256,
        "in_dim": 48,
        "model_type": "ti2v",
        "num_heads": 24,
        "num_layers": 30,
        "out_dim": 48,
        "text_len": 512,
    }
    assert config_from_wan(published, "config.json") == named_config("wan22_5b")


def test_defaults_are_filled_in() -> None:
    with torch.device("meta"):
        defaults = WanTransformer3DModel(num_layers=1).config
    assert validate_config({"num_layers": 1, "patch_size": [1, 2, 2], "eps": 1e-6}) == {
        key: value for key, value in defaults.items() if not key.startswith("_")
    }


# Writing


def full(descriptor: int, data: bytes) -> int:
    """What os.write does on a disk that is full."""
    raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout, suffix in SUFFIX.items():
        if suffix:
            (tmp_path / f"a{suffix}").write_text("before")
        with monkeypatch.context() as patch:
            patch.setattr("lltk.files.writing.os.write", full)
            with pytest.raises(OSError, match="No space"):
                save_checkpoint(tmp_path / f"a{suffix}", WEIGHTS, layout, CONFIG)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.safetensors": "before",
        "a.pt": "before",
    }


def test_refused_saves_write_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    save, path = save_checkpoint, tmp_path / "new"
    assert "pass config" in refused(save, path, WEIGHTS, "diffusers")
    assert "did not write it as a model's folder" in refused(
        save, taken, WEIGHTS, "diffusers", CONFIG
    )
    assert "takes no x" in refused(save, path, WEIGHTS, "diffusers", CONFIG | {"x": 1})
    assert "use one of diffusers, wan" in refused(save, path, WEIGHTS, "onnx")
    assert "this layout is a .safetensors file" in refused(save, tmp_path / "a.pt", WEIGHTS, "wan")
    assert "not lltk's names: x;" in refused(save, path, WEIGHTS | {"x": torch.zeros(1)}, "wan")
    assert "multiply lora_B" in refused(save_lora, tmp_path / "a.pt", LORA, "longlive", ADAPTER)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine"]
