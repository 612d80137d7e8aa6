"""What cuDNN's attention takes."""

from __future__ import annotations

import torch
from torch import Tensor


def check_attends(op: str, q: Tensor) -> None:
    """Refuse operands that cuDNN cannot attend with.

    Args:
        op: the op whose implementation ``cudnn`` runs; errors name it.
        q: the queries.

    Raises:
        ValueError: q is neither bfloat16 nor float16.
    """
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{op}: cudnn attends in bfloat16 or float16, not in {q.dtype}; set model.dtype, or "
            f"{op} of the recipe's lower pass to sdpa"
        )
