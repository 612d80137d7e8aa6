"""A linear and its gradients: kernels."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.nvfp4_linear.op import compose

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "kernels",
    parts={
        "nvfp4_quantise": "triton",
        "nvfp4_quantise_transposed": "triton",
        "nvfp4_largest": "triton",
        "nvfp4_matmul": "triton",
    },
)

nvfp4_linear = compose("nvfp4_linear_triton", load_parts(DECLARATION))
