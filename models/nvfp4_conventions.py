"""How modelopt, compressed-tensors and torchao store NVFP4 weights, and what their files say.

A convention names its entries, finds out from a file's description how a weight is stored, and
describes the files that lltk writes. docs/nvfp4-files.md compares the conventions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lltk.files.reading import parse_json
from lltk.ops.nvfp4_quantise.reference import BLOCK

_PACKED = "nvfp4-pack-quantized"
_E4M3 = str(torch.float8_e4m3fn)
# Entries of safetensors headers: torchao's, and those of modelopt's exports to one file.
_TORCHAO, CONFIG, LAYERS = "tensor_names", "quantization_config", "_quantization_metadata"
HEADER_ENTRIES = frozenset({_TORCHAO, CONFIG, LAYERS})
"""Entries of a safetensors header. A header that describes quantised weights has one of them."""
_AGAIN = "use the files as they were exported"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its quantisation.

    Attributes:
        config: ``quantization_config`` of its ``config.json``; None where there is none.
        header: the metadata of its safetensors files.
    """

    config: Mapping[str, Any] | None
    header: Mapping[str, str]


class Order(NamedTuple):
    """How a weight is stored in its file.

    Attributes:
        swapped: whether the even element is in the high nibble.
        tile: the shape that a GEMM tile of 128×4 scales has in the file; None for scales by rows.
        e4m3: whether the file says that scales are E4M3, so that plain bytes may stand for them.
    """

    swapped: bool = False
    tile: tuple[int, int] | None = None
    e4m3: bool = False


@dataclass(frozen=True)
class Convention:
    """How a library's files hold NVFP4 weights.

    Attributes:
        endings: what follows the module's name in the keys of codes, of block scales, and of the
            tensor's scale.
        activation: what follows it in the key of the activation's scale, which lltk does not use.
        order: finds out how a module's weight is stored, from the file's description, the module's
            name and the file's name. Raises ValueError if it is of another kind, or not said.
        describe: what a file says of its quantisation, from its plain entries and the quantised
            modules.
        divides: whether values are divided by the tensor's scale instead of multiplied by it.
        scale_shape: shape of the tensor's scale.
        scale_optional: whether a weight may lack the tensor's scale, which is then 1.
        tile: as `Order.tile`, in files that lltk writes.
    """

    endings: tuple[str, str, str]
    activation: str
    order: Callable[[Description, str, str], Order]
    describe: Callable[[Mapping[str, Tensor], list[str]], Description]
    divides: bool = False
    scale_shape: tuple[int, ...] = ()
    scale_optional: bool = False
    tile: tuple[int, int] | None = None

    @property
    def marks(self) -> set[str]:
        """What only the keys of quantised weights end in."""
        return {*self.endings, self.activation} - {".weight"}


def declared(description: Description, where: str) -> tuple[str, Description] | None:
    """The convention that a checkpoint says it follows, and its description, completed.

    A configuration that only a safetensors header has is completed from there.

    Returns:
        None if it says nothing of quantisation.

    Raises:
        ValueError: it follows another convention, contradicts itself, or says too little.
    """
    config, header = description.config, description.header
    if config is None and CONFIG in header:
        config = parse_object(header[CONFIG], f"{where}: {CONFIG} in its header")
    if config is None and _TORCHAO in header:
        return "torchao", description
    if config is None and LAYERS in header:
        raise ValueError(
            f"{where}: its header names quantised layers ({LAYERS}), but neither the order of "
            "nibbles nor that of scales; use a folder that modelopt exported, with its config.json"
        )
    if config is None:
        return None
    name = _required(f"{where}: quant_method", config.get("quant_method"), *CONVENTIONS)
    if (name == "torchao") != (_TORCHAO in header):
        has = "lacks" if name == "torchao" else "has"
        raise ValueError(
            f"{where}: quant_method is {name!r}, but its header {has} torchao's {_TORCHAO!r}; "
            "use the config.json and the weights of one export"
        )
    return name, Description(config, header)


def parse_object(text: str | bytes, subject: object) -> dict[str, Any]:
    """The JSON object of a text; raises ValueError, which names ``subject``, if it is none."""
    content = parse_json(text, str(subject))
    if not isinstance(content, dict):
        raise ValueError(f"{subject}: its JSON is not an object; download it again")
    return content


def _required(subject: str, found: Any, *allowed: Any) -> Any:
    if not any(type(found) is type(value) and found == value for value in allowed):
        wanted = " or ".join(repr(value) for value in allowed if value is not None)
        raise ValueError(f"{subject} is {found!r}; lltk reads {wanted}: use an export with that")
    return found


def _weight_groups(config: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The ``weights`` of a configuration's groups; raises ValueError if one is not NVFP4."""
    groups = config.get("config_groups", {})
    try:
        weights = [group["weights"] for group in groups.values()]
        for group in weights:
            _required(f"{where}: num_bits of weights", group["num_bits"], 4)
            _required(f"{where}: type of weights", group["type"], "float")
            _required(f"{where}: group_size of weights", group["group_size"], BLOCK)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: config_groups without the format of weights ({error}); {_AGAIN}"
        ) from error
    return weights


def _check_kept(module: str, ignored: Any, where: str) -> None:
    """Raise ValueError if a quantised module is named among those that are not quantised."""
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise ValueError(f"{where}: ignored modules are {ignored!r}, not a list; {_AGAIN}")
    for name in ignored:
        regular = name.startswith("re:") and re.match(name[3:], module)
        if regular or fnmatchcase(module, name):
            raise ValueError(
                f"{where}: {module} is quantised, but {name!r} says that it is not; {_AGAIN}"
            )


def _linear(plain: Mapping[str, Tensor]) -> list[str]:
    """The modules of plain entries that are linears, by the shape of their weights."""
    return [
        name.removesuffix(".weight")
        for name, weight in plain.items()
        if name.endswith(".weight") and weight.dim() == 2
    ]


_WEIGHTS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}


def _modelopt_order(description: Description, module: str, where: str) -> Order:
    config, header = description.config or {}, description.header
    _required(f"{where}: quant_algo", config.get("quant_algo"), "NVFP4", "W4A16_NVFP4")
    _required(f"{where}: group_size", config.get("group_size"), None, BLOCK)
    _weight_groups(config, where)
    _check_kept(module, config.get("ignore", config.get("exclude_modules")) or [], where)
    # These two keys are SGLang's, whose loader reads the same files.
    scales = config.get("checkpoint_weight_scale_layout")
    swapped = config.get("swap_weight_nibbles")
    _required(f"{where}: checkpoint_weight_scale_layout", scales, None, "linear", "swizzled")
    _required(f"{where}: swap_weight_nibbles", swapped, None, False, True)
    if scales is None and (CONFIG in header or LAYERS in header):
        raise ValueError(
            f"{where}: exported to one file, with scales by rows or swizzled; say which: "
            'checkpoint_weight_scale_layout "linear" or "swizzled" in quantization_config'
        )
    if swapped is None and LAYERS in header:
        raise ValueError(
            f"{where}: {LAYERS} in its header: nibbles may be in either order; say which: "
            "swap_weight_nibbles in quantization_config, true for the even element in the high one"
        )
    return Order(swapped=bool(swapped), tile=(128, 4) if scales == "swizzled" else None)


def _describe_modelopt(plain: Mapping[str, Tensor], modules: list[str]) -> Description:
    config = {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "config_groups": {"group_0": {"weights": _WEIGHTS, "targets": ["Linear"]}},
        "ignore": _linear(plain),
    }
    return Description(config, {})


def _compressed_order(description: Description, module: str, where: str) -> Order:
    config = description.config or {}
    _required(f"{where}: format", config.get("format"), _PACKED)
    _required(f"{where}: quantization_status", config.get("quantization_status"), "compressed")
    groups = _weight_groups(config, where)
    for weights in groups:
        _required(f"{where}: symmetric of weights", weights.get("symmetric"), True)
        _required(f"{where}: strategy of weights", weights.get("strategy"), "tensor_group")
        _required(f"{where}: scale_dtype of weights", weights.get("scale_dtype"), None, _E4M3)
    _check_kept(module, config.get("ignore") or [], where)
    if config.get("transform_config"):
        raise ValueError(
            f"{where}: transform_config: its weights are rotated, which lltk does not undo; use an "
            "export without transforms"
        )
    return Order(e4m3=bool(groups) and all(group.get("scale_dtype") for group in groups))


def _describe_compressed(plain: Mapping[str, Tensor], modules: list[str]) -> Description:
    weights = {"strategy": "tensor_group", "symmetric": True, "scale_dtype": _E4M3, **_WEIGHTS}
    config = {
        "quant_method": "compressed-tensors",
        "format": _PACKED,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"weights": weights, "targets": ["Linear"], "format": _PACKED}
        },
        "ignore": _linear(plain),
    }
    return Description(config, {})


def _torchao_order(description: Description, module: str, where: str) -> Order:
    name = f"{module}.weight"
    subject = f"{where}: {name} in its header"
    if name not in description.header:
        raise ValueError(f"{subject} is missing; {_AGAIN}")
    notes = parse_object(description.header[name], subject)
    _required(f"{subject}: _type", notes.get("_type"), "NVFP4Tensor")
    data = notes.get("_data")
    if not isinstance(data, dict):
        raise ValueError(f"{subject}: _data is {data!r}, not an object; {_AGAIN}")
    _required(f"{subject}: block_size", data.get("block_size"), BLOCK)
    swizzled = data.get("is_swizzled_scales")
    _required(f"{subject}: is_swizzled_scales", swizzled, False, True)
    return Order(tile=(32, 16) if swizzled else None)


def _describe_torchao(plain: Mapping[str, Tensor], modules: list[str]) -> Description:
    kind = {
        "_type": "NVFP4WeightOnlyConfig",
        "_version": 1,
        "_data": {"use_dynamic_per_tensor_scale": True},
    }
    config = {
        "quant_method": "torchao",
        "quant_type": {"default": kind},
        "modules_to_not_convert": _linear(plain),
    }
    header = {name: json.dumps({"_type": "Tensor"}) for name in plain}
    for module in modules:
        # The dtype that products with the weight have, which is that of the bias added to them.
        bias = plain.get(f"{module}.bias")
        dtype = str(torch.bfloat16 if bias is None else bias.dtype).removeprefix("torch.")
        data = {
            "is_swizzled_scales": True,
            "use_triton_kernel": False,
            "act_quant_kwargs": None,
            "block_size": BLOCK,
            "orig_dtype": {"_type": "torch.dtype", "_data": dtype},
        }
        tensors = ["per_tensor_scale", "qdata", "scale"]
        notes = {"_type": "NVFP4Tensor", "_data": data, "_tensor_data_names": tensors}
        header[f"{module}.weight"] = json.dumps(notes)
    return Description(config, header | {_TORCHAO: json.dumps(list(header))})


CONVENTIONS: Mapping[str, Convention] = {
    "modelopt": Convention(
        (".weight", ".weight_scale", ".weight_scale_2"),
        ".input_scale",
        _modelopt_order,
        _describe_modelopt,
    ),
    "compressed-tensors": Convention(
        (".weight_packed", ".weight_scale", ".weight_global_scale"),
        ".input_global_scale",
        _compressed_order,
        _describe_compressed,
        divides=True,
        scale_shape=(1,),
    ),
    "torchao": Convention(
        ("._weight_qdata", "._weight_scale", "._weight_per_tensor_scale"),
        "._weight_act_per_tensor_scale",
        _torchao_order,
        _describe_torchao,
        scale_optional=True,
        tile=(32, 16),
    ),
}
