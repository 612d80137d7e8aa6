"""NVFP4 weights in the files of modelopt, compressed-tensors and torchao, and in lltk's own form.

lltk holds a quantised weight [N, K] as three entries of a state dict, x̂ = e2m1 · scale · decode
scale:

| entry | dtype and shape |
|---|---|
| ``<module>.weight_codes`` | uint8 [N, K/2], the even element in the low nibble |
| ``<module>.weight_scales`` | float8_e4m3fn [N, K/16], by rows |
| ``<module>.weight_decode_scale`` | float32 [] |

A `Convention` is how a library's files hold the same. Such a file must say what it is, in its
folder's ``config.json`` or in its safetensors header; what leaves room for two readings is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lltk.models.layouts import few
from lltk.ops.nvfp4_quantise.reference import BLOCK, Quantised
from lltk.ops.scale_layout import swizzle, unswizzle

_OWN = (".weight_codes", ".weight_scales", ".weight_decode_scale")
_OWN_KEY = re.compile(r"\.weight_(codes|scales|decode_scale)$")
_NAN = 0x7F  # Bytes of E4M3 from here on are NaN or negative.
_FORMAT = "nvfp4-pack-quantized"
_LISTED, _CONFIG, _LAYERS = "tensor_names", "quantization_config", "_quantization_metadata"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its quantisation.

    Attributes:
        config: ``quantization_config`` of its ``config.json``; None where there is none.
        header: the metadata of its safetensors files.
    """

    config: Mapping[str, Any] | None
    header: Mapping[str, str]


class _Order(NamedTuple):
    """How one weight lies in its file.

    Attributes:
        swapped: the even element is in the high nibble.
        tile: the shape that a GEMM tile of 128×4 scales has in the file; None for rows.
        e4m3: the file says that scales are E4M3, so that bytes may stand for them.
    """

    swapped: bool = False
    tile: tuple[int, int] | None = None
    e4m3: bool = False


@dataclass(frozen=True)
class Convention:
    """How a library's files hold NVFP4 weights.

    Attributes:
        codes: what a key of codes has after the module's name; likewise the others.
        scales: of block scales.
        scale: of the tensor's scale.
        activation: of the activation's scale, which is read past: lltk takes it as it runs.
        divides: values are divided by the tensor's scale, not multiplied.
        scale_shape: of the tensor's scale.
        optional: a weight without the tensor's scale has one of 1.
        order: reads the description of a module's weight; ValueError where it is of another kind.
        describe: what a file with these weights says of itself, given their modules.
        swizzled: the shape of a GEMM tile of scales in files that lltk writes; None for rows.
    """

    codes: str
    scales: str
    scale: str
    activation: str
    order: Callable[[Description, str, str], _Order]
    describe: Callable[[Mapping[str, Tensor], list[str]], Description]
    divides: bool = False
    scale_shape: tuple[int, ...] = ()
    optional: bool = False
    swizzled: tuple[int, int] | None = None

    @property
    def endings(self) -> tuple[str, ...]:
        """What only keys of quantised weights end in."""
        return tuple(
            ending
            for ending in (self.codes, self.scales, self.scale, self.activation)
            if ending != ".weight"
        )


def is_packed(weights: Iterable[str]) -> bool:
    """Whether a state dict, or its names, hold NVFP4 weights in lltk's form."""
    return any(_OWN_KEY.search(name) for name in weights)


def plain_name(name: str) -> str:
    """The name that the weight of an entry has when it is not quantised."""
    return _OWN_KEY.sub(".weight", name)


def packed_modules(weights: Iterable[str]) -> list[str]:
    """The modules whose weights a state dict holds in lltk's form."""
    found = (_OWN_KEY.split(name)[0] for name in weights if _OWN_KEY.search(name))
    return list(dict.fromkeys(found))


def check_packed(weights: Mapping[str, Tensor], where: str) -> None:
    """ValueError unless every NVFP4 weight in lltk's form is whole, fits, and decodes to numbers.

    A block scale may not be NaN or negative, a decode scale must be finite and positive.
    """
    for module in packed_modules(weights):
        _check(_entries(weights, module, _OWN, where), f"{where}: {module}", _OWN)


def read_packed(
    state: Mapping[str, Tensor], description: Description, where: str
) -> tuple[dict[str, Tensor], str] | None:
    """The entries of a file, NVFP4 weights in lltk's form, and the name of its convention.

    Codes and block scales come back bit by bit; a scale that divides becomes the float32 next to
    its reciprocal. Scales of activations are left out.

    Args:
        state: the entries as the file names them.
        description: what the file says of itself.
        where: the file, for errors.

    Returns:
        None for a checkpoint that is not quantised and does not say so.

    Raises:
        ValueError: the description is missing, or of another kind, or leaves the order of nibbles
            or scales open; entries are missing, of two conventions, or misshapen; a scale is NaN,
            negative, zero (of a tensor) or infinite.
    """
    name, description = _declared(description, where)
    if name is None:
        marks = {end for convention in CONVENTIONS.values() for end in convention.endings}
        quantised = [
            key
            for key, value in state.items()
            if key.endswith((*marks, *_OWN)) or value.dtype is torch.uint8
        ]
        if quantised:
            raise ValueError(
                f"{where}: holds quantised weights ({few(quantised)}) but does not say how: no "
                "quantization_config, and no torchao metadata in its header; name the folder with "
                "its config.json, or use weights that are not quantised"
            )
        return None
    convention = CONVENTIONS[name]
    _only_of(convention, name, state, where)
    modules = _modules(convention, state)
    if not modules:
        raise ValueError(
            f"{where}: says that it is quantised by {name}, but holds no NVFP4 weight; remove its "
            "quantization_config, or download it again"
        )
    found: dict[str, Tensor] = {}
    ours = {}
    for module in modules:
        order = convention.order(description, module, where)
        quantised_weight = _decode(convention, state, module, order, where)
        ours[module] = dict(zip((module + end for end in _OWN), quantised_weight, strict=True))
    for key, value in state.items():
        owner = next((key[: -len(end)] for end in _all(convention) if key.endswith(end)), None)
        if owner in ours:
            found |= ours[owner]
        else:
            found[key] = value
    return found, name


def write_packed(
    weights: Mapping[str, Tensor], name: str, where: str
) -> tuple[dict[str, Tensor], Description]:
    """The entries of a file in a convention, and what the file must say of itself.

    Codes and block scales are written bit by bit; where the tensor's scale divides, the float32
    next to the decode scale's reciprocal. Files describe weights alone (W4A16): lltk scales
    activations as it runs.

    Args:
        weights: plain entries, and NVFP4 weights in lltk's form.
        name: one of `CONVENTIONS`.
        where: the file, for errors.

    Raises:
        ValueError: as `check_packed`; nothing is quantised; or a decode scale has no reciprocal.
    """
    convention = CONVENTIONS[name]
    modules = packed_modules(weights)
    if not modules:
        raise ValueError(f"{where}: no weight is in NVFP4; write these weights as 'diffusers'")
    check_packed(weights, where)
    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not _OWN_KEY.search(key):
            state[key] = value
        elif (module := _OWN_KEY.split(key)[0]) + convention.codes not in state:
            state |= _encode(convention, weights, module, where)
    return state, convention.describe(weights, modules)


def _all(convention: Convention) -> tuple[str, ...]:
    return (convention.codes, *convention.endings)


def _only_of(convention: Convention, name: str, state: Mapping[str, Tensor], where: str) -> None:
    others = {end for other in CONVENTIONS.values() for end in other.endings} | set(_OWN)
    foreign = [key for key in state if key.endswith(tuple(others - set(_all(convention))))]
    if foreign:
        raise ValueError(
            f"{where}: says that it is of {name}, but {few(foreign)} is of another convention; "
            "keep the entries of one"
        )


def _modules(convention: Convention, state: Mapping[str, Tensor]) -> list[str]:
    found = []
    for key, value in state.items():
        ends = convention.endings
        if key.endswith(convention.codes) and value.dtype is torch.uint8:
            ends = _all(convention)
        found += [key[: -len(end)] for end in ends if key.endswith(end)]
    return list(dict.fromkeys(found))


def _entries(
    state: Mapping[str, Tensor], module: str, endings: tuple[str, ...], where: str
) -> Quantised:
    missing = [module + end for end in endings if module + end not in state]
    if missing:
        raise ValueError(
            f"{where}: {module} has an NVFP4 weight without {few(missing)}; download it again"
        )
    return Quantised(*(state[module + end] for end in endings))


def _decode(
    convention: Convention, state: Mapping[str, Tensor], module: str, order: _Order, where: str
) -> Quantised:
    endings = (convention.codes, convention.scales, convention.scale)
    if convention.optional and module + convention.scale not in state:
        state = {**state, module + convention.scale: torch.ones(())}
    if convention.codes != ".weight" and f"{module}.weight" in state:
        raise ValueError(f"{where}: {module} has a weight and an NVFP4 weight; keep one of them")
    codes, scales, scale = _entries(state, module, endings, where)
    subject = f"{where}: {module}"
    if scales.dtype is torch.uint8 and order.e4m3:
        scales = scales.view(torch.float8_e4m3fn)
    if order.tile is not None:
        _check_codes(codes, subject, convention.codes)
        scales = _unswizzled(scales, codes, order.tile, f"{subject}{convention.scales}")
    if scale.numel() != 1:
        raise ValueError(
            f"{subject}{convention.scale} is {tuple(scale.shape)}, not one number; NVFP4 has one "
            "scale a tensor"
        )
    scale = scale.reshape(())
    _check(Quantised(codes, scales, scale), subject, endings)
    if convention.divides:
        scale = _reciprocal(scale, f"{subject}{convention.scale}")
    if order.swapped:
        codes = (codes >> 4) | (codes << 4)
    return Quantised(codes, scales, scale)


def _encode(
    convention: Convention, weights: Mapping[str, Tensor], module: str, where: str
) -> dict[str, Tensor]:
    codes, scales, scale = _entries(weights, module, _OWN, where)
    if convention.divides:
        scale = _reciprocal(scale, f"{where}: {module}.weight_decode_scale")
    if convention.swizzled is not None:
        down, across = convention.swizzled
        shape = (-(-scales.shape[0] // 128) * down, -(-scales.shape[1] // 4) * across)
        flat = swizzle(scales.view(torch.uint8)).view(torch.float8_e4m3fn)
        scales = flat.reshape(shape)
    return {
        module + convention.codes: codes,
        module + convention.scales: scales,
        module + convention.scale: scale.reshape(convention.scale_shape),
    }


def _unswizzled(scales: Tensor, codes: Tensor, tile: tuple[int, int], subject: str) -> Tensor:
    rows, columns = codes.shape[0], codes.shape[1] * 2 // BLOCK
    expected = (-(-rows // 128) * tile[0], -(-columns // 4) * tile[1])
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"{subject} is {tuple(scales.shape)}; scales of {rows}×{columns} blocks in GEMM tiles "
            f"are {expected}; correct what the file says of their order"
        )
    _check_dtype(scales, torch.float8_e4m3fn, subject)
    flat = scales.contiguous().view(torch.uint8).flatten()
    return unswizzle(flat, rows, columns).view(torch.float8_e4m3fn)


def _reciprocal(scale: Tensor, subject: str) -> Tensor:
    inverse = 1 / scale
    if not inverse.isfinite() or inverse == 0:
        raise ValueError(
            f"{subject} is {scale.item()!r}, whose reciprocal is not a float32; use a convention "
            "that multiplies (modelopt, torchao)"
        )
    return inverse


def _check(weight: Quantised, subject: str, endings: tuple[str, ...]) -> None:
    """Raise ValueError unless a weight fits together and decodes to numbers."""
    codes, scales, scale = weight
    of_codes, of_scales, of_scale = endings
    _check_codes(codes, subject, of_codes)
    _check_dtype(scales, torch.float8_e4m3fn, subject + of_scales)
    _check_dtype(scale, torch.float32, subject + of_scale)
    expected = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"{subject}{of_scales} is {tuple(scales.shape)}; codes of {tuple(codes.shape)} with a "
            f"scale for {BLOCK} elements have {expected}; other block sizes are not NVFP4"
        )
    if scale.dim():
        raise ValueError(f"{subject}{of_scale} is {tuple(scale.shape)}, not one number")
    broken = scales.view(torch.uint8) >= _NAN
    if broken.any():
        raise ValueError(
            f"{subject}{of_scales} holds {int(broken.sum())} scales that are NaN or negative, of "
            f"{broken.numel()}; quantise the weight again"
        )
    if not scale.isfinite() or scale <= 0:
        raise ValueError(
            f"{subject}{of_scale} is {scale.item()!r}; it must be finite and above 0 (1 for a "
            "weight of zeros); quantise the weight again"
        )


def _check_codes(codes: Tensor, subject: str, ending: str) -> None:
    _check_dtype(codes, torch.uint8, subject + ending)
    if codes.dim() != 2 or codes.shape[1] * 2 % BLOCK:
        raise ValueError(
            f"{subject}{ending} is {tuple(codes.shape)}; codes are [N, K/2], K a multiple of "
            f"{BLOCK}; pad the weight before it is quantised"
        )


def _check_dtype(tensor: Tensor, dtype: torch.dtype, subject: str) -> None:
    if tensor.dtype is not dtype:
        unsaid = tensor.dtype is torch.uint8
        raise ValueError(
            f"{subject} is {tensor.dtype}, not {dtype}"
            + (", and nothing says which type the bytes are (E4M3 or E8M0)" if unsaid else "")
            + "; convert it, or quantise the weight again"
        )


def _declared(description: Description, where: str) -> tuple[str | None, Description]:
    """The convention that a checkpoint says it is of, with the configuration that says so."""
    config, header = description.config, description.header
    if config is None and _CONFIG in header:
        config = _parsed(header[_CONFIG], f"{where}: {_CONFIG} in the header")
    method = None if config is None else config.get("quant_method")
    if config is None and _LISTED in header:
        method = "torchao"
    elif config is None and _LAYERS in header:
        raise ValueError(
            f"{where}: its header names quantised layers ({_LAYERS}), but neither the order of "
            "nibbles nor that of scales; use the folder that modelopt exports, with its config.json"
        )
    elif config is not None and method not in CONVENTIONS:
        raise ValueError(
            f"{where}: quant_method is {method!r}; lltk reads NVFP4 weights of "
            f"{', '.join(CONVENTIONS)}"
        )
    elif (method == "torchao") != (_LISTED in header):
        raise ValueError(
            f"{where}: quant_method is {method!r}, but its header "
            + ("has no" if method == "torchao" else "has torchao's")
            + f" {_LISTED}; use the config.json and the weights of one export"
        )
    return method, Description(config, header)


def _parsed(text: str, subject: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{subject}: damaged JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{subject}: its JSON is not an object; download it again")
    return content


def _required(subject: str, found: Any, *allowed: Any) -> Any:
    if not any(
        found is value or (type(found) is type(value) and found == value) for value in allowed
    ):
        raise ValueError(
            f"{subject} is {found!r}; lltk reads {' or '.join(map(repr, allowed))}; use an export "
            "with that"
        )
    return found


def _groups(config: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The groups of a quantisation configuration, whose weights are all NVFP4's."""
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(f"{where}: config_groups is {groups!r}, not groups by name; repair it")
    for name, group in groups.items():
        weights = group.get("weights") or {}
        subject = f"{where}: config_groups.{name}.weights"
        _required(f"{subject}.num_bits", weights.get("num_bits"), 4)
        _required(f"{subject}.type", weights.get("type"), "float")
        _required(f"{subject}.group_size", weights.get("group_size"), BLOCK)
    return list(groups.values())


def _modelopt_order(description: Description, module: str, where: str) -> _Order:
    config = description.config or {}
    _required(f"{where}: quant_algo", config.get("quant_algo"), "NVFP4", "W4A16_NVFP4")
    _required(f"{where}: group_size", config.get("group_size"), None, BLOCK)
    _groups(config, where)
    order, swapped = (
        config.get(key) for key in ("checkpoint_weight_scale_layout", "swap_weight_nibbles")
    )
    _required(f"{where}: checkpoint_weight_scale_layout", order, None, "linear", "swizzled")
    _required(f"{where}: swap_weight_nibbles", swapped, None, False, True)
    # Exports for a single file may be swizzled, and those for ComfyUI have their nibbles swapped.
    if order is None and (_CONFIG in description.header or _LAYERS in description.header):
        raise ValueError(
            f"{where}: exported as one file, whose scales may be by rows or swizzled; set "
            'checkpoint_weight_scale_layout to "linear" or "swizzled" in its quantization_config'
        )
    if swapped is None and _LAYERS in description.header:
        raise ValueError(
            f"{where}: {_LAYERS} in its header: nibbles may be in either order; set "
            "swap_weight_nibbles to true or false in its quantization_config (true where the even "
            "element is in the high nibble)"
        )
    return _Order(swapped=bool(swapped), tile=(128, 4) if order == "swizzled" else None)


def _compressed_order(description: Description, module: str, where: str) -> _Order:
    config = description.config or {}
    _required(f"{where}: format", config.get("format"), _FORMAT)
    _required(f"{where}: quantization_status", config.get("quantization_status"), "compressed")
    groups = _groups(config, where)
    if not groups:
        raise ValueError(f"{where}: config_groups names no weights; use the exporter's config.json")
    for group in groups:
        weights = group["weights"]
        _required(f"{where}: group format", group.get("format"), None, _FORMAT)
        _required(f"{where}: weights.symmetric", weights.get("symmetric"), True)
        _required(f"{where}: weights.strategy", weights.get("strategy"), "tensor_group")
        dtype = weights.get("scale_dtype")
        _required(f"{where}: weights.scale_dtype", dtype, None, str(torch.float8_e4m3fn))
    if config.get("transform_config"):
        raise ValueError(
            f"{where}: transform_config: weights are rotated, which lltk does not undo; use an "
            "export without transforms"
        )
    return _Order(e4m3=all(group["weights"].get("scale_dtype") for group in groups))


def _torchao_order(description: Description, module: str, where: str) -> _Order:
    name = f"{module}.weight"
    subject = f"{where}: {name} in the header"
    if name not in description.header:
        raise ValueError(f"{subject} is missing; use the file as torchao wrote it")
    notes = _parsed(description.header[name], subject)
    _required(f"{subject}: _type", notes.get("_type"), "NVFP4Tensor")
    data = notes.get("_data")
    if not isinstance(data, dict):
        raise ValueError(f"{subject}: _data is {data!r}; use the file as torchao wrote it")
    _required(f"{subject}: block_size", data.get("block_size"), BLOCK)
    swizzled = _required(
        f"{subject}: is_swizzled_scales", data.get("is_swizzled_scales"), True, False
    )
    return _Order(tile=(32, 16) if swizzled else None)


def _kept(weights: Mapping[str, Tensor]) -> list[str]:
    """The linear modules, by the shape of their weights, that are not quantised."""
    return [
        name.removesuffix(".weight")
        for name, weight in weights.items()
        if name.endswith(".weight") and weight.dim() == 2
    ]


def _describe_modelopt(weights: Mapping[str, Tensor], modules: list[str]) -> Description:
    arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    return Description(
        {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_NVFP4",
            "config_groups": {"group_0": {"weights": arguments, "targets": ["Linear"]}},
            "ignore": _kept(weights),
        },
        {},
    )


def _describe_compressed(weights: Mapping[str, Tensor], modules: list[str]) -> Description:
    arguments = {
        "dynamic": False,
        "num_bits": 4,
        "type": "float",
        "group_size": BLOCK,
        "strategy": "tensor_group",
        "symmetric": True,
        "scale_dtype": str(torch.float8_e4m3fn),
    }
    group = {"weights": arguments, "targets": ["Linear"], "format": _FORMAT}
    return Description(
        {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": _kept(weights),
        },
        {},
    )


def _describe_torchao(weights: Mapping[str, Tensor], modules: list[str]) -> Description:
    config = {
        "quant_method": "torchao",
        "quant_type": {
            "default": {
                "_type": "NVFP4WeightOnlyConfig",
                "_version": 1,
                "_data": {"use_dynamic_per_tensor_scale": True},
            }
        },
        "modules_to_not_convert": _kept(weights),
    }
    header = {}
    for name in dict.fromkeys(plain_name(key) for key in weights):
        module = name.removesuffix(".weight")
        notes: dict[str, Any] = {"_type": "Tensor"}
        if module in modules:
            bias = weights.get(f"{module}.bias")
            dtype = torch.bfloat16 if bias is None else bias.dtype
            notes = {
                "_type": "NVFP4Tensor",
                "_data": {
                    "is_swizzled_scales": True,
                    "use_triton_kernel": False,
                    "act_quant_kwargs": None,
                    "block_size": BLOCK,
                    "orig_dtype": {
                        "_type": "torch.dtype",
                        "_data": str(dtype).removeprefix("torch."),
                    },
                },
                "_tensor_data_names": ["per_tensor_scale", "qdata", "scale"],
            }
        header[name] = json.dumps(notes)
    return Description(config, header | {_LISTED: json.dumps(list(header))})


CONVENTIONS: Mapping[str, Convention] = {
    "modelopt": Convention(
        ".weight",
        ".weight_scale",
        ".weight_scale_2",
        ".input_scale",
        _modelopt_order,
        _describe_modelopt,
    ),
    "compressed-tensors": Convention(
        ".weight_packed",
        ".weight_scale",
        ".weight_global_scale",
        ".input_global_scale",
        _compressed_order,
        _describe_compressed,
        divides=True,
        scale_shape=(1,),
    ),
    "torchao": Convention(
        "._weight_qdata",
        "._weight_scale",
        "._weight_per_tensor_scale",
        "._weight_act_per_tensor_scale",
        _torchao_order,
        _describe_torchao,
        optional=True,
        swizzled=(32, 16),
    ),
}
