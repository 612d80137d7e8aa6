"""NVFP4 weights in lltk's own form, and from and into the files of other libraries.

A quantised weight [N, K] is three entries of a state dict; x̂ = e2m1(code) · scale · decode scale:

| entry | dtype and shape |
|---|---|
| ``<module>.weight_codes`` | uint8 [N, K/2], the even element in the low nibble |
| ``<module>.weight_scales`` | float8_e4m3fn [N, K/16], by rows |
| ``<module>.weight_decode_scale`` | float32 [] |

A file of another convention must say what it is; what leaves room for two readings is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lltk.models.layouts import few
from lltk.models.nvfp4_conventions import CONVENTIONS, Convention, Description, Order, declared
from lltk.ops.nvfp4_quantise.reference import BLOCK, Quantised
from lltk.ops.scale_layout import swizzle, unswizzle

_OWN = (".weight_codes", ".weight_scales", ".weight_decode_scale")
_OWN_ENDING = re.compile(r"\.weight_(codes|scales|decode_scale)$")
_FIRST_BROKEN = 0x7F
"""The least byte of E4M3 that is NaN or negative; all above it are too."""


def is_packed(weights: Iterable[str]) -> bool:
    """Whether a state dict, or its names, hold NVFP4 weights in lltk's form."""
    return any(_OWN_ENDING.search(name) for name in weights)


def plain_name(name: str) -> str:
    """``<module>.weight`` for an entry of a quantised weight; other names as they are."""
    return _OWN_ENDING.sub(".weight", name)


def packed_weights(weights: Mapping[str, Tensor], where: str) -> dict[str, Quantised]:
    """The NVFP4 weights in lltk's form, by module.

    Raises:
        ValueError: one is not whole or does not fit, a block scale is NaN or negative, or a decode
            scale is not finite and above 0.
    """
    found = {}
    for module in _modules(weights, _OWN):
        weight = _entries(weights, module, _OWN, where)
        _check(weight, f"{where}: {module}", _OWN)
        found[module] = weight
    return found


def read_packed(
    state: Mapping[str, Tensor], description: Description, where: str
) -> tuple[dict[str, Tensor], str] | None:
    """The entries of a file, with NVFP4 weights in lltk's form, and the name of its convention.

    Codes and block scales come bit by bit; a scale that divides becomes the float32 nearest to its
    reciprocal. Activations' scales are left out: lltk computes them as it runs.

    Args:
        state: entries under the file's names.
        description: what the file says of itself.
        where: the file, for errors.

    Returns:
        None for a checkpoint that neither is quantised nor says so.

    Raises:
        ValueError: the description is missing, of another kind, or leaves the order of nibbles or
            scales open; entries are missing, misshapen, or of two conventions; a block scale is
            NaN or negative; a tensor's scale is not finite and above 0.
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
    modules = _modules(state, (*convention.endings, convention.activation))
    if not modules:
        raise ValueError(
            f"{where}: says that it is of {name}, but holds no NVFP4 weight; remove its "
            "quantization_config, or download it again"
        )
    entries = dict(state)
    for module in modules:
        order = convention.order(description, module, where)
        weight = _decode(convention, state, module, order, where)
        for ending in (*convention.endings, convention.activation):
            entries.pop(module + ending, None)
        entries |= {module + end: part for end, part in zip(_OWN, weight, strict=True)}
    return entries, name


def write_packed(
    weights: Mapping[str, Tensor], name: str, where: str
) -> tuple[dict[str, Tensor], Description]:
    """The entries of a file in a convention, and what the file must say of itself.

    Codes and block scales are written bit by bit; where the tensor's scale divides, the float32
    nearest to the decode scale's reciprocal. Files describe quantised weights alone (W4A16).

    Args:
        weights: plain entries, and NVFP4 weights in lltk's form.
        name: one of `CONVENTIONS`.
        where: the file, for errors.

    Raises:
        ValueError: no weight is quantised, one is refused by `packed_weights`, or a decode scale
            has no reciprocal in float32.
    """
    convention = CONVENTIONS[name]
    packed = packed_weights(weights, where)
    if not packed:
        raise ValueError(f"{where}: no weight is in NVFP4; use the layout 'diffusers'")
    plain = {key: value for key, value in weights.items() if not _OWN_ENDING.search(key)}
    state = dict(plain)
    for module, weight in packed.items():
        parts = _encode(convention, weight, f"{where}: {module}")
        state |= {module + end: part for end, part in zip(convention.endings, parts, strict=True)}
    return state, convention.describe(plain, list(packed))


def _marks() -> set[str]:
    return set(_OWN).union(*(convention.marks for convention in CONVENTIONS.values()))


def _check_plain(state: Mapping[str, Tensor], where: str) -> None:
    marks = tuple(_marks())
    quantised = [
        key for key, value in state.items() if key.endswith(marks) or value.dtype is torch.uint8
    ]
    if quantised:
        raise ValueError(
            f"{where}: holds quantised weights ({few(quantised)}) but does not say how they lie: "
            "no quantization_config, no torchao metadata; name the folder with its config.json, "
            "or use weights that are not quantised"
        )


def _modules(state: Mapping[str, Tensor], endings: tuple[str, ...]) -> list[str]:
    """The modules of which a state has any entry of a quantised weight."""
    found = [
        key.removesuffix(ending)
        for key, value in state.items()
        for ending in endings
        if key.endswith(ending) and (ending != ".weight" or value.dtype is torch.uint8)
    ]
    return list(dict.fromkeys(found))


def _entries(
    state: Mapping[str, Tensor], module: str, endings: tuple[str, str, str], where: str
) -> Quantised:
    missing = [module + ending for ending in endings if module + ending not in state]
    if missing:
        raise ValueError(f"{where}: {module} is quantised without {few(missing)}; add what is lost")
    if ".weight" not in endings and f"{module}.weight" in state:
        raise ValueError(f"{where}: {module} has a plain weight and a quantised one; keep one")
    return Quantised(*(state[module + ending] for ending in endings))


def _decode(
    convention: Convention, state: Mapping[str, Tensor], module: str, order: Order, where: str
) -> Quantised:
    subject, endings = f"{where}: {module}", convention.endings
    if convention.scale_optional:
        state = {module + endings[2]: torch.ones(())} | dict(state)
    codes, scales, scale = _entries(state, module, endings, where)
    if scales.dtype is torch.uint8 and order.e4m3:
        scales = scales.view(torch.float8_e4m3fn)
    if order.tile is not None:
        _check_codes(codes, subject + endings[0])
        _check_dtype(scales, torch.float8_e4m3fn, subject + endings[1])
        scales = _unswizzled(scales, codes.shape, order.tile, subject + endings[1])
    if scale.numel() == 1:
        scale = scale.reshape(())
    _check(Quantised(codes, scales, scale), subject, endings)
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
        scale = _reciprocal(scale, subject + _OWN[2])
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


def _check(weight: Quantised, subject: str, endings: tuple[str, str, str]) -> None:
    """Raise ValueError unless a weight fits together and decodes to numbers."""
    codes, scales, scale = weight
    of_codes, of_scales, of_scale = (subject + ending for ending in endings)
    _check_codes(codes, of_codes)
    _check_dtype(scales, torch.float8_e4m3fn, of_scales)
    _check_dtype(scale, torch.float32, of_scale)
    expected = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"{of_scales} is {tuple(scales.shape)}; codes of {tuple(codes.shape)} have scales of "
            f"{expected}, one for {BLOCK} elements of a row; other blocks are not NVFP4"
        )
    if scale.dim():
        raise ValueError(f"{of_scale} is {tuple(scale.shape)}; NVFP4 has one number a weight")
    broken = int((scales.view(torch.uint8) >= _FIRST_BROKEN).sum())
    if broken:
        raise ValueError(
            f"{of_scales}: {broken} of {scales.numel()} are NaN or negative; quantise the weight "
            "again"
        )
    if not scale.isfinite() or scale <= 0:
        raise ValueError(
            f"{of_scale} is {scale.item()!r}; it must be finite and above 0, 1 for a weight of "
            "zeros; quantise the weight again"
        )


def _check_codes(codes: Tensor, subject: str) -> None:
    _check_dtype(codes, torch.uint8, subject)
    if codes.dim() != 2 or codes.shape[1] * 2 % BLOCK:
        raise ValueError(
            f"{subject} is {tuple(codes.shape)}; codes are [N, K/2] with K a multiple of {BLOCK}; "
            "pad the weight before it is quantised"
        )


def _check_dtype(tensor: Tensor, dtype: torch.dtype, subject: str) -> None:
    if tensor.dtype is not dtype:
        bytes_only = tensor.dtype is torch.uint8
        unsaid = ", and nothing says whether its bytes are E4M3 or E8M0" if bytes_only else ""
        raise ValueError(f"{subject} is {tensor.dtype}, not {dtype}{unsaid}; convert it")
