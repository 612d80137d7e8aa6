"""Configurations of diffusers' WanTransformer3DModel: named ones, and how any is checked."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lltk.graph.loading import LOADING
from lltk.graph.weights import few

_MODEL = "WanTransformer3DModel"
NOTES = frozenset(
    {"torch_dtype", "dtype", "transformers_version", "diffusers_version", "architectures"}
    | {"auto_map", "library_name", "name_or_path", "license", "tags"}
)
"""Keys that tools write to a ``config.json`` and that say nothing of the model's graph."""
_IMAGE_KEYS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
# Keys of an original Wan configuration: diffusers' name for each, and the values lltk covers.
_FROM_WAN: Mapping[str, str] = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
} | {k: k for k in ("ffn_dim", "num_layers", "freq_dim", "text_dim", "eps", "patch_size")}
_WAN_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("t2v", "ti2v"),
    "window_size": ([-1, -1],),
    "qk_norm": (True,),
    "cross_attn_norm": (True,),
}


def _config(**sizes: int) -> Mapping[str, Any]:
    shared = {
        "patch_size": (1, 2, 2),
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }
    return MappingProxyType(shared | dict.fromkeys(_IMAGE_KEYS) | sizes)


CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "wan22_5b": _config(
            num_attention_heads=24,
            attention_head_dim=128,
            in_channels=48,
            out_channels=48,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=14336,
            num_layers=30,
        ),
        "tiny": _config(
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=24,
            out_channels=24,
            text_dim=64,
            freq_dim=64,
            ffn_dim=1024,
            num_layers=8,
        ),
    }
)


_LARGEST = 1 << 16
_BLOCKS = ("num_layers", "num_res_blocks")
_MOST_BLOCKS = 1 << 10
"""What a size may be, and how many blocks there may be; more is a slip, and takes forever."""


def named_config(name: str, configs: Mapping[str, Mapping[str, Any]] = CONFIGS) -> dict[str, Any]:
    """A copy of the configuration of a name; raises ValueError with the nearest for another."""
    if name not in configs:
        close = difflib.get_close_matches(name, configs, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(configs)}"
        raise ValueError(f"model configuration {name!r} is not known; {hint}")
    return dict(configs[name])


def validate_config(config: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """The configuration with diffusers' defaults, and without diffusers' notes (``_…`` keys).

    Args:
        config: arguments of WanTransformer3DModel.
        where: what errors call it.

    Raises:
        ValueError: its class, keys or types are not those of WanTransformer3DModel, or it has an
            image branch, which lltk does not cover.
    """
    with LOADING:
        from diffusers import WanTransformer3DModel

    full = fill_config(config, WanTransformer3DModel, where)
    if full["attention_head_dim"] % 2 or full["attention_head_dim"] < 6:
        raise ValueError(
            f"{where}: attention_head_dim is {full['attention_head_dim']}; RoPE turns pairs over "
            "three axes: write an even number from 6"
        )
    if len(full["patch_size"]) != 3 or full["patch_size"][0] != 1:
        raise ValueError(
            f"{where}: patch_size is {full['patch_size']}; lltk covers patches of one frame, such "
            "as (1, 2, 2)"
        )
    image = [f"{key}={full[key]!r}" for key in _IMAGE_KEYS if full[key] is not None]
    if image:
        raise ValueError(
            f"{where}: {', '.join(image)}: lltk does not cover image branches; use a text-to-video "
            "model, or TI2V, which takes its image as the first latent frame"
        )
    return full


def fill_config(config: Mapping[str, Any], model: type, where: str) -> dict[str, Any]:
    """The configuration with the defaults of a diffusers class, and without notes (``_…`` keys).

    Args:
        config: arguments of the class.
        model: the class.
        where: what errors call the configuration.

    Raises:
        ValueError: its class, keys or types are not those of the class.
    """
    name = model.__name__
    if config.get("_class_name", name) != name:
        raise ValueError(
            f"{where}: _class_name is {config['_class_name']!r}, not {name}; "
            f"use the folder of a {name}"
        )
    parameters = inspect.signature(model).parameters
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    _no_extra(given, parameters, name, where)
    return {
        key: _typed(key, given.get(key, parameter.default), parameter.default, where)
        for key, parameter in parameters.items()
    }


def without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` without `NOTES`."""
    return {key: value for key, value in config.items() if key not in NOTES}


def config_from_wan(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The diffusers configuration of what an original Wan ``config.json`` describes.

    Raises:
        ValueError: a size is missing, or as `validate_config`.
    """
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    _no_extra(given, {**_FROM_WAN, **_WAN_FIXED, "dim": None, "text_len": None}, _MODEL, where)
    for key, covered in _WAN_FIXED.items():
        if given.get(key, covered[0]) not in covered:
            raise ValueError(f"{where}: {key} is {given[key]!r}; lltk covers only {covered}")
    sizes = {k: given.get(k) for k in ("dim", "num_heads", "ffn_dim", "num_layers", "in_dim")}
    missing = [key for key, size in sizes.items() if type(size) is not int or size < 1]
    if missing or given["dim"] % given["num_heads"]:
        raise ValueError(
            f"{where}: {few(missing) or 'dim'} is not a size; an original Wan configuration needs "
            f"{', '.join(sizes)}, and dim a multiple of num_heads"
        )
    renamed = {new: given[old] for old, new in _FROM_WAN.items() if old in given}
    head_dim = given["dim"] // given["num_heads"]
    return validate_config(renamed | {"attention_head_dim": head_dim}, where)


def _no_extra(given: Mapping[str, Any], known: Mapping[str, Any], model: str, where: str) -> None:
    extra = sorted(given.keys() - known.keys())
    if extra:
        raise ValueError(
            f"{where}: a model diffusers cannot describe: {model} takes no {few(extra)}; "
            "use the model without these parts, or remove the keys if they mean nothing"
        )


def _typed(key: str, value: Any, default: Any, where: str) -> Any:
    if isinstance(default, tuple | list) and isinstance(value, tuple | list):
        value = type(default)(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise ValueError(f"{where}: {key} is {value!r}; write a {type(default).__name__}")
    kinds = {type(part) for part in default} if isinstance(default, list | tuple) else set()
    kinds |= {int} if float in kinds else set()
    if kinds and any(type(part) not in kinds for part in value):
        names = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{where}: {key} is {value!r}; each of its values is {names}")
    parts = value if isinstance(value, list | tuple) else [value]
    most = _MOST_BLOCKS if key in _BLOCKS else _LARGEST
    if len(parts) > _LARGEST or any(type(part) is int and not 0 < part <= most for part in parts):
        raise ValueError(f"{where}: {key} is {value!r}; write sizes from 1 to {most}")
    return value
