"""Comparing precisions: errors by layer, shares with intervals, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import yaml
from helpers import Run, refused, tiny_config
from streams import SIZES, planned, save_pipeline

from lltk.bench.agreement import interval, lasting, mean, one_ahead, overlap, summarise
from lltk.bench.layer_errors import OUTPUT, Model, layer_errors
from lltk.bench.quality import ShotScore, draw_stories, streamed
from lltk.compiler import with_weights
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe
from lltk.graph.recipe_files import shipped
from lltk.models.tiny.world import render
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.train.plot import Curve, line_plot

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return planned(save_pipeline(tmp_path_factory.mktemp("pipeline"))).transformer


def errors(base: Program, other: Program) -> dict[str, float]:
    text = torch.randn(1, 3, base.geometry.text_tokens, base.spec.text_dim)
    modules = {id(each): instantiate(each) for each in (base, other)}
    ours, theirs = (Model(TorchRuntime(p, modules[id(p)]), modules[id(p)]) for p in (base, other))
    return layer_errors(ours, theirs, text, 2, seed=1)


def test_a_model_does_not_differ_from_itself(program: Program) -> None:
    found = errors(program, replace(program))
    assert set(found) == {"blocks.0", "blocks.1", OUTPUT}
    assert set(found.values()) == {0.0}


def test_errors_begin_where_a_weight_changes(program: Program) -> None:
    weights = dict(program.weights)
    weights["blocks.1.ffn.net.2.weight"] = weights["blocks.1.ffn.net.2.weight"] * 1.1
    found = errors(program, with_weights(program, weights))
    assert found["blocks.0"] == 0 and found["blocks.1"] > 0 and found[OUTPUT] > 0


def test_what_is_not_finite_is_named(program: Program) -> None:
    weights = dict(program.weights)
    weights["blocks.1.ffn.net.2.bias"] = torch.full_like(weights["blocks.1.ffn.net.2.bias"], 3e38)
    broken = with_weights(program, weights)
    message = refused(errors, program, broken)
    assert "chunk 0, pass 0: " in message and "is not finite" in message
    text = torch.randn(1, 3, program.geometry.text_tokens, program.spec.text_dim)
    runtime = TorchRuntime(broken, instantiate(broken))
    chunks = streamed(runtime, text, (0,), 1, seed=1)
    assert "chunk 0: its latents are not finite" in refused(list, chunks)


def test_errors_of_the_first_layer_reach_the_next_chunk(program: Program) -> None:
    weights = dict(program.weights)
    weights["blocks.0.attn1.to_v.weight"] = weights["blocks.0.attn1.to_v.weight"] * 1.5
    found = errors(program, with_weights(program, weights))
    assert all(value > 1e-3 for value in found.values())


def score(index: int, right: bool, kept: float) -> ShotScore:
    return ShotScore(index, (True, True, True, right), kept, 2.0 + index, 4.0 - index, index / 4)


def test_shots_are_summarised() -> None:
    scores = [score(0, True, 100.0), score(1, False, math.nan), score(1, True, 80.0)]
    found = summarise(scores)
    assert (found.shots, found.later) == (3, 2)
    assert found.after_cut is not None and found.identity is not None
    assert found.agreement[0] == pytest.approx(200 / 3)
    assert found.after_cut[0] == 50 and found.identity[0] == 90
    assert found.first_frame[0] == pytest.approx(8 / 3)
    assert found.other_frames[0] == pytest.approx(10 / 3)
    assert found.tint_spread == pytest.approx(100 * (1 - math.sqrt(5) / 3))
    assert found.parts["background"] == found.agreement and found.parts["shape"][0] == 100
    assert summarise(scores[:1]).after_cut is None
    assert summarise([score(0, True, math.nan)]).identity is None


def test_lasting_identity_is_early_and_late() -> None:
    stories = draw_stories(seed=1, count=2, shots=1, chunks=12, chunk=3)
    film, other = (render(stories) * 127.5 + 127.5).round().to(torch.uint8)
    turned = torch.cat([film[:64], other[64:]])
    with ThreadPoolExecutor(1) as pool:
        same, changed = lasting(pool, [film])(), lasting(pool, [turned])()
    assert same.over_time == [100.0] * 3 and same.late[0] == 100
    assert same.change == (0, 0, 0) and changed.change[0] == changed.late[0] - 100
    assert changed.early[0] == 100 and changed.late[0] < 100


def test_intervals() -> None:
    assert mean([50.0]) == (50, 50, 50)
    low, high = mean([90.0, 100.0, 100.0, 100.0])[1:]
    assert low < 97.5 and high == 100, "no more than all"
    assert overlap((50, 40, 60), (65, 60, 70)) and not overlap((50, 40, 60), (65, 61, 70))
    assert interval((1, 0.5, 2)) == "1.0 (0.5 to 2.0)" and interval(None) == "–"


def test_a_plot_has_its_curves() -> None:
    curves = [Curve("one", [(0, 1.0), (1, 2.0)]), Curve("", [(0, 3.0), (2, 1.0)], "#c40")]
    root = ElementTree.fromstring(line_plot(curves, "what"))
    lines = [e for e in root if e.tag.endswith("polyline")]
    texts = [e.text for e in root if e.tag.endswith("text")]
    assert len(lines) == 2 and {"one", "what"} <= set(texts)
    assert {"1", "1.5", "3", "0", "2"} <= set(texts), "round numbers"
    ends = [line.attrib["points"].split()[-1].split(",") for line in lines]
    assert float(ends[0][0]) < float(ends[1][0]), "one axis for both"


def test_the_command_compares(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lltk.bench.comparison.SHOTS", 1)
    monkeypatch.setattr("lltk.bench.comparison.CHUNKS", 1)
    monkeypatch.setattr("lltk.bench.comparison._LONG_CHUNKS", 6)
    output = tmp_path / "record"
    line = ["compare", "tiny_stream", "tiny_stream_nvfp4", "--shots", "1", "--minutes", "2"]
    code, out, _ = run(
        *line, "--workers", "1", "--device", "cpu", "--set", "stream.steps=1", "-o", str(output)
    )
    assert code == 0 and "tiny_stream_nvfp4" in out
    base, other = json.loads(output.with_suffix(".json").read_text("utf-8"))["results"]
    assert set(base["errors"].values()) == {0.0} and base["shots"] == other["shots"] == 1
    assert 0.01 < other["errors"]["output"] < 0.5
    assert other["ran"]["nvfp4_matmul"] == "reference"
    assert len(other["minute"]["over_time"]) == 1 and "Single shots of 60 s" in out
    text = output.with_suffix(".md").read_text("utf-8")
    assert "tiny_stream_nvfp4" in text and "identity at 60 s" in text


def test_the_command_tells_errors_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer cannot read frames of this size, and nothing is decoded."""

    def opened(plan: object) -> None:
        raise AssertionError("errors need no frames")

    monkeypatch.setattr("lltk.bench.agreement.open_decoder", opened)
    monkeypatch.setattr("lltk.bench.comparison.SHOTS", 1)
    monkeypatch.setattr("lltk.bench.comparison.CHUNKS", 1)
    output = tmp_path / "record"
    pipeline = save_pipeline(tmp_path / "pipeline")
    changes = [*SIZES, f"stream.pipeline={pipeline}", "stream.steps=1"]
    line = ["compare", "tiny_stream", "tiny_stream_w4a4", "--shots", "0", "--device", "cpu"]
    line += [part for change in changes for part in ("--set", change)]
    code, out, err = run(*line, "-o", str(output))
    assert code == 0, err
    assert "Relative error" in out and "Tiny world" not in out
    base, other = json.loads(output.with_suffix(".json").read_text("utf-8"))["results"]
    assert set(base["errors"].values()) == {0.0} and "agreement" not in other
    assert all(0.01 < error < 1 for error in other["errors"].values())
    text = output.with_suffix(".md").read_text("utf-8")
    assert "| recipe | blocks.0 | blocks.1 | output |" in text and "agreement" not in text


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_cannot_be_compared_is_refused_before_it_is_compiled(
    run: Run, monkeypatch: pytest.MonkeyPatch, dry: list[str]
) -> None:
    def compiled(*_: object, **__: object) -> None:
        raise AssertionError("refuse it first")

    monkeypatch.setattr("lltk.streaming.plan_stream", compiled)
    code, _, err = run("compare", "tiny_stream", "wan22_5b_stream", "--shots", "0", *dry)
    assert code == 2
    assert "wan22_5b_stream: geometry: differs from tiny_stream's in height (704, not 128)" in err
    both = ["wan22_5b_stream", "wan22_5b_stream_nvfp4_cache"]
    for more in ([], ["--shots", "0", "--minutes", "1"]):
        code, _, err = run("compare", *both, *more, *dry)
        assert code == 2 and "frames of 1280×704 are not the tiny world's" in err
        assert "compare errors alone: --shots 0" in " ".join(err.split())


def test_two_models_are_not_compared(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(recipe: Recipe, *_: object, **__: object) -> object:
        return SimpleNamespace(config=recipe.resolved()["model"]["config"])

    monkeypatch.setattr("lltk.streaming.plan_stream", planned)
    monkeypatch.setattr("lltk.streaming.describe", lambda plan: {"transformer": ""})
    paths = []
    for layers in (1, 2):
        path = tmp_path / f"of_{layers}.yaml"
        recipe = {"extends": str(shipped()["tiny_stream"])}
        path.write_text(yaml.safe_dump({**recipe, "model": {"config": tiny_config(layers)}}))
        paths.append(path)
    code, _, err = run("compare", *paths, "--dry-run")
    assert code == 2
    assert "of_2: model.config: differs from of_1's in num_layers (2, not 1)" in err
    code, out, _ = run("compare", paths[0], paths[0], "--dry-run")
    assert code == 0 and "30 shots and 0 minutes a recipe, 10 videos at once" in out


def test_what_the_device_lacks_is_refused_before_anything_streams(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(recipe: Recipe, *_: object, **__: object) -> object:
        chosen = dict(recipe.steps())["lower"].get("paged_attention", "sdpa")
        return SimpleNamespace(config={}, implementations={"paged_attention": chosen})

    def streamed(*_: object) -> None:
        raise AssertionError("refuse it first")

    monkeypatch.setattr("lltk.streaming.plan_stream", planned)
    monkeypatch.setattr("lltk.streaming.describe", lambda plan: {"transformer": ""})
    monkeypatch.setattr("lltk.bench.comparison.Comparison.results", streamed)
    line = ["compare", "tiny_stream", "tiny_stream", "--device", "cpu"]
    code, _, err = run(*line, "--set", "passes.lower.paged_attention=cudnn")
    assert code == 2 and "paged_attention: cudnn runs on cuda, not on cpu" in err
    with pytest.raises(AssertionError):
        run(*line)


def test_the_command_wants_two_recipes(run: Run) -> None:
    code, _, err = run("compare", "tiny_stream")
    assert code == 2 and "name at least two" in err


def test_the_next_is_made_before_one_is_waited_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    assert [(number, len(made)) for number in one_ahead(items())] == [(0, 2), (1, 3), (2, 3)]
    assert list(one_ahead(iter(()))) == []
