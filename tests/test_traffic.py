"""What ranks send each other in a pass, counted and compared."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from helpers import PASSES, after, reached
from ranks import alike

from lltk.streaming.traffic import pcie_seconds, sent_bytes

pytestmark = pytest.mark.cpu

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "exchanges.py"


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"exchange": "compute"}, 1),
        ({"exchange": "fp8"}, (1 + (1 + 4 / 16) / 4) / 2),
        ({"exchange": "nvfp4"}, (1 + (8 + 16 / 4 + 16 / 4) / 64) / 2),  # scales fill 16 bytes
        ({"exchange": "fp8", "exchange_queries": "fp8"}, (1 + 4 / 16) / 4),
    ],
)
def test_bytes_follow_from_shapes(options: dict[str, str], share: float) -> None:
    """A rank keeps its own part of what it sends. Layers that share a block are counted each."""
    program = after(
        reached("stream", *PASSES["stream"][:6], head_dim=16), {"ulysses_stream": options}
    )
    spec, geometry = program.spec, program.geometry
    tokens = geometry.chunk * geometry.frame_tokens(spec)
    value = tokens * spec.heads * spec.head_dim * 4  # bytes of the keys of all ranks
    result = tokens * spec.channels * 4 * 4
    wanted = spec.layers * 4 * value * share // 4 + result // 2
    assert sent_bytes(program) == wanted
    assert sent_bytes(after(program, "regionalise", "lower")) == wanted
    assert sent_bytes(program, "prologue") == 0


def test_pcie_is_a_model() -> None:
    assert pcie_seconds(31_507_692_307) == pytest.approx(1, abs=1e-3)


def test_fewer_bytes_make_larger_errors() -> None:
    """Of ranks that hold the same, over random weights."""
    config = "{num_layers: 2, num_attention_heads: 2, attention_head_dim: 32, ffn_dim: 64}"
    passes = str([*PASSES["stream"][:6], "ulysses_stream", *PASSES["stream"][6:]])
    sizes = "geometry.height=32", "geometry.width=64", "geometry.chunk=2", "geometry.window=6"
    changes = [f"model.config={config}", f"passes={passes}", *sizes, "geometry.sink=2"]
    script = runpy.run_path(str(SCRIPT))
    with alike():
        found = list(script["results"]("tiny_stream", changes, torch.device("cpu")))
    error = {row["name"]: row["errors"]["output"] for row in found}
    sent = {row["name"]: row["sent_bytes"] for row in found}
    names = "compute", "keys and values in FP8", "keys and values in NVFP4"
    assert error[names[0]] == 0 < 2 * error[names[1]] < error[names[2]] < 0.2
    assert sent[names[0]] > sent[names[1]] > sent[names[2]]
    assert 0 < error["queries and results in FP8"] < 0.1
