"""A rank's share of the clips of a call, whose frames several ranks have between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.graph.contract import Role
from lltk.graph.facts import Ranks
from lltk.graph.program import Program
from lltk.parallel.exchange import all_parts, own_part
from lltk.parallel.groups import SEQUENCE, rank_in


class Share:
    """What this rank has of the tensors of whole clips.

    Args:
        program: for one rank, or for those of the group ``sequence``.

    Raises:
        ValueError: the group has another number of ranks.
    """

    def __init__(self, program: Program) -> None:
        self.ranks = program.fact(Ranks).count
        """How many ranks have a share."""
        self._rank = rank_in(SEQUENCE, self.ranks)

    def own(self, whole: Tensor, shape: Sequence[int]) -> Tensor:
        """This rank's part of a tensor.

        Args:
            whole: the same on every rank.
            shape: of a rank's part. The ranks share the axis in which it is smaller.
        """
        for axis, (size, own) in enumerate(zip(whole.shape, shape, strict=True)):
            if size != own:
                assert size == own * self.ranks, f"{own} is no rank's part of {size}"
                return whole.narrow(axis, self._rank * own, own)
        return whole

    def counted(self, alike: Tensor, axis: int) -> Tensor:
        """This rank's part of what all ranks have computed alike, for its share of a loss.

        Gradients reach the whole tensor, on every rank. All ranks must call it.
        """
        return alike if self.ranks == 1 else own_part(alike, axis, self.ranks, SEQUENCE)

    def whole(self, own: Tensor, axis: int) -> Tensor:
        """The parts of all ranks along an axis. All ranks must call it."""
        return own if self.ranks == 1 else all_parts(own, axis, self.ranks, SEQUENCE)


def takes_joined(program: Program) -> bool:
    """Whether ranks divide [clean; noisy] as it stands, so that one input has parts of both."""
    return program.kind == "train" and not program.contract("train").having(Role.CLEAN)


def joined(values: Mapping[Role, Tensor]) -> dict[Role, Tensor]:
    """The values of whole clips for such a Program: what is by frame or chunk, for [clean; noisy].

    Clean frames have t = 0.
    """
    time = values[Role.TIME]
    return dict(values) | {
        Role.LATENTS: torch.cat([values[Role.CLEAN], values[Role.LATENTS]], 2),
        Role.TIME: F.pad(time, (time.shape[1], 0)),
        Role.POSITIONS: values[Role.POSITIONS].repeat(2),
        Role.TEXT: values[Role.TEXT].repeat(1, 2, 1, 1),
    }
