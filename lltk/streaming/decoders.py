"""A plan's decoders, loaded: modules that sessions share, and a decoder for each session."""

from __future__ import annotations

from dataclasses import dataclass

from lltk.graph.module import ProgramModule, instantiate
from lltk.stream.columns import ColumnDecoder
from lltk.stream.decoder import Decoder, LatentDecoder, decoder_lane
from lltk.stream.lanes import Lane
from lltk.streaming.plan import Placed, StreamPlan


@dataclass(frozen=True)
class _Loaded:
    """A decoder's Program, the same runnable, and where decoders over it take turns."""

    placed: Placed
    module: ProgramModule
    lane: Lane


class Decoders:
    """The decoders of a plan; several make a part of the columns each.

    Args:
        plan: with weights.
    """

    def __init__(self, plan: StreamPlan) -> None:
        section = plan.section.decoder
        self._graphs = section.cuda_graphs
        self._loaded: list[_Loaded] = []
        for placed in plan.decoders:
            module = instantiate(placed.program, placed.device)
            if section.compile:
                module.compile_graph("steps" if section.latents > 1 else "step")
            self._loaded.append(_Loaded(placed, module, decoder_lane(module)))

    @property
    def lane(self) -> Lane:
        """Where decoding takes turns."""
        return self._loaded[0].lane

    @property
    def modules(self) -> list[ProgramModule]:
        """The modules, each with its weights."""
        return [each.module for each in self._loaded]

    def new(self) -> LatentDecoder:
        """A decoder with feature caches of its own."""
        made = [
            Decoder(each.placed.program, each.module, self._graphs, each.lane)
            for each in self._loaded
        ]
        return made[0] if len(made) == 1 else ColumnDecoder(made)


def open_decoder(plan: StreamPlan) -> LatentDecoder:
    """Load what turns a plan's latents into frames."""
    return Decoders(plan).new()
