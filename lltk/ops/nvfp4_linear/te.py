"""A linear and its gradients: kernels, and products by TransformerEngine."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.nvfp4_linear.op import compose

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "kernels, and products by TransformerEngine",
    parts={
        "nvfp4_quantise": "triton",
        "nvfp4_quantise_transposed": "triton",
        "nvfp4_largest": "triton",
        "nvfp4_matmul": "te",
    },
)

nvfp4_linear = compose("nvfp4_linear_te", load_parts(DECLARATION))
