"""A plan's models, loaded: what all sessions share, and what makes a session's own."""

from __future__ import annotations

from typing import Protocol

from lltk.stream.decoder import LatentDecoder
from lltk.stream.lanes import Lane
from lltk.stream.runtimes import Runtime
from lltk.streaming.bundle import BundlePlan
from lltk.streaming.plan import Plan, StreamPlan
from lltk.streaming.slots import Slot


class Engine(Protocol):
    """Loaded models."""

    @property
    def decoder_lane(self) -> Lane | None:
        """Where decoding takes turns; None where this process decodes nothing."""

    def slot(self) -> Slot:
        """Runtimes and decoder for a session."""


def load_engine(plan: Plan, rank: int) -> Engine:
    """Load a plan's models.

    Args:
        plan: of the stream.
        rank: which of its processes this one is.

    Raises:
        ValueError: the plan has no weights, or ONNX Runtime does not load a graph.
    """
    if isinstance(plan, BundlePlan):
        from lltk.streaming.ort_engine import OrtEngine

        return OrtEngine(plan)
    from lltk.streaming.torch_engine import TorchEngine  # a bundle needs no modules

    assert isinstance(plan, StreamPlan)
    return TorchEngine(plan, rank)


def open_decoder(plan: Plan) -> LatentDecoder:
    """Load what turns a plan's latents into frames; errors as `load_engine`'s."""
    if isinstance(plan, BundlePlan):
        from lltk.streaming.ort_engine import make_decoder

        return make_decoder(plan)
    from lltk.streaming.decoders import Decoders

    assert isinstance(plan, StreamPlan)
    return Decoders(plan).new()


def open_runtime(plan: Plan) -> Runtime:
    """Load a plan's transformer for a single run; errors as `load_engine`'s."""
    if isinstance(plan, BundlePlan):
        from lltk.streaming.ort_engine import make_runtime

        return make_runtime(plan)
    from lltk.streaming.torch_engine import make_runtime as make_torch_runtime

    assert isinstance(plan, StreamPlan)
    return make_torch_runtime(plan)
