"""Where the decoder had best run: a model of the 5B in FP8 on H200s, and what it proposes.

A chunk takes one pass a step and a commit, which is a pass too, and the decoding of its latents. On
the same GPUs one comes after the other; on others they overlap, and the longer one counts. Several
GPUs decode a part of the columns each; more than two count as two.
"""

from __future__ import annotations

from dataclasses import dataclass

from lltk.stream.recipe import EVERY_RANK
from lltk.streaming.plan import Plan

PASS_MS = {1: 147.5, 2: 91.5}
"""Milliseconds of a pass, by ranks, as benchmarks/records has them: inference_h200, dit_2_ranks."""
DECODE_MS = {1: 60.9, 2: 42.0}
"""Milliseconds of a latent beside the transformer, by GPUs that decode a part of its columns each,
as benchmarks/records has them: inference_h200, inference_2_ranks."""
_GPUS = (1, 2, 4)
_LATENTS = 8
"""Latents of a chunk."""
_SHAPE = (704, 1280, _LATENTS, 32)
"""Height and width of the video, chunk and window that were measured."""


@dataclass(frozen=True)
class Placement:
    """A way to use GPUs.

    Attributes:
        gpus: how many.
        ranks: how many of them share the transformer.
        device: what ``stream.decoder.device`` says.
        chunk_ms: milliseconds of a chunk, by the model.
    """

    gpus: int
    ranks: int
    device: str
    chunk_ms: float


def placements(gpus: int, steps: int) -> list[Placement]:
    """The ways to use so many GPUs, the fastest first.

    Args:
        gpus: of one machine.
        steps: denoising passes of a chunk.
    """
    found = [
        Placement(gpus, ranks, *_decoded(gpus, ranks, (steps + 1) * ms))
        for ranks, ms in PASS_MS.items()
        if ranks <= gpus
    ]
    return sorted(found, key=lambda each: each.chunk_ms)


def _decoded(gpus: int, ranks: int, passes: float) -> tuple[str, float]:
    """Where the decoder runs, and milliseconds of a chunk whose passes take ``passes``."""
    own = [f"cuda:{index}" for index in range(ranks, gpus)]
    decoding = _LATENTS * DECODE_MS[min(len(own) or ranks, 2)]
    if own:
        names = own[0] if len(own) == 1 else f"[{', '.join(own)}]"
        return names, max(passes, decoding)
    return EVERY_RANK if ranks > 1 else "null", passes + decoding


def proposals(plan: Plan) -> list[list[Placement]]:
    """`placements` for some numbers of GPUs; none for a plan that the model does not cover."""
    geometry = plan.geometry
    shape = (*plan.size, geometry.chunk, geometry.window)
    fp8 = plan.implementations.get("fp8_matmul") == "scaled_mm"
    if shape != _SHAPE or plan.spec.layers != 30 or not fp8:
        return []
    return [placements(gpus, plan.section.steps) for gpus in _GPUS]
