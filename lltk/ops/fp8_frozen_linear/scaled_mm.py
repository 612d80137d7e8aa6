"""A product with a weight in FP8 that gradients pass: by torch's scaled multiplication."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_frozen_linear.op import compose
from lltk.ops.implementations import load_parts

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "products summed as tensor cores do, rounded to bfloat16",
    parts={"fp8_matmul": "scaled_mm", "fp8_dequantise": "triton"},
)

fp8_frozen_linear = compose("fp8_frozen_linear_scaled_mm", load_parts(DECLARATION))
