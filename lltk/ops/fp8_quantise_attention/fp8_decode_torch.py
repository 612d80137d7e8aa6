"""What `fp8_decode` computes, in plain torch on any device."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.nvfp4_paged_attention.fp8 import compose

DECLARATION = Declaration(
    Exactness.NARROWER,
    "fp8_decode's formula in torch",
    parts={
        "nvfp4_gather_fp8": "reference",
        "fp8_attention": "reference",
        "row_pipeline": "reference",
        "fp8_quantise_centred": "reference",
    },
)

*parts, quantise = load_parts(DECLARATION)
fp8_quantise_attention = compose("fp8_quantise_attention", __name__, quantise, *parts)
