"""Updates of a network's weights, by ranks together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lltk.parallel.mesh import Mesh, divided_like, local_part, whole
from lltk.stream.timing import Stopwatch
from lltk.train.data import Batch, Batches, Dataset
from lltk.train.gradients import by_place, clip, total_norm
from lltk.train.masters import Masters
from lltk.train.objective import Objective
from lltk.train.optimiser import Optimiser
from lltk.train.recipe import TrainSection
from lltk.train.shards import Divided, divided
from lltk.train.state import NetworkState


class NotFinite(ArithmeticError):
    """A loss or a gradient is not finite; says which, and where that begins.

    The weights are those before the update.
    """


class Updates:
    """A network that trains: its weights, their optimiser, their average and its clips.

    Args:
        objective: what an update minimises.
        dataset: the samples.
        section: the batch, the optimiser, the averaging and so on.
        mesh: the ranks, all of which make and use this alike.
        watch: measures the parts of an update.
        found: see `divided`.
        name: of the network, before the names of these parts; empty for the only one.

    Raises:
        ValueError: the batch is not a whole number of calls.
    """

    def __init__(
        self,
        objective: Objective,
        dataset: Dataset,
        section: TrainSection,
        mesh: Mesh,
        watch: Stopwatch,
        found: Divided,
        name: str = "",
    ) -> None:
        self.calls = section.calls(objective.clips * mesh.groups)
        """The calls of an update, on each rank."""
        self._objective = objective
        self._section = section
        self._mesh = mesh
        self._watch = watch
        self._prefix = f"{name} " if name else ""
        self._batches = Batches(dataset, section.seed, objective.clips, mesh.group, mesh.groups)
        wide = section.weights == "float32"
        apart = divided(objective.module, mesh, wide, found) if mesh.shards > 1 else {}
        self.masters = Masters(
            objective.module, objective.weights, objective.weights_changed, wide, section.offload,
            apart,
        )  # fmt: skip
        self.optimiser = Optimiser(self.masters.parameters, section)
        self.averaged: dict[str, Tensor] = {}
        """The averaged weights, float32 by name, in this rank's parts; empty before there are any.
        """
        self.done = 0
        """How many updates were made."""

    @property
    def position(self) -> int:
        """How many samples all ranks have seen."""
        return self._batches.position

    def take(self, rate: float) -> tuple[float, float]:
        """Update the weights once with a learning rate, and average them.

        Returns:
            The loss before the update, and its gradient's norm before clipping.

        Raises:
            NotFinite: one of them is not finite.
        """
        mesh, objective = self._mesh, self._objective
        with self._measure("data"):
            batches = [next(self._batches) for _ in range(self.calls)]
        counts = torch.tensor(sum(objective.count(batch) for batch in batches))
        count = max(1, int(mesh.total(counts)) // mesh.sequence)
        parts = []
        for batch in batches:
            with self._measure("forward"):
                part = objective.loss(batch) / count
            with self._measure("backward"):
                (part * mesh.factor).backward()
                self.masters.collect()
            parts.append(part.detach())
        groups = by_place(self.masters.parameters.values())
        with self._measure("exchange"):
            loss = float(mesh.total(torch.stack(parts).sum()))
            mesh.add_up(master for group in groups for master in group)
            norm = total_norm(groups)
        if not math.isfinite(loss + float(norm)):
            raise NotFinite(self._first_bad(loss, float(norm), batches))
        with self._measure("optimiser"):
            clip(self.masters.parameters.values(), self._section.clip, norm)
            self.optimiser.step(rate)
            self.masters.publish()
            self.done += 1
            self._average()
        return loss, float(norm)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights that train, by parameter name."""
        return {name: tuple(master.shape) for name, master in self.masters.parameters.items()}

    def load(self, state: NetworkState, done: int) -> None:
        """Go on from a checked state of this network, after so many updates."""
        masters = self.masters.parameters
        self.masters.load({n: divided_like(state.weights[n], m) for n, m in masters.items()})
        self.averaged = {n: divided_like(tensor, masters[n]) for n, tensor in state.ema.items()}
        self.optimiser.load(state.optimiser)
        self.done = done
        self._batches.position = done * self._section.batch

    @contextmanager
    def using_averages(self) -> Iterator[None]:
        """Let the module have the averaged weights inside the block, once there are some."""
        if not self.averaged:
            yield
        else:
            with self.masters.replaced(self.averaged):
                yield

    @contextmanager
    def _measure(self, part: str) -> Iterator[None]:
        with self._watch.measure(self._prefix + part):
            yield

    @torch.no_grad()
    def _average(self) -> None:
        decay = self._section.ema_decay
        if decay is None or self.done < self._section.ema_start:
            return
        if not self.averaged:
            self.averaged = self.masters.copy()
            return
        masters = self.masters.parameters
        averages = [local_part(self.averaged[name]) for name in masters]
        torch._foreach_lerp_(averages, [local_part(m) for m in masters.values()], 1 - decay)

    def _first_bad(self, loss: float, norm: float, batches: list[Batch]) -> str:
        where: str | None = None
        if self._mesh.size == 1:  # ranks that share a clip would have to look together
            where = next((bad for b in batches if (bad := self._objective.first_bad(b))), None)
        if where is None and math.isfinite(loss):
            wrong = [n for n, m in self.masters.parameters.items() if not _finite_gradient(m)]
            where = f"the gradient of {wrong[-1] if wrong else 'all parameters together'}"
        found = where or "the loss itself"
        return f"the loss is {loss}, its gradient's norm {norm}; first not finite: {found}"


def _finite_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or bool(whole(parameter.grad).isfinite().all())
