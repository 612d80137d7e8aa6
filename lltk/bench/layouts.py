"""A recipe's passes with another layout of sequence parallelism."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def with_layout(passes: Iterable[Any], layout: str | None, size: int) -> list[Any]:
    """The passes of a train recipe, of which another one divides a clip among ranks.

    Args:
        passes: names, or a name and its options each; ``teacher_forcing`` among them.
        layout: ``balanced_sp``, which follows it; ``naive_sp``, which takes its place; or None for
            one rank a clip.
        size: how many ranks share a clip.
    """
    kept = [
        step
        for step in passes
        if (step if isinstance(step, str) else next(iter(step))) != "balanced_sp"
    ]
    if layout is None:
        return kept
    place = kept.index("teacher_forcing")
    before = place if layout == "naive_sp" else place + 1
    return [*kept[:before], {layout: {"size": size}}, *kept[place + 1 :]]
