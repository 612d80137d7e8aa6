"""The formula itself, whose operations torch.compile can fuse with their neighbours."""

from __future__ import annotations

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.gated_add.reference import gated_add

__all__ = ["DECLARATION", "gated_add"]

DECLARATION = Declaration(Exactness.BITWISE, "operations that torch.compile can fuse")
