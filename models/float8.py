"""Weights that files hold in float8, with or without scales, as bfloat16.

A scale lies beside its weight, under the weight's name and one of these endings:

| writer | scale | what else there is |
|---|---|---|
| ComfyUI, older | ``scale_weight`` | ``scale_input``, and ``scaled_fp8`` once in the file |
| ComfyUI | ``weight_scale`` | ``input_scale``, ``comfy_quant`` |
| modelopt, compressed-tensors, lightx2v | ``weight_scale`` | ``input_scale`` |
| Transformers' ``fp8`` | ``weight_scale_inv`` | ``activation_scale`` |

In all of them a value is the float8 number times its scale: one for the tensor, one a row, or one a
block of equal size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lltk.graph.weights import few
from lltk.models.nvfp4_conventions import CONFIG, LAYERS, Description, parse_object

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_NOTES = ("scale_input", "input_scale", "activation_scale", "comfy_quant")
_FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
_WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def widened(
    state: Mapping[str, Tensor], description: Description, where: str
) -> tuple[dict[str, Tensor], Description]:
    """The weights, those in float8 as bfloat16 with their scales applied.

    bfloat16 holds every value of float8. Products with a scale are rounded to it. A wider weight
    that has a scale is multiplied by it, and keeps its dtype. Scales of activations are left out,
    as lltk computes them when it runs. NVFP4 weights are left as they are.

    Args:
        state: entries under the file's names.
        description: what the file says of its quantisation.
        where: what errors call the file.

    Returns:
        The entries, and the description, which is empty if it was of float8.

    Raises:
        ValueError: some matrices in float8 have a scale and others not, or a scale does not fit its
            weight.
    """
    packed = {
        _module(key)
        for key, value in state.items()
        if value.dtype is torch.uint8 and not key.endswith(_NOTES)
    }
    marked = any(_is_marker(key) for key in state)
    entries = {key: value for key, value in state.items() if not _is_marker(key)}
    scales = {
        f"{_module(key)}weight": key
        for key in entries
        if key.endswith(_SCALES) and _module(key) not in packed
    }
    narrow = [
        key
        for key, value in entries.items()
        if value.dtype in _FLOAT8 and _module(key) not in packed and key not in scales.values()
    ]
    described = _is_float8(description, where)
    alone = [key for key in narrow if key not in scales and entries[key].dim() > 1]
    if alone and (scales or marked or described):
        raise ValueError(
            f"{where}: holds scaled float8, but {len(alone)} of its matrices have no scale "
            f"({few(alone)}); download it again"
        )
    for name, key in scales.items():
        if name not in entries:
            raise ValueError(f"{where}: {key} is a scale without {name}; download it again")
        entries[name] = _product(entries[name], entries.pop(key), f"{where}: {key}")
        for note in _NOTES:
            entries.pop(_module(key) + note, None)
    for name in narrow:
        entries[name] = entries[name].to(torch.bfloat16)
    return entries, Description(None, {}) if described and narrow else description


def _product(weight: Tensor, scale: Tensor, subject: str) -> Tensor:
    if scale.dtype not in _WIDE or weight.dtype not in _WIDE + _FLOAT8:
        raise ValueError(
            f"{subject}: {scale.dtype} scales of a weight in {weight.dtype} are not scaled float8; "
            "use a checkpoint in float8 with float scales, or in bfloat16"
        )
    if scale.numel() == 1:
        spread = scale.reshape(())
    else:
        rows = scale.dim() == 1
        spread = scale.reshape(-1, *[1] * (weight.dim() - 1)) if rows else scale
        if spread.dim() != weight.dim() or any(
            size % parts for size, parts in zip(weight.shape, spread.shape, strict=True)
        ):
            raise ValueError(
                f"{subject} is {tuple(scale.shape)}, but its weight {tuple(weight.shape)}; a scale "
                "is one number, one a row or one a block: download it again"
            )
        for axis, size in enumerate(weight.shape):
            if spread.shape[axis] > 1:
                spread = spread.repeat_interleave(size // spread.shape[axis], axis)
    wide = weight.dtype if weight.dtype in _WIDE else torch.bfloat16
    return (weight.float() * spread.float()).to(wide)


def _module(key: str) -> str:
    """The module's name with its dot, and an empty one for an entry of the file's own."""
    return key[: key.rfind(".") + 1]


def _is_marker(key: str) -> bool:
    return key.rsplit(".", 1)[-1] == "scaled_fp8"


def _is_float8(description: Description, where: str) -> bool:
    """Whether a file says that it is in float8."""
    config, header = description.config, description.header
    if config is None and CONFIG in header:
        config = parse_object(header[CONFIG], f"{where}: {CONFIG} in its header")
    if config is None and LAYERS in header:
        layers = parse_object(header[LAYERS], f"{where}: {LAYERS} in its header").get("layers")
        kinds = list(layers.values()) if isinstance(layers, dict) else []
        return bool(kinds) and all(
            isinstance(kind, dict) and str(kind.get("format")).startswith("float8")
            for kind in kinds
        )
    config = config or {}
    match config.get("quant_method"):
        case "modelopt":
            return str(config.get("quant_algo")).startswith("FP8")
        case "compressed-tensors":
            return config.get("format") == "float-quantized" and not config.get("transform_config")
        case method:
            return method == "fp8"
