"""From a recipe to running streams.

::

    plan = plan_stream(load_recipe(path), device="cuda")  # nothing is allocated
    models = load_models(plan)  # weights, compiled code and text encoder
    with VideoWriter(output, *plan.size, plan.section.fps) as writer:
        with models.open(lambda video: writer.write(pixels(video)), load_script(script)) as stream:
            for report in stream:
                …
            stream.save(state)

`open_stream` is the short way to a single stream. What a plan says of itself is in functions:
`describe`, `stream_memory`, `session_memory`, `loading_memory`, `check_plan`, `refusal`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from lltk.parallel.groups import LostRank
from lltk.parallel.orders import Orders
from lltk.stream.prompts import Embed
from lltk.stream.script import Shot
from lltk.streaming.bundle import BundlePlan, is_bundle, plan_bundle
from lltk.streaming.checks import check_plan, refusal
from lltk.streaming.description import describe
from lltk.streaming.engines import open_decoder, open_runtime
from lltk.streaming.leading import LeadingModels, follow
from lltk.streaming.memory import check_sessions, loading_memory, session_memory, stream_memory
from lltk.streaming.models import Models, load_models
from lltk.streaming.plan import Placed, Plan, StreamPlan, plan_stream
from lltk.streaming.stream import Stream

__all__ = [
    "BundlePlan",
    "LeadingModels",
    "LostRank",
    "Models",
    "Orders",
    "Placed",
    "Plan",
    "Stream",
    "StreamPlan",
    "check_plan",
    "check_sessions",
    "describe",
    "follow",
    "is_bundle",
    "load_models",
    "loading_memory",
    "open_decoder",
    "open_runtime",
    "open_stream",
    "plan_bundle",
    "plan_stream",
    "refusal",
    "session_memory",
    "stream_memory",
]


def open_stream(
    plan: Plan,
    sink: Callable[[Tensor], None] | None,
    script: Sequence[Shot] = (),
    *,
    image: Tensor | None = None,
    resume: Path | None = None,
    prompts: Embed | None = None,
) -> Stream:
    """Load models for a single stream, and open it: prompts and image are encoded before.

    Args:
        plan, prompts: see `load_models`.
        sink, script, image, resume: see `Models.open`.

    Raises:
        ValueError: as `load_models` and `Models.open`.
    """
    check_plan(plan, image is not None)
    return Models(plan, prompts).open(sink, script, image=image, resume=resume)
