"""What must be the same where a saved stream goes on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lltk import __version__
from lltk.graph.fingerprint import fingerprint
from lltk.streaming.plan import StreamPlan


def identity(plan: StreamPlan) -> dict[str, Any]:
    """What a plan's saved streams have in common, as plain data.

    It holds digests of the Programs, for which every weight is read.
    """
    return {
        "lltk": __version__,
        "transformer": fingerprint(plan.transformer),
        "decoder": "+".join(fingerprint(decoder.program) for decoder in plan.decoders),
        **asdict(plan.chunking),
        **asdict(plan.sampling),
        **({"rank": plan.rank} if plan.ranks > 1 else {}),
    }
