"""Transposing, transforming and quantising: what a weight's gradient takes of both its operands."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from lltk.ops.hadamard.reference import hadamard
from lltk.ops.nvfp4_quantise.reference import BLOCK, Quantised, nvfp4_quantise


def nvfp4_quantise_transposed(
    x: Tensor,
    signs: list[int],
    rule: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
) -> Quantised:
    """xᵀ of all rows in 1×16 blocks, through the Hadamard transform along the rows.

    Args:
        x: [..., K], L rows in all.
        signs: of the transform, a power of two of them; none for no transform.
        rule, seed, stream: see `nvfp4_quantise`.

    Returns:
        [K, L] in NVFP4, L padded with zeros to whole blocks and whole transforms.
    """
    rows = x.flatten(0, -2)
    turned = pad(rows, (0, 0, 0, padded(rows.shape[0], signs) - rows.shape[0])).t().contiguous()
    return nvfp4_quantise(hadamard(turned, signs) if signs else turned, 1, rule, seed, stream)


def padded(rows: int, signs: list[int]) -> int:
    """Rows with what fills the last block and transform, both powers of two."""
    unit = max(BLOCK, len(signs))
    return -(-rows // unit) * unit
