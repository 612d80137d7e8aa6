"""A product with a weight in NVFP4 that gradients pass: kernels."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.nvfp4_frozen_linear.op import compose

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "kernels",
    parts={"nvfp4_matmul": "triton", "nvfp4_dequantise": "triton"},
)

nvfp4_frozen_linear = compose("nvfp4_frozen_linear_triton", load_parts(DECLARATION))
