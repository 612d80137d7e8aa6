"""The table of what ranks have to do is counted from their graphs."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config

from lltk.graph.edit import building, op_of
from lltk.ops.implementations import overload

pytestmark = pytest.mark.cpu

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "layouts.py"))


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    """Of the script, for the tiny recipe with a model of one layer."""
    recipe = tmp_path / "small.yaml"
    config = json.dumps(tiny_config(1))
    recipe.write_text(f"extends: tiny_train\nmodel:\n  config: {config}\n")
    given = [str(recipe), "--frames", "12", "--vae", "tiny_vae"]
    made: argparse.Namespace = SCRIPT["parser"]().parse_args(given)
    return made


def counted(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    return list(SCRIPT["counted"](way, 2, options))


def test_a_naive_layout_leaves_half_of_the_ranks_without_a_loss(
    options: argparse.Namespace,
) -> None:
    naive = counted("naive, whole encoder", options)
    balanced = counted("balanced, encoder looks back", options)
    assert [row["tokens"] for row in naive] == [0, 12 * 16]
    assert [row["tokens"] for row in balanced] == [6 * 16, 6 * 16]
    assert naive[0]["sent"] == balanced[0]["sent"] > 0
    assert all(row["encoded"] == 45 for row in naive)
    assert sum(row["encoded"] for row in counted("balanced, encoder handed on", options)) == 45


def test_what_is_moved_after_an_exchange_is_seen(options: argparse.Namespace) -> None:
    program = SCRIPT["program_of"]("balanced_sp", 2, options)
    assert SCRIPT["permuted_bytes"](program) == 0
    (region,) = program.regions.values()
    attention = overload("block_causal_attention")
    node = next(node for node in region.graph.nodes if op_of(node) is attention)
    queries: Any = node.args[0]
    with building(node) as build:
        moved = build(torch.ops.aten.clone.default, queries)
    moved.meta["val"] = queries.meta["val"]
    node.replace_input_with(queries, moved)
    layers = program.spec.layers
    assert SCRIPT["permuted_bytes"](program) == layers * queries.meta["val"].nbytes
