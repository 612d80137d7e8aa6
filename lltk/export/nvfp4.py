"""NVFP4: quantising and decoding in float32, to the bit as the references do it.

What is quantised for a product goes on as code · scale, which float32 holds exactly, in the place
of its codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto
from torch import fx

from lltk.export.emitter import Emitter, emits, like, source
from lltk.ops.floats import E2M1_MAX, E4M3_MAX, decode_e2m1, unpack
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_quantise.reference import BLOCK, FOUR_OVER_SIX_MAX

_FLOAT = torch.float32
_FLT_MAX = float(np.finfo(np.float32).max)


@emits(overload("nvfp4_quantise"))
def _quantise(to: Emitter, node: fx.Node, x: str, tile: int = 1, rule: str = "none") -> list[str]:
    assert tile == 1, f"{node.name} quantises a weight"
    return quantised_rows(to, x, source(node).shape, rule)


def quantised_rows(to: Emitter, x: str, shape: Sequence[int], rule: str) -> list[str]:
    """Rows in NVFP4: code · scale of whole blocks, no scales, and the decode scale."""
    *rows, width = shape
    if odd := -width % BLOCK:
        axes = len(shape)
        x = to.op("Pad", x, to.ints(*[0] * (2 * axes - 1), odd), to.constant(0, _FLOAT))
    blocks = to.op("Reshape", x, to.ints(*rows, (width + odd) // BLOCK, BLOCK))
    values, scales, decode = _quantised(to, blocks, range(len(shape) + 1), rule)
    exact = to.op("Mul", values, scales)
    decode = to.op("Reshape", decode, to.ints())
    return [to.op("Reshape", exact, to.ints(*rows, width + odd)), "", decode]


@emits(overload("nvfp4_matmul"))
def _matmul(
    to: Emitter,
    node: fx.Node,
    a: str,
    _: str,
    a_scale: str,
    codes: str,
    scales: str,
    scale: str,
    dtype: torch.dtype,
) -> str:
    made = to.op("MatMul", a, _weight(to, codes, scales, source(node, "b_codes").shape))
    return to.op("Mul", made, to.op("Mul", a_scale, scale))


def _weight(to: Emitter, codes: str, scales: str, shape: Sequence[int]) -> str:
    """code · scale of a weight, transposed: [K, N] of codes [N, K/2].

    ONNX Runtime folds what reads parameters alone when it loads a graph. It keeps integers of 8
    bits, twice the values of the codes, and decodes them in every call: not folding
    DequantizeLinear is a rule of its. It would also fuse one along the first axis with the product,
    and round activations to 8 bits then; so the transpose comes after it.
    """
    rows, half = shape
    doubled = to.op("Reshape", _looked_up(to, codes, 2, torch.int8), to.ints(rows, 2 * half))
    halves = to.op("Mul", to.op("Cast", scales, to=TensorProto.FLOAT), to.constant(0.5, _FLOAT))
    values = to.op("DequantizeLinear", doubled, halves, axis=1, block_size=BLOCK)
    return to.op("Transpose", values, perm=[1, 0])


@emits(overload("nvfp4_quantise_page"))
def _quantise_page(
    to: Emitter, node: fx.Node, value: str, smoothing: bool, rule: str = "none"
) -> list[str]:
    batch, tokens, heads, width = source(node).shape
    means = []
    if smoothing:
        wide = to.op("Cast", value, to=TensorProto.DOUBLE)
        mean = to.op("ReduceMean", wide, to.ints(1), keepdims=1)
        rounded = to.op("Cast", mean, to=TensorProto.BFLOAT16)
        value = to.op("Sub", value, to.op("Cast", rounded, to=TensorProto.FLOAT))
        means = [to.op("Reshape", rounded, to.ints(batch, heads, width))]
    blocks = to.op("Reshape", value, to.ints(batch, tokens, heads, width // BLOCK, BLOCK))
    values, scales, decode = _quantised(to, blocks, (1, 3, 4), rule)
    scales = to.op("Reshape", scales, to.ints(batch, tokens, heads, width // BLOCK))
    return [
        _packed(to, values, blocks, (batch, tokens, heads, width // 2)),
        to.op("Cast", scales, to=TensorProto.FLOAT8E4M3FN),
        to.op("Reshape", decode, to.ints(batch, heads)),
        *means,
    ]


@emits(overload("nvfp4_decode_pages"))
def _decode_pages(
    to: Emitter, node: fx.Node, codes: str, scales: str, decode_scales: str, means: str | None
) -> str:
    batch, pages, _, heads, width = like(node).shape
    values = _values(to, codes, scales, source(node).shape)
    per_head = to.op("Reshape", decode_scales, to.ints(batch, pages, 1, heads, 1))
    values = to.op("Mul", values, per_head)
    if means is None:
        return values
    per_channel = to.op("Reshape", means, to.ints(batch, pages, 1, heads, width))
    return to.op("Add", values, to.op("Cast", per_channel, to=TensorProto.FLOAT))


def _values(to: Emitter, codes: str, scales: str, shape: Sequence[int]) -> str:
    """code · scale, [..., K], of codes [..., K/2]."""
    *rows, half = shape
    pairs = _looked_up(to, codes, 1, _FLOAT)
    blocks = to.op("Reshape", pairs, to.ints(*rows, 2 * half // BLOCK, BLOCK))
    wide = to.op("Cast", scales, to=TensorProto.FLOAT)
    wide = to.op("Reshape", wide, to.ints(*rows, 2 * half // BLOCK, 1))
    return to.op("Reshape", to.op("Mul", blocks, wide), to.ints(*rows, 2 * half))


def _looked_up(to: Emitter, codes: str, times: int, dtype: torch.dtype) -> str:
    """A multiple of the values of codes, [..., K/2, 2]."""
    every = decode_e2m1(unpack(torch.arange(256, dtype=torch.uint8)[:, None]))
    index = to.op("Cast", codes, to=TensorProto.INT32)
    return to.op("Gather", to.constant(times * every, dtype), index, axis=0)


def _quantised(to: Emitter, blocks: str, axes: Sequence[int], rule: str) -> tuple[str, str, str]:
    """Blocks rounded to NVFP4, step by step as `nvfp4_quantise`.

    Args:
        to: the emitter.
        blocks: [..., 16], float32.
        axes: those over which one decode scale is shared.
        rule: of Four Over Six.

    Returns:
        The codes' values, the blocks' scales [..., 1], both float32, and the decode scale, in
        which ``axes`` are 1.
    """

    def number(value: float) -> str:
        return to.constant(value, _FLOAT)

    over = to.ints(*axes)
    top = E4M3_MAX if rule == "none" else FOUR_OVER_SIX_MAX
    # A product with 0 is 0 for what is finite, and else NaN; the largest of a NaN may be a number.
    spoilt = to.op("ReduceSum", to.op("Mul", blocks, number(0)), over, keepdims=1)
    finite = to.op("Equal", spoilt, number(0))
    largest = to.op("ReduceMax", to.op("Abs", blocks), over, keepdims=1)
    largest = to.op("Where", finite, largest, number(0))
    encode = to.op("Min", to.op("Div", number(E2M1_MAX * top), largest), number(_FLT_MAX))
    encode = to.op("Where", to.op("Equal", largest, number(0)), number(1), encode)
    decode = to.op("Div", number(1), encode)
    peak = to.op("ReduceMax", to.op("Abs", blocks), to.ints(-1), keepdims=1)
    if rule == "none":
        scales = _e4m3(to, to.op("Mul", peak, to.op("Mul", encode, number(1 / 6))))
        values = _codes(to, blocks, scales, decode)
    else:
        fine = to.op("Mul", to.op("Div", peak, number(E2M1_MAX)), encode)
        unit = _unit(to, largest)
        clamped = to.op("Mul", decode, number(E2M1_MAX * top))
        reach = to.op("Where", to.op("Less", encode, number(_FLT_MAX)), largest, clamped)
        reach, exact = to.op("Mul", unit, reach), to.op("Mul", blocks, unit)
        choices = []
        for scales in (_e4m3(to, to.op("Mul", fine, number(1.5))), _e4m3(to, fine)):
            values = _codes(to, blocks, scales, decode)
            decoded = to.op("Mul", to.op("Mul", values, scales), reach)
            lost = to.op("Sub", to.op("Div", decoded, number(E2M1_MAX * top)), exact)
            choices.append((values, scales, _error(to, lost, rule)))
        (four, coarse, of_four), (six, fine, of_six) = choices
        nearer = to.op("Less", of_four, of_six)
        values, scales = to.op("Where", nearer, four, six), to.op("Where", nearer, coarse, fine)
    return values, scales, to.op("Where", finite, decode, number(math.nan))


def _e4m3(to: Emitter, x: str) -> str:
    """The nearest E4M3 numbers, at most 448."""
    return to.op("Cast", to.op("Cast", x, to=TensorProto.FLOAT8E4M3FN), to=TensorProto.FLOAT)


def _codes(to: Emitter, blocks: str, scales: str, decode: str) -> str:
    """The nearest E2M1 numbers to x / (scale · decode scale), ties to even codes.

    The numbers are 0.5 apart below 2, 1 apart below 4, and 2 apart above. In units of that distance
    ties to even integers are ties to even codes.
    """

    def number(value: float) -> str:
        return to.constant(value, _FLOAT)

    inverse = to.op("Div", number(1), to.op("Mul", scales, decode))
    inverse = to.op("Min", inverse, number(_FLT_MAX))
    x = to.op("Clip", to.op("Mul", blocks, inverse), number(-E2M1_MAX), number(E2M1_MAX))
    size = to.op("Abs", x)
    apart = to.op("Where", to.op("Less", size, number(4)), number(1), number(2))
    apart = to.op("Where", to.op("Less", size, number(2)), number(0.5), apart)
    return to.op("Mul", to.op("Round", to.op("Div", x, apart)), apart)


def _unit(to: Emitter, largest: str) -> str:
    """A power of two that brings a tensor near 1; see the reference's."""
    logarithm = to.op("Mul", to.op("Log", largest), to.constant(1 / math.log(2), _FLOAT))
    exponent = to.op("Clip", logarithm, to.constant(-126, _FLOAT), to.constant(126, _FLOAT))
    return to.op("Pow", to.constant(2, _FLOAT), to.op("Neg", to.op("Round", exponent)))


def _error(to: Emitter, lost: str, rule: str) -> str:
    """A block's error by a rule, summed in the order of its elements."""
    if rule == "abs_max":
        return to.op("ReduceMax", to.op("Abs", lost), to.ints(-1), keepdims=1)
    each = to.op("Mul", lost, lost) if rule == "mse" else to.op("Abs", lost)
    return to.op("Sum", *to.ops("Split", BLOCK, each, to.ints(*[1] * BLOCK), axis=-1))


def _packed(to: Emitter, values: str, blocks: str, shape: Sequence[int]) -> str:
    """The bytes of E2M1 numbers, two a byte.

    A number's code is the least of 2v, v + 2 and v/2 + 4, and 8 more where what was rounded has a
    sign; 1/x tells the signs of zeros.
    """
    size = to.op("Abs", values)
    lines = (
        to.op("Add", to.op("Mul", size, to.constant(slope, _FLOAT)), to.constant(start, _FLOAT))
        for slope, start in ((2, 0), (1, 2), (0.5, 4))
    )
    negative = to.op("Less", to.op("Div", to.constant(1, _FLOAT), blocks), to.constant(0, _FLOAT))
    sign = to.op("Where", negative, to.constant(8, _FLOAT), to.constant(0, _FLOAT))
    pairs = to.op("Reshape", to.op("Add", to.op("Min", *lines), sign), to.ints(*shape, 2))
    places = to.op("Mul", pairs, to.constant([1, 16], _FLOAT))
    both = to.op("ReduceSum", places, to.ints(-1), keepdims=0)
    return to.op("Cast", both, to=TensorProto.UINT8)
