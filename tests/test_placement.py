"""Where a dry run proposes to decode, and that the records have what its model says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Run

from lltk.graph.recipe import open_recipe
from lltk.streaming import StreamPlan
from lltk.streaming.placement import PASS_MS, placements, proposals

pytestmark = pytest.mark.cpu

RECORDS = Path(__file__).parents[1] / "benchmarks" / "records"


def results(name: str) -> dict[str, Any]:
    """A record's rows by name; of several of a name, the last."""
    record = json.loads((RECORDS / f"{name}.json").read_text())
    return {row["name"]: row for row in record["results"]}


@pytest.mark.parametrize(
    ("record", "row"),
    [
        *(("inference_h200", row) for row in ("+ async decoding", "3 steps", "2 steps")),
        *(
            ("inference_2_ranks", row)
            for row in ("2 ranks", "2 ranks, 3 steps", "2 ranks, 2 steps")
        ),
    ],
)
def test_the_model_makes_the_chunks_that_were_recorded(record: str, row: str) -> None:
    """Where a GPU decodes beside the transformer. At half the decoder's time it would not."""
    recorded = results(record)[row]
    gpus = recorded.get("gpus", 1)
    device = "null" if gpus == 1 else "ranks"
    (modelled,) = [way for way in placements(gpus, recorded["steps"]) if way.device == device]
    assert modelled.ranks == gpus
    assert modelled.chunk_ms / 1e3 == pytest.approx(recorded["chunk_seconds"]["p50"], rel=0.01)
    assert modelled.chunk_ms / 1e3 == pytest.approx(32 / recorded["e2e_fps"], rel=0.02)


def test_a_pass_of_two_ranks_is_as_recorded() -> None:
    row = results("dit_2_ranks")["wan22_5b_stream_sp2"]
    assert row["graphs"] and PASS_MS[2] == pytest.approx(row["step"]["median_ms"], abs=0.05)


def test_the_fastest_is_proposed() -> None:
    """The more the passes, the better it is to share them."""
    assert [way.device for way in placements(2, 4)] == ["cuda:1", "ranks"]
    assert [way.device for way in placements(2, 8)] == ["ranks", "cuda:1"]
    best, other = placements(4, 4)
    assert (best.ranks, best.device, best.gpus) == (2, "[cuda:2, cuda:3]", 4)
    assert (other.ranks, other.device) == (1, "[cuda:1, cuda:2, cuda:3]")
    assert (best.chunk_ms, other.chunk_ms) == (5 * PASS_MS[2], 5 * PASS_MS[1])


@pytest.fixture
def measured(plan: StreamPlan) -> StreamPlan:
    """A plan that the model covers, for 2 steps; its graphs are another's."""
    geometry, program = open_recipe("wan22_5b_stream_fp8", ()).geometry, plan.transformer
    return replace(
        plan,
        recipe=plan.recipe.model_copy(update={"geometry": geometry}),
        section=plan.section.model_copy(update={"steps": 2}),
        transformer=replace(
            program,
            geometry=geometry,
            model=replace(program.spec, layers=30),
            implementations={"fp8_matmul": "scaled_mm"},
        ),
    )


def test_only_what_was_measured_is_modelled(plan: StreamPlan, measured: StreamPlan) -> None:
    assert [way[0].device for way in proposals(measured)] == ["null", "cuda:1", "[cuda:2, cuda:3]"]
    program = measured.transformer
    for change in (
        {"geometry": program.geometry.model_copy(update={"chunk": 4})},
        {"implementations": {"paged_attention": "arena"}},
        {"model": plan.transformer.spec},
    ):
        assert not proposals(replace(measured, transformer=replace(program, **change)))


def test_a_dry_run_shows_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, plan: StreamPlan, measured: StreamPlan
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("lltk.streaming.plan_stream", lambda *given, **options: plan)
    what = "stream", "tiny_stream", "--prompt", "x", "--dry-run"
    _, out, _ = run(*what)
    assert "Where to decode" not in out
    ways = proposals(measured)
    monkeypatch.setattr("lltk.streaming.placement.proposals", lambda plan: ways)
    _, out, _ = run(*what)
    table = out[out.index("Where to decode") :]
    assert [line.split()[:3] for line in table.splitlines() if "yes" in line] == [
        ["1", "1", "null"],
        ["2", "1", "cuda:1"],
        ["4", "2", "[cuda:2,"],
    ]
    _, out, _ = run(*what, "--json")
    assert json.loads(out)["placements"][1]["device"] == "cuda:1"
