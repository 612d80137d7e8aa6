"""Keeping a page decoded to E4M3, by the kernel that decodes the listed pages."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_decode_page.reference import with_gather
from lltk.ops.implementations import load_parts

DECLARATION = Declaration(
    Exactness.BITWISE,
    "nvfp4_gather_fp8's kernel, then a copy",
    devices=("cuda",),
    opaque=True,
    parts={"nvfp4_gather_fp8": "triton"},
)

fp8_decode_page = with_gather(*load_parts(DECLARATION))
