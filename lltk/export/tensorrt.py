"""What TensorRT takes in another form than ONNX Runtime: products in FP4 and FP8, attention, pages.

TensorRT makes a product in FP4 or FP8 only of forms that it knows. For activations that is one in
which the scale of the whole tensor is a constant. A calibrated scale is one. Otherwise x is divided
by its scale s, quantised with a constant 1, multiplied, and the product is multiplied by s. The
ops' implementations ``tensorrt_arithmetic`` do the same in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx import TensorProto
from torch import fx

from lltk.export.attention import HEADS_FIRST, listed_operands
from lltk.export.emitter import Dialect, Emitter, cast, emits, like, source
from lltk.ops.floats import E2M1_MAX, E4M3_MAX
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.tensorrt_blocks import TINY
from lltk.stream.runtimes.tensorrt_plugin import NAME, NAMESPACE, VERSION

aten = torch.ops.aten
DOMAIN, QUANTISE = "trt", "TRT_FP4DynamicQuantize"
"""The one op of TensorRT's own; it quantises blocks as they come."""
PLUGIN_DOMAIN = "lltk"
"""Of the op that a plugin of ours serves; see `lltk.stream.runtimes.tensorrt_plugin`."""
_FLOAT, _ONE = torch.float32, 1.0
_TRT = Dialect.TENSORRT


@emits(aten.scaled_dot_product_attention.default, dialect=_TRT)
def _attention(
    to: Emitter,
    node: fx.Node,
    q: str,
    k: str,
    v: str,
    mask: str = "",
    dropout: float = 0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> str:
    assert not (mask or dropout or causal), f"{node.name} has a mask, drops weights, or is causal"
    _, heads, _, width = source(node).shape
    return _attend(to, (q, k, v), "", heads, like(node).dtype, scale or width**-0.5)


@emits(overload("listed_attention"), dialect=_TRT)
def _listed_attention(
    to: Emitter, node: fx.Node, q: str, k: str, v: str, k_pages: str, v_pages: str, listed: str
) -> str:
    operands, mask = listed_operands(to, node, q, k, v, k_pages, v_pages, listed)
    _, _, heads, width = like(node).shape
    made = _attend(to, operands, mask, heads, like(node).dtype, width**-0.5)
    return to.op("Transpose", made, perm=HEADS_FIRST)


@emits(overload("nvfp4_listed_attention"), dialect=_TRT)
def _nvfp4_listed_attention(to: Emitter, node: fx.Node, *operands: str | None) -> str:
    """The plugin reads what is there, in the op's order."""
    given = [each for each in operands if each is not None]
    return to.op(
        NAME, *given, domain=PLUGIN_DOMAIN, plugin_namespace=NAMESPACE, plugin_version=VERSION
    )


def _attend(
    to: Emitter,
    operands: Sequence[str],
    mask: str,
    heads: int,
    dtype: torch.dtype,
    scale: float,
) -> str:
    """Attention of heads [B, H, L, D]; written out where TensorRT has no fused kernel for it."""
    if heads > 1 and dtype is not _FLOAT:
        return to.op("Attention", *operands, mask, scale=scale)
    q, k, v = operands
    keys = to.op("Transpose", k, perm=[0, 1, 3, 2])
    scores = to.op("MatMul", to.op("Mul", q, to.constant(scale, dtype)), keys)
    if mask:
        scores = to.op("Where", mask, scores, to.constant(torch.finfo(dtype).min, dtype))
    return to.op("MatMul", to.op("Softmax", scores, axis=-1), v)


@emits(overload("nvfp4_quantise"), dialect=_TRT)
def _nvfp4_quantise(
    to: Emitter, node: fx.Node, x: str, tile: int = 1, rule: str = "none"
) -> list[str]:
    assert tile == 1, f"{node.name} quantises a weight"
    if rule != "none":
        raise ValueError(
            f"{node.name} ({to.scope}): activations are rounded by the rule {rule}, which TensorRT "
            "has no form for; set nvfp4_infer.activation_rule=none in the recipe's passes"
        )
    x = _padded(to, node, x)
    largest = to.op("ReduceMax", to.op("Abs", x), keepdims=0)
    scale = _tensor_scale(to, largest)
    codes, scales = _block_quantised(to, to.op("Div", x, scale))
    return [codes, scales, scale]


@emits(overload("nvfp4_quantise_calibrated"), dialect=_TRT)
def _nvfp4_quantise_calibrated(to: Emitter, node: fx.Node, x: str, scale: str) -> list[str]:
    return _block_quantised(to, _padded(to, node, x), scale)


def _tensor_scale(to: Emitter, largest: str) -> str:
    """The scale that brings the largest magnitude to what codes and scales can say at most.

    Of zeros it is 1, and of what is not finite it is not.
    """
    scale = to.op("Mul", largest, to.constant(1 / (E2M1_MAX * E4M3_MAX), _FLOAT))
    tiny = to.op("Less", scale, to.constant(TINY, _FLOAT))
    return to.op("Where", tiny, to.constant(1, _FLOAT), scale)


def _padded(to: Emitter, node: fx.Node, x: str) -> str:
    """Rows of whole blocks in float32."""
    before, shape = source(node).dtype, source(node).shape
    x = cast(to, x, before, _FLOAT)
    if odd := -shape[-1] % BLOCK:
        places = [0] * (2 * len(shape) - 1)
        x = to.op("Pad", x, to.ints(*places, odd), to.constant(0, _FLOAT))
    return x


def _block_quantised(to: Emitter, x: str, scale: str | None = None) -> list[str]:
    """Codes and block scales along the last axis of [R, K] or [B, R, K].

    Args:
        x: in float32.
        scale: a parameter's name; by default the scale is 1.
    """
    return to.ops(
        QUANTISE, 2, x, scale or to.constant(_ONE, _FLOAT),
        domain=DOMAIN, axis=-1, block_size=BLOCK, scale_type=int(TensorProto.FLOAT8E4M3FN),
    )  # fmt: skip


def _decoded(to: Emitter, codes: str, scales: str, scale: str, dtype: torch.dtype) -> str:
    """code · block scale · scale."""
    wide = to.op("DequantizeLinear", scales, scale)
    values = to.op("DequantizeLinear", codes, wide, axis=-1, block_size=BLOCK)
    return cast(to, values, _FLOAT, dtype)


@emits(overload("nvfp4_matmul"), dialect=_TRT)
def _nvfp4_matmul(
    to: Emitter,
    node: fx.Node,
    a: str,
    a_scales: str,
    a_scale: str,
    codes: str,
    scales: str,
    scale: str,
    dtype: torch.dtype,
) -> str:
    constant = to.is_parameter(a_scale)  # as it is where activations are calibrated
    scale_of_a = a_scale if constant else to.constant(_ONE, _FLOAT)
    left = _decoded(to, a, a_scales, scale_of_a, torch.bfloat16)
    packed = to.parameter(codes, packed=True)
    right = _decoded(to, packed, scales, scale, torch.bfloat16)
    made = to.op("MatMul", left, to.op("Transpose", right, perm=[1, 0]))
    if constant:
        return cast(to, made, torch.bfloat16, dtype)
    made = to.op("Mul", cast(to, made, torch.bfloat16, _FLOAT), a_scale)
    return cast(to, made, _FLOAT, dtype)


@emits(overload("row_pipeline"), dialect=_TRT)
def _row_pipeline(
    emitter: Emitter, node: fx.Node, x: str, *rest: object, to: str = "plain", **more: object
) -> list[str]:
    """Rows in FP8 and their scales; TensorRT fuses other steps by itself."""
    asked = [each for each in (*rest, *more.values()) if each not in (None, False, "none")]
    assert to == "fp8" and not asked, f"{node.name} is fused, which TensorRT does by itself"
    x = cast(emitter, x, source(node).dtype, _FLOAT)
    peak = emitter.op("ReduceMax", emitter.op("Abs", x), emitter.ints(-1), keepdims=1)
    scales = emitter.op("Div", peak, emitter.constant(E4M3_MAX, _FLOAT))
    tiny = emitter.op("Less", scales, emitter.constant(TINY, _FLOAT))
    scales = emitter.op("Where", tiny, emitter.constant(1, _FLOAT), scales)
    rows = emitter.op(
        "QuantizeLinear", emitter.op("Div", x, scales), emitter.constant(_ONE, _FLOAT),
        emitter.constant(0, torch.float8_e4m3fn),
    )  # fmt: skip
    return [rows, scales]


@emits(overload("fp8_matmul"), dialect=_TRT)
def _fp8_matmul(
    to: Emitter,
    node: fx.Node,
    a: str,
    a_scales: str,
    b: str,
    b_scales: str,
    bias: str | None,
    dtype: torch.dtype,
) -> str:
    one = to.constant(_ONE, _FLOAT)
    left, right = (
        to.op("Cast", to.op("DequantizeLinear", each, one), to=TensorProto.BFLOAT16)
        for each in (a, b)
    )
    made = to.op("MatMul", left, to.op("Transpose", right, perm=[1, 0]))
    made = to.op("Mul", cast(to, made, torch.bfloat16, _FLOAT), a_scales)
    made = to.op("Mul", made, to.op("Reshape", b_scales, to.ints(-1)))
    made = cast(to, made, _FLOAT, dtype)
    return made if bias is None else to.op("Add", made, bias)


@emits(overload("nvfp4_decode_pages"), dialect=_TRT)
def _decode_pages(
    to: Emitter, node: fx.Node, codes: str, scales: str, decode_scales: str, means: str | None
) -> str:
    batch, pages, tokens, heads, width = like(node).shape
    rows = batch * pages, tokens, heads
    flat = to.op("Reshape", codes, to.ints(*rows[:2], heads * width))
    flat_scales = to.op("Reshape", scales, to.ints(*rows[:2], heads * width // BLOCK))
    values = _decoded(to, flat, flat_scales, to.constant(_ONE, _FLOAT), _FLOAT)
    values = to.op("Reshape", values, to.ints(batch, pages, tokens, heads, width))
    per_head = to.op("Reshape", decode_scales, to.ints(batch, pages, 1, heads, 1))
    values = to.op("Mul", values, per_head)
    if means is None:
        return values
    per_channel = to.op("Reshape", means, to.ints(batch, pages, 1, heads, width))
    return to.op("Add", values, to.op("Cast", per_channel, to=TensorProto.FLOAT))


@emits(overload("nvfp4_quantise_page"), dialect=_TRT)
def _quantise_page(
    to: Emitter, node: fx.Node, value: str, smoothing: bool, rule: str = "none"
) -> list[str]:
    if rule != "none":
        raise ValueError(
            f"{node.name} ({to.scope}): pages are rounded by the rule {rule}, which TensorRT has "
            "no form for; set nvfp4_cache.rule=none in the recipe's passes"
        )
    batch, tokens, heads, width = source(node).shape
    value = cast(to, value, source(node).dtype, _FLOAT)
    means = []
    if smoothing:
        mean = to.op("ReduceMean", value, to.ints(1), keepdims=1)
        rounded = to.op("Cast", mean, to=TensorProto.BFLOAT16)
        value = to.op("Sub", value, to.op("Cast", rounded, to=TensorProto.FLOAT))
        means = [to.op("Reshape", rounded, to.ints(batch, heads, width))]
    largest = to.op("ReduceMax", to.op("Abs", value), to.ints(1, 3), keepdims=1)
    scale = _tensor_scale(to, largest)
    rows = to.op("Reshape", to.op("Div", value, scale), to.ints(batch, tokens, heads * width))
    codes, scales = _block_quantised(to, rows)
    return [
        to.op("Reshape", codes, to.ints(batch, tokens, heads, width)),
        to.op("Reshape", scales, to.ints(batch, tokens, heads, width // BLOCK)),
        to.op("Reshape", scale, to.ints(batch, heads)),
        *means,
    ]
