"""The formula itself, whose operations torch.compile can fuse with their neighbours."""

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.row_pipeline.reference import row_pipeline as row_pipeline

DECLARATION = Declaration(Exactness.BITWISE, "operations that torch.compile can fuse")
