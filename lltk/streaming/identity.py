"""What must be the same where a saved stream goes on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lltk import __version__
from lltk.streaming.plan import Plan


def identity(plan: Plan) -> dict[str, Any]:
    """What a plan's saved streams have in common, as plain data.

    It holds digests of the models, for which every weight may be read.
    """
    transformer, decoder = plan.fingerprints()
    return {
        "lltk": __version__,
        "transformer": transformer,
        "decoder": decoder,
        **asdict(plan.chunking),
        **asdict(plan.sampling),
        **({"rank": plan.rank} if plan.ranks > 1 else {}),
    }
