"""Gradients of parameters of which some may lie in parts on several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lltk.parallel.mesh import local_part, whole


def by_place(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that lie in parts, and those that every rank has, as torch takes no list of both."""
    divided: list[nn.Parameter] = []
    complete: list[nn.Parameter] = []
    for parameter in parameters:
        (divided if isinstance(parameter, DTensor) else complete).append(parameter)
    return [group for group in (divided, complete) if group]


def total_norm(groups: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """The norm of all gradients together, a scalar. All ranks must call it."""
    norms = [
        whole(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups
    ]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def clip(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm, which is given, is at most ``limit``.

    Each rank scales its own parts.
    """
    own = []
    for parameter in parameters:
        if parameter.grad is not None:
            part = local_part(parameter.detach())
            part.grad = local_part(parameter.grad)
            own.append(part)
    clip_grads_with_norm_(own, limit, norm)
