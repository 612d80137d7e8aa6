"""The formula itself, whose operations torch.compile can fuse with their neighbours."""

from __future__ import annotations

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.fp8_quantise.reference import fp8_quantise

__all__ = ["DECLARATION", "fp8_quantise"]

DECLARATION = Declaration(Exactness.BITWISE, "operations that torch.compile can fuse")
