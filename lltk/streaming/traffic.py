"""How many bytes ranks send each other, and what a slow link makes of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lltk.graph.edit import op_of
from lltk.graph.facts import Ranks
from lltk.graph.program import Program
from lltk.graph.regions import nodes_of_pass
from lltk.parallel.exchange import ALL_PARTS, HEADS_TO_TOKENS, SEND_TOKENS, TOKENS_TO_HEADS

PCIE = 16 * 16e9 / 8 * 128 / 130
"""Bytes a second each way over PCIe Gen4 x16: 16 lanes of 16 GT/s, 128 bits of 130."""
_EXCHANGES = (SEND_TOKENS, TOKENS_TO_HEADS, HEADS_TO_TOKENS, ALL_PARTS)


def sent_bytes(program: Program, graph: str = "step") -> int:
    """Bytes that each rank sends to the others in a pass; as many arrive."""
    ranks = program.fact(Ranks).count
    exchanged = sum(
        _bytes(node.meta["val"])
        for node in nodes_of_pass(program, graph)
        if op_of(node) in _EXCHANGES
    )
    return exchanged * (ranks - 1) // ranks


def pcie_seconds(sent: int) -> float:
    """A model: what a pass's bytes take over PCIe Gen4 x16 if nothing hides or slows them."""
    return sent / PCIE


def _bytes(results: Any) -> int:
    """Of an exchange's one result or several, a rank's own part among them."""
    each = [results] if isinstance(results, Tensor) else results
    return sum(value.nbytes for value in each)
