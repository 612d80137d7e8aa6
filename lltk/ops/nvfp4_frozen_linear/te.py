"""A product with a weight in NVFP4 that gradients pass, by TransformerEngine."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.nvfp4_frozen_linear.op import compose

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "kernels, and products by TransformerEngine",
    parts={"nvfp4_matmul": "te", "nvfp4_dequantise": "triton"},
)

nvfp4_frozen_linear = compose("nvfp4_frozen_linear_te", load_parts(DECLARATION))
