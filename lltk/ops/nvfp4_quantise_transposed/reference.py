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
    largest: Tensor | None = None,
    run: int = 0,
) -> Quantised:
    """xᵀ of all rows in 1×16 blocks, through the Hadamard transform along the rows.

    Args:
        x: [..., K], L rows in all.
        signs: of the transform, a power of two of them; none for no transform.
        rule, seed, stream: see `nvfp4_quantise`.
        largest: the transform's largest magnitude, float32 []; by default that of these rows.
        run: how many rows follow one another in a tensor that several ranks share, whole blocks and
            transforms of them; 0 if no ranks share it.

    Returns:
        [K, L] in NVFP4, L padded with zeros to whole blocks and whole transforms.
    """
    return nvfp4_quantise(transformed(x, signs), 1, rule, seed, stream, largest, run=run)


def transformed(x: Tensor, signs: list[int]) -> Tensor:
    """xᵀ of all rows, padded and through the transform: [K, L]."""
    rows = x.flatten(0, -2)
    turned = pad(rows, (0, 0, 0, padded(rows.shape[0], signs) - rows.shape[0])).t().contiguous()
    return hadamard(turned, signs) if signs else turned


def padded(rows: int, signs: list[int]) -> int:
    """Rows with what fills the last block and transform, both powers of two."""
    unit = max(BLOCK, len(signs))
    return -(-rows // unit) * unit
