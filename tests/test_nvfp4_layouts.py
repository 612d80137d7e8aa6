"""NVFP4 files of other libraries: read and written bit by bit, and refused where they are unclear.

tests/data/nvfp4_layouts holds files that the libraries wrote.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lltk.files.tensors import SEAL
from lltk.graph.packed import is_packed, packed_weights, plain_name
from lltk.graph.weights import check_weights
from lltk.models.checkpoint import load_checkpoint, save_checkpoint
from lltk.models.nvfp4_conventions import CONVENTIONS, Description
from lltk.models.nvfp4_layouts import read_packed, write_packed
from lltk.ops.floats import pack, unpack
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_quantise.reference import Quantised, nvfp4_quantise
from lltk.ops.scale_layout import swizzle

pytestmark = pytest.mark.cpu

DATA = Path(__file__).parent / "data" / "nvfp4_layouts"
FOLDERS = {
    "modelopt": "modelopt",
    "modelopt_w4a16": "modelopt",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "torchao_rows": "torchao",
}
FILE = "diffusion_pytorch_model.safetensors"
DECODED = load_file(DATA / "decoded.safetensors")
MODULE = "blocks.0.ffn.net.2"
OWN = [f"{MODULE}.weight_{part}" for part in ("codes", "scales", "decode_scale")]
KEYS = {name: [MODULE + end for end in kind.endings] for name, kind in CONVENTIONS.items()}
State = dict[str, Tensor]


def golden(folder: str) -> tuple[State, dict[str, Any], dict[str, str]]:
    """A folder's entries, quantisation configuration and header."""
    config = json.loads((DATA / folder / "config.json").read_text()).get("quantization_config")
    with safe_open(DATA / folder / FILE, "pt") as file:
        header = file.metadata()
    return load_file(DATA / folder / FILE), config, header


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        (left[key].dtype, left[key].shape) == (right[key].dtype, right[key].shape)
        and torch.equal(raw(left[key]), raw(right[key]))
        for key in left
    )


def swap(codes: Tensor) -> Tensor:
    return pack(unpack(codes).unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def refused(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        action(*arguments)
    return str(caught.value)


def ulps(left: Tensor, right: Tensor) -> int:
    return int((left.view(torch.int32) - right.view(torch.int32)).abs().max())


# The libraries' files


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_librarys_file_decodes_as_the_library_decodes_it(folder: str) -> None:
    loaded = load_checkpoint(DATA / folder)
    assert loaded.layout == FOLDERS[folder] and is_packed(loaded.weights)
    assert loaded.config is not None and loaded.config["ffn_dim"] == 80
    found = packed_weights(loaded.weights, "test")
    assert len(found) == 10
    for key, expected in DECODED.items():
        if key.split("|")[0] == folder:
            weight = found[key.split("|")[1]]
            # compressed-tensors decodes in bfloat16; the others multiply in another order.
            bound = 2**-7 if expected.dtype is torch.bfloat16 else 2**-22
            assert error(weight, expected) <= bound
            codes, scales, scale = weight
            wrong = [
                Quantised(swap(codes), scales, scale),
                Quantised(codes, scales.view(torch.uint8).roll(1, 0).view(scales.dtype), scale),
                Quantised(codes, scales, 1 / scale),
            ]
            assert all(error(other, expected) > 0.01 for other in wrong)


def error(weight: Quantised, expected: Tensor) -> float:
    off = nvfp4_dequantise(*weight) - expected.float()
    return float(off.norm() / expected.float().norm())


@pytest.mark.parametrize("folder", FOLDERS)
def test_codes_and_scales_are_the_files_bytes(folder: str) -> None:
    theirs, _, header = golden(folder)
    ours = load_checkpoint(DATA / folder).weights
    codes, scales, scale = (theirs[key] for key in KEYS[FOLDERS[folder]])
    assert torch.equal(ours[OWN[0]], codes)
    rows = raw(ours[OWN[1]].view(torch.uint8))
    swizzled = '"is_swizzled_scales": true' in header.get(f"{MODULE}.weight", "")
    laid = swizzle(ours[OWN[1]].view(torch.uint8)) if swizzled else rows
    assert torch.equal(laid, raw(scales))
    expected = 1 / scale if CONVENTIONS[FOLDERS[folder]].divides else scale
    assert torch.equal(ours[OWN[2]], expected.reshape(()))
    plain = {key for key in ours if key == plain_name(key)}
    assert plain == {key for key in theirs if key in ours}
    assert all(torch.equal(ours[key], theirs[key]) for key in plain)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_librarys_file_is_written_as_the_library_writes_it(folder: str, tmp_path: Path) -> None:
    loaded = load_checkpoint(DATA / folder)
    save_checkpoint(tmp_path / "a", loaded.weights, loaded.layout, loaded.config)
    theirs, _, header = golden(folder)
    mine = load_file(tmp_path / "a" / FILE)
    theirs = {key: value for key, value in theirs.items() if not key.endswith(".input_scale")}
    if folder == "compressed-tensors":
        # A reciprocal's reciprocal is the number again, or its neighbour.
        for key in [key for key in theirs if key.endswith("_global_scale")]:
            assert ulps(mine.pop(key), theirs.pop(key)) <= 1
    if folder == "torchao_rows":
        mine, theirs = (
            {k: v for k, v in x.items() if "_weight_scale" not in k} for x in (mine, theirs)
        )
    assert same(mine, theirs)
    with safe_open(tmp_path / "a" / FILE, "pt") as file:
        written = file.metadata()
    del written[SEAL]
    if folder == "torchao":
        names = [set(json.loads(notes.pop("tensor_names"))) for notes in (written, header)]
        assert names[0] == names[1]
        assert {k: v if k == "format" else json.loads(v) for k, v in written.items()} == {
            k: v if k == "format" else json.loads(v) for k, v in header.items()
        }
    again = load_checkpoint(tmp_path / "a")
    assert again.config == loaded.config
    weights = again.weights
    if folder == "compressed-tensors":
        for key in [key for key in weights if key.endswith("_decode_scale")]:
            assert ulps(weights.pop(key), loaded.weights.pop(key)) <= 1
    assert same(weights, loaded.weights)


def test_the_written_configuration_is_part_of_the_librarys(tmp_path: Path) -> None:
    for folder in ("modelopt_w4a16", "compressed-tensors", "torchao"):
        loaded = load_checkpoint(DATA / folder)
        save_checkpoint(tmp_path / folder, loaded.weights, loaded.layout, loaded.config)
        mine = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        theirs = golden(folder)[1]
        for key in mine.keys() - {"ignore", "modules_to_not_convert", "config_groups"}:
            assert mine[key] == theirs[key], key
        groups = [config.get("config_groups", {}).get("group_0", {}) for config in (mine, theirs)]
        assert groups[0].items() <= groups[1].items()
        kept = mine.get("ignore", mine.get("modules_to_not_convert"))
        assert len(kept) == 6 and {"proj_out", "condition_embedder.time_proj"} < set(kept)


# Round trips


@st.composite
def quantised(draw: st.DrawFn) -> State:
    """A few weights in lltk's form, of any size and magnitude, with plain entries beside them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    state: State = {"scale_shift_table": torch.zeros(2)}
    for index in range(draw(st.integers(1, 3))):
        rows, columns = draw(st.integers(1, 140)), draw(st.integers(1, 90))
        x = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
        x[draw(st.integers(0, rows - 1))] = 0
        weight = nvfp4_quantise(
            x, draw(st.sampled_from([1, 16])), draw(st.sampled_from(["none", "mse"]))
        )
        state |= {
            f"m.{index}.weight_{part}": value
            for part, value in zip(("codes", "scales", "decode_scale"), weight, strict=True)
        }
        state[f"m.{index}.bias"] = torch.randn(rows, generator=generator).bfloat16()
    return state


@given(quantised(), st.sampled_from(list(CONVENTIONS)))
def test_round_trip(state: State, name: str) -> None:
    written, description = write_packed(state, name, "a")
    assert not is_packed(written)
    found = read_packed(written, description, "a")
    assert found is not None and found[1] == name
    again = found[0]
    if CONVENTIONS[name].divides:
        scales = [key for key in state if key.endswith("decode_scale")]
        assert all(ulps(again.pop(key), state[key]) <= 1 for key in scales)
        state = {key: value for key, value in state.items() if key not in scales}
    assert same(again, state)


@given(quantised())
def test_what_a_modelopt_file_says_of_its_order_is_heeded(state: State) -> None:
    written, description = write_packed(state, "modelopt", "a")
    assert description.config is not None
    config = {
        **description.config,
        "swap_weight_nibbles": True,
        "checkpoint_weight_scale_layout": "swizzled",
    }
    for key in [key for key in written if written[key].dtype is torch.uint8]:
        scales = written[f"{key}_scale"]
        tiles = swizzle(scales.view(torch.uint8)).view(scales.dtype)
        rows, columns = scales.shape
        written[f"{key}_scale"] = tiles.view(-(-rows // 128) * 128, -(-columns // 4) * 4)
        written[key] = swap(written[key])
    found = read_packed(written, Description(config, {"_quantization_metadata": "{}"}), "a")
    assert found is not None and same(found[0], state)


def test_a_torchao_weight_without_a_tensor_scale_has_one_of_1() -> None:
    state, config, header = golden("torchao")
    del state[KEYS["torchao"][2]]
    found = read_packed(state, Description(config, header), "a")
    assert found is not None and torch.equal(found[0][OWN[2]], torch.tensor(1.0))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_scales_of_activations_are_read_past(name: str) -> None:
    state, config, header = golden(name)
    whole = read_packed(state, Description(config, header), "a")
    state[MODULE + CONVENTIONS[name].activation] = torch.tensor(0.5)
    if name == "compressed-tensors":
        arguments = {"dynamic": "local", "num_bits": 4, "type": "float", "group_size": 16}
        config["config_groups"]["group_0"]["input_activations"] = arguments
    if name == "torchao":
        kwargs = {"_type": "QuantizeTensorToNVFP4Kwargs", "_data": {"block_size": 16}}
        notes = json.loads(header[f"{MODULE}.weight"])
        notes["_data"]["act_quant_kwargs"] = kwargs
        header[f"{MODULE}.weight"] = json.dumps(notes)
    found = read_packed(state, Description(config, header), "a")
    assert found is not None and whole is not None and same(found[0], whole[0])


# Files


def test_sharded_and_single_files(tmp_path: Path) -> None:
    loaded = load_checkpoint(DATA / "modelopt")
    for name in CONVENTIONS:
        save_checkpoint(tmp_path / name, loaded.weights, name, loaded.config, max_shard_size=9000)
        assert len(list((tmp_path / name).glob("*-of-*.safetensors"))) > 2
        again = load_checkpoint(tmp_path / name)
        assert again.layout == name
        weights = dict(again.weights)
        for key in [key for key in weights if key.endswith("decode_scale")]:
            assert ulps(weights[key], loaded.weights[key]) <= CONVENTIONS[name].divides
            weights[key] = loaded.weights[key]
        assert same(weights, loaded.weights)
    index = tmp_path / "torchao" / f"{FILE}.index.json"
    assert load_checkpoint(index).layout == "torchao"
    assert load_checkpoint(DATA / "torchao" / FILE).layout == "torchao"
    assert "does not say how" in refused(load_checkpoint, DATA / "modelopt" / FILE)


def test_shards_must_agree_on_what_they_say(tmp_path: Path) -> None:
    loaded = load_checkpoint(DATA / "torchao")
    save_checkpoint(tmp_path / "a", loaded.weights, "torchao", loaded.config, max_shard_size=9000)
    shard = min((tmp_path / "a").glob("*-of-*.safetensors"))
    with safe_open(shard, "pt") as file:
        header = file.metadata()
    header[f"{MODULE}.weight"] = header[f"{MODULE}.weight"].replace("true", "false")
    save_file(load_file(shard), shard, header)
    (tmp_path / "a" / "lltk.json").unlink()
    assert f"differs from other shards' in {MODULE}.weight" in refused(
        load_checkpoint, tmp_path / "a"
    )


def test_shards_of_plain_weights_may_differ_in_their_headers(tmp_path: Path) -> None:
    loaded = load_checkpoint(DATA / "modelopt")
    plain = {key: value for key, value in loaded.weights.items() if key == plain_name(key)}
    save_checkpoint(tmp_path / "a", plain, "diffusers", loaded.config, max_shard_size=9000)
    for index, shard in enumerate((tmp_path / "a").glob("*-of-*.safetensors")):
        save_file(load_file(shard), shard, {"hash": str(index)})
    (tmp_path / "a" / "lltk.json").unlink()
    assert same(load_checkpoint(tmp_path / "a").weights, plain)


def copied(folder: str, path: Path, **entries: Any) -> Path:
    """A folder with entries of its config.json replaced; None removes one."""
    shutil.copytree(DATA / folder, path)
    config = json.loads((path / "config.json").read_text()) | entries
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (path / "config.json").write_text(text)
    return path


def test_hf_quant_config(tmp_path: Path) -> None:
    folder = copied("modelopt", tmp_path / "a", quantization_config=None)
    assert "does not say how" in refused(load_checkpoint, folder)
    notes = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["proj_out"]}
    content = {"producer": {"name": "modelopt"}, "quantization": notes}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    assert same(load_checkpoint(folder).weights, load_checkpoint(DATA / "modelopt").weights)
    notes["group_size"] = 32
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    assert "group_size is 32" in refused(load_checkpoint, folder)
    notes["quant_algo"] = "FP8"
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    both = copied("modelopt", tmp_path / "b")
    shutil.copy(folder / "hf_quant_config.json", both)
    assert "quant_algo is 'NVFP4', but hf_quant_config.json has 'FP8'" in refused(
        load_checkpoint, both
    )
    (both / "hf_quant_config.json").write_text("{}")
    assert "has no object 'quantization'" in refused(load_checkpoint, both)


def test_files_that_cannot_describe_nvfp4_are_refused(tmp_path: Path) -> None:
    loaded = load_checkpoint(DATA / "modelopt")
    for layout in ("diffusers", "wan", "longlive"):
        message = refused(save_checkpoint, tmp_path / "a", loaded.weights, layout, loaded.config)
        assert f"the layout {layout!r} cannot say how" in message
    plain = {key: value for key, value in loaded.weights.items() if key == plain_name(key)}
    message = refused(save_checkpoint, tmp_path / "a", plain, "torchao", loaded.config)
    assert "no weight is in NVFP4" in message
    message = refused(save_checkpoint, tmp_path / "a", loaded.weights, "torchao")
    assert "needs a configuration" in message
    other = loaded.weights | {"strange.weight_codes": loaded.weights[OWN[0]]}
    message = refused(save_checkpoint, tmp_path / "a", other, "torchao", loaded.config)
    assert "strange.weight" in message
    assert not list(tmp_path.iterdir())
    torch.save(loaded.weights, tmp_path / "a.pt")
    assert "does not say how" in refused(load_checkpoint, tmp_path / "a.pt")
    save_file(loaded.weights, tmp_path / "a.safetensors")
    assert "does not say how" in refused(load_checkpoint, tmp_path / "a.safetensors")


def test_weights_of_bytes_alone_are_refused(tmp_path: Path) -> None:
    save_file({"proj_out.weight": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    message = refused(load_checkpoint, tmp_path / "a.safetensors")
    assert "holds quantised weights (proj_out.weight) but does not say how" in message


def test_a_torchao_weight_has_the_dtype_of_its_bias() -> None:
    weights = load_checkpoint(DATA / "torchao").weights
    weights[f"{MODULE}.bias"] = weights[f"{MODULE}.bias"].float()
    del weights["blocks.0.attn1.to_q.bias"]
    _, description = write_packed(weights, "torchao", "a")
    for module, dtype in {MODULE: "float32", "blocks.0.attn1.to_q": "bfloat16"}.items():
        notes = json.loads(description.header[f"{module}.weight"])
        assert notes["_data"]["orig_dtype"]["_data"] == dtype


def test_strange_names_are_refused(tmp_path: Path) -> None:
    folder = copied("modelopt", tmp_path / "a")
    state = load_file(folder / FILE)
    save_file(state | {f"{MODULE}.pre_quant_scale": torch.ones(80)}, folder / FILE)
    message = refused(load_checkpoint, folder)
    assert f"1 of 43 keys are not of the layout 'diffusers': {MODULE}.pre_quant_scale" in message


def test_check_weights_takes_packed_ones() -> None:
    weights = load_checkpoint(DATA / "modelopt").weights
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    check_weights(weights, shapes, "a")
    broken = weights | {OWN[2]: torch.tensor(float("nan"))}
    assert "holds NaN" in refused(check_weights, broken, shapes, "a")


# Refusals

Change = Callable[[State, dict[str, Any], dict[str, str]], object]


def put(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[str], Change]:
    """A change of a weight's codes, scales or tensor scale, in any convention."""

    def of(name: str) -> Change:
        key = KEYS[name][index]
        return lambda state, config, header: state.update({key: change(state[key])})

    return of


def byte(value: int) -> Callable[[Tensor], Tensor]:
    def change(scales: Tensor) -> Tensor:
        changed = scales.clone()
        changed.view(torch.uint8)[1, 2] = value
        return changed

    return change


BROKEN = {
    "nan": (put(1, byte(0x7F)), "1 of {n} are NaN or negative"),
    "negative nan": (put(1, byte(0xFF)), "1 of {n} are NaN or negative"),
    "negative": (put(1, byte(0xB8)), "1 of {n} are NaN or negative"),
    "negative zero": (put(1, byte(0x80)), "1 of {n} are NaN or negative"),
    "scale nan": (put(2, lambda scale: scale * float("nan")), "is nan; it must be finite"),
    "scale infinite": (put(2, lambda scale: scale * float("inf")), "is inf; it must be finite"),
    "scale zero": (put(2, lambda scale: scale * 0), "is 0.0; it must be finite and above 0"),
    "scale negative": (put(2, lambda scale: -scale), "it must be finite and above 0"),
    "scale a row": (put(2, lambda scale: scale.expand(32).clone()), "is (32,); NVFP4 has one"),
    "scale half": (put(2, lambda scale: scale.half()), "is torch.float16, not torch.float32"),
    "scales of e5m2": (
        put(1, lambda scales: scales.float().to(torch.float8_e5m2)),
        "is torch.float8_e5m2, not torch.float8_e4m3fn; convert it",
    ),
    "scales short": (put(1, lambda scales: scales[:, :-1].contiguous()), "blocks"),
    "blocks of 32": (put(1, lambda scales: scales[:, ::2].contiguous()), "blocks"),
    "codes signed": (
        put(0, lambda codes: codes.view(torch.int8)),
        "is torch.int8, not torch.uint8",
    ),
    "codes unpacked": (put(0, unpack), "blocks"),
    "codes of 3 axes": (put(0, lambda codes: codes[None]), "codes are [N, K/2]"),
    "width of 78": (put(0, lambda codes: codes[:, :39].contiguous()), "is (32, 39); codes are"),
}


@pytest.mark.parametrize("folder", ["modelopt", "compressed-tensors", "torchao", "torchao_rows"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_weight_is_refused(folder: str, case: str) -> None:
    make, message = BROKEN[case]
    state, config, header = golden(folder)
    make(FOLDERS[folder])(state, config, header)
    found = refused(read_packed, state, Description(config, header), "a.safetensors")
    assert found.startswith(f"a.safetensors: {MODULE}")
    assert message.format(n=160) in found


@pytest.mark.parametrize(("name", "part"), [(n, i) for n in CONVENTIONS for i in range(3)][:-1])
def test_a_weight_in_part_is_refused(name: str, part: int) -> None:
    state, config, header = golden(name)
    key = KEYS[name][part]
    del state[key]
    message = refused(read_packed, state, Description(config, header), "a")
    assert f"{MODULE} is quantised, but {key} is missing" in message


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_weight_is_never_written(case: str) -> None:
    make, _ = BROKEN[case]
    weights = load_checkpoint(DATA / "modelopt_w4a16").weights
    parts = dict(zip(KEYS["modelopt"], (weights[key] for key in OWN), strict=True))
    make("modelopt")(parts, {}, {})
    broken = weights | dict(zip(OWN, parts.values(), strict=True))
    for name in CONVENTIONS:
        assert refused(write_packed, broken, name, "a").startswith(f"a: {MODULE}.weight_")


def of_config(**entries: Any) -> Change:
    return lambda state, config, header: config.update(entries)


def of_group(**entries: Any) -> Change:
    return lambda state, config, header: config["config_groups"]["group_0"]["weights"].update(
        entries
    )


def of_header(**entries: str) -> Change:
    return lambda state, config, header: header.update(entries)


def of_notes(old: str, new: str) -> Change:
    key = f"{MODULE}.weight"
    return lambda state, config, header: header.update({key: header[key].replace(old, new)})


def beside(key: str) -> Change:
    return lambda state, config, header: state.update({f"{MODULE}{key}": torch.ones(())})


def bare(state: State, config: dict[str, Any], header: dict[str, str]) -> None:
    for name in [name for name in state if "_scale" in name or "quantis" in name]:
        del state[name]
    for name, value in state.items():
        state[name] = value.to(torch.bfloat16)


UNCLEAR: list[tuple[str, Change, str]] = [
    ("modelopt", of_config(quant_method="bfl"), "quant_method is 'bfl'; lltk reads 'modelopt' or"),
    ("modelopt", of_config(quant_method=None), "quant_method is None"),
    ("modelopt", of_config(quant_method="torchao"), "its header lacks torchao's 'tensor_names'"),
    ("modelopt", of_header(tensor_names="[]"), "its header has torchao's 'tensor_names'"),
    ("modelopt", of_config(quant_method="compressed-tensors"), "says that it is of compr"),
    ("modelopt", of_config(quant_algo="NVFP4_AWQ"), "quant_algo is 'NVFP4_AWQ'"),
    ("modelopt", of_config(quant_algo=None), "quant_algo is None"),
    ("modelopt", of_config(group_size=32), "group_size is 32"),
    ("modelopt", of_group(group_size=32), "group_size of weights is 32"),
    ("modelopt", of_group(num_bits=8), "num_bits of weights is 8"),
    ("modelopt", of_group(type="int"), "type of weights is 'int'"),
    ("modelopt", of_config(config_groups={"g": {}}), "config_groups without the format"),
    ("modelopt", of_config(config_groups=[]), "config_groups without the format"),
    ("modelopt", of_config(ignore=["*ffn*"]), f"{MODULE.replace('2', '0.proj')} is quantised, but"),
    ("modelopt", of_config(ignore="proj_out"), "ignored modules are 'proj_out', not a list"),
    ("modelopt", of_config(swap_weight_nibbles="yes"), "swap_weight_nibbles is 'yes'"),
    ("modelopt", of_config(checkpoint_weight_scale_layout="?"), "scale_layout is '?'"),
    (
        "modelopt",
        of_config(checkpoint_weight_scale_layout="swizzled"),
        "swizzled scales of 32×2 blocks are (128, 4)",
    ),
    ("modelopt", of_header(quantization_config="{}"), "scales by rows or swizzled; say which"),
    ("modelopt", of_header(_quantization_metadata="{}"), "scales by rows or swizzled; say which"),
    ("modelopt", beside(".weight_global_scale"), "says that it is of modelopt, but"),
    ("modelopt", beside(".weight_packed"), "keep the entries of one convention"),
    ("modelopt", beside(".weight_codes"), "keep the entries of one convention"),
    ("modelopt", bare, "holds no NVFP4 weight"),
    ("compressed-tensors", of_config(format="pack-quantized"), "format is 'pack-quantized'"),
    ("compressed-tensors", of_config(quantization_status="frozen"), "status is 'frozen'"),
    ("compressed-tensors", of_config(config_groups={"g": {"weights": None}}), "without the format"),
    ("compressed-tensors", of_config(ignore=["re:.*ffn"]), "'re:.*ffn' says that it is not"),
    ("compressed-tensors", of_config(transform_config={"R1": {}}), "its weights are rotated"),
    ("compressed-tensors", of_group(group_size=32), "group_size of weights is 32"),
    ("compressed-tensors", of_group(symmetric=False), "symmetric of weights is False"),
    ("compressed-tensors", of_group(strategy="group"), "strategy of weights is 'group'"),
    ("compressed-tensors", of_group(scale_dtype="torch.uint8"), "scale_dtype of weights is"),
    ("compressed-tensors", beside(".weight_scale_2"), "keep the entries of one convention"),
    ("compressed-tensors", beside(".weight"), "has a plain weight and a quantised one"),
    ("torchao", of_config(quant_method="modelopt"), "its header has torchao's 'tensor_names'"),
    ("torchao", of_notes("NVFP4Tensor", "MXTensor"), "_type is 'MXTensor'"),
    ("torchao", of_notes('"block_size": 16', '"block_size": 32'), "block_size is 32"),
    ("torchao", of_notes("is_swizzled_scales", "is_swizzled"), "is_swizzled_scales is None"),
    ("torchao", of_notes(": true", ": false"), "is (32, 32); codes of (32, 40) have scales of"),
    ("torchao_rows", of_notes("scales\": false", "scales\": true"), "blocks are (32, 32)"),
    ("torchao", of_notes("_data", "_date"), "_data is None, not an object"),
    ("torchao", of_notes("{", ""), "damaged JSON"),
    ("torchao", of_header(**{f"{MODULE}.weight": "1"}), "its JSON is not an object"),
    ("torchao", lambda s, c, header: header.pop(f"{MODULE}.weight"), "in its header is missing"),
    ("torchao", beside(".weight"), "has a plain weight and a quantised one"),
    ("torchao", beside(".weight_scale"), "keep the entries of one convention"),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "change", "message"), UNCLEAR, ids=range(len(UNCLEAR)))
def test_an_unclear_file_is_refused(folder: str, change: Change, message: str) -> None:
    state, config, header = golden(folder)
    change(state, config, header)
    assert message in refused(read_packed, state, Description(config, header), "a")
    state, config, header = golden(folder)
    assert read_packed(state, Description(config, header), "a")


def test_headers_of_single_files() -> None:
    """modelopt's exports to one file may be swizzled; ComfyUI's have nibbles swapped as well."""
    state, config, _ = golden("modelopt")
    layers = {"_quantization_metadata": '{"format_version": "1.0", "layers": {}}'}
    assert "neither the order of nibbles" in refused(
        read_packed, state, Description(None, layers), "a"
    )
    clear = config | {"checkpoint_weight_scale_layout": "linear"}
    header = {"quantization_config": json.dumps(clear)}
    assert read_packed(state, Description(None, header), "a")
    message = refused(read_packed, state, Description(None, header | layers), "a")
    assert "nibbles may be in either order; say which" in message
    header["quantization_config"] = json.dumps(clear | {"swap_weight_nibbles": False})
    assert read_packed(state, Description(None, header | layers), "a")
    assert "damaged JSON" in refused(
        read_packed, state, Description(None, {"quantization_config": "{"}), "a"
    )


def test_bytes_are_scales_only_where_the_file_says_of_which_type() -> None:
    state, config, header = golden("compressed-tensors")
    whole = read_packed(state, Description(config, header), "a")
    state |= {key: v.view(torch.uint8) for key, v in state.items() if key.endswith("weight_scale")}
    found = read_packed(state, Description(config, header), "a")
    assert found is not None and whole is not None and same(found[0], whole[0])
    groups = config["config_groups"]
    weights = dict(groups["group_0"]["weights"])
    del weights["scale_dtype"]
    groups["group_1"] = {"weights": weights}
    message = refused(read_packed, state, Description(config, header), "a")
    assert "nothing says whether its bytes are E4M3 or E8M0" in message


def test_a_reciprocal_that_float32_does_not_hold_is_refused() -> None:
    weights = load_checkpoint(DATA / "modelopt").weights
    tiny = weights | {OWN[2]: torch.tensor(1e-40)}
    assert "whose reciprocal float32 does not hold" in refused(
        write_packed, tiny, "compressed-tensors", "a"
    )
    written, description = write_packed(tiny, "modelopt", "a")
    found = read_packed(written, description, "a")
    assert found is not None and torch.equal(found[0][OWN[2]], torch.tensor(1e-40))
    state, config, header = golden("compressed-tensors")
    state[KEYS["compressed-tensors"][2]] = torch.tensor([1e-40])
    assert "whose reciprocal" in refused(read_packed, state, Description(config, header), "a")
