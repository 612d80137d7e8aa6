"""Weights that a state dict holds in NVFP4 or in FP8.

A weight [N, K] in NVFP4 is three entries. Its values are e2m1(code) · scale · decode scale:

| entry | dtype and shape |
|---|---|
| ``<module>.weight_codes`` | uint8 [N, K/2], the even element in the low nibble |
| ``<module>.weight_scales`` | float8_e4m3fn [N, K/16], by rows |
| ``<module>.weight_decode_scale`` | float32 [] |

A weight in FP8 is two entries. Its values are value · scale:

| entry | dtype and shape |
|---|---|
| ``<module>.weight_values`` | float8_e4m3fn [N, K] |
| ``<module>.weight_row_scales`` | float32 [N, 1], by rows |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lltk.graph.contract import TensorSpec
from lltk.ops.fp8_conv3d.reference import fold_taps, unfold_taps
from lltk.ops.fp8_rows import fp8_quantise, new_fp8
from lltk.ops.nvfp4_quantise.reference import BLOCK, Quantised

DECODE_SCALE = "weight_decode_scale"
ENDINGS = (".weight_codes", ".weight_scales", f".{DECODE_SCALE}")
"""What follows the module's path in the entries of a weight in NVFP4: codes first."""
INPUT_SCALE = "input_scale"
"""The last part of the name of an activation's calibrated scale, float32 []: largest / 2688."""
ROW_SCALES = "weight_row_scales"
FP8_ENDINGS = (".weight_values", f".{ROW_SCALES}")
"""What follows the module's path in the entries of a weight in FP8: values first."""
_ENDING = re.compile(r"\.weight_(codes|scales|decode_scale)$")
_FIRST_BROKEN = 0x7F
"""The bytes of E4M3 from this one up are NaN or negative, those below are neither."""
_E4M3_NAN = 0x7F
"""The byte of E4M3 that is NaN, its sign bit aside."""


def broken_scales(scales: Tensor) -> int:
    """How many block scales in E4M3 are NaN or negative, which no scale may be."""
    return int((scales.view(torch.uint8) >= _FIRST_BROKEN).sum())


def is_packed(weights: Iterable[str]) -> bool:
    """Whether a state dict, or its names alone, have NVFP4 weights in lltk's form."""
    return any(_ENDING.search(name) for name in weights)


def plain_name(name: str) -> str:
    """``<module>.weight`` for the name of an NVFP4 weight's entry; any other name as it is."""
    return _ENDING.sub(".weight", name)


def packed_weights(weights: Mapping[str, Tensor], where: str) -> dict[str, Quantised]:
    """The NVFP4 weights in lltk's form, by module.

    Args:
        weights: a state dict.
        where: what errors call it.

    Raises:
        ValueError: a weight lacks an entry, its entries do not fit together, a block scale is NaN
            or negative, or a decode scale is not finite and above 0.
    """
    found = {}
    for module in quantised_modules(weights, ENDINGS):
        weight = quantised_entries(weights, module, ENDINGS, where)
        check_quantised(weight, f"{where}: {module}", ENDINGS)
        found[module] = weight
    return found


def quantised_modules(state: Mapping[str, Tensor], endings: tuple[str, ...]) -> list[str]:
    """The modules of whose quantised weight a state dict has at least one entry."""
    found = [
        key.removesuffix(ending)
        for key, value in state.items()
        for ending in endings
        if key.endswith(ending) and (ending != ".weight" or value.dtype is torch.uint8)
    ]
    return list(dict.fromkeys(found))


def quantised_entries(
    state: Mapping[str, Tensor], module: str, endings: tuple[str, str, str], where: str
) -> Quantised:
    """A module's quantised weight.

    Raises:
        ValueError: an entry is missing, or there is a plain weight too.
    """
    _check_whole(state, module, endings, where)
    return Quantised(*(state[module + ending] for ending in endings))


def _check_whole(
    state: Mapping[str, Tensor], module: str, endings: tuple[str, ...], where: str
) -> None:
    missing = [module + ending for ending in endings if module + ending not in state]
    if missing:
        raise ValueError(
            f"{where}: {module} is quantised, but {', '.join(missing)} is missing; add it"
        )
    if not {".weight", ENDINGS[0]} & set(endings) and f"{module}.weight" in state:
        raise ValueError(f"{where}: {module} has a plain weight and a quantised one; keep one")


def check_quantised(weight: Quantised, subject: str, endings: tuple[str, str, str]) -> None:
    """Raise ValueError unless a weight fits together and decodes to numbers."""
    codes, scales, scale = weight
    of_codes, of_scales, of_scale = (subject + ending for ending in endings)
    check_codes(codes, of_codes)
    check_dtype(scales, torch.float8_e4m3fn, of_scales)
    check_dtype(scale, torch.float32, of_scale)
    expected = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"{of_scales} is {tuple(scales.shape)}; codes of {tuple(codes.shape)} have scales of "
            f"{expected}, one for {BLOCK} elements of a row; other blocks are not NVFP4"
        )
    if scale.dim():
        raise ValueError(f"{of_scale} is {tuple(scale.shape)}; NVFP4 has one number a weight")
    if scales.is_meta:
        return
    if broken := broken_scales(scales):
        raise ValueError(
            f"{of_scales}: {broken} of {scales.numel()} are NaN or negative; quantise the weight "
            "again"
        )
    if not scale.isfinite() or scale <= 0:
        raise ValueError(
            f"{of_scale} is {scale.item()!r}; it must be finite and above 0, 1 for a weight of "
            "zeros; quantise the weight again"
        )


def pack_fp8(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] in FP8: its values, and a scale for each row.

    Args:
        name: what errors call the weight.
        weight: floating point; a meta tensor gives meta tensors.

    Raises:
        ValueError: the weight is not finite.
    """
    if weight.is_meta:
        return new_fp8(weight)
    values, scales = fp8_quantise(weight)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{name}: is not finite; repair the checkpoint")
    return values, scales


@dataclass(frozen=True)
class Fp8Weights:
    """The state map of weights that a pass stores in FP8; weights in FP8 already stay as they are.

    The weight of a convolution, [O, C, 3, 3, 3], is stored as the rows of `fold_taps`.

    Attributes:
        before: the weights as they were, by module.
    """

    before: Mapping[str, TensorSpec]

    def map_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pack the weights."""
        mapped = dict(state)
        for module, weight in self.before.items():
            name = f"{module}.weight"
            if name in mapped:
                rows = mapped.pop(name)
                packed = pack_fp8(name, rows if len(weight.shape) == 2 else fold_taps(rows))
                mapped |= zip((module + ending for ending in FP8_ENDINGS), packed, strict=True)
        return mapped

    def unmap_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode the packed weights, in the dtype that they had."""
        mapped = dict(state)
        for module, weight in self.before.items():
            if module + FP8_ENDINGS[0] in mapped:
                values, scales = (mapped.pop(module + ending) for ending in FP8_ENDINGS)
                rows = values.float() * scales
                plain = rows if len(weight.shape) == 2 else unfold_taps(rows)
                mapped[f"{module}.weight"] = plain.to(weight.dtype).contiguous()
        return mapped


def check_fp8_weights(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError unless every weight in FP8 is whole, alone and decodes to numbers."""
    for module in quantised_modules(weights, FP8_ENDINGS):
        _check_whole(weights, module, FP8_ENDINGS, where)
        values, scales = (weights[module + ending] for ending in FP8_ENDINGS)
        of_values, of_scales = (f"{where}: {module}{ending}" for ending in FP8_ENDINGS)
        _check_values(values, of_values)
        _check_row_scales(scales, values, of_scales)


def _check_values(values: Tensor, subject: str) -> None:
    check_dtype(values, torch.float8_e4m3fn, subject)
    if values.dim() != 2:
        raise ValueError(
            f"{subject} is {tuple(values.shape)}; values are [N, K]; quantise the weight again"
        )
    if values.is_meta:
        return
    if broken := int((values.view(torch.uint8) & _E4M3_NAN == _E4M3_NAN).sum()):
        raise ValueError(
            f"{subject}: {broken} of {values.numel()} are NaN; quantise the weight again"
        )


def _check_row_scales(scales: Tensor, values: Tensor, subject: str) -> None:
    check_dtype(scales, torch.float32, subject)
    expected = (values.shape[0], 1)
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"{subject} is {tuple(scales.shape)}; values of {tuple(values.shape)} have scales of "
            f"{expected}, one a row; quantise the weight again"
        )
    if scales.is_meta:
        return
    if broken := int((~scales.isfinite() | (scales <= 0)).sum()):
        raise ValueError(
            f"{subject}: {broken} of {scales.numel()} are not finite and above 0, 1 for a row of "
            "zeros; quantise the weight again"
        )


def check_codes(codes: Tensor, subject: str) -> None:
    """Raise ValueError unless these are packed codes of whole blocks."""
    check_dtype(codes, torch.uint8, subject)
    if codes.dim() != 2 or codes.shape[1] * 2 % BLOCK:
        raise ValueError(
            f"{subject} is {tuple(codes.shape)}; codes are [N, K/2] with K a multiple of {BLOCK}; "
            "pad the weight before it is quantised"
        )


def check_dtype(tensor: Tensor, dtype: torch.dtype, subject: str) -> None:
    """Raise ValueError unless a tensor has this dtype."""
    if tensor.dtype is not dtype:
        bytes_only = tensor.dtype is torch.uint8
        unsaid = ", and nothing says whether its bytes are E4M3 or E8M0" if bytes_only else ""
        raise ValueError(f"{subject} is {tensor.dtype}, not {dtype}{unsaid}; convert it")
