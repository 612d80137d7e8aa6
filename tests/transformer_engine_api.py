"""What the ``te`` backend calls of TransformerEngine: its signatures (2.20), computed plainly."""

from __future__ import annotations

from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lltk.ops.floats import E2M1_MAX, E4M3_MAX
from lltk.ops.nvfp4_matmul.reference import nvfp4_matmul


class DType(Enum):
    kFloat4E2M1 = 10


class NVFP4Quantizer:
    def __init__(
        self,
        fp4_dtype: Any = DType.kFloat4E2M1,
        rowwise: bool = True,
        columnwise: bool = True,
        with_amax_reduction: bool = False,
        amax_reduction_group: Any = None,
        with_rht: bool = False,
        with_post_rht_amax: bool = False,
        with_2d_quantization: bool = False,
        stochastic_rounding: bool = False,
        row_scaled_nvfp4: bool = False,
        nvfp4_use_4over6: bool = False,
        nvfp4_e4m3_max: int = 448,
        nvfp4_4over6_err_mode: str = "MAE",
        with_random_sign_mask: bool = True,
    ) -> None:
        assert rowwise and not columnwise and fp4_dtype is DType.kFloat4E2M1


class NVFP4Tensor:
    def __new__(
        cls,
        *args: Any,
        rowwise_data: Tensor | None,
        rowwise_scale_inv: Tensor | None,
        columnwise_data: Tensor | None,
        columnwise_scale_inv: Tensor | None,
        amax_rowwise: Tensor | None,
        amax_columnwise: Tensor | None,
        fp4_dtype: Any,
        quantizer: Any,
        with_gemm_swizzled_scales: bool,
        row_scaled_nvfp4: bool = False,
        nvfp4_use_4over6: bool = False,
        nvfp4_e4m3_max: int = 448,
        **kwargs: Any,
    ) -> NVFP4Tensor:
        assert kwargs.keys() <= {"shape", "dtype", "requires_grad", "device"}, kwargs
        assert fp4_dtype is DType.kFloat4E2M1 and isinstance(quantizer, NVFP4Quantizer)
        assert rowwise_data is not None and rowwise_scale_inv is not None
        assert amax_rowwise is not None and amax_rowwise.shape == (1,)
        rows, width = kwargs["shape"]
        assert rowwise_data.shape == (rows, width // 2) and rowwise_data.dtype is torch.uint8
        assert rowwise_data.is_contiguous() and rows % 16 == width % 32 == 0
        tiles = (-(-rows // 128) * 128, -(-width // 64) * 4)
        assert rowwise_scale_inv.shape == tiles and rowwise_scale_inv.dtype is torch.uint8
        assert not with_gemm_swizzled_scales
        made = super().__new__(cls)
        scales = rowwise_scale_inv[:rows, : width // 16].view(torch.float8_e4m3fn)
        made.quantised = rowwise_data, scales, amax_rowwise[0] / (E2M1_MAX * E4M3_MAX)
        return made

    quantised: tuple[Tensor, Tensor, Tensor]


def general_gemm(
    A: Any,
    B: Any,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    gelu: bool = False,
    gelu_in: Any = None,
    alpha: float = 1.0,
    beta: float | None = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: Any = None,
    bias: Any = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    ub: Any = None,
    ub_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
) -> tuple[Tensor, None, None, None]:
    """B Aᵀ, both quantised by rows."""
    assert layout == "TN" and out_dtype is not None
    product = nvfp4_matmul(*B.quantised, *A.quantised, out_dtype)
    return product, None, None, None


def modules() -> dict[str, ModuleType]:
    """Modules of these names, for `sys.modules`."""
    contents: dict[str, tuple[Any, ...]] = {
        "transformer_engine_torch": (DType,),
        "transformer_engine": (),
        "transformer_engine.pytorch": (),
        "transformer_engine.pytorch.cpp_extensions": (general_gemm,),
        "transformer_engine.pytorch.tensor": (),
        "transformer_engine.pytorch.tensor.nvfp4_tensor": (NVFP4Quantizer, NVFP4Tensor),
    }
    made = {name: ModuleType(name) for name in contents}
    for name, things in contents.items():
        for thing in things:
            setattr(made[name], thing.__name__, thing)
    return made
