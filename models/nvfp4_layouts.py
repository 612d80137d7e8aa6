"""NVFP4 weights from and into the files of other libraries; `lltk.graph.packed` has lltk's form.

A file must say which convention it follows. A file that could be read in two ways is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lltk.graph.packed import (
    ENDINGS,
    check_codes,
    check_dtype,
    check_quantised,
    packed_weights,
    plain_name,
    quantised_entries,
    quantised_modules,
)
from lltk.graph.weights import few
from lltk.models.nvfp4_conventions import CONVENTIONS, Convention, Description, Order, declared
from lltk.ops.nvfp4_quantise.reference import BLOCK, Quantised
from lltk.ops.scale_layout import swizzle, unswizzle


def read_packed(
    state: Mapping[str, Tensor], description: Description, where: str
) -> tuple[dict[str, Tensor], str, dict[str, float]] | None:
    """The entries of a file, with NVFP4 weights in lltk's form; its convention; input scales.

    Codes and block scales are taken bit by bit. Where the convention divides by a tensor's scale,
    the decode scale is the float32 nearest to its reciprocal. Calibrated scales of activations,
    which multiply in lltk, are returned apart, by module.

    Args:
        state: entries under the file's names.
        description: what the file says of its quantisation.
        where: what errors call the file.

    Returns:
        None for a checkpoint that is not quantised and does not say that it is.

    Raises:
        ValueError: the description is missing, is of another kind, or does not say in which order
            nibbles or scales are. Or entries are missing, have a wrong shape, or are of two
            conventions. Or a block scale is NaN or negative, or a tensor's scale is not finite and
            above 0.
    """
    found = declared(description, where)
    if found is None:
        _check_plain(state, where)
        return None
    name, description = found
    convention = CONVENTIONS[name]
    foreign = tuple(_marks() - convention.marks)
    others = [key for key in state if key.endswith(foreign)]
    if others:
        raise ValueError(
            f"{where}: says that it is of {name}, but {few(others)} is not; keep the entries of "
            "one convention"
        )
    modules = quantised_modules(state, (*convention.endings, convention.activation))
    if not modules:
        raise ValueError(
            f"{where}: says that it is of {name}, but holds no NVFP4 weight; remove its "
            "quantization_config, or download it again"
        )
    entries, inputs = dict(state), {}
    for module in modules:
        if (scale := state.get(module + convention.activation)) is not None:
            inputs[module] = _input_scale(convention, scale, f"{where}: {module}")
        order = convention.order(description, module, where)
        weight = _decode(convention, state, module, order, where)
        for ending in (*convention.endings, convention.activation):
            entries.pop(module + ending, None)
        entries |= {module + end: part for end, part in zip(ENDINGS, weight, strict=True)}
    return entries, name, inputs


def _input_scale(convention: Convention, scale: Tensor, subject: str) -> float:
    """An activation's scale as lltk has it, largest magnitude / 2688."""
    made = float(scale) if scale.numel() == 1 and scale.is_floating_point() else math.nan
    if convention.divides and made:
        made = 1 / made
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= made <= limits.max:
        raise ValueError(
            f"{subject}{convention.activation} is no number above 0 that float32 holds; calibrate "
            "the model again"
        )
    return made


def write_packed(
    weights: Mapping[str, Tensor], name: str, where: str
) -> tuple[dict[str, Tensor], Description]:
    """The entries of a file in a convention, and what the file must say of its quantisation.

    Codes and block scales are written bit by bit. Where the convention divides by a tensor's scale,
    it is the float32 nearest to the decode scale's reciprocal. Files say that weights are
    quantised and activations are not (W4A16).

    Args:
        weights: plain entries, and NVFP4 weights in lltk's form.
        name: one of `CONVENTIONS`.
        where: what errors call the file.

    Raises:
        ValueError: no weight is quantised, one is refused by `packed_weights`, or a decode scale
            has no reciprocal in float32.
    """
    convention = CONVENTIONS[name]
    packed = packed_weights(weights, where)
    if not packed:
        raise ValueError(f"{where}: no weight is in NVFP4; use the layout 'diffusers'")
    plain = {key: value for key, value in weights.items() if key == plain_name(key)}
    state = dict(plain)
    for module, weight in packed.items():
        parts = _encode(convention, weight, f"{where}: {module}")
        state |= {module + end: part for end, part in zip(convention.endings, parts, strict=True)}
    return state, convention.describe(plain, list(packed))


def _marks() -> set[str]:
    return set(ENDINGS).union(*(convention.marks for convention in CONVENTIONS.values()))


def _check_plain(state: Mapping[str, Tensor], where: str) -> None:
    marks = tuple(_marks())
    quantised = [
        key
        for key, value in state.items()
        if key.endswith(marks) or not value.is_floating_point() or value.dtype.itemsize == 1
    ]
    if quantised:
        raise ValueError(
            f"{where}: holds quantised weights ({few(quantised)}) but does not say how they lie: "
            "no quantization_config, no torchao metadata; name the folder with its config.json, "
            "or use weights that are not quantised"
        )


def _decode(
    convention: Convention, state: Mapping[str, Tensor], module: str, order: Order, where: str
) -> Quantised:
    subject, endings = f"{where}: {module}", convention.endings
    if convention.scale_optional:
        state = {module + endings[2]: torch.ones(())} | dict(state)
    codes, scales, scale = quantised_entries(state, module, endings, where)
    if scales.dtype is torch.uint8 and order.e4m3:
        scales = scales.view(torch.float8_e4m3fn)
    if order.tile is not None:
        check_codes(codes, subject + endings[0])
        check_dtype(scales, torch.float8_e4m3fn, subject + endings[1])
        scales = _unswizzled(scales, codes.shape, order.tile, subject + endings[1])
    if scale.numel() == 1:
        scale = scale.reshape(())
    check_quantised(Quantised(codes, scales, scale), subject, endings)
    if convention.divides:
        scale = _reciprocal(scale, subject + endings[2])
    if order.swapped:
        codes = (codes >> 4) | (codes << 4)
    return Quantised(codes, scales, scale)


def _encode(convention: Convention, weight: Quantised, subject: str) -> Quantised:
    codes, scales, scale = weight
    if convention.tile is not None:
        flat = swizzle(scales.view(torch.uint8)).view(torch.float8_e4m3fn)
        scales = flat.reshape(_swizzled_shape(scales.shape, convention.tile))
    if convention.divides:
        scale = _reciprocal(scale, subject + ENDINGS[2])
    return Quantised(codes, scales, scale.reshape(convention.scale_shape))


def _swizzled_shape(shape: torch.Size, tile: tuple[int, int]) -> tuple[int, int]:
    rows, columns = shape
    return -(-rows // 128) * tile[0], -(-columns // 4) * tile[1]


def _unswizzled(scales: Tensor, codes: torch.Size, tile: tuple[int, int], subject: str) -> Tensor:
    rows, columns = codes[0], codes[1] * 2 // BLOCK
    expected = _swizzled_shape(torch.Size((rows, columns)), tile)
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"{subject} is {tuple(scales.shape)}; swizzled scales of {rows}×{columns} blocks are "
            f"{expected}; correct what the file says of their order"
        )
    flat = scales.contiguous().view(torch.uint8).flatten()
    return unswizzle(flat, rows, columns).view(torch.float8_e4m3fn)


def _reciprocal(scale: Tensor, subject: str) -> Tensor:
    inverse = 1 / scale
    if not inverse.isfinite() or inverse == 0:
        raise ValueError(
            f"{subject} is {scale.item()!r}, whose reciprocal float32 does not hold; use a "
            "convention that multiplies, modelopt or torchao"
        )
    return inverse
