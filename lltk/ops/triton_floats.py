"""E2M1 and E4M3 in Triton: `lltk.ops.floats`, for kernels.

Rounding is integer and float32 arithmetic of our own: one meaning on every architecture. Kernels
that use it are launched with ``enable_fp_fusion=False``, so that no product is fused with a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_e4m3(values):
    """Round float32 from 0 to 448 to the nearest E4M3, ties to even; its bytes, as int32."""
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2**14 rounds to multiples of 2**-9, E4M3's step below 2**-6.
    subnormal = (values + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return tl.where(values < 0.015625, subnormal, normal)


@triton.jit
def reciprocal(scale):
    """1 / scale, at most float32's largest."""
    return tl.minimum(tl.div_rn(1.0, scale), 3.4028234663852886e38)


@triton.jit
def round_e4m3_up(values):
    """Round float32 from 0 to 448 up to E4M3; its bytes, as int32."""
    nearest = round_e4m3(values)
    return nearest + (decode_e4m3(nearest) < values).to(tl.int32)


@triton.jit
def decode_e4m3(byte):
    """float32 of E4M3 bytes, which are int32."""
    size = ((byte & 0x7F) << 20 | (byte & 0x80) << 24).to(tl.float32, bitcast=True)
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), size * 2.0**120)


@triton.jit
def nearest_e2m1(values):
    """The nearest E2M1 values, ties to even, at most 6 in size, of float32."""
    size = tl.minimum(tl.abs(values), 6.0)
    # Adding 2**23 times the step rounds to multiples of the step.
    magic = tl.where(size < 2.0, 4194304.0, tl.where(size < 4.0, 8388608.0, 16777216.0))
    rounded = (size + magic) - magic
    return tl.where(values < 0.0, -rounded, rounded)


@triton.jit
def round_e2m1(values):
    """The nearest E2M1 codes, ties to even, saturating at ±6, of float32.

    Returns:
        int32, of which the low four bits are the code.
    """
    size = tl.minimum(tl.abs(values), 6.0)
    # As above. The lowest bits of the sum count the grid's steps: 4 of them at 2, and 6 at 4.
    magic = tl.where(size < 2.0, 4194304.0, tl.where(size < 4.0, 8388610.0, 16777224.0))
    return _signed((size + magic).to(tl.int32, bitcast=True), values)


@triton.jit
def round_e2m1_randomly(values, random):
    """Codes of a neighbour, as of `round_e2m1`; see `lltk.ops.floats.round_e2m1_randomly`."""
    size = tl.minimum(tl.abs(values), 6.0)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    steps_a_unit = tl.where(size < 2.0, 2.0, tl.where(size < 4.0, 1.0, 0.5))
    first = tl.where(size < 2.0, 0, tl.where(size < 4.0, 2, 4))
    whole = (size * steps_a_unit).to(tl.int32)
    up = (size < 6.0) & (random * step < size - whole.to(tl.float32) * step)
    return _signed(first + whole + up.to(tl.int32), values)


@triton.jit
def _signed(magnitude, values):
    """The low three bits, and the sign as the next."""
    return (magnitude & 7) | ((values.to(tl.int32, bitcast=True) >> 28) & ~7)


@triton.jit
def pairs(x):
    """Even and odd elements along the last of three axes."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def pack(codes):
    """Bytes of codes [A, B, 2n], the even element in the low nibble; uint8 [A, B, n]."""
    even, odd = pairs(codes)
    return ((even & 15) | (odd << 4)).to(tl.uint8)


@triton.jit
def unpack(packed):
    """Codes of bytes, the last axis twice as long; int32."""
    packed = packed.to(tl.int32)
    return tl.interleave(packed & 15, packed >> 4)


@triton.jit
def decode_e2m1(codes):
    """float32 of E2M1 codes, which are int32."""
    return ((codes & 7) << 22 | (codes & 8) << 28).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def round_e2m1_pairs(even, odd):
    """Bytes of two E2M1 codes, ties to even, saturating, by the instruction; uint8.

    ``cvt.rn.satfinite.e2m1x2.f32`` takes the high nibble first.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b8 a, b, c, d;
        cvt.rn.satfinite.e2m1x2.f32 a, $5, $1;
        cvt.rn.satfinite.e2m1x2.f32 b, $6, $2;
        cvt.rn.satfinite.e2m1x2.f32 c, $7, $3;
        cvt.rn.satfinite.e2m1x2.f32 d, $8, $4;
        mov.b32 $0, {a, b, c, d};
        }
        """,
        "=r,f,f,f,f,f,f,f,f",
        [even, odd],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def magnitude_bits(values):
    """The bits of float32 magnitudes, as int32: in the magnitudes' order, with NaN above all."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def is_finite(values):
    """Whether each float32 is a number."""
    return tl.abs(values) < float("inf")
