"""An exchange whose values are rounded and read back by kernels."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.rounded_exchange.op import compose

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "kernels",
    parts={
        "row_pipeline": "triton",
        "fp8_dequantise": "triton",
        "nvfp4_quantise": "triton",
        "nvfp4_dequantise": "triton",
    },
)

rounded_exchange = compose("rounded_exchange_triton", load_parts(DECLARATION))
