"""Adapters of every layout do what PEFT and diffusers do with them, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from helpers import captured, difference, refused, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lltk.graph.low_rank import LowRank
from lltk.models.adapters import load_adapter, merge_adapters
from lltk.models.checkpoint import save_lora
from lltk.models.layouts import WEIGHT_LAYOUTS

pytestmark = pytest.mark.cpu

Q, K = "blocks.0.attn1.to_q", "blocks.0.attn1.to_k"
INNER = [f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")]
MODULES = [
    f"blocks.{i}.{inner}" for i in (0, 1) for inner in [*INNER, "ffn.net.0.proj", "ffn.net.2"]
]
LAYOUTS = ["diffusers", "peft", "longlive", "diffusion_model", "lora_unet"]


@cache
def base() -> dict[str, Tensor]:
    return captured("score").weights


def random(shape: tuple[int, ...], name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / 8


def pair(module: str, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a module."""
    out, into = base()[f"{module}.weight"].shape
    return random((rank, into), module), random((out, rank), f"{module} B")


def pairs(ranks: dict[str, int], prefix: str = "", down: str = "lora_A") -> dict[str, Tensor]:
    """A state dict of pairs, under diffusers' names."""
    up = {"lora_A": "lora_B", "lora_down": "lora_up"}[down]
    state = {}
    for module, rank in ranks.items():
        a, b = pair(module, rank)
        state |= {f"{prefix}{module}.{down}.weight": a, f"{prefix}{module}.{up}.weight": b}
    return state


def wan(module: str) -> str:
    """Wan's path of a module that diffusers has under another."""
    (name,) = WEIGHT_LAYOUTS["wan"].write([f"{module}.weight"], "test").values()
    return name.removesuffix(".weight")


def merged(path: Path, strength: float = 1.0) -> dict[str, Tensor]:
    return merge_adapters(base(), [(load_adapter(path), strength)])


def model() -> WanTransformer3DModel:
    made = WanTransformer3DModel(**tiny_config())
    made.load_state_dict(base())
    return made


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".base_layer", ""): t for name, t in state.items() if ".lora_" not in name}


def by_diffusers(path: Path, strength: float) -> dict[str, Tensor]:
    """The weights after diffusers loads and fuses a file."""
    state, metadata = WanLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, return_lora_metadata=True
    )
    theirs = model()
    theirs.load_lora_adapter(state, metadata=metadata, prefix="transformer")
    theirs.fuse_lora(lora_scale=strength)
    return plain(theirs.state_dict())


def by_peft(folder: Path, strength: float) -> dict[str, Tensor]:
    """The weights after PEFT loads and merges a folder."""
    theirs = PeftModel.from_pretrained(model(), str(folder))
    for module in theirs.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", strength)
    return dict(theirs.merge_and_unload().state_dict())


def peft_folder(folder: Path, ranks: dict[str, int], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(pairs(ranks, "base_model.model."), folder / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [*ranks], **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


@contextmanager
def temporary() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder)


# Scales


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    """A layout, the ranks of its modules, how it states alpha, and a strength."""
    layout = draw(st.sampled_from(LAYOUTS))
    # diffusers reads lora_unet_ only with every module, and an alpha for each.
    some = st.lists(st.sampled_from(MODULES), min_size=1, max_size=6, unique=True)
    modules = MODULES if layout == "lora_unet" else sorted(draw(some))
    ranks = {module: draw(st.sampled_from([4, 4, 2, 7])) for module in modules}
    forms = {
        "diffusers": ["none", "config"],
        "peft": ["config"],
        "longlive": ["none"],
        "diffusion_model": ["none", "tensors"],
        "lora_unet": ["tensors"],
    }
    alphas = st.sampled_from([1.0, 3.0, 4.0, 16.0])
    return {
        "layout": layout,
        "ranks": ranks,
        "form": draw(st.sampled_from(forms[layout])),
        "alpha": draw(alphas),
        "own_alphas": {m: draw(alphas) for m in modules if draw(st.booleans())},
        "root": draw(st.booleans()),
        "biases": layout == "diffusion_model" and draw(st.booleans()),
        "strength": draw(st.sampled_from([1.0, 0.5, 0.0, -1.0, 2.0])),
    }


def written(folder: Path, drawn: dict[str, Any]) -> tuple[Path, Path]:
    """The drawn adapter, and one of the same meaning that diffusers or PEFT reads."""
    ranks, layout = drawn["ranks"], drawn["layout"]
    config = {
        "lora_alpha": drawn["alpha"],
        "alpha_pattern": drawn["own_alphas"],
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != 4},
        "use_rslora": drawn["root"],
    }
    if layout == "peft":
        path = peft_folder(folder / "peft", ranks, **config)
        return path, path
    path, header, state = folder / "lora.safetensors", {"format": "pt"}, {}
    if layout == "diffusers":
        state = pairs(ranks, "transformer.")
        notes = config | {"r": 4, "target_modules": [*ranks]}
        if drawn["form"] == "config":
            text = json.dumps({f"transformer.{key}": value for key, value in notes.items()})
            header["lora_adapter_metadata"] = text
    else:
        down, up = ("lora_A", "lora_B") if drawn["form"] == "none" else ("lora_down", "lora_up")
        for module, rank in ranks.items():
            key = f"diffusion_model.{wan(module)}"
            if layout == "lora_unet":
                key = "lora_unet_" + wan(module).replace(".", "_")
            a, b = pair(module, rank)
            state |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
            if drawn["form"] == "tensors":
                alpha = drawn["own_alphas"].get(module, drawn["alpha"])
                state[f"{key}.alpha"] = torch.tensor(alpha)
            if drawn["biases"]:
                state[f"{key}.diff_b"] = random((b.shape[0],), module)
    save_file(state, path, header)
    if layout == "longlive":
        named = {k.replace("diffusion_model.", "base_model.model."): v for k, v in state.items()}
        torch.save({"generator_lora": named, "critic_lora": {}}, folder / "lora.pt")
        return folder / "lora.pt", path
    return path, path


@settings(max_examples=40)
@given(adapters())
def test_merged_weights_are_diffusers_or_pefts(drawn: dict[str, Any]) -> None:
    with temporary() as folder:
        path, theirs = written(folder, drawn)
        oracle = by_peft if drawn["layout"] == "peft" else by_diffusers
        wanted = oracle(theirs, drawn["strength"])
        ours = merged(path, drawn["strength"])
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, wanted[name], rtol=0, atol=1e-6), name
    changed = {
        name.removesuffix(".weight") for name in ours if not torch.equal(ours[name], base()[name])
    }
    biases = {f"{module}.bias" for module in drawn["ranks"] if drawn["biases"]}
    assert changed == (drawn["ranks"].keys() | biases if drawn["strength"] else set())


@pytest.mark.parametrize("key", ["alpha", "lora_alpha", "ss_network_alpha"])
def test_alpha_may_be_in_the_header(key: str, tmp_path: Path) -> None:
    save_file(pairs({Q: 4, K: 2}, "transformer."), tmp_path / "a.safetensors", {key: "8"})
    changes = load_adapter(tmp_path / "a.safetensors").changes
    found = {name: change.scale for name, change in changes.items() if isinstance(change, LowRank)}
    assert found == {f"{Q}.weight": 2, f"{K}.weight": 4}


def test_several_adapters_add_up_with_a_strength_each(tmp_path: Path) -> None:
    save_file(pairs({Q: 4}), tmp_path / "a.safetensors")
    save_file(pairs({Q: 2, K: 2}), tmp_path / "b.safetensors")
    both = [(load_adapter(tmp_path / f"{x}.safetensors"), s) for x, s in (("a", 0.5), ("b", -2.0))]
    wanted = dict(base())
    for (_, strength), ranks in zip(both, ({Q: 4}, {Q: 2, K: 2}), strict=True):
        for module, rank in ranks.items():
            a, b = pair(module, rank)
            wanted[f"{module}.weight"] = wanted[f"{module}.weight"] + strength * (b @ a)
    assert difference(merge_adapters(base(), both), wanted) < 1e-6


@pytest.mark.parametrize(
    ("key", "parameter"),
    [
        ("diffusion_model.blocks.1.norm3.diff", "blocks.1.norm2.weight"),
        ("diffusion_model.blocks.1.norm3.diff_b", "blocks.1.norm2.bias"),
        ("blocks.0.self_attn.norm_q.w_norm", "blocks.0.attn1.norm_q.weight"),
        ("lora_unet_blocks_0_cross_attn_norm_k.w_norm", "blocks.0.attn2.norm_k.weight"),
        ("lora_unet_blocks_1_norm3.b_norm", "blocks.1.norm2.bias"),
        ("diffusion_model.blocks.0.diff_m", "blocks.0.scale_shift_table"),
        ("diffusion_model.head.modulation.diff", "scale_shift_table"),
        ("diffusion_model.head.head.diff", "proj_out.weight"),
        ("lora_unet_head_head.diff_b", "proj_out.bias"),
        ("diffusion_model.patch_embedding.diff", "patch_embedding.weight"),
        ("diffusion_model.time_projection.1.diff_b", "condition_embedder.time_proj.bias"),
        ("transformer.blocks.0.attn1.to_out.0.diff", "blocks.0.attn1.to_out.0.weight"),
    ],
)
def test_differences_are_added(key: str, parameter: str, tmp_path: Path) -> None:
    """diffusers drops those of norms; lightx2v's and LyCORIS's readers add them."""
    change = random(tuple(base()[parameter].shape), key)
    save_file({key: change}, tmp_path / "a.safetensors")
    wanted = base() | {parameter: base()[parameter] - 0.5 * change}
    assert difference(merged(tmp_path / "a.safetensors", -0.5), wanted) == 0


@pytest.mark.parametrize(
    "name",
    [
        "transformer.{own}.lora_A.weight",
        "{own}.lora_A.weight",
        "{own}.lora_A.default.weight",
        "transformer.{own}.lora.down.weight",
        "model.diffusion_model.{wan}.lora_down.weight",
        "base_model.model.model.{wan}.lora_A.weight",
        "base_model.model._fsdp_wrapped_module.{wan}.lora_A.default.weight",
        "pipe.dit.{wan}.lora_A.default.weight",
        "{wan}.lora_A.weight",
        "lora_unet_{joined}.lora_down.weight",
        "lora_unet__{joined}.lora_down.weight",
    ],
)
def test_names_in_use(name: str, tmp_path: Path) -> None:
    modules, state = ["blocks.1.attn2.to_out.0", "blocks.0.ffn.net.0.proj"], {}
    for module in modules:
        key = name.format(own=module, wan=wan(module), joined=wan(module).replace(".", "_"))
        state[key], up = pair(module, 3)
        state[key.replace("lora_A", "lora_B").replace("down", "up")] = up
    save_file(state, tmp_path / "a.safetensors")
    wanted = dict(base())
    for module in modules:
        a, b = pair(module, 3)
        wanted[f"{module}.weight"] = wanted[f"{module}.weight"] + b @ a
    assert difference(merged(tmp_path / "a.safetensors"), wanted) < 1e-6


def test_a_convolutions_pair_is_pefts(tmp_path: Path) -> None:
    wrapped = get_peft_model(
        model(),
        LoraConfig(r=2, lora_alpha=6, target_modules=["patch_embedding"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path)
    assert difference(merged(tmp_path, 0.5), by_peft(tmp_path, 0.5)) < 1e-6


def test_biases_of_b_are_scaled_as_pefts(tmp_path: Path) -> None:
    options = {"r": 2, "lora_alpha": 6, "target_modules": [Q], "lora_bias": True}
    wrapped = get_peft_model(model(), LoraConfig(**options, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    wanted = by_peft(tmp_path, 1.0)
    assert difference(wanted, base() | {f"{Q}.weight": wanted[f"{Q}.weight"]}) > 1e-3
    assert difference(merged(tmp_path), wanted) < 1e-6


def test_narrow_tensors_are_widened(tmp_path: Path) -> None:
    """The sum is made in float32 and rounded once, to the weight's dtype."""
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in pairs({Q: 4}).items()}
    save_file(state, tmp_path / "a.safetensors")
    a, b = (state[f"{Q}.lora_{side}.weight"].float() for side in "AB")
    weight, adapter = base()[f"{Q}.weight"].bfloat16(), load_adapter(tmp_path / "a.safetensors")
    found = merge_adapters({f"{Q}.weight": weight}, [(adapter, 0.4), (adapter, 0.35)])
    wanted = (weight.float() + 0.4 * (b @ a) + 0.35 * (b @ a)).bfloat16()
    assert torch.equal(found[f"{Q}.weight"], wanted)


# Folders


def test_folders(tmp_path: Path) -> None:
    for name in ("pytorch_lora_weights", "lora", "mine"):
        (tmp_path / name).mkdir()
        save_file(pairs({Q: 4}), tmp_path / name / f"{name}.safetensors")
        assert load_adapter(tmp_path / name).where.endswith(f"{name}.safetensors")
    folder = peft_folder(tmp_path / "peft", {Q: 4}, lora_alpha=8)
    pickled = peft_folder(tmp_path / "bin", {Q: 4}, lora_alpha=8)
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    assert difference(merged(folder), merged(pickled)) == 0
    bare = peft_folder(tmp_path / "bare", {Q: 4}, lora_alpha=8)
    save_file(pairs({Q: 4}), bare / "adapter_model.safetensors")
    assert difference(merged(folder), merged(bare)) == 0, "the names need no prefix"
    save_file(pairs({Q: 4}), tmp_path / "mine" / "other.safetensors")
    message = refused(load_adapter, tmp_path / "mine")
    assert (
        message == f"{tmp_path / 'mine'}: holds mine.safetensors, other.safetensors; name one file"
    )
    (tmp_path / "empty").mkdir()
    assert "no file of an adapter" in refused(load_adapter, tmp_path / "empty")


# Refusals

A, B = pair(Q, 4)
GOOD = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}


def test_whole_model_as_adapter(tmp_path: Path) -> None:
    save_file({f"{Q}.bias": A[0].clone(), f"{Q}.weight": A.clone()}, tmp_path / "whole.safetensors")
    found = refused(load_adapter, tmp_path / "whole.safetensors")
    assert "the file holds no adapter" in found and "--set model.checkpoint=" in found


@pytest.mark.parametrize(
    ("state", "header", "found"),
    [
        ({f"{Q}.lora_magnitude_vector": B}, {}, f"{Q}.lora_magnitude_vector makes this a DoRA"),
        ({f"{Q}.dora_scale": B}, {}, f"{Q}.dora_scale makes this a DoRA"),
        ({f"{Q}.lokr_w1": A}, {}, f"{Q}.lokr_w1 is no part of a LoRA"),
        ({f"{Q}.hada_w1_a": A}, {}, f"{Q}.hada_w1_a is no part of a LoRA"),
        ({f"{Q}.lora_mid.weight": A}, {}, f"{Q}.lora_mid.weight is no part of a LoRA"),
        ({f"{Q}.bias": A}, {}, f"{Q}.bias is no part of a LoRA"),
        ({f"{K}.lora_A.weight": A}, {}, f"{K}.lora_A.weight has no lora_B beside it"),
        ({f"{K}.lora_B.weight": A}, {}, f"{K}.lora_B.weight has no lora_A beside it"),
        ({f"{K}.alpha": A[0, 0]}, {}, f"{K}.alpha has no lora_A beside it"),
        ({f"{Q}.alpha": A}, {}, f"{Q}.alpha is [["),
        ({f"{Q}.alpha": A[0, 0] / 0}, {}, f"{Q}.alpha is "),
        ({f"{Q}.lora_down.weight": A}, {}, f"{Q}.lora_A.weight and {Q}.lora_down.weight mean"),
        ({f"{Q}.lora_B.weight": B[:, :3]}, {}, f"{Q}.lora_A.weight is (4, 24) and {Q}.lora_B"),
        (
            {f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0], f"{Q}.alpha": A[0, 0]},
            {},
            f"{Q}.lora_A.weight is (0, 24)",
        ),
        ({f"{Q}.lora_B.weight": B / 0}, {}, f"{Q}.lora_B.weight holds NaN or infinity"),
        ({f"{Q}.lora_B.weight": B.int()}, {}, f"{Q}.lora_B.weight is torch.int32, not floating"),
        ({"lora_te_text_model_q.alpha": A[0, 0]}, {}, "is for lora_te_text_model_q, which Wan2.2"),
        ({"blocks.0.cross_attn.k_img.diff_b": A}, {}, "is for blocks.0.cross_attn.k_img, which"),
        ({"transformer_2.blocks.0.attn1.to_q.alpha": A[0, 0]}, {}, "transformer_2.blocks.0"),
        ({}, {"lora_alpha": "many"}, "lora_alpha in its header is 'many', not a number"),
        ({}, {"alpha": "4", "ss_network_alpha": "8"}, "alpha=4 and ss_network_alpha=8"),
        ({}, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata: damaged JSON"),
        ({}, {"lora_adapter_metadata": '{"r": 8}'}, f"says rank 8 for {Q}, whose tensors have"),
    ],
)  # fmt: skip
def test_files_that_mean_something_else_are_refused(
    state: dict[str, Tensor], header: dict[str, str], found: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {
            key: tensor.clone(memory_format=torch.contiguous_format)
            for key, tensor in (GOOD | state).items()
        },
        path,
        header,
    )
    message = refused(load_adapter, path)
    assert message.startswith(f"{path}: ") and found in message
    assert_short(message, path)


def assert_short(message: str, path: Path) -> None:
    """Without the path, the message fits into two lines of a hundred characters."""
    assert "\n" not in message and len(message.replace(str(path), "")) < 200


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"use_dora": True}, "use_dora: lltk does not merge DoRA"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4"),
        ({"layer_replication": [[0, 1]]}, "does not merge by the options layer_replication"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern is no object of patterns"),
        ({"rank_pattern": [Q]}, "rank_pattern is no object of patterns"),
        ({"rank_pattern": {"to_q": 2}}, f"says rank 2 for {Q}"),
    ],
)
def test_configurations_that_mean_something_else_are_refused(
    config: dict[str, Any], found: str, tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path / "peft", {Q: 4}, **config)
    for path in (folder, folder / "adapter_model.safetensors"):
        message = refused(load_adapter, path)
        assert message.startswith(f"{folder / 'adapter_config.json'}: ") and found in message
        assert_short(message, folder)


def test_pefts_weights_alone_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", {Q: 4})
    (folder / "adapter_config.json").unlink()
    assert "its scale is in adapter_config.json, which is missing" in refused(load_adapter, folder)


def test_options_of_training_do_not_matter(tmp_path: Path) -> None:
    """What PEFT writes by default is read, though lltk knows few of its options."""
    for start in (True, "gaussian", "eva"):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=[Q], init_lora_weights=start)
        folder = peft_folder(tmp_path / str(start), {Q: 4})
        config.save_pretrained(folder)
        assert difference(merged(folder), by_peft(folder, 1.0)) < 1e-6


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shapes = {name: tuple(tensor.shape) for name, tensor in base().items()}
    save_file({k.replace("blocks.0", "blocks.39"): v for k, v in GOOD.items()}, path)
    message = refused(load_adapter(path).check, shapes)
    assert message.startswith(
        f"{path}: changes blocks.39.attn1.to_q.weight of (24, 24), and the model does not"
    )
    save_file({f"{Q}.lora_A.weight": torch.ones(4, 48), f"{Q}.lora_B.weight": B}, path)
    message = refused(load_adapter(path).check, shapes)
    assert "of (24, 48), and the model has it as (24, 24)" in message


# Writing


@pytest.mark.parametrize("layout", ["diffusers", "peft", "longlive"])
def test_what_is_written_is_read(layout: str, tmp_path: Path) -> None:
    path = tmp_path / {"longlive": "a.pt", "diffusers": "a.safetensors", "peft": "a"}[layout]
    config = None if layout == "longlive" else {"r": 4, "lora_alpha": 6.0, "target_modules": [Q]}
    save_lora(path, GOOD, layout, config)
    (change,) = load_adapter(path).changes.values()
    assert isinstance(change, LowRank)
    assert change.scale == (1.5 if config else 1.0)
    assert torch.equal(change.a, A) and torch.equal(change.b, B)
