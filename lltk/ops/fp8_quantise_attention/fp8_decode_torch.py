"""What `fp8_decode` computes, in plain torch on any device."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise_attention.fp8 import compose
from lltk.ops.implementations import load_parts

DECLARATION = Declaration(
    Exactness.NARROWER,
    "fp8_decode's formula in torch",
    parts={
        "nvfp4_gather_fp8": "reference",
        "fp8_attention": "reference",
        "row_pipeline": "reference",
        "fp8_quantise_centred": "reference",
        "fp8_write_own": "reference",
    },
)

fp8_quantise_attention = compose(__name__, *load_parts(DECLARATION))
