"""Models that ONNX Runtime or TensorRT for RTX runs."""

from __future__ import annotations

from collections.abc import Mapping

from lltk.export.bundle import open_engine
from lltk.export.facts import DECODER, TRANSFORMER
from lltk.stream.decoder import LatentDecoder
from lltk.stream.lanes import Lane
from lltk.stream.runtimes import Runtime
from lltk.stream.runtimes.onnx_graph import OnnxGraph
from lltk.stream.runtimes.ort import Graph, OrtDecoder, OrtRuntime
from lltk.streaming.bundle import BundlePlan
from lltk.streaming.slots import Slot


class OrtEngine:
    """A bundle's graphs, loaded; see `lltk.streaming.engines.Engine`.

    Args:
        plan: of the bundle.

    Raises:
        ValueError: what is to run a graph does not load it.
    """

    def __init__(self, plan: BundlePlan) -> None:
        self._plan = plan
        self._transformer, self._decoder = (_graphs(plan, each) for each in (TRANSFORMER, DECODER))
        self._lane, self._decoder_lane = Lane(plan.device), Lane(plan.device)

    @property
    def decoder_lane(self) -> Lane | None:
        return self._decoder_lane

    def slot(self) -> Slot:
        plan = self._plan
        runtimes = [
            _runtime(plan, self._transformer, self._lane) for _ in range(2 if plan.guided else 1)
        ]
        return Slot(runtimes, OrtDecoder(self._decoder, plan.decoder_spec, self._decoder_lane))


def make_runtime(plan: BundlePlan) -> Runtime:
    """The transformer alone."""
    return _runtime(plan, _graphs(plan, TRANSFORMER), Lane(plan.device))


def make_decoder(plan: BundlePlan) -> LatentDecoder:
    """The decoder alone."""
    return OrtDecoder(_graphs(plan, DECODER), plan.decoder_spec, Lane(plan.device))


def _runtime(plan: BundlePlan, graphs: Mapping[str, Graph], lane: Lane) -> Runtime:
    return OrtRuntime(graphs, plan.geometry, plan.spec, lane, plan.high_steps)


def _graphs(plan: BundlePlan, stage: str) -> dict[str, Graph]:
    """The graphs of a stage, loaded."""
    if plan.facts.engines:
        graphs = plan.facts.stages[stage].graphs
        return {name: open_engine(plan.path, plan.facts, stage, name) for name in graphs}
    return {
        name: OnnxGraph(plan.path / stage / f"{name}.onnx", graph.contract, plan.provider)
        for name, graph in plan.facts.stages[stage].graphs.items()
    }
