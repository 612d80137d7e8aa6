"""Attention in FP8 on a GPU: a kernel decodes pages to E4M3, and cuDNN attends."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import load_parts
from lltk.ops.nvfp4_paged_attention.fp8 import add_centre, compose

DECLARATION = Declaration(
    Exactness.NARROWER,
    "decodes pages to E4M3, attends in FP8",
    parts={
        "nvfp4_gather_fp8": "triton",
        "fp8_attention": "cudnn",
        "row_pipeline": "triton",
        "fp8_dequantise": "triton",
    },
)

*parts, dequantise = load_parts(DECLARATION)
nvfp4_paged_attention = compose("nvfp4_paged_attention", __name__, add_centre(dequantise), *parts)
