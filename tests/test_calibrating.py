"""Calibrated scales of activations: found, taken from checkpoints, and multiplied by."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import PASSES, Run, after, reached, refused
from streams import SHOTS, SIZES, streamed
from torch.library import opcheck

from lltk.calibrating import _Largest, calibrated, record_scales
from lltk.graph.edit import op_of
from lltk.graph.recipe import Recipe, open_recipe, parse_recipe
from lltk.models.checkpoint import load_checkpoint
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise
from lltk.ops.nvfp4_quantise_calibrated.op import nvfp4_quantise_calibrated
from lltk.streaming import plan_stream

pytestmark = pytest.mark.cpu

DATA = Path(__file__).parent / "data" / "nvfp4_layouts"


# The op


def test_values_and_saturation() -> None:
    """Within the range it is as near as a dynamic scale; what is beyond becomes the largest."""
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax() / 2688
    codes, scales = nvfp4_quantise_calibrated(x, scale)
    made = nvfp4_dequantise(codes, scales, scale)[:, :40]
    dynamic = nvfp4_dequantise(*nvfp4_quantise(x))[:, :40]
    lost, usual = (float((each - x).norm() / x.norm()) for each in (made, dynamic))
    assert abs(lost / usual - 1) < 0.05 and usual < 0.12
    beyond = nvfp4_dequantise(*nvfp4_quantise_calibrated(100 * x, scale), scale)[:, :40]
    assert float(beyond.abs().max()) == pytest.approx(float(2688 * scale))
    assert torch.equal(beyond.sign()[beyond != 0], x.sign()[beyond != 0])
    zeros = torch.zeros(3, 16)
    assert not nvfp4_dequantise(*nvfp4_quantise_calibrated(zeros, scale), scale).any()


def test_opcheck() -> None:
    for x in (torch.randn(7, 40), torch.randn(2, 3, 32).bfloat16()):
        opcheck(nvfp4_quantise_calibrated, (x, torch.tensor(0.003)))


# The pass


def scales_of(program: Any) -> dict[str, float]:
    """A scale for each linear that becomes NVFP4, none like another."""
    made = after(program, "nvfp4_infer")
    names = [n.removesuffix(".weight_codes") for n in made.weights if n.endswith("_codes")]
    return {name: 0.001 * (3 + index) for index, name in enumerate(names)}


def test_graphs_read_constant_scales() -> None:
    base = reached("stream", *PASSES["stream"][:6], head_dim=16)
    scales = scales_of(base)
    made = after(base, {"nvfp4_infer": {"activation_scale": "calibrated", "input_scales": scales}})
    names = [str(op_of(n)) for n in made.graphs["step"].nodes if n.op == "call_function"]
    assert names.count("lltk.nvfp4_quantise_calibrated.default") > 0
    assert "lltk.nvfp4_quantise.default" not in names
    held = {name: float(value) for name, value in made.weights.items() if "input_scale" in name}
    shared = [scales[f"blocks.0.attn1.to_{part}"] for part in "qkv"]
    assert held["blocks.0.attn1.to_q.input_scale"] == pytest.approx(max(shared))
    assert "blocks.0.attn1.to_k.input_scale" not in held
    assert made.run_dtype("blocks.0.attn1.to_q.input_scale") is torch.float32
    back = made.unmap_state(made.weights)
    assert back.keys() == base.weights.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_scale": "calibrated"}, "find them with lltk calibrate"),
        ({"input_scales": {"blocks.0.attn1.to_q": 0.1}}, "or remove both"),
        (
            {"activation_scale": "calibrated", "input_scales": {"blocks.0.attn1.to_q": 0.1}},
            "has no scale; exclude it, or find scales of this recipe",
        ),
        (
            {
                "activation_scale": "calibrated", "activation_rule": "mse",
                "input_scales": {"blocks.0.attn1.to_q": 0.1},
            },
            "set activation_rule: none",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    base = reached("stream", *PASSES["stream"][:6], head_dim=16)
    assert message in refused(after, base, {"nvfp4_infer": options})


def test_a_scale_of_no_linear_is_refused() -> None:
    base = reached("stream", *PASSES["stream"][:6], head_dim=16)
    options = {"activation_scale": "calibrated", "input_scales": {**scales_of(base), "head": 1.0}}
    said = refused(after, base, {"nvfp4_infer": options})
    assert "head is no linear that becomes NVFP4; remove its scale" in said


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-60, 1e300, math.inf, math.nan])
def test_a_scale_that_float32_does_not_hold_is_refused(scale: float) -> None:
    base = reached("stream", *PASSES["stream"][:6], head_dim=16)
    scales = {**scales_of(base), "blocks.0.attn1.to_q": scale}
    options = {"activation_scale": "calibrated", "input_scales": scales}
    said = refused(after, base, {"nvfp4_infer": options})
    assert "input_scales.blocks.0.attn1.to_q: Input should be " in said


# Recording


def test_largest_magnitudes_are_noted_by_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(4, 6, generator=generator) for name in "abc"}
    x = torch.randn(3, 6, generator=generator)
    linear = torch.ops.aten.linear.default
    with _Largest(weights, ["a", "b"]) as found:
        linear(x, weights["a.weight"])
        linear(-5 * x, weights["a.weight"], torch.ones(4))
        linear(2 * x, weights["b.weight"], torch.ones(4))
        linear(99 * x, weights["c.weight"])
    largest = float(x.abs().max())
    assert found.scales() == pytest.approx({"a": 5 * largest / 2688, "b": 2 * largest / 2688})
    with _Largest(weights, ["a"]) as found:
        pass
    assert "a: reads nothing but zeros" in refused(found.scales)
    said = refused(_Largest, weights, ["a", "d"])
    assert "d: another pass changes it while the stream runs without nvfp4_infer" in said


def recipe_of(pipeline: Path, **options: Any) -> Recipe:
    data = open_recipe("tiny_stream_w4a4", (*SIZES, f"stream.pipeline={pipeline}")).resolved()
    names = [each if isinstance(each, str) else next(iter(each)) for each in data["passes"]]
    data["passes"] = [{each: options} if each == "nvfp4_infer" else each for each in names]
    return parse_recipe(data, "test")


def test_a_stream_by_recorded_scales(pipeline: Path) -> None:
    """It is as near the stream in high precision as dynamic scales are; others are not."""
    dynamic = recipe_of(pipeline)
    scales = record_scales(dynamic, SHOTS)
    made = parse_recipe(calibrated(dynamic.resolved(), scales), "test")
    assert dict(made.steps())["nvfp4_infer"]["input_scales"] == scales
    plain = dynamic.model_copy(
        update={"passes": [p for p in dynamic.passes if "nvfp4" not in str(p)]}
    )
    wanted, _ = streamed(plan_stream(plain), SHOTS[:1])

    def apart(recipe: Recipe) -> float:
        latents, _ = streamed(plan_stream(recipe), SHOTS[:1])
        return float((latents - wanted).norm() / wanted.norm())

    usual, found = apart(dynamic), apart(made)
    assert 0 < found < 1.5 * usual
    tight = {name: scale / 64 for name, scale in scales.items()}
    assert apart(parse_recipe(calibrated(dynamic.resolved(), tight), "test")) > 1.5 * found


def test_a_recipe_without_the_pass_is_refused() -> None:
    said = refused(record_scales, open_recipe("tiny_stream"), SHOTS)
    assert "have no nvfp4_infer, which scales are for" in said


# Scales of others


def test_scales_of_modelopt() -> None:
    """What its file has, by module; files without scales have none."""
    from safetensors.torch import load_file

    (file,) = (DATA / "modelopt").glob("*.safetensors")
    theirs = {
        k.removesuffix(".input_scale"): float(v)
        for k, v in load_file(file).items()
        if "input_scale" in k
    }
    found = load_checkpoint(DATA / "modelopt").input_scales
    assert found == theirs and len(found) == 10 and len(set(found.values())) > 3
    assert load_checkpoint(DATA / "modelopt_w4a16").input_scales == {}


@pytest.mark.parametrize(
    "scale",
    [
        torch.tensor(0.0),
        torch.tensor(math.nan),
        torch.tensor(math.inf),
        torch.tensor(-1.0),
        torch.tensor(1e-60, dtype=torch.float64),
        torch.tensor(1e300, dtype=torch.float64),
        torch.tensor(1, dtype=torch.int8),
        torch.ones(2),
        torch.ones(0),
    ],
    ids=str,
)
def test_scales_that_are_none(tmp_path: Path, scale: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(DATA / "modelopt", tmp_path / "made")
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), "blocks.0.attn1.to_k.input_scale": scale}, file)
    said = refused(load_checkpoint, folder)
    assert "blocks.0.attn1.to_k.input_scale is no number above 0 that float32 holds" in said


def test_scales_of_a_checkpoint(run: Run, tmp_path: Path, pipeline: Path) -> None:
    """They are taken if they are of the very linears that the recipe makes NVFP4."""
    path, made = tmp_path / "base.yaml", tmp_path / "made.yaml"
    line = ["calibrate", path, "--checkpoint", DATA / "modelopt", "-o", made]

    def base(config: Any, **options: Any) -> None:
        data = recipe_of(pipeline, **options).resolved()
        path.write_text(yaml.safe_dump({**data, "model": {**data["model"], "config": config}}))

    base(None)  # the checkpoint's own
    code, _, err = run(*line)
    assert code == 0, err
    options = dict(open_recipe(str(made)).steps())["nvfp4_infer"]
    scales = options["input_scales"]
    assert scales == load_checkpoint(DATA / "modelopt").input_scales
    made.unlink()
    linears = ", ".join(f"blocks.0.attn1.to_{part}" for part in ("k", "out.0", "q"))
    base(None, exclude=[".*attn1.*"])
    code, _, err = run(*line, "--dry-run")
    said = " ".join(err.split())
    assert code == 2 and f"has scales of {linears}, …, which nvfp4_infer does not make" in said
    config = load_checkpoint(DATA / "modelopt").config
    assert config is not None and config["num_layers"] == 1
    base({**config, "num_layers": 2})
    code, _, err = run(*line)
    said = " ".join(err.split())
    assert code == 2 and f"has no scale of {linears.replace('.0.a', '.1.a')}, …, which" in said
    assert "change include or exclude of nvfp4_infer" in said and not made.exists()


def test_the_command(run: Run, tmp_path: Path, pipeline: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(recipe_of(pipeline, activation_rule="mse").resolved()))
    script = tmp_path / "shots.yaml"
    script.write_text("- caption: a red circle moving left\n  seconds: 2\n")
    made = tmp_path / "made.yaml"
    code, out, err = run("calibrate", base, "--script", script, "-o", made, "--json")
    assert code == 0, err
    scales = json.loads(out)["input_scales"]
    options = dict(open_recipe(str(made)).steps())["nvfp4_infer"]
    assert options["input_scales"] == pytest.approx(scales) and len(scales) > 10
    assert options["activation_scale"] == "calibrated"
    assert options["activation_rule"] == "none"
    for more, message in (
        ((), "one of --script and --checkpoint"),
        (("--script", script, "--checkpoint", DATA / "modelopt"), "one of --script and"),
        (("--checkpoint", DATA / "modelopt_w4a16"), "has no calibrated scales"),
        (("--checkpoint", DATA / "modelopt", "--device", "cpu"), "--device: a checkpoint's scales"),
    ):
        code, _, err = run("calibrate", base, "-o", made, *more)
        assert code == 2 and message in " ".join(err.split()), err
    folder = shutil.copytree(DATA / "modelopt", tmp_path / "checkpoint")
    config = folder / "config.json"
    given = "--checkpoint", folder, "-o", config, "--overwrite"
    code, _, err = run("calibrate", base, *given)
    assert code == 2 and "config.json, which is read; name another" in " ".join(err.split()), err
    assert config.read_bytes() == (DATA / "modelopt" / "config.json").read_bytes()
    without = tmp_path / "without.yaml"
    for more in (("--checkpoint", DATA / "modelopt"), ("--script", script, "--dry-run")):
        code, _, err = run("calibrate", "tiny_stream", "-o", without, *more)
        assert code == 2 and "passes: have no nvfp4_infer" in " ".join(err.split()), err
    assert not without.exists()
