"""The operations that are counted are those that a run makes; of attention, what a mask allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PASSES, make_recipe, runnable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lltk.graph.flops import forward_flops, training_flops
from lltk.graph.geometry import Kind
from lltk.graph.program import Program

pytestmark = pytest.mark.cpu

SIZES: dict[str, Any] = {"frames": 8, "batch": 3, "height": 64, "width": 96}
KINDS: tuple[Kind, ...] = ("reference", "train", "score")


def counted(program: Program, module: torch.nn.Module) -> int:
    """torch's count of a pass, which runs each chunk's attention over the keys that it sees."""
    kind = program.kind
    inputs = {
        name: torch.zeros(spec.shape, dtype=spec.dtype)
        for name, spec in program.contract(kind).inputs.items()
    }
    plain = sdpa_kernel(SDPBackend.MATH)  # torch counts no fused attention of a CPU
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        module(kind, inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_as_torch_counts_them(kind: Kind) -> None:
    program, module = runnable(make_recipe(kind, **SIZES))
    found = counted(program, module)
    assert forward_flops(program, kind) == found > 0
    assert training_flops(program) == 3 * found


def test_ranks_that_share_a_clip_do_together_what_one_does() -> None:
    *steps, last = PASSES["train"][:-1]
    whole, _ = runnable(make_recipe("train", [*steps, last], **SIZES))
    shared = [*steps, {"balanced_sp": {"size": 2}}, last]
    part, _ = runnable(make_recipe("train", shared, **SIZES))
    assert training_flops(part) == training_flops(whole)
    assert forward_flops(part, "train") < forward_flops(whole, "train")
