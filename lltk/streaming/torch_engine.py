"""Models that torch runs."""

from __future__ import annotations

from torch import Tensor

from lltk.graph.module import instantiate
from lltk.stream.decoder import DecodedElsewhere
from lltk.stream.lanes import Lane
from lltk.stream.runtimes import Runtime
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.streaming.decoders import Decoders
from lltk.streaming.plan import StreamPlan
from lltk.streaming.slots import Slot


class TorchEngine:
    """A plan's modules; see `lltk.streaming.engines.Engine`.

    Args:
        plan: with weights.
        rank: which of its processes this one is.

    Raises:
        ValueError: the plan has no weights.
    """

    def __init__(self, plan: StreamPlan, rank: int) -> None:
        self._plan = plan
        self._decoders = Decoders(plan, rank) if plan.decoders_of(rank) else None
        self._module = instantiate(plan.transformer, plan.device)
        if plan.section.compile:
            self._module.compile_blocks()
        self._lane = Lane(next(self._module.parameters()).device)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The transformer's parameters, as they run, by name."""
        return dict(self._module.named_parameters())

    @property
    def decoder_lane(self) -> Lane | None:
        return None if self._decoders is None else self._decoders.lane

    def slot(self) -> Slot:
        plan, lane, decoders = self._plan, self._lane, self._decoders
        program, graphs = plan.transformer, plan.section.cuda_graphs
        count = 2 if plan.guided else 1
        runtimes = [TorchRuntime(program, self._module, graphs, lane) for _ in range(count)]
        decoder = DecodedElsewhere(lane.device) if decoders is None else decoders.new()
        if plan.section.decoder.cuda_graphs and decoder.lane.device == lane.device:
            # A recording begins by emptying the device's caches, so the transformer has to rest.
            with lane.turn(), decoder.lane.turn():
                decoder.warm_up()
        return Slot(runtimes, decoder)


def make_runtime(plan: StreamPlan) -> Runtime:
    """The transformer alone, as it is without compiling and recording."""
    program = plan.transformer
    return TorchRuntime(program, instantiate(program, plan.device))
