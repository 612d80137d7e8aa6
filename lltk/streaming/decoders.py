"""A plan's decoders, loaded: modules that sessions share, and a decoder for each session."""

from __future__ import annotations

from dataclasses import dataclass

from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program
from lltk.graph.spec import DecoderSpec
from lltk.stream.columns import ColumnDecoder, RankDecoder
from lltk.stream.decoder import Decoder, LatentDecoder, decoder_lane
from lltk.stream.lanes import Lane
from lltk.stream.recipe import EVERY_RANK
from lltk.streaming.plan import Placed, StreamPlan


@dataclass(frozen=True)
class _Loaded:
    """A decoder's Program, the same runnable, and where decoders over it take turns."""

    placed: Placed
    module: ProgramModule
    lane: Lane


class Decoders:
    """The decoders of a plan that a rank runs; several make a part of the columns each.

    Args:
        plan: with weights.
        rank: which of the processes this one is; it has a decoder.
    """

    def __init__(self, plan: StreamPlan, rank: int = 0) -> None:
        section = plan.section.decoder
        self._of_ranks: list[int] = []
        """The columns that each rank makes, if each makes some."""
        if section.device == EVERY_RANK:
            self._of_ranks = [_columns(placed.program) for placed in plan.decoders]
        self._graphs = section.cuda_graphs
        self._loaded: list[_Loaded] = []
        for placed in plan.decoders_of(rank):
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
        if len(self._of_ranks) > 1:
            return RankDecoder(made[0], self._of_ranks)
        return made[0] if len(made) == 1 else ColumnDecoder(made)


def _columns(program: Program) -> int:
    """How many columns of the video a decode Program makes."""
    assert isinstance(program.model, DecoderSpec)
    return program.contract("first").outputs[program.model.output].shape[-1]
