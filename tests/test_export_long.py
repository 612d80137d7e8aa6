"""What takes long: graphs of 5 billion parameters in ONNX, and steps in W4A4 by distribution."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import after, make_program, make_recipe
from test_export_quantised import written

from lltk.bench.random_weights import with_random_weights
from lltk.export.golden import distance, given, transformer_cases
from lltk.exporting import plan_export
from lltk.graph.recipe import open_recipe
from lltk.models.configs import named_config
from lltk.stream.runtimes.onnx_graph import OnnxGraph

pytestmark = pytest.mark.manual

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "export.py"
PASSES = (
    "canonicalise", "per_frame_timesteps", "frame_positions", "hoist_text", "cached_step", "commit",
)  # fmt: skip


@pytest.mark.parametrize("recipe", ["wan22_5b_stream", "wan22_5b_stream_nvfp4"])
def test_graphs_are_emitted(tmp_path: Path, recipe: str) -> None:
    """In at most a minute and 4 GB beyond the weights, and pass onnx's checker."""
    found = runpy.run_path(str(SCRIPT))["measure"](recipe, tmp_path)
    assert found["emit_s"] + found["check_s"] < 60
    assert found["peak_bytes"] < 4e9
    assert found["weight_bytes"] > (15e9 if recipe == "wan22_5b_stream" else 3e9)


@pytest.mark.parametrize(
    "steps", [(), ("nvfp4_cache",), ({"nvfp4_infer": {}}, {"nvfp4_cache": {"rule": "none"}})]
)
def test_one_block(tmp_path: Path, steps: tuple[Any, ...]) -> None:
    """Of the 5B's widths, over pages of few tokens, in ONNX Runtime as in torch."""
    config = dict(named_config("wan22_5b")) | {"num_layers": 1}
    sizes = {"height": 64, "width": 96, "text_tokens": 16}
    recipe = make_recipe("stream", [*PASSES, *steps], config=config, **sizes)
    base = with_random_weights(make_program(recipe, seed=None))
    original, external = (after(base, *more, "regionalise") for more in ((), ("externalise",)))
    models = written(external, tmp_path)
    sessions = {name: OnnxGraph(models / f"{name}.onnx") for name in external.graphs}
    for case in transformer_cases(original, external):
        made = sessions[case.graph](given(case.inputs, external.contract(case.graph)))
        for name, held in case.outputs.items():
            least = 1e-5 if held.element_size() == 4 else 0.01
            bound = max(least, 2 * case.spread.get(held.dtype, 0))
            assert distance(made[name], held) <= bound, (case.graph, name)


@pytest.mark.parametrize("recipe", ["tiny_stream_w4a4", "tiny_stream_nvfp4"])
def test_steps_in_w4a4_are_as_far_from_torch_as_torch_from_itself(
    tmp_path: Path, recipe: str
) -> None:
    """Over a dozen latents, and none farther than one and a half times; a wrong graph is not."""
    script = runpy.run_path(str(SCRIPT.with_name("export_spread.py")))
    row = script["measure"](recipe, 12)
    assert script["within"](row)
    assert max(row["onnx_runtime"]) <= 1.5 * max(row["torch"])
    plan = plan_export(open_recipe(recipe), text="reference")
    name = "blocks.3.attn1.to_v.weight_scales"
    scales = plan.transformer.weights[name].float()
    scales[5, 2] *= 2
    weights = {**plan.transformer.weights, name: scales.to(torch.float8_e4m3fn)}
    models = written(replace(plan.transformer, weights=weights), tmp_path)
    pairs = script["distances"](plan, OnnxGraph(models / "step.onnx"), 12)
    wrong, own = (sorted(each) for each in zip(*pairs, strict=True))
    assert own == row["torch"]
    assert not script["within"]({"onnx_runtime": wrong, "torch": own})
