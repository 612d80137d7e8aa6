"""How the ranks of a training run share its work: clips, a clip's frames, and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from lltk.parallel.groups import SEQUENCE, SHARDS, regrouped
from lltk.parallel.ranks import Ranks

Plain = TypeVar("Plain")


@dataclass(frozen=True)
class Mesh:
    """Where a rank stands among those that train together.

    Consecutive ranks form a group that works on the same clips. Weights, gradients and the
    optimiser's state are divided among as many consecutive ranks as there are shards, whether or
    not they share clips. ::

        8 ranks, sequence=2, shards=4
        clips    0 0 1 1 2 2 3 3
        shards   0 1 2 3 0 1 2 3

    Attributes:
        rank, size: the number of this process, and how many there are.
        sequence: ranks that share the frames of a clip.
        shards: ranks among which the weights are divided; 1 if each holds all of them.
    """

    rank: int = 0
    size: int = 1
    sequence: int = 1
    shards: int = 1

    @property
    def groups(self) -> int:
        """How many groups of ranks work on clips of their own."""
        return self.size // self.sequence

    @property
    def group(self) -> int:
        """The number of this rank's group."""
        return self.rank // self.sequence

    @property
    def factor(self) -> int:
        """What to multiply a rank's loss by. Shards give the mean of gradients, not their sum."""
        return 1 if self.shards == 1 else self.size

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let gradients be the sum over all ranks, after backward passes of `factor` times a loss.

        Those of parameters in parts are already. All ranks must call it.
        """
        for parameter in parameters:
            gradient = parameter.grad
            if self.size > 1 and gradient is not None and not isinstance(gradient, DTensor):
                self.total(gradient).div_(self.factor)

    def total(self, value: Tensor) -> Tensor:
        """The sum of all ranks' values, in place. All ranks must call it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def of_groups(self, value: Tensor) -> Iterator[Tensor]:
        """The groups' values in their order, each of the same shape. All ranks must take all."""
        if self.groups == 1:
            yield value
            return
        for group in range(self.groups):
            found = value.clone() if group == self.group else torch.empty_like(value)
            # As bytes, since a backend may not know the dtype.
            dist.broadcast(found.view(torch.uint8), src=group * self.sequence)
            yield found

    def spread(self, values: Mapping[str, Tensor] | None, owner: int) -> dict[str, Tensor]:
        """What one rank has, on all ranks. All must call it.

        Args:
            values: of the owner; the others have None.
            owner: the number of the rank.

        Returns:
            The owner's own tensors; the others have copies on their devices of the same type.
        """
        if self.size == 1:
            return dict(values or {})
        own = values if values is not None else {}
        facts = [{n: (tuple(x.shape), x.dtype, x.device.type) for n, x in own.items()}]
        dist.broadcast_object_list(facts, src=owner)
        spread = {}
        for name, (shape, dtype, device) in facts[0].items():
            mine = torch.empty(shape, dtype=dtype, device=device) if values is None else own[name]
            spread[name] = mine.contiguous()
            # As bytes, since a backend may not know the dtype.
            dist.broadcast(spread[name].view(torch.uint8), src=owner)
        return spread

    def same(self, value: object) -> bool:
        """Whether every rank has an equal value. All ranks must call it."""
        return all(other == value for other in self.every(value))

    def every(self, value: Plain) -> list[Plain]:
        """Each rank's value. All ranks must call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def shard(self, module: nn.Module, apart: Collection[nn.Parameter] = frozenset()) -> DeviceMesh:
        """Divide a module's parameters among the shards, block by block, by FSDP2.

        FSDP2 takes parameters of one dtype. Those of another than most, such as a model in bfloat16
        keeps in float32, stay whole on every rank, and so do scalars.

        A backward pass then gives the mean of all ranks' gradients, made in float32 or wider.

        Args:
            module: a Program's, or any other; its blocks are known by ``blocks_by_path``.
            apart: parameters that are left as they are.

        Returns:
            The ranks as FSDP2 has them: of the weights' replicas, and of their shards.
        """
        parameters = set(module.parameters()) - set(apart)
        sizes = Counter[torch.dtype]()
        for parameter in parameters:
            sizes[parameter.dtype] += parameter.numel()
        ((most, _),) = sizes.most_common(1)
        others = {p for p in parameters if p.dtype != most or not p.dim()} | set(apart)
        names = ("replicas", "shards")
        mesh = init_device_mesh(
            next(module.parameters()).device.type,
            (self.size // self.shards, self.shards),
            mesh_dim_names=names,
        )
        wide = torch.promote_types(most, torch.float32)
        policy = MixedPrecisionPolicy(reduce_dtype=wide)
        module.register_forward_hook(_copied)  # FSDP warns of results that are views
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": others}
        for part in (*getattr(module, "blocks_by_path", {}).values(), module):
            # Else the module would keep what it gathered for a forward pass that no backward pass
            # follows, and run with it after the weights have changed.
            fully_shard(part, reshard_after_forward=True, **options)
        return mesh


def _copied(module: nn.Module, given: Any, result: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, result)


ALONE = Mesh()
"""A process by itself."""


@contextmanager
def meshed(ranks: Ranks, sequence: int, shards: int) -> Iterator[Mesh]:
    """Let the ranks train together; ops find the group of those that share a clip.

    Args:
        ranks: all of them.
        sequence: how many share the frames of a clip.
        shards: among how many the weights are divided.

    Raises:
        ValueError: their number is no multiple of one of these.
    """
    size = ranks.size
    for count, what, key in (
        (sequence, "share a clip", "the size of balanced_sp or naive_sp"),
        (shards, "share the weights", "train.shards"),
    ):
        if size % count:
            raise ValueError(
                f"ranks: {count} {what} ({key}), which does not divide the {size} that run; start "
                f"torchrun --nproc-per-node {count} -m lltk train …, or a multiple of that, or "
                f"set {key} to a number that does"
            )
    mesh = Mesh(ranks.rank, size, sequence, shards)
    if size == 1:
        yield mesh
        return
    with regrouped(SEQUENCE, sequence), regrouped(SHARDS, shards):
        yield mesh


def whole(value: Tensor) -> Tensor:
    """A tensor whose parts lie on several ranks, as a whole. All of these ranks must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_part(value: Tensor) -> Tensor:
    """The part of a tensor that this rank has; all of it where it is not divided."""
    return value.to_local() if isinstance(value, DTensor) else value


def divided_like(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, divided among ranks as another one is, on its device.

    One that is divided already stays as it is.
    """
    value = value.to(like.device)
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def parted_like(own: Tensor, like: Tensor) -> Tensor:
    """A tensor of which each rank has a part, as it has of another one; undoes `local_part`."""
    if not isinstance(like, DTensor):
        return own
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape,
        stride=like.stride(),
    )  # fmt: skip
