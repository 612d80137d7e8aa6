"""The formula itself, whose operations torch.compile can fuse with their neighbours."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.rms_norm_rope.reference import rms_norm_rope as rms_norm_rope

DECLARATION = Declaration(Exactness.BITWISE, "operations that torch.compile can fuse")
