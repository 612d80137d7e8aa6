"""What `fp8_decode` computes, in plain torch on any device."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.nvfp4_paged_attention.fp8 import add_centre, compose

DECLARATION = Declaration(
    Exactness.NARROWER,
    "fp8_decode's formula in torch",
    parts={
        "nvfp4_gather_fp8": "reference",
        "fp8_attention": "reference",
        "row_pipeline": "reference",
        "fp8_dequantise": "reference",
    },
)

*parts, dequantise = load_parts(DECLARATION)
nvfp4_paged_attention = compose("nvfp4_paged_attention", __name__, add_centre(dequantise), *parts)
