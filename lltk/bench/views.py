"""Large Programs with random weights that take little memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lltk.graph.program import Program


def with_views(program: Program) -> Program:
    """The Program with random weights, views of one tensor a dtype; its scales are positive.

    Each view begins elsewhere, because a builder of engines keeps equal weights once.
    """
    most = max(weight.numel() for weight in program.weights.values()) + len(program.weights)
    normal = 0.02 * torch.randn(most, generator=torch.Generator().manual_seed(0))
    codes = (normal * 1e4).to(torch.int32).to(torch.uint8)
    drawn: Mapping[torch.dtype, Tensor] = {
        torch.float32: normal,
        torch.uint8: codes,
        torch.float8_e4m3fn: (codes % 64 + 32).view(torch.float8_e4m3fn),
    }

    def view(start: int, like: Tensor) -> Tensor:
        if not like.dim():
            return normal[start].abs()
        return drawn[like.dtype][start : start + like.numel()].view(like.shape)

    weights = {
        name: view(start, like) for start, (name, like) in enumerate(program.weights.items())
    }
    return replace(program, weights=weights)
