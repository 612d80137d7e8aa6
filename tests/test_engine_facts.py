"""Engines without TensorRT: layers, refusals, the builder's process, bundles and their runtime.

What stands for an engine here is its graph, run by the reference of ONNX.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, rmtree
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from bundles import at, resealed
from dialect import Reference
from helpers import PASSES, Run, after, reached, refused
from streams import SHOTS, SIZES, save_pipeline, streamed

from lltk.export import engines as building
from lltk.export.bundle import bound_of, open_engine, read_bundle, verify_bundle
from lltk.export.engines import Built, EngineOrder, build_engine, check_formats, check_gpu
from lltk.export.facts import Facts
from lltk.export.golden import distance
from lltk.export.layers import Fast, Layer, lint, meant, read_layers, summary
from lltk.exporting import emitted, export, plan_export
from lltk.graph.contract import Contract, TensorSpec
from lltk.graph.recipe import open_recipe, parse_recipe
from lltk.stream.runtimes import tensorrt
from lltk.stream.runtimes.cubin import read_kernels
from lltk.streaming import plan_bundle, plan_stream
from lltk.streaming.description import describe
from lltk.streaming.memory import stream_memory

pytestmark = pytest.mark.cpu

# Layers

GEMM = (
    "Name: blocks.0.to_v/MatMul_U1+blocks.0.to_k/MatMul_U2_myl0_8, LayerType: gemm, Inputs: "
    "[ {{ Name: a, Dimensions: [1,48,256], Datatype: {0}, Format: (Linear) Row major }}], "
    "Constants: [ {{ Name: b, Dimensions: [1,256,512], Datatype: {1}, Format: (Linear) }}, "
    "{{ Name: alpha, Dimensions: [1], Datatype: Float, Format: (Linear) }}], Outputs: "
    "[ {{ Name: c, Dimensions: [1,48,512], Datatype: BFloat16, Format: (Linear) }}], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: blocks.0.to_k/MatMul]"
    "[ONNX Layer: blocks.0.to_v/MatMul][ONNX Layer: blocks.0.to_k/Transpose]"
)
MHA = (
    "Name: _gemm_mha_v2_myl0_19, LayerType: kgen, Inputs: [ { Name: q, Datatype: BFloat16 }], "
    "Constants: [], Outputs: [ { Name: o, Datatype: BFloat16 }], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: blocks.0.attn1/Attention]"
)
MOVE = MHA.replace("_gemm_mha_v2_myl0_19", "__myl_Move_myl0_3")
WANTED = {
    "blocks.0.to_k/MatMul": Fast.FP4,
    "blocks.0.to_v/MatMul": Fast.FP4,
    "blocks.0.attn1/Attention": Fast.ATTENTION,
}


def layers(*lines: str) -> list[Layer]:
    return read_layers(["[I] something else", *lines, "Name: no layer"])


def test_layers_are_read() -> None:
    gemm, mha = layers(GEMM.format("FP4E2M1", "FP4E2M1"), MHA)
    assert gemm.kind == "gemm" and gemm.inputs == ("FP4E2M1", "FP4E2M1", "Float")
    assert gemm.outputs == ("BFloat16",)
    assert gemm.nodes == tuple(
        f"blocks.0.{n}" for n in ("to_k/MatMul", "to_v/MatMul", "to_k/Transpose")
    )
    assert mha.does == "fused attention"
    assert summary([gemm, mha, mha]) == {"a product of FP4 operands": 1, "fused attention": 2}


def test_fast_layers_pass() -> None:
    """Merged products too; layers that only move an attention's operands do not count."""
    assert not list(lint(WANTED, layers(GEMM.format("FP4E2M1", "FP4E2M1"), MHA, MOVE)))


@pytest.mark.parametrize(
    ("lines", "slow"),
    [
        ((GEMM.format("BFloat16", "FP4E2M1"), MHA), ["to_k", "to_v"]),
        ((GEMM.format("FP8", "FP8"), MHA), ["to_k", "to_v"]),
        ((GEMM.format("FP4E2M1", "FP4E2M1"), MOVE), ["attn1"]),
        ((GEMM.format("FP4E2M1", "FP4E2M1").replace("/MatMul]", "/Mul]"), MHA), ["to_k", "to_v"]),
        ((MHA,), ["to_k", "to_v"]),
    ],
)
def test_slow_layers_are_told(lines: tuple[str, ...], slow: list[str]) -> None:
    found = list(lint(WANTED, layers(*lines)))
    assert [line.partition(":")[0] for line in found] == [f"blocks.0.{name}" for name in slow]
    waived = [f"blocks.0.{name}" for name in slow]
    assert not list(lint(WANTED, layers(*lines), waived))
    assert len(list(lint(WANTED, layers(*lines), waived[:1]))) == len(slow) - 1


# What is refused before anything is built


@pytest.mark.parametrize("sm", [75, 90, 100])
def test_a_gpu_that_nothing_is_built_for(sm: int) -> None:
    said = refused(check_gpu, sm)
    assert f"no engines for {sm}, only for 80 (A100)" in said and "--target ort" in said
    check_gpu(120)


@pytest.mark.parametrize(
    ("steps", "least", "message"),
    [
        (["nvfp4_infer"], 120, "FP4 products, which need compute capability 12.0"),
        ([{"nvfp4_cache": {}}], 120, "FP4 pages, which need compute capability 12.0"),
        (["fp8_infer"], 89, "FP8 products, which need compute capability 8.9"),
        ([], 80, ""),
    ],
)
def test_formats_that_a_gpu_does_not_know(steps: list[Any], least: int, message: str) -> None:
    base = reached("stream", *PASSES["stream"][:6], head_dim=16)
    program = after(base, *steps, "externalise", "regionalise")
    for sm in tensorrt.GPUS:
        if sm >= least:
            check_formats([program], sm)
        else:
            said = refused(check_formats, [program], sm)
            assert message in said and f"this is for {sm // 10}.{sm % 10}" in said
            (made_by,) = [each if isinstance(each, str) else next(iter(each)) for each in steps]
            assert f"without {made_by}, in bfloat16; or for --sm {least}" in said
            assert ("fp8_infer in the place" in said) is (made_by == "nvfp4_infer" and sm == 89)


def test_the_command_refuses(run: Run, tmp_path: Path) -> None:
    line = ("export", "tiny_stream", "-o", tmp_path / "new", "--dry-run")
    for more, message in (
        (("--target", "tensorrt-rtx"), "--sm: engines are for one kind of GPU"),
        (("--target", "ort", "--sm", "120"), "--sm: is for engines"),
        (("--target", "ort", "--waive", "a"), "--waive: is for engines"),
        (("--target", "ort", "--attention", "plugin"), "--attention: is for engines"),
        (("--target", "tensorrt-rtx", "--sm", "90"), "no engines for 90"),
        (("--target", "tensorrt-rtx", "--sm", "120"), "set model.dtype=bfloat16"),
    ):
        code, _, err = run(*line, *more)
        assert code == 2 and message in err, err
    halves = ("--set", "model.dtype=bfloat16", "--target", "tensorrt-rtx", "--sm", "120")
    assert "set stream.decoder.dtype=bfloat16" in run(*line, *halves)[2]
    plugin = ("--set", "stream.decoder.dtype=bfloat16", "--attention", "plugin")
    said = " ".join(run(*line, *halves, *plugin)[2].split())
    assert "--attention plugin: is for pages in NVFP4, and the recipe has none" in said


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    assert "pip install 'lltk[tensorrt-rtx]'" in refused(tensorrt.check_installed)


# What a build takes


def test_what_a_build_takes() -> None:
    """By the record: the step as it took, all others no longer than is said."""
    path = Path(__file__).parents[1] / "benchmarks" / "records" / "engines.json"
    for row in json.loads(path.read_text())["results"]:
        said = building.build_seconds(row["engine_bytes"])
        if row["name"] == "transformer/step":
            assert said == pytest.approx(row["seconds"], rel=0.1)
            assert row["peak_bytes"] <= building.build_memory(row["engine_bytes"])
        else:
            assert row["seconds"] < said < 4 * row["seconds"]
    assert building.build_costs(1 << 28).startswith("a minute or less on two cores, about 1.8 GiB")
    assert building.build_costs(5 << 29).startswith("about 6 min on two cores, about 13.0 GiB")


# The builder's process


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says what the builder's process does, as a shell script."""
    script = tmp_path / "python"

    def does(body: str) -> None:
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)

    monkeypatch.setattr(sys, "executable", str(script))
    return does


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo cannot open library >&2; kill -ABRT $$",
            "was ended by SIGABRT: cannot open library",
        ),
        ("kill -KILL $$", "was killed, as one is that takes more memory than there is"),
        ("echo no >&2; exit 3", "ended with 3: no"),
        (
            """echo '{"errors": ["too wide", "too deep"]}'""",
            "builds no engine of it: too wide; too",
        ),
    ],
)
def test_a_build_that_fails(
    builder: Callable[[str], None], tmp_path: Path, body: str, message: str
) -> None:
    builder(body)
    said = refused(build_engine, tmp_path / "stage" / "step.onnx", tmp_path / "engine", 120)
    assert said.startswith("stage/step.onnx: ") and message in said


def test_a_build(builder: Callable[[str], None], tmp_path: Path) -> None:
    module = "-P -m lltk.export.engine_builder"
    builder(f"""[ "$1 $2 $3 $4" = "{module} {tmp_path}/step.onnx" ] || exit 9
echo '{MHA}' > "$6"; echo "$7" > "$5"; echo '{{"errors": [], "peak_bytes": 12}}'""")
    made = build_engine(tmp_path / "step.onnx", tmp_path / "engine", 89)
    assert (tmp_path / "engine").read_text() == "89\n"
    assert [each.does for each in made.layers] == ["fused attention"] and made.peak_bytes == 12


def test_a_builder_ends_with_its_parent(tmp_path: Path) -> None:
    """Whatever ends the parent, nothing goes on taking its time and memory."""
    (tmp_path / f"{tensorrt.BINDINGS}.py").write_text(
        "import sys, time\nclass ILogger:\n    def __init__(self): pass\n"
        "class Builder:\n    def __init__(self, log): print(1, flush=True); time.sleep(60)\n"
    )
    line = [sys.executable, "-P", "-m", "lltk.export.engine_builder", "a", "b", str(tmp_path / "c")]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({[*line, '120']})"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout and parent.stdout.readline() == b"1\n", "the build has begun"
    parent.kill()
    assert parent.communicate(timeout=20)[0] == b"", "whoever could write more has ended"


def test_the_library_has_its_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser opens it by that for plugins, and aborts where it is not."""
    wheel, folder = tmp_path / "wheel", tmp_path / "own"
    wheel.mkdir()
    folder.mkdir()
    (wheel / "libtensorrt_rtx.so.1").write_text("library")
    found = ModuleSpec("tensorrt_rtx_libs", None, is_package=True)
    found.submodule_search_locations = [str(wheel)]
    monkeypatch.setattr(building, "find_spec", lambda name: found)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    paths = building._environment(folder)["LD_LIBRARY_PATH"].split(os.pathsep)
    assert paths == [str(folder), "/elsewhere", str(wheel)]
    assert (folder / "libtensorrt_rtx.so").read_text() == "library"


# Bundles


def fake_build(model: Path, engine: Path, sm: int, kernels: Path | None) -> Built:
    """An engine in which every layer is as it was meant."""
    import onnx

    engine.write_text(f"{model.name} for {sm}")
    kinds = {Fast.FP4: ("gemm", "FP4E2M1"), Fast.FP8: ("gemm", "FP8"), Fast.ATTENTION: ("mha", "")}
    found = []
    for node, fast in meant(onnx.load(model, load_external_data=False)).items():
        kind, dtype = kinds[fast]
        found.append(Layer(name=kind, kind=kind, inputs=(dtype,) * 2, outputs=(), nodes=(node,)))
    return Built(found, 1.5, 3 << 30)


OVERRIDES = (*SIZES, "model.dtype=bfloat16", "stream.decoder.dtype=bfloat16")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, a recipe and a bundle of engines that nobody built."""
    folder = tmp_path_factory.mktemp("engines")
    save_pipeline(folder / "pipeline")
    recipe = open_recipe("tiny_stream", (*OVERRIDES, f"stream.pipeline={folder / 'pipeline'}"))
    steps = [*recipe.passes[:6], {"nvfp4_cache": {"rule": "none"}}, "regionalise", "lower"]
    recipe = parse_recipe({**recipe.resolved(), "passes": steps}, "test")
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe.resolved()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "build_engine", fake_build)
        patch.setattr(building, "library_version", lambda: "1.2.3")
        notes: list[str] = []
        plan = plan_export(recipe, engines=EngineOrder(120, ("blocks.0.attn1",)))
        found = export(plan, folder / "bundle", note=notes.append)
    assert found.engines and len(found.engines.built) == 4 and found.engines.sm == 120
    assert [each.graph for each in found.golden] == ["text/encode"]
    assert any(
        "engine 2 of 4, transformer/step, with weights of 0.00 GiB: a minute or less on two cores, "
        "about 0.5 GiB of memory" in n
        for n in notes
    )
    return folder


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_plugins_kernels_are_in_the_bundle(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are files of it as others are, and models may have the plugin's op."""
    monkeypatch.setattr(building, "build_engine", fake_build)
    monkeypatch.setattr(building, "library_version", lambda: "1.2.3")
    recipe = open_recipe(str(made / "small.yaml"))
    plan = plan_export(recipe, text="reference", engines=EngineOrder(120, plugin=True))
    place = tmp_path / "bundle"
    found = export(plan, place)
    files = ("kernels.json", "decode_k.cubin", "decode_v.cubin", "attend.cubin")
    assert found.engines and found.engines.kernels == tuple(f"kernels/{name}" for name in files)
    verify_bundle(place)
    sizes = read_kernels(place / "kernels").tensors.contract
    arena = plan.transformer.pages["k_pages_codes_0"]
    assert sizes.inputs["k_codes"] == arena and sizes.inputs["listed"].dtype is torch.bool
    (place / "kernels" / "other.cubin").write_bytes(b"")
    assert "kernels/other.cubin is no file of a bundle" in refused(read_bundle, place)
    (place / "kernels" / "other.cubin").unlink()

    def told(change: Callable[[Any], object]) -> str:
        """What is said of a copy whose kernels' facts are changed, and sealed."""
        own = Path(copytree(place, tmp_path / "copy", dirs_exist_ok=True))
        content = json.loads((own / "kernels" / "kernels.json").read_text())
        change(content)
        (own / "kernels" / "kernels.json").write_text(json.dumps(content))
        resealed(own)
        return refused(verify_bundle, own)

    assert "another compute capability than the engines" in told(lambda c: c.update(sm=90))
    codes = "tensors", "inputs", "k_codes", "shape"
    assert "other pages than those of transformer/step" in told(at(*codes, 1, to=99))
    assert "attend.cubin: is not the file" in told(at("launches", 2, "sha256", to="0"))
    files = found.engines.kernels
    for kernels in files[1:], (*files, "golden.safetensors"):
        own = Path(copytree(place, tmp_path / "copy", dirs_exist_ok=True))
        resealed(own, at("engines", "kernels", to=kernels))
        said = refused(verify_bundle, own)
        assert "kernels are not kernels/kernels.json and what it" in said or (
            "kernels/kernels.json is no file of a bundle" in said
        )
    with (place / "kernels" / "attend.cubin").open("r+b") as file:
        file.write(b"\0")
    assert "kernels/attend.cubin" in refused(read_bundle, place)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of the bundle."""
    return Path(copytree(made / "bundle", tmp_path / "bundle"))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are run by the reference of ONNX."""

    def opened(folder: Path, facts: Facts, stage: str, graph: str) -> Reference:
        contract = facts.stages[stage].graphs[graph].contract
        return Reference(folder / stage / f"{graph}.onnx", contract)

    for place in ("lltk.export.bundle", "lltk.streaming.ort_engine"):
        monkeypatch.setattr(f"{place}.open_engine", opened)
    monkeypatch.setattr("lltk.streaming.bundle.check_device", lambda sm: torch.device("cpu"))
    monkeypatch.setattr(tensorrt, "check_installed", lambda: None)


def test_the_command_says_what_builds_take(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beforehand, and line by line where nobody watches."""
    monkeypatch.setattr(building, "build_engine", fake_build)
    monkeypatch.setattr(building, "library_version", lambda: "1.2.3")
    monkeypatch.setattr(tensorrt, "check_installed", lambda: None)
    line = ["export", made / "small.yaml", "--target", "tensorrt-rtx", "--sm", 120]
    line += ["--text", "reference", "-o", tmp_path / "new"]
    order = EngineOrder(120)
    plan = plan_export(open_recipe(str(made / "small.yaml")), text="reference", engines=order)
    monkeypatch.setattr("lltk.exporting.plan_export", lambda recipe, **options: plan)
    takes = "a minute or less on two cores, about 0.5 GiB of memory"
    code, out, err = run(*line, "--dry-run")
    assert code == 0, err
    assert out.count(takes) == 4 and not (tmp_path / "new").exists()
    told = json.loads(run(*line, "--dry-run", "--json")[1])
    assert told["engines"].keys() == told["nodes"].keys() and len(told["nodes"]) == 4
    step = told["engines"]["transformer/step"]
    assert step["peak_bytes"] > 1 << 29 and 0 < step["seconds"] < 1
    code, out, err = run(*line)
    assert code == 0, err
    said = [text for text in out.splitlines() if "building engine" in text]
    assert len(said) == 4 and all(text.endswith(takes) for text in said)


def test_fusions_are_left_to_tensorrt(made: Path) -> None:
    recipe = open_recipe(str(made / "small.yaml"))
    fused = ["merge_qkv", "fuse_norm_rope", "fp8_infer", "fuse_rows"]
    steps = [*recipe.passes[:6], *fused, "regionalise", "lower"]
    recipe = parse_recipe({**recipe.resolved(), "passes": steps}, "test")
    plan = plan_export(recipe, text="reference", engines=EngineOrder(89))
    names = [entry.name for entry in plan.transformer.log]
    assert names[-5:] == ["merge_qkv", "fp8_infer", "externalise", "join_commit", "regionalise"]
    assert set(plan.transformer.graphs) == {"prologue", "step"}
    graphs = emitted(plan)
    assert set(graphs) >= {"transformer/step", "decoder/first"}
    assert all(each.engine for each in graphs.values())


def test_a_waived_module_must_have_what_is_waived(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "build_engine", fake_build)
    recipe = open_recipe(str(made / "small.yaml"))
    plan = plan_export(recipe, text="reference", engines=EngineOrder(120, ("blocks.9",)))
    said = refused(export, plan, tmp_path / "new")
    assert "--waive: blocks.9 has no product in FP4 or FP8 and no attention" in said
    assert "modules that have one are blocks.0.attn1, " in said
    assert not (tmp_path / "new").exists()


def test_bounds_of_engines() -> None:
    """Norms may be apart by more than the whole; of codes never all may differ."""
    half = torch.ones(4).bfloat16()
    assert bound_of(half, 0.8, norms=True) == 1.6 and bound_of(half, 0.001, norms=True) == 0.002
    assert bound_of(half, 0.8) == 0.9 and bound_of(half.byte(), 0.8, norms=True) == 0.9
    other = torch.tensor([1, 1, 1, 1.5]).bfloat16()
    assert distance(other, half, norms=True) == 0.25 == distance(other, half)
    assert distance(3 * half, half, norms=True) == 2 and distance(3 * half, half) == 1


def without(bundle: Path, *names: str) -> None:
    """Leave files out of a bundle's manifest, and seal it as whoever made it would."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    for name in names:
        del content["files"][name]
    path.write_text(json.dumps(content))
    resealed(bundle)


def test_a_bundle_of_engines(made: Path, run: Run) -> None:
    facts = read_bundle(made / "bundle")
    assert facts.target == "tensorrt-rtx" and facts.engines
    (step,) = [
        each for each in facts.engines.built if each.graph == "step" and each.stage != "decoder"
    ]
    assert (made / "bundle" / step.file).read_text() == "step.onnx for 120"
    table = json.loads((made / "bundle" / step.table).read_text())
    assert {each["kind"] for each in table} == {"mha"} and step.layers == {"fused attention": 4}
    _, out, _ = run("bundle", "show", made / "bundle")
    assert "Engines for compute capability 12.0, by TensorRT for RTX 1.2.3" in out
    assert "4 × fused attention" in out and "Not held to be fast: blocks.0.attn1" in out
    code, out, _ = run("bundle", "verify", made / "bundle")
    assert code == 0 and "They were not run" in " ".join(out.split())
    assert json.loads(run("bundle", "verify", made / "bundle", "--json")[1])["engines_run"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("engines", "version", to="1; rm -rf /"), "engines.version: String should match"),
        (at("engines", "version", to="1\n2"), "engines.version: String should match"),
        (at("target", to="ort"), "engines: a bundle for ort has some"),
        (
            lambda content: content["engines"]["built"].append(content["engines"]["built"][0]),
            "engines: are not one of each graph of transformer and decoder",
        ),
        (at("engines", "built", 0, "stage", to="../x"), "has no engines/../x.prologue.engine"),
        (
            lambda content: [
                content["stages"]["transformer"]["graphs"]["step"]["outputs"].pop(f"new_{page}_0")
                for page in ("k_pages_codes", "v_pages_codes")
            ],
            "new_k_pages_codes_0 is nothing there",
        ),
    ],
    ids=["command", "lines", "target", "twice", "elsewhere", "no pages"],
)
def test_another_manifest_is_refused(
    bundle: Path, change: Callable[[Any], object], message: str
) -> None:
    resealed(bundle, change)
    said = refused(verify_bundle, bundle)
    assert message in said and refused(plan_bundle, bundle) == said


def test_a_graph_without_an_engine_is_refused(bundle: Path) -> None:
    """The files fit, and nothing would run the step."""
    names = [f"engines/transformer.step.{end}" for end in ("engine", "layers.json")]
    for name in names:
        (bundle / name).unlink()
    without(bundle, *names)
    resealed(bundle, lambda content: content["engines"]["built"].pop(1))
    assert "engines: are not one of each graph" in refused(verify_bundle, bundle)


def test_a_bundle_for_engines_has_some(bundle: Path) -> None:
    without(bundle, *(f"engines/{each.name}" for each in (bundle / "engines").iterdir()))
    rmtree(bundle / "engines")
    resealed(bundle, at("engines", to=None))
    said = refused(verify_bundle, bundle)
    assert "engines: a bundle for tensorrt-rtx has none" in said


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    """A folder's too, of which nothing is read."""
    (bundle / "more").symlink_to(tmp_path)
    assert f"{bundle}/more: is a link that leaves the bundle" in refused(verify_bundle, bundle)


def test_what_a_bundle_says_is_shown_as_it_is(run: Run, bundle: Path) -> None:
    """Whatever stands in it."""
    resealed(
        bundle, lambda c: (at("engines", "waived", to=["[/a]"])(c), c["versions"].update(b="[/c]"))
    )
    code, out, _ = run("bundle", "show", bundle)
    assert code == 0 and "Not held to be fast: [/a]" in out and ", b [/c]" in " ".join(out.split())


@pytest.mark.parametrize("name", ["transformer.step.engine", "decoder.first.layers.json"])
def test_another_engine_is_refused(bundle: Path, name: str) -> None:
    path = bundle / "engines" / name
    path.write_text(path.read_text() + " ")
    message = refused(verify_bundle, bundle)
    assert str(path) in message and refused(plan_bundle, bundle) == message
    path.unlink()
    assert "is missing" in refused(verify_bundle, bundle)
    without(bundle, f"engines/{name}")
    assert f"has no engines/{name}" in refused(verify_bundle, bundle)


def test_a_stray_engine_is_refused(bundle: Path) -> None:
    (bundle / "engines" / "other.engine").write_text("code")
    assert "engines/other.engine is no file of a bundle" in refused(verify_bundle, bundle)


def test_engines_run_on_their_gpu_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_bundle(made / "bundle")
    load = (open_engine, made / "bundle", facts, "transformer", "step")
    monkeypatch.setattr(tensorrt, "check_installed", lambda: None)
    monkeypatch.setattr(tensorrt, "library_version", lambda: "1.2.4")
    said = refused(*load)
    assert "for TensorRT for RTX 1.2.3, and 1.2.4 is installed" in said
    assert "tensorrt_rtx_cu13_libs==1.2.3 tensorrt_rtx_cu13_bindings==1.2.3" in said
    monkeypatch.setattr(tensorrt, "library_version", lambda: "1.2.3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "compute capability 12.0, and torch sees none" in refused(*load)
    assert "compute capability 12.0, and torch sees none" in refused(plan_bundle, made / "bundle")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    said = refused(*load)
    assert "H100 has 9.0; TensorRT for RTX has none for it: stream the recipe itself" in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert "has 8.9; export the recipe again with --sm 89" in refused(*load)


def test_a_plain_bundle_has_no_engines_to_run(made: Path, bundle: Path) -> None:
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        said = refused(plan_bundle, made / "bundle", provider=provider)
        assert "--provider: " in said and "has engines of TensorRT for RTX" in said
    said = refused(plan_bundle, made / "bundle", ["stream.compile=true"])
    assert "TensorRT for RTX plays" in said

    without(bundle, *(f"engines/{each.name}" for each in (bundle / "engines").iterdir()))
    rmtree(bundle / "engines")
    resealed(bundle, lambda content: content.update(engines=None))
    assert "--run: " in refused(verify_bundle, bundle, True)


@pytest.mark.usefixtures("played")
def test_golden_values_of_engines(made: Path, bundle: Path) -> None:
    """All are compared with --run, and a small change of a weight is seen."""
    found = verify_bundle(made / "bundle", run=True).golden
    assert len(found) == 1 + 1 + 4 + 4 + 2 and max(each.relative for each in found) < 0.5
    from safetensors.torch import load_file

    from lltk.files.tensors import save_tensors

    path = bundle / "transformer" / "weights.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"][0] += 1
    save_tensors(path, tensors, {})
    resealed(bundle)
    assert "transformer/step (golden case 1): output sample" in refused(verify_bundle, bundle, True)


@pytest.mark.usefixtures("played")
def test_a_stream_over_engines(made: Path) -> None:
    """Session, cache and decoder are those of every runtime; the step makes the commits."""
    plan = plan_bundle(made / "bundle")
    assert plan.facts.engines
    built = plan.facts.engines.built
    held = {each.file: (made / "bundle" / each.file).stat().st_size for each in built}
    own = sum(size for name, size in held.items() if "/transformer." in name)
    assert stream_memory(plan)["cpu"]["weights"] == own
    assert "engines of TensorRT for RTX 1.2.3" in str(describe(plan))
    latents, video = streamed(plan, SHOTS[:1])
    torchs, torchs_video = streamed(plan_stream(open_recipe(str(made / "small.yaml"))), SHOTS[:1])
    assert video.shape == torchs_video.shape
    assert (latents.float() - torchs.float()).norm() < 0.15 * torchs.float().norm()


# The runtime, over a fake of TensorRT


class FakeEngine:
    """An engine as TensorRT tells of it: tensors, and a run that copies x to y."""

    def __init__(self, tensors: dict[str, tuple[str, str, list[int]]], works: bool = True) -> None:
        self.tensors, self.works = tensors, works
        self.num_io_tensors = len(tensors)
        self.bound: dict[str, int] = {}
        self.streams: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[name][1]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.tensors[name][2]

    def create_execution_context(self) -> FakeEngine:
        return self

    def set_tensor_address(self, name: str, address: int) -> None:
        self.bound[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        ctypes.memmove(self.bound["y"], self.bound["x"], 8)
        return self.works


TENSORS = {
    "x": ("input", "FP4", [2, 8]),
    "scale": ("input", "BF16", [3]),
    "y": ("output", "FP4", [2, 8]),
}
CONTRACT = Contract(
    {"x": TensorSpec((2, 4), torch.uint8), "scale": TensorSpec((3,), torch.bfloat16)},
    {"y": TensorSpec((2, 4), torch.uint8)},
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeEngine | None], None]:
    """Says what TensorRT makes of an engine's bytes."""

    class Logger:
        ERROR, INTERNAL_ERROR = "error", "internal error"

    def gives(engine: FakeEngine | None) -> None:
        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
                assert data == b"engine"
                self.logger.log(None, "a note")
                self.logger.log("error", "another device")
                return engine

        module = ModuleType(tensorrt.BINDINGS)
        module.__dict__.update(
            ILogger=Logger, Runtime=Runtime, __version__="1.2.3",
            TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
            DataType=SimpleNamespace(FP4="FP4", BF16="BF16", FLOAT="FLOAT"),
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, tensorrt.BINDINGS, module)

    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return gives


def loaded(folder: Path) -> tensorrt.EngineGraph:
    (folder / "step.engine").write_bytes(b"engine")
    return tensorrt.EngineGraph(folder / "step.engine", CONTRACT, torch.device("cpu"))


def test_an_engine_takes_and_gives_bytes(library: Any, tmp_path: Path) -> None:
    library(engine := FakeEngine(TENSORS))
    graph = loaded(tmp_path)
    x = torch.arange(8, dtype=torch.uint8).view(2, 4)
    given = {"x": x.t().contiguous().t(), "scale": torch.ones(3).bfloat16()}
    assert torch.equal(graph(given)["y"], x) and engine.streams == [77]
    into = torch.zeros(2, 4, dtype=torch.uint8)
    assert graph({**given, "x": x + 1}, {"y": into})["y"] is into and torch.equal(into, x + 1)
    assert engine.bound["y"] == into.data_ptr() and engine.bound.keys() == TENSORS.keys()
    with pytest.raises(AssertionError, match="scale"):
        graph({**given, "scale": torch.ones(3)})
    engine.works = False
    assert "fails in TensorRT" in refused(graph, given)


def test_an_engine_that_is_not_loaded(library: Any, tmp_path: Path) -> None:
    library(None)
    said = refused(loaded, tmp_path)
    assert "TensorRT for RTX 1.2.3 does not load it (another device)" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ("input", "FP4", [2, 4])}, "x is FP4 (2, 4)"),
        ({"scale": ("input", "FLOAT", [3])}, "scale is FLOAT (3,)"),
        ({"z": ("output", "FP4", [2, 8])}, "z is in the engine or in the manifest alone"),
        ({"y": ("input", "FP4", [2, 8])}, "y is in the engine or in the manifest alone"),
    ],
)
def test_an_engine_of_another_contract(
    library: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    library(FakeEngine({**TENSORS, **change}))
    assert message in refused(loaded, tmp_path)
