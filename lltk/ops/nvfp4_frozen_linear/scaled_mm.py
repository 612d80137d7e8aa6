"""A product with a weight in NVFP4 that gradients pass: kernels, and products by cuBLAS."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.nvfp4_frozen_linear.op import compose

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "kernels, and products by cuBLAS",
    parts={"nvfp4_matmul": "scaled_mm", "nvfp4_dequantise": "triton"},
)

nvfp4_frozen_linear = compose("nvfp4_frozen_linear_scaled_mm", load_parts(DECLARATION))
