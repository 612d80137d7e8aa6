"""Bundles: what `lltk export` writes, refuses to write, and what of it is refused when read."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from bundles import Exported, bundle_plan, resealed
from helpers import Run, hand_made, randomise, refused, same
from safetensors.torch import load_file
from streams import SIZES
from test_files import FAILURES, failing

from lltk.artefact import load_program, save_program
from lltk.compiler import transform, with_weights
from lltk.export.bundle import bound_of, read_bundle, verify_bundle, write_bundle
from lltk.export.facts import MANIFEST, Facts
from lltk.export.golden import Case, distance, given, sample, whole
from lltk.exporting import plan_export
from lltk.files.tensors import save_tensors
from lltk.graph.contract import Role, TensorSpec
from lltk.graph.recipe import open_recipe, parse_recipe
from lltk.graph.stages import Stage
from lltk.ops.rope_table.reference import rope_table
from lltk.stream.bundle_text import BundleTextEncoder
from lltk.stream.runtimes.onnx_graph import OnnxGraph
from lltk.stream.text import TextEncoder, encoder_digest
from lltk.streaming import plan_bundle

pytestmark = pytest.mark.cpu

FILES = [
    "decoder/first.onnx", "decoder/step.onnx", "decoder/weights.safetensors", "golden.safetensors",
    "text/encode.onnx", "text/tokenizer.json", "text/weights.safetensors",
    "transformer/commit.onnx", "transformer/prologue.onnx", "transformer/step.onnx",
    "transformer/weights.safetensors",
]  # fmt: skip


@pytest.fixture
def made(exported: Exported) -> Path:
    return exported.bundle


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_what_a_bundle_says(made: Path) -> None:
    facts = read_bundle(made)
    assert sorted(facts.files) == FILES
    assert {name: list(stage.graphs) for name, stage in facts.stages.items()} == {
        "transformer": ["prologue", "step", "commit"], "decoder": ["first", "step"],
        "text": ["encode"],
    }  # fmt: skip
    step = facts.stages["transformer"].graphs["step"].contract
    assert step.input(Role.LISTED) == TensorSpec((4,), torch.bool)
    assert step.input(Role.LATENTS) == step.outputs["sample"]
    assert list(step.having(Role.PROMPT)) == [f"cross_{part}_{i}" for i in (0, 1) for part in "kv"]
    assert facts.recipe["geometry"]["height"] == 32 and facts.rotary["rows"] == 1
    assert {"lltk", "onnx", "onnxruntime", "torch"} <= facts.versions.keys()
    names = [entry.name for entry in facts.stages["transformer"].log]
    assert names[-2:] == ["externalise", "regionalise"] and "lower" not in names


def test_golden_values(made: Path) -> None:
    """They are of no page, one, some, and all but the one in flight, the last at a late chunk."""
    facts, tensors = read_bundle(made), load_file(made / "golden.safetensors")
    graphs = [f"{case.stage}/{case.graph}" for case in facts.golden]
    assert graphs == [
        "transformer/prologue", *["transformer/step"] * 4, *["transformer/commit"] * 4,
        "decoder/first", "decoder/step", "text/encode",
    ]  # fmt: skip
    steps = [case for case in facts.golden if case.graph == "step" and case.stage != "decoder"]
    listed = [tensors[case.inputs["listed"]].tolist() for case in steps]
    assert [[i for i in range(4) if each[i]] for each in listed] == [[], [0], [1, 2], [0, 1, 2]]
    contract = facts.stages["transformer"].graphs["step"].contract
    held = {name: tensors[of] for name, of in steps[2].inputs.items()}
    pages = given(held, contract)["k_pages_0"]
    assert pages[:, [0, 3]].isnan().all() and pages[:, 1:3].isfinite().all()
    assert len({case.inputs["k_pages_0"] for case in steps}) == 1, "pages are held once"
    rows, columns, split, theta = facts.rotary.values()
    late = torch.arange(200, 202, dtype=torch.float64)
    wanted = rope_table(late, rows, columns, split, theta)[0]
    assert torch.equal(tensors[steps[3].inputs["rotary_cos"]], wanted)
    outputs = [tensors[of] for case in facts.golden for of in case.outputs.values()]
    assert all(value.isfinite().all() for value in outputs)
    assert {bound for case in facts.golden for bound in case.bounds.values()} == {1e-5}


@pytest.mark.parametrize("name", [*FILES, MANIFEST.name])
def test_one_changed_byte_is_refused(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = refused(verify_bundle, copy)
    assert message.startswith(f"{path}: ") and len(message) < 300
    assert refused(plan_bundle, copy) == message


@pytest.mark.parametrize("name", [*FILES, MANIFEST.name])
def test_a_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    message = refused(verify_bundle, copy)
    assert refused(plan_bundle, copy) == message
    assert name in message and ("is missing" in message or "has no manifest.json" in message)


def test_other_weights_fail_the_golden_values(copy: Path) -> None:
    """Also where every checksum fits."""
    verify_bundle(copy)
    path = copy / "transformer/weights.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"][0] += 1e-3
    save_tensors(path, tensors, {})
    resealed(copy)
    message = refused(verify_bundle, copy)
    assert "transformer/step (golden case 1): output sample is" in message


SUM = """
    def step(hidden_states: latents(f32[3]), timestep: time(f32[3])):
        # root
        add: f32[3] = aten.add.Tensor(hidden_states, timestep)
        return {'sample': add}
"""


def write_sum(path: Path, changed: float = 0.0) -> None:
    """Write a bundle of a sum, with a golden value that is ``changed``."""
    program = hand_made("stream", Stage.CAUSAL, {"step": SUM})
    given = {"hidden_states": torch.tensor([1.0, 2, 3]), "timestep": torch.tensor([0.5, 0, 1])}
    case = Case("transformer", "step", given, {"sample": sum(given.values()) + changed})
    write_bundle(path, {"transformer": program}, [case], {}, {}, [], "{}")


def test_an_export_that_misses_the_bound_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bad in (1e-3, float("nan")):
        message = refused(write_sum, tmp_path / "bundle", bad)
        assert message.startswith("export: transformer/step (golden case 0): output sample is")
        assert "not written" in message and not list(tmp_path.iterdir())
    with monkeypatch.context() as broken:
        broken.setattr(OnnxGraph, "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_sum(tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
    write_sum(tmp_path / "bundle")
    assert (tmp_path / "bundle" / MANIFEST.name).exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file it is that has no space."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with failing(-1, FAILURES["full"]) as counted:
        write_sum(tmp_path / "whole")
    writes = [at for at, (name, _) in enumerate(counted.made) if name == "write"]
    files = read_bundle(tmp_path / "whole").files
    assert len(files) == 4 and len(writes) > len(files)
    for at in writes:
        wanted = pytest.raises(OSError, match=r"bundle.*cannot be written.*No space left")
        with failing(at, FAILURES["full"]) as faults, wanted:
            write_sum(tmp_path / "bundle")
        assert faults.done and [each.name for each in tmp_path.iterdir()] == ["whole"]
    assert read_bundle(tmp_path / "whole").files == files


def test_a_value_that_is_not_finite_fails(made: Path) -> None:
    wanted = torch.ones(3)
    for bad in (float("nan"), float("inf")):
        relative = distance(torch.tensor([1.0, bad, 1.0]), wanted)
        assert not relative <= 1e-5
    assert distance(torch.zeros(2), torch.zeros(2)) == 0


def test_bounds_of_shares_are_less_than_all() -> None:
    """However far torch is from itself, other values of a page are seen."""
    means, other = (torch.randn(500, generator=_seeded(i)).to(torch.bfloat16) for i in (0, 1))
    for spread, bound in ((0.0, 0.01), (0.2, 0.4), (0.5, 0.75), (0.97, 0.985)):
        assert bound_of(means, spread) == pytest.approx(bound)
        assert distance(other, means) > bound
    assert bound_of(means.float(), 0.0) == 1e-5 and bound_of(means.float(), 0.2) == 0.4


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_large_tensors_are_held_in_part() -> None:
    """Inputs repeat what is held, of outputs an odd stride is; neither needs to be told."""
    spec = TensorSpec((3, 50000), torch.float32)
    filled = whole(torch.arange(65521.0), spec).reshape(-1)
    assert filled[65520] == 65520 and filled[65521] == 0 and filled.shape == (150000,)
    held = sample(filled)
    assert torch.equal(held, filled[::3]) and distance(filled, held) == 0
    assert torch.equal(sample(filled[:65536]), filled[:65536])
    changed = filled.clone()
    changed[3 * 777] += 1
    assert distance(changed, held) > 1e-5 and distance(filled + 1, held) > 1e-5
    narrow = filled.to(torch.bfloat16)
    assert distance(narrow, sample(narrow)) == 0 < distance(-narrow, sample(narrow))


def shared() -> str:
    """Passes of a stream of two ranks."""
    passes = [*open_recipe("tiny_stream").passes]
    return f"passes={json.dumps([*passes[:6], 'ulysses_stream', *passes[6:]])}"


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("tiny_train", (), "program: train has no bundle"),
        ("tiny_decode", (), "program: decode has no bundle"),
        ("tiny_stream", ("model.dtype=bfloat16",), "set model.dtype=float32"),
        ("tiny_stream", ("geometry.batch=2",), "set geometry.batch=1"),
        ("tiny_stream", ("stream.decoder.dtype=bfloat16",), "set stream.decoder.dtype=float32"),
        ("tiny_stream", ("stream.decoder.device=[cpu, cpu]",), "names several"),
        (
            "tiny_stream",
            ("geometry.chunk=2", "geometry.window=8", "geometry.sink=2", shared()),
            "passes: cut the stream for 2 processes, and a bundle runs in one",
        ),
    ],
)
def test_what_this_version_does_not_export(
    recipe: str, changes: tuple[str, ...], message: str
) -> None:
    opened = open_recipe(recipe, changes)
    assert message in refused(plan_export, opened, weights=False)


def test_the_commands(run: Run, made: Path, tmp_path: Path) -> None:
    code, out, err = run("bundle", "show", str(made))
    assert code == 0 and "transformer/step" in out and "rotary_cos" in out, err
    code, out, _ = run("bundle", "show", str(made), "--json")
    assert code == 0 and Facts.model_validate(json.loads(out)) == read_bundle(made)
    code, out, _ = run("bundle", "verify", str(made), "--json")
    found = json.loads(out)["golden"]
    assert code == 0 and len(found) == 12 and all(each["relative"] < 1e-5 for each in found)
    code, out, _ = run("bundle", "verify", str(made))
    assert code == 0 and "decoder/first" in out
    code, _, err = run("bundle", "verify", str(tmp_path))
    assert code == 2 and "has no manifest.json, so it is not a bundle" in err


def test_the_bundles_text_encoder_gives_the_pipelines_embeddings(
    exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    """Cleaned, cut and padded as there; by tokenizers and ONNX Runtime alone."""
    texts = [
        "a red circle moving left", "A  “red”\n circle &amp; a ﬁsh", "", "xyzzy, 12!",
        "a red circle moving left a blue square moving up then down",
    ]  # fmt: skip
    ours, theirs = bundle_plan(exported).text_encoder(None), TextEncoder(exported.pipeline, 12)
    assert isinstance(ours, BundleTextEncoder)
    wanted = theirs.encode(texts)
    found = ours.encode(texts)
    assert found.shape == wanted.shape == (5, 12, 64)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not found[2, 1:].any() and found[4, 11].any()
    assert (found[0] - found[1]).abs().max() > 0.1
    cut = [each.getMessage() for each in caplog.records if "cut to" in each.getMessage()]
    assert len(cut) == 2 and cut[0] == cut[1], cut
    ours.free()
    assert torch.equal(ours.encode(texts[:1]), found[:1])


def test_a_text_encoder_that_cannot_be_exported(exported: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.pipeline, tmp_path / "pipeline"))
    (folder / "tokenizer/tokenizer.json").unlink()
    recipe = open_recipe("tiny_stream", (*SIZES, f"stream.pipeline={folder}"))
    message = refused(plan_export, recipe)
    assert message.startswith(f"{folder}: has no tokenizer/tokenizer.json")
    assert message.endswith("with --text reference")


def test_a_text_encoder_outside(exported: Exported) -> None:
    """The bundle names it by folder and digest."""
    facts = read_bundle(exported.outside)
    assert "text" not in facts.stages and not any(n.startswith("text") for n in facts.files)
    assert facts.text is not None and facts.text.digest == encoder_digest(exported.pipeline)
    assert facts.text.folder == str(exported.pipeline)


def test_export_command(run: Run, exported: Exported, copy: Path) -> None:
    nodes, done = exported.said("dry")["nodes"], exported.said("export")
    assert set(nodes) == {f"{stage}/{name}" for stage, name in graphs_of(read_bundle(copy))}
    assert min(nodes.values()) > 10
    assert done["output"] == str(exported.bundle) and len(done["golden"]) == 12
    assert max(each["relative"] for each in done["golden"]) < 1e-5
    line = ("export", str(exported.recipe), "--target", "ort", "-o", str(copy))
    (copy / "notes").write_text("mine")
    code, _, err = run(*line)
    assert code == 2 and "did not write it as a bundle" in err
    code, _, err = run("export", "tiny_stream", "--target", "tensorrt", "-o", "x")
    assert code == 2 and "'tensorrt' is not one of 'ort', 'tensorrt-rtx'" in err


def graphs_of(facts: Facts) -> list[tuple[str, str]]:
    return [(stage, name) for stage, each in facts.stages.items() for name in each.graphs]


def test_a_programs_own_weights_are_exported(run: Run, exported: Exported, tmp_path: Path) -> None:
    """The decoder and the text encoder are still the pipeline's."""
    weights = f"model.checkpoint={exported.pipeline / 'transformer'}"
    made = transform(open_recipe(str(exported.recipe), (weights,)))
    program = transform(parse_recipe(made.recipe, "own"), weights=False)
    save_program(program, tmp_path / "bare")
    code, _, errors = run("export", tmp_path / "bare", "--target", "ort", "-o", tmp_path / "x")
    assert code == 2 and "bare: has no weights; transform its recipe without --no-weights" in errors
    save_program(with_weights(program, randomise(program.weights, seed=5)), tmp_path / "own")
    own = load_program(tmp_path / "own")
    plan = plan_export(parse_recipe(own.recipe, "own"), program=own)
    for made in (plan.transformer, plan.reference):
        assert same(made.weights, own.weights)
    assert not any(weight.is_meta for weight in plan.decoder.weights.values())
    assert plan.text is not None
    changed = ("--set", "stream.steps=2")
    code, _, errors = run("export", tmp_path / "own", "--target", "ort", "-o", "x", *changed)
    assert code == 2 and "is a Program, which has its recipe; drop it" in errors


def test_the_pages_example_runs_as_printed(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[1] / "docs" / "export.md"
    example = re.findall(r"```python\n(import json\n.*?)```", page.read_text(), re.DOTALL)[0]
    monkeypatch.chdir(made.parent)
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[1].startswith("transformer/step")
    assert all(float(line.split()[-1]) < 1e-4 for line in lines)


def test_nothing_is_read_without_its_package(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lltk.stream.runtimes.onnx_graph.find_spec", lambda name: None)
    wanted = "onnx is not installed; run: pip install 'lltk[export]'"
    assert refused(verify_bundle, made) == refused(plan_bundle, made) == wanted
    assert refused(write_bundle, tmp_path / "new", {}, [], {}, {}, [], "") == wanted
