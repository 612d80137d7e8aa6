"""Attention in FP8 on a GPU, its result quantised by a kernel."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise_attention.fp8 import compose
from lltk.ops.implementations import load_parts

DECLARATION = Declaration(
    Exactness.NARROWER,
    "decodes pages to E4M3, attends in FP8",
    parts={
        "nvfp4_gather_fp8": "triton",
        "fp8_attention": "cudnn",
        "row_pipeline": "triton",
        "fp8_quantise_centred": "triton",
        "fp8_write_own": "triton",
    },
)

fp8_quantise_attention = compose(__name__, *load_parts(DECLARATION))
