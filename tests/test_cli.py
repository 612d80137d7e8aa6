"""The commands: what they print, what they write, how they refuse."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from helpers import Run
from PIL import Image

from lltk.bench.scorer import agreement, read
from lltk.cli.main import main
from lltk.graph.passes import Pass
from lltk.stream.script import load_script
from lltk.stream.video import read_video

pytestmark = pytest.mark.cpu

SMALL = (
    "{num_attention_heads: 2, attention_head_dim: 12, in_channels: 4, out_channels: 4, "
    "text_dim: 8, freq_dim: 8, ffn_dim: 16, num_layers: 2}"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe file that extends the shipped tiny one with a smaller model."""
    from lltk.graph.recipe_files import shipped

    path = tmp_path / "small.yaml"
    path.write_text(
        f"extends: {shipped()['tiny_stream']}\n"
        f"model: {{config: {SMALL}}}\n"
        "geometry: {height: 64, width: 64}\n"
    )
    return path


def test_transform_then_inspect(run: Run, recipe: Path, tmp_path: Path) -> None:
    program, dump, diagram = tmp_path / "program", tmp_path / "dump", tmp_path / "block.svg"
    code, out, err = run("transform", recipe, "--no-weights", "-o", program, "--dump", dump)
    assert (code, err) == (0, "")
    for name in ("canonicalise", "commit", "3 step_block", "paged_attention → sdpa"):
        assert name in out
    assert len(list(dump.iterdir())) == 9
    assert "def step(" in (dump / "06_commit" / "step.txt").read_text()

    code, out, err = run("inspect", program, "--diagram", diagram)
    assert (code, err) == (0, "")
    assert "a lowered stream program" in out
    assert "k_pages_0 … k_pages_1" in out
    assert "def step_block(" in out
    assert ElementTree.parse(diagram).getroot().tag.endswith("svg")

    code, out, _ = run("inspect", program, "--json")
    described = json.loads(out)
    assert described["contracts"]["commit"]["outputs"] == {}
    assert [entry["name"] for entry in described["log"]][-1] == "lower"

    code, _, err = run("inspect", program, "--joint")
    assert code == 2 and "--joint: a stream program has no backward" in err
    code, _, err = run("inspect", program, "--graph", "nothing")
    assert code == 2
    assert "the program has prologue, step, commit" in " ".join(err.split())


def test_the_documented_regions_are_there(run: Run) -> None:
    """Runs the commands of docs/nvfp4.md that print joint graphs, on a narrower model."""
    text = (Path(__file__).parents[1] / "docs" / "nvfp4.md").read_text("utf-8")
    lines = [line.split() for line in text.splitlines() if line.startswith("    lltk inspect")]
    small = SMALL.replace("layers: 2", "layers: 8").replace("head_dim: 12", "head_dim: 16")
    small = small.replace("text_dim: 8", "text_dim: 16")
    sizes = ["geometry.frames=6", "geometry.batch=1", "geometry.height=64", "geometry.width=64"]
    sets = [part for each in (f"model.config={small}", *sizes) for part in ("--set", each)]
    code, out, err = run("transform", "tiny_train_nvfp4", "--no-weights", "--json", *sets)
    assert code == 0, err
    (made,) = (e["matches"] for e in json.loads(out)["log"] if e["name"] == "regionalise")
    named = [line[line.index("--graph") + 1] for line in lines if "--graph" in line]
    assert named and set(named) <= set(made)
    assert next(iter(made)) == "train_block_0_1_2", "the first is converted"


def test_transform_can_stop_leave_out_and_plan(run: Run, recipe: Path) -> None:
    code, out, _ = run(
        "transform", recipe, "--no-weights", "--stop-after", "frame_positions",
        "--disable", "per_frame_timesteps", "--json",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out)
    assert [entry["name"] for entry in result["log"]] == ["canonicalise", "frame_positions"]
    assert result["stage"] == "canonical"

    code, out, _ = run("transform", recipe, "--dry-run", "--json")
    assert code == 0
    assert set(json.loads(out)["memory"]) == {"weights", "cache pages", "cross-attention K/V"}


def test_memory_estimate_of_5b(run: Run) -> None:
    code, out, _ = run(
        "transform", "wan22_5b_stream", "--dry-run", "--json", "--stop-after", "canonicalise"
    )
    assert code == 0
    memory = json.loads(out)["memory"]
    assert memory["cache pages"] / 32 == 309.375 * 2**20
    assert memory["cross-attention K/V"] == 180 * 2**20
    assert 9.2 < memory["weights"] / 2**30 < 9.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "geometry.windw=24"], "unknown key 'geometry.windw'; did you mean 'window'?"),
        (["--set", "geometry.window=10"], "the nearest that fit: 9 and 12"),
        (["--set", "passes=[canonicalize]"], "did you mean 'canonicalise'?"),
        (["--set", "passes=[commit]"], "move it later in the recipe's passes"),
        (["--disable", "hoist_text"], "put hoist_text before it in the recipe"),
        (["--set", "passes=[canonicalise, lora: {include: nothing}]"], "lora: matched nothing"),
        (["--stop-after", "lora"], "'lora' is not in the recipe's passes"),
    ],
)
def test_bad_input_is_refused_with_one_message(
    run: Run, recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    target = tmp_path / "program"
    code, out, err = run("transform", recipe, "--no-weights", "-o", target, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]


def test_missing_weights_and_recipes(run: Run, recipe: Path) -> None:
    code, _, err = run("transform", recipe)
    assert code == 2
    assert "or transform without weights (--no-weights)" in " ".join(err.split())
    code, _, err = run("transform", "tiny_steam", "--no-weights")
    assert code == 2
    assert "did you mean 'tiny_stream'?" in err


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lltk", "--debug", "transform", "nowhere.yaml"])
    with pytest.raises(ValueError, match="no such recipe file"):
        main()


def test_a_gpu_that_runs_out_of_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told in one message. Torch's other errors are not the user's fault."""
    wrong = iter([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])

    def fail(*given: object, **options: object) -> None:
        raise next(wrong, RuntimeError("mat1 and mat2 differ"))

    monkeypatch.setattr("lltk.streaming.plan_stream", fail)
    what = ["stream", "tiny_stream", "--prompt", "x", "-o", "x.mp4", "--device", "cpu"]
    code, _, err = run(*what)
    assert code == 2 and "memory: CUDA out of memory. Tried to allocate 2 GiB" in err
    assert "--dry-run" in err and "Traceback" not in err
    with pytest.raises(RuntimeError, match="mat1"):
        run(*what)


def test_doctor(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    assert code == 0
    findings = json.loads(out)
    assert findings["devices"][0]["device"] == "cpu"
    cpu = {(row["op"], row["implementation"]): row["cpu"] for row in findings["implementations"]}
    assert cpu["paged_attention", "sdpa"] == "runs"
    assert cpu["paged_attention", "cudnn"] == "runs on cuda, not on cpu"
    code, out, _ = run("doctor")
    assert "lltk[te]" in out


def test_doctor_tells_how_implementations_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(run("doctor", "--json")[1])["how implementations work"]
    told = {(row["op"], row["implementation"]): row for row in rows}
    product = told["nvfp4_matmul", "scaled_mm"]
    assert "sm_90" not in product["GPUs"] and "sm_100" in product["GPUs"]
    assert product["result"] == "rounding: NVFP4 tensor cores by cuBLAS"
    assert "sm_90" in told["nvfp4_matmul", "triton"]["GPUs"]
    assert told["nvfp4_quantise", "triton"]["result"].startswith("bitwise: ")
    assert "sm_89" not in told["nvfp4_paged_attention", "fp8_decode"]["GPUs"]
    assert told["paged_attention", "sdpa"]["GPUs"] == "any"
    monkeypatch.setenv("COLUMNS", "80")
    out = run("doctor")[1]
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    for op, name in told:
        assert op in out and name in out


def test_doctor_names_packages_from_what_lltk_states(run: Run) -> None:
    rows = json.loads(run("doctor", "--json")[1])["packages"]
    extras = {row["package"]: row["extra"] for row in rows}
    assert extras["torch"] == "" and extras["triton"] == "gpu" and extras["torchao"] == "ao"
    assert extras["nvidia-cudnn-frontend"] == "gpu" and extras["transformer-engine"] == "te"
    assert len(extras) == len(rows) and "pytest" not in extras


@pytest.mark.parametrize(
    "command", ["doctor", "transform", "inspect", "stream", "prepare", "train", "demo"]
)
def test_help_has_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"lltk {command}" in out.split("Example:")[1]


def test_demo(run: Run, tmp_path: Path) -> None:
    """The video of the shipped model shows what the shipped script says."""
    code, out, _ = run("demo", "-o", tmp_path / "demo.mp4")
    assert code == 0
    assert "285 (17.81 s)" in out
    video = read_video(tmp_path / "demo.mp4").permute(0, 3, 1, 2).float() / 127.5 - 1
    script = load_script(Path(str(files("lltk.models.tiny"))) / "demo.yaml")
    shots = [read(frames) for frames in (video[:69], video[69:141], video[141:213], video[213:])]
    agreed = [agreement(seen, shot.caption).score for seen, shot in zip(shots, script, strict=True)]
    assert sum(agreed) / 4 >= 90
    others = [agreement(seen, script[0].caption).score for seen in shots[1:]]
    assert max(others) < 100
    sheet = Image.open(tmp_path / "demo.png")
    assert sheet.width == 6 * 128
    assert sheet.height > 4 * 128


def test_the_demo_can_be_planned(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("demo", "-o", tmp_path / "demo.mp4", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["plan"]["pipeline"] == "tiny"
    assert not list(tmp_path.iterdir())


def test_a_pass_is_one_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the worked example of docs/writing-a-pass.md, in a folder beside the shipped passes."""
    import lltk.passes
    from lltk.graph.recipe_files import shipped

    text = (Path(__file__).parents[1] / "docs" / "writing-a-pass.md").read_text()
    code_block, recipe_block = (
        text.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "yaml")
    )
    assert len(code_block.splitlines()) < 60
    (tmp_path / "wide_output.py").write_text(code_block)
    monkeypatch.setattr(lltk.passes, "__path__", [*lltk.passes.__path__, str(tmp_path)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_block.replace("tiny_stream.yaml", str(shipped()["tiny_stream"])))
    small = ["--no-weights", "--set", f"model.config={SMALL}"]
    code, out, err = run("transform", recipe, *small, "--json")
    assert (code, err) == (0, "")
    (entry,) = (e for e in json.loads(out)["log"] if e["name"] == "wide_output")
    assert entry["matches"] == {"results": 1}

    code, _, err = run("transform", recipe, *small, "--set", "model.dtype=float32")
    assert code == 2
    assert "is float32 already" in " ".join(err.split())
    assert issubclass(type(lltk.passes.make_pass("wide_output", {})), Pass)


@pytest.mark.parametrize("device", ["foo", "cuda:99", "cuda:x", "meta"])
def test_a_device_that_is_not_there(run: Run, device: str) -> None:
    for command in ("stream", "train", "compare"):
        recipes = {"stream": ["tiny_stream", "--prompt", "x"], "train": ["tiny_train"]}
        code, _, err = run(
            command, *recipes.get(command, ["tiny_stream", "tiny_stream"]), "-o", "x",
            "--device", device,
        )  # fmt: skip
        assert code == 2 and f"--device: {device} is not here; there is cpu" in err


def test_recipes_are_listed(run: Run) -> None:
    from lltk.graph.recipe_files import shipped

    code, out, _ = run("recipes", "--json")
    assert code == 0
    rows = {row["recipe"]: row for row in json.loads(out)}
    assert rows.keys() == shipped().keys()
    assert all(row["what for"].endswith(".") and len(row["what for"]) > 20 for row in rows.values())
    assert rows["tiny_stream"]["command"] == "lltk stream"
    assert rows["tiny_vae"]["command"] == "lltk train"
    assert rows["wan22_decode"]["command"] == "lltk transform"
    assert "wan22_5b_stream_fp8" in run("recipes")[1]
