"""The memory that a training run is planned to need, beside what steps of the 5B took."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lltk.graph.memory import total
from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import shipped
from lltk.tasks.transformer import TransformerPlan, plan_transformer

pytestmark = pytest.mark.cpu
RECORDS = Path(__file__).parents[1] / "benchmarks" / "records"


@cache
def planned() -> TransformerPlan:
    """The 5B as `benchmarks/training_iteration.py` trains it on one GPU, without its weights."""
    changes = ["optimiser=adamw_8bit", "weights=compute", "ema_decay=null", "from_scratch=true"]
    changes += ["batch=1", "sample_every=null", "data.shots=1", "data.clips=null"]
    changes = [f"train.{change}" for change in changes]
    recipe = read_recipe(
        shipped()["wan22_5b_train_16s"],
        [*changes, "geometry.batch=1", "model.checkpoint=null", "passes=[canonicalise]"],
    )
    return plan_transformer(recipe, torch.device("cpu"), "test")


def estimate(frames: int, **section: Any) -> dict[str, int]:
    """The plan's memory for a clip of so many latent frames."""
    plan = planned()
    geometry = plan.program.geometry.model_copy(update={"frames": frames})
    program = replace(plan.program, geometry=geometry)
    return dict(
        replace(plan, program=program, section=plan.section.model_copy(update=section)).memory
    )


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ("training_iteration", "16 s"),
        ("training_iteration_longest", "27 s, all recomputed"),
    ],
)
def test_a_steps_peak_is_estimated(record: str, name: str) -> None:
    """With what encodes clips and captions, whose files are not here."""
    results = json.loads((RECORDS / f"{record}.json").read_text())["results"]
    (row,) = (each for each in results if each["name"] == name)
    encoders = {owner: row["estimate"][owner] for owner in ("vae", "text encoder")}
    memory = estimate(row["frames"], keep_attention=row["kept"]) | encoders
    assert total(memory) == pytest.approx(row["peak"], rel=0.05)


def test_what_is_held_at_once_is_counted() -> None:
    """Short clips peak when all gradients are there; so do long ones in a second call."""
    weights = planned().memory["weights"]
    short, long = estimate(8), estimate(96)
    assert short["gradients"] == pytest.approx(weights, rel=0.05)
    assert "gradients" not in long
    for more in ({"batch": 2}, {"graphs": True}):
        kept = estimate(96, **more)
        assert kept.pop("gradients") == pytest.approx(weights, rel=0.05)
        assert kept == long


def test_the_block_that_needs_most_counts() -> None:
    """A block that keeps what attention gives has less to make again than one that does not."""
    none, one, ten, all_ = (estimate(96, keep_attention=n) for n in (0, 1, 10, 30))
    assert total(none) > total(one) > 0.9 * total(none)
    assert one["inside a block"] == none["inside a block"] > ten["inside a block"]
    assert all_["attention's results"] == 3 * ten["attention's results"]
    assert total(all_) > total(ten)
