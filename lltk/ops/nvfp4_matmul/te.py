"""The block-scaled product of TransformerEngine."""

from __future__ import annotations

import torch
import transformer_engine_torch as tex
from torch import Tensor
from torch.nn.functional import pad
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer, NVFP4Tensor

from lltk.ops.declaration import E2M1, Declaration, Exactness
from lltk.ops.floats import E2M1_MAX, E4M3_MAX

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "NVFP4 tensor cores by TransformerEngine",
    devices=("cuda",),
    modules=("transformer_engine",),
    architectures=E2M1,
    opaque=True,
)

_BYTES, _ROWS = 16, 16
_SCALE_ROWS, _SCALE_COLUMNS = 128, 4


def nvfp4_matmul(
    a_codes: Tensor,
    a_scales: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.nvfp4_matmul`, but float32 sums may be rounded in another order.

    Rows are padded to 32 codes, and operands to 16 rows, with zeros.
    """
    a = _tensor(a_codes.flatten(0, -2), a_scales.flatten(0, -2), a_scale)
    b = _tensor(b_codes, b_scales, b_scale)
    product: Tensor = general_gemm(b, a, out_dtype=dtype, layout="TN")[0]
    columns = b_codes.shape[0]
    rows = a_codes.numel() // a_codes.shape[-1]
    return product[:rows, :columns].reshape(*a_codes.shape[:-1], columns).contiguous()


def _tensor(codes: Tensor, scales: Tensor, scale: Tensor) -> NVFP4Tensor:
    """An operand in the library's form: scales padded to whole tiles, and the amax they imply."""
    codes = pad(codes, (0, -codes.shape[1] % _BYTES, 0, -codes.shape[0] % _ROWS)).contiguous()
    rows, columns = scales.shape
    padding = (0, -columns % _SCALE_COLUMNS, 0, -rows % _SCALE_ROWS)
    return NVFP4Tensor(
        shape=(codes.shape[0], 2 * codes.shape[1]),
        dtype=torch.bfloat16,
        rowwise_data=codes,
        rowwise_scale_inv=pad(scales.view(torch.uint8), padding).contiguous(),
        columnwise_data=None,
        columnwise_scale_inv=None,
        amax_rowwise=(scale * (E2M1_MAX * E4M3_MAX)).reshape(1),
        amax_columnwise=None,
        fp4_dtype=tex.DType.kFloat4E2M1,
        quantizer=NVFP4Quantizer(rowwise=True, columnwise=False),
        requires_grad=False,
        with_gemm_swizzled_scales=False,
    )
