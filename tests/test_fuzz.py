"""Damaged and hostile files: read rightly, or refused with one error that names the file.

The numbers are drawn from seeds. The `manual` tests make many more rounds of the same.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from helpers import Run, randomise, refused, tiny_config
from mutations import changed, damaged
from streams import opened
from toy import finish, trainer

from lltk.artefact import load_program, save_program
from lltk.compiler import transform, with_weights
from lltk.files.manifest import _digest
from lltk.files.tensors import checksum, read_tensors, save_tensors
from lltk.graph.recipe import Recipe, load_recipe, open_recipe
from lltk.graph.weights import check_weights
from lltk.models.checkpoint import load_checkpoint
from lltk.models.configs import validate_config
from lltk.stream import state as states
from lltk.stream.recipe import stream_section
from lltk.stream.script import load_script
from lltk.stream.state import read_state
from lltk.streaming import StreamPlan
from lltk.streaming.restoring import check_state
from lltk.train.captions import read_caption
from lltk.train.clip_shards import Shard, write_shard
from lltk.train.loop import newest_state
from lltk.train.metrics import read_metrics
from lltk.train.prepared import Facts, read_facts, write_facts
from lltk.train.state import check_training_state, load_training_state

cpu, manual = pytest.mark.cpu, pytest.mark.manual
SECONDS = 10.0
"""No file takes longer to read or to refuse, of the processor's time."""


@dataclass(frozen=True)
class Format:
    """A file that lltk reads.

    Attributes:
        path: of a good one.
        read: what reads it.
        sealed: whether any change is refused.
        named: whether errors name the file itself, or else its folder.
    """

    path: Path
    read: Callable[[], Any]
    sealed: bool = False
    named: bool = True


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pipeline: Path, plan: StreamPlan) -> Path:
    """A good file of every format."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "script.yaml").write_text(yaml.safe_dump(SCRIPT))
    (folder / "caption.json").write_text('{"caption": "a red circle"}')
    stream, _ = opened(plan)
    with stream:
        for _ in range(5):
            next(stream.session)
        stream.save(folder / "state")
    finish(trainer(folder / "run", steps=12))
    save_program(transform(open_recipe("tiny_stream", SMALL), weights=False), folder / "program")
    (folder / "set").mkdir()
    clip = {"latents": torch.ones(2, 4, 3, 3), "text": torch.ones(2, 5, 4), "opens": torch.ones(2)}
    sums = {
        "shard-000000.tar": write_shard(folder / "set" / "shard-000000.tar", [(0, clip, ("a",))])
    }
    facts = {"origin": {}, "seed": 0, "clips": 1, "shard": 1, "held_out": 1, "versions": {}}
    write_facts(folder / "set", Facts.model_validate(facts | {"files": sums}))
    shutil.copytree(pipeline / "transformer", folder / "transformer")
    (folder / "transformer" / "lltk.json").unlink()
    tensors, _ = read_tensors(next((pipeline / "transformer").glob("*.safetensors")))
    from safetensors.torch import save_file

    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(tensors, weights, {"format": "pt"})
    shutil.copytree(folder / "transformer", folder / "sharded")
    names = dict.fromkeys(tensors, weights.name)
    index = {"metadata": {"total_size": 9}, "weight_map": names}
    (folder / "sharded" / f"{weights.name}.index.json").write_text(json.dumps(index))
    return folder


SMALL = (
    "model.config={num_attention_heads: 2, attention_head_dim: 12, in_channels: 4, "
    "out_channels: 4, text_dim: 8, freq_dim: 8, ffn_dim: 16, num_layers: 2}",
    "geometry.height=64",
    "geometry.width=64",
)
RECIPE = {
    "extends": "tiny_stream",
    "model": {"config": tiny_config(1) | {"patch_size": [1, 2, 2]}, "dtype": "float32"},
    "geometry": {"height": 64, "width": 64, "chunk": 2, "window": 8, "sink": 2},
    "stream": {"steps": 3, "fps": 8.0, "decoder": {"device": ["cpu", "cpu"]}},
}
SCRIPT = [
    {"caption": "a red circle", "seconds": 4},
    {"caption": "a blue square", "seconds": 2.5, "cut": False},
]


def formats(folder: Path, plan: StreamPlan) -> dict[str, Format]:
    run, sharded, whole = folder / "run", folder / "sharded", folder / "transformer"
    newest = newest_state(run, resume=True)
    assert newest is not None
    shapes = {n: tuple(t.shape) for n, t in load_training_state(newest).weights.items()}

    def state() -> Any:
        read = read_state(folder / "state")
        check_state(folder / "state", read, plan)
        return read

    def training_state() -> Any:
        read = load_training_state(newest)
        check_training_state(read, newest, shapes)
        return read

    def program() -> Any:
        return load_program(folder / "program")

    sets = {
        "recipe": Format(folder / "recipe.yaml", lambda: load_recipe(folder / "recipe.yaml")),
        "script": Format(folder / "script.yaml", lambda: load_script(folder / "script.yaml")),
        "caption": Format(folder / "caption.json", lambda: read_caption(folder / "caption.json")),
        "metrics": Format(run / "metrics.jsonl", lambda: read_metrics(run / "metrics.jsonl")),
        "state": Format(folder / "state", state, sealed=True),
        "config": Format(whole / "config.json", lambda: load_checkpoint(whole)),
        "safetensors": Format(
            whole / "diffusion_pytorch_model.safetensors", lambda: load_checkpoint(whole)
        ),
        "index": Format(
            sharded / "diffusion_pytorch_model.safetensors.index.json",
            lambda: load_checkpoint(sharded),
            named=False,
        ),
    }
    for name in ("checkpoint.json", "weights.safetensors", "optimiser.safetensors"):
        sets[f"training {name}"] = Format(newest / name, training_state, sealed=True)
    shard = folder / "set" / "shard-000000.tar"
    sets["shard"] = Format(shard, lambda: Shard(shard).clip(0))
    sets["prepared"] = Format(
        folder / "set" / "prepared.json", lambda: read_facts(folder / "set"), sealed=True
    )
    for name in ("program.json", "graphs/step.txt"):
        sets[f"program {name}"] = Format(folder / "program" / name, program, sealed=True)
    return sets


FORMATS = (
    "recipe", "script", "caption", "metrics", "state", "config", "safetensors", "index",
    "training checkpoint.json", "training weights.safetensors", "training optimiser.safetensors",
    "program program.json", "program graphs/step.txt", "shard", "prepared",
)  # fmt: skip


def attempted(format: Format, content: bytes) -> bool:
    """Read a file with another content: whether it was accepted."""
    whole = format.path.read_bytes()
    start = time.process_time()
    try:
        format.path.write_bytes(content)
        format.read()
    except (ValueError, OSError) as error:
        named = format.path if format.named else format.path.parent
        assert str(named) in str(error) or "caption" in str(error), (content, error)
        return False
    finally:
        format.path.write_bytes(whole)
        assert time.process_time() - start < SECONDS, content
    return True


def fuzzed_bytes(format: Format, rounds: int, seed: int) -> None:
    random, whole = Random(seed), format.path.read_bytes()
    for _ in range(rounds):
        content = damaged(whole, random)
        accepted = attempted(format, content)
        assert not (accepted and format.sealed and differ(whole, content)), content


def differ(one: bytes, other: bytes) -> bool:
    """Whether contents differ by more than white space between JSON's tokens."""
    try:
        return bool(json.loads(one) != json.loads(other))
    except ValueError:
        return one != other


@cpu
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(folder: Path, plan: StreamPlan, name: str) -> None:
    fuzzed_bytes(formats(folder, plan)[name], 40, 0)


@manual
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files(folder: Path, plan: StreamPlan, name: str) -> None:
    fuzzed_bytes(formats(folder, plan)[name], 1500, 1)


# Plain data that is well formed, but not what it should be


def fuzzed_data(format: Format, data: Any, dump: Callable[[Any], str], rounds: int) -> None:
    random = Random(rounds)
    for _ in range(rounds):
        other = data
        for _ in range(random.choice((1, 1, 2, 4))):
            other = changed(other, random)
        attempted(format, dump(other).encode("utf-8", "surrogatepass"))


def _yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=yaml.SafeDumper, allow_unicode=False)


PLAIN: dict[str, Callable[[Any], str]] = {
    "recipe": _yaml, "script": _yaml, "caption": json.dumps, "config": json.dumps,
    "index": json.dumps, "metrics": lambda data: json.dumps(data) + "\n",
}  # fmt: skip


def plain(format: Format, name: str) -> Any:
    text = format.path.read_text()
    if name == "metrics":
        text = text.splitlines()[0]
    return yaml.safe_load(text)


@cpu
@pytest.mark.parametrize("name", PLAIN)
def test_data_of_other_types(folder: Path, plan: StreamPlan, name: str) -> None:
    format = formats(folder, plan)[name]
    fuzzed_data(format, plain(format, name), PLAIN[name], 60)


@manual
@pytest.mark.parametrize("name", PLAIN)
def test_much_data_of_other_types(folder: Path, plan: StreamPlan, name: str) -> None:
    format = formats(folder, plan)[name]
    fuzzed_data(format, plain(format, name), PLAIN[name], 5000)


# Files whose checksums were made anew


def forge_state(folder: Path, plan: StreamPlan, rounds: int) -> None:
    format = formats(folder, plan)["state"]
    whole = format.path.read_bytes()
    tensors, metadata = read_tensors(format.path)
    about = json.loads(metadata[states.KEY])
    random = Random(rounds)
    accepted = 0
    for _ in range(rounds):
        other, own = about, dict(tensors)
        if random.random() < 0.6:
            other = {**about, "facts": changed(about["facts"], random)}
        else:
            own = retyped(own, random)
        try:
            save_tensors(format.path, own, {states.KEY: json.dumps(other, sort_keys=True)})
            accepted += attempted(format, format.path.read_bytes())
        finally:
            format.path.write_bytes(whole)
    assert accepted < rounds / 3


def retyped(tensors: dict[str, torch.Tensor], random: Random) -> dict[str, torch.Tensor]:
    """Tensors of which one is removed, renamed, of another shape or dtype, or not finite."""
    name = random.choice(sorted(tensors))
    tensor = tensors.pop(name)
    way = random.randrange(5)
    if way == 1:
        tensors[random.choice((name + "0", "x", "pages9.x", name.split(".")[0]))] = tensor
    elif way == 2:
        tensors[name] = tensor.reshape(-1)[:1]
    elif way == 3:
        tensors[name] = tensor.to(torch.int64 if tensor.is_floating_point() else torch.float32)
    elif way == 4:
        wide = tensor.double()
        wide.view(-1)[-1:] = float("nan")
        tensors[name] = wide.to(tensor.dtype) if tensor.is_floating_point() else wide
    return tensors


@cpu
def test_forged_states(folder: Path, plan: StreamPlan) -> None:
    forge_state(folder, plan, 120)


@manual
def test_many_forged_states(folder: Path, plan: StreamPlan) -> None:
    forge_state(folder, plan, 5000)


def forged(folder: Path, manifest: str, random: Random) -> bool:
    """Change a folder's manifest or tensors, with checksums that fit; whether a tensor changed."""
    path = folder / manifest
    content = json.loads(path.read_text())
    del content["digest"]
    tensors = sorted(name for name in content["files"] if name.endswith(".safetensors"))
    retyping = bool(tensors) and random.random() < 0.5
    if retyping:
        file = folder / random.choice(tensors)
        save_tensors(file, retyped(read_tensors(file)[0], random), {"format": "pt"})
        content["files"][file.name] = checksum(file)
    else:
        content = changed(content, random)
        if isinstance(content, dict):
            content["digest"] = _digest(content)
    path.write_bytes(json.dumps(content, ensure_ascii=True).encode())
    return retyping


def forge_folder(
    folder: Path, manifest: str, read: Callable[[Path], Any], place: Path, rounds: int
) -> None:
    """No changed tensor is accepted, and each error names the folder."""
    random, accepted = Random(rounds), 0
    for _ in range(rounds):
        copy = place / folder.name
        shutil.copytree(folder, copy)
        retyping = forged(copy, manifest, random)
        try:
            read(copy)
        except (ValueError, OSError) as error:
            assert str(copy) in str(error), error
        else:
            assert not retyping
            accepted += 1
        shutil.rmtree(copy)
    assert accepted < rounds / 2


def forge_training_state(run: Path, place: Path, rounds: int) -> None:
    newest = newest_state(run, resume=True)
    assert newest is not None

    def resume(state: Path) -> None:
        trainer(place, steps=12, resume=True)

    (place / "checkpoints").mkdir()
    forge_folder(newest, "checkpoint.json", resume, place / "checkpoints", rounds)


def forge_program(folder: Path, place: Path, rounds: int) -> None:
    program = load_program(folder / "program")
    whole = with_weights(program, randomise(program.weights))
    save_program(whole, place / "whole")
    (place / "copies").mkdir()
    forge_folder(place / "whole", "program.json", load_program, place / "copies", rounds)


@cpu
def test_forged_training_states(folder: Path, tmp_path: Path) -> None:
    forge_training_state(folder / "run", tmp_path, 60)


@cpu
def test_forged_programs(folder: Path, tmp_path: Path) -> None:
    forge_program(folder, tmp_path, 6)


@manual
def test_many_forged_training_states(folder: Path, tmp_path: Path) -> None:
    forge_training_state(folder / "run", tmp_path, 2000)


@manual
def test_many_forged_programs(folder: Path, tmp_path: Path) -> None:
    forge_program(folder, tmp_path, 300)


@cpu
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_weights_are_floating_point(dtype: torch.dtype) -> None:
    weights = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(3, dtype=dtype)}
    message = refused(check_weights, weights, {"a.weight": (2, 3), "a.bias": (3,)}, "here")
    assert message.startswith(f"here: a.bias is {dtype}, and weights are floating-point")


@cpu
def test_what_only_a_forger_changes_in_a_training_state(folder: Path) -> None:
    newest = newest_state(folder / "run", resume=True)
    assert newest is not None
    state = load_training_state(newest)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
    for name, tensor, problem in (
        ("step.2.bias", torch.tensor(13.0), "has values that no run gives"),
        ("step.2.bias", torch.tensor(0.0), "has values that no run gives"),
        ("exp_avg_sq.2.bias", -torch.ones(shapes["2.bias"]), "has values that no run gives"),
        ("rng.cpu", torch.zeros_like(torch.get_rng_state()), "is no generator"),
        ("rng.cpu", torch.zeros(7, dtype=torch.uint8), "is no generator"),
        ("rng.cuda.x", torch.zeros(7, dtype=torch.uint8), "is no generator"),
        ("rng.cuda.999", torch.zeros(7), "is no generator"),
    ):
        other = replace(state, optimiser={**state.optimiser, name: tensor})
        message = refused(check_training_state, other, newest, shapes)
        assert message.startswith(f"{newest}: optimiser: {name} {problem}; ")


# The command line

SETS = (
    "geometry.height=1e23", "geometry.height=100000000000000000000000", "geometry.chunk=true",
    "geometry.window=-6", "geometry.batch=70000", "stream.fps=1e6", "stream.fps=.inf",
    "stream.fps=.nan", "stream.steps=2147483648", "stream.seed=-1", "stream.guidance=1e400",
    "stream=null", "stream=[]", "passes=[[[]]]", "passes=3", "model=!!bool x", "model={{{",
    "model=!!python/object/apply:os.system [touch owned]", "a.b.c=1", "=1", "..=1", "x",
    "model.config={num_layers: 1000000000}", "model.config={attention_head_dim: 7}",
    "model.config={ffn_dim: -1}", "model.config={patch_size: [2, 2, 2]}", "model.config=x",
    "model=" + 500 * "[", "model.dtype=\ud800", "stream.text.device=\x00", "passes.lower.x=1",
    "model: {a: 1, a: 2}", "model={a: 1, a: 2}", "model=2001-13-45", "model={? [a]: 1}",
    "model=&a [*a]",
)  # fmt: skip
DEEPER = tuple(value for value in SETS if value.startswith(("model.config=", "passes.lower.")))
"""Refused where a model is made, which this test leaves out."""
OPTIONS = {
    "--prompt": ("", " ", "\ud800", "x" * 100_000),
    "--seconds": ("inf", "nan", "-1", "0", "1e-300", "1e23", "x", "3600"),
    "--seed": ("-1", "1.5", "x", str(10**30)),
    "--steps": ("0", "-1", "1e3", str(10**30)),
    "--guidance": ("inf", "nan", "x"),
    "--device": ("", "cuda:99", "meta", "x" * 300, "cuda:-1"),
    "--script": ("FIFO", "FOLDER", "/dev/zero", "/dev/null", "/dev/stdin", "nowhere", "x" * 300),
    "--image": ("FIFO", "FOLDER", "/dev/zero", "/dev/null", "nowhere"),
    "--resume": ("FIFO", "FOLDER", "/dev/zero", "/dev/null", "nowhere"),
    "-o": ("FIFO", "FOLDER", "/dev/null", "/dev/null/x", "x" * 300, ""),
    "--save": ("FIFO", "FOLDER", "/dev/full"),
    "--contact-sheet": ("FIFO", "/proc/nowhere"),
}


@cpu
def test_arguments_times_values(
    run: Run, plan: StreamPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is used or refused with one message, and nothing is written."""
    monkeypatch.chdir(tmp_path)

    def make_plan(recipe: Recipe, *given: Any, **options: Any) -> StreamPlan:
        return replace(plan, section=stream_section(recipe.stream, "recipe"))

    monkeypatch.setattr("lltk.streaming.plan_stream", make_plan)
    os.mkfifo("FIFO")
    Path("FOLDER").mkdir()
    Path("FOLDER", "notes").touch()
    lines = [(option, value) for option, values in OPTIONS.items() for value in values]
    for option, value in [*lines, *(("--set", value) for value in SETS)]:
        source = [] if option in ("--prompt", "--script", "--resume") else ["--prompt", "x"]
        start = time.monotonic()
        code, _, err = run("stream", "tiny_stream", *source, option, value, "--dry-run")
        assert time.monotonic() - start < SECONDS, (option, value)
        assert code in (0, 1, 2) and "Traceback" not in err, (option, value, err)
        harmless = ("3600", "1e-300") if option == "--seconds" else DEEPER
        assert code == 2 or value in harmless, (option, value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FIFO", "FOLDER"]


@cpu
@pytest.mark.parametrize(
    "change",
    [{"num_layers": 10**9}, {"attention_head_dim": 7}, {"ffn_dim": -1}, {"text_dim": 0},
     {"patch_size": [2, 2, 2]}, {"patch_size": [1]}, {"patch_size": [1, 2, [2]]},
     {"num_layers": True}],
)  # fmt: skip
def test_sizes_that_no_model_has(change: dict[str, Any]) -> None:
    message = refused(validate_config, {**tiny_config(), **change}, "here")
    assert message.startswith(f"here: {next(iter(change))} is ")


@cpu
def test_files_that_are_too_large_or_no_files(tmp_path: Path) -> None:
    from PIL import Image

    from lltk.stream.chunks import Chunking
    from lltk.stream.image import read_image
    from lltk.stream.script import parse_script

    picture = tmp_path / "large.png"
    Image.new("1", (13_000, 13_000)).save(picture)
    assert f"{picture}: has 13000×13000 pixels" in refused(read_image, picture, 64, 64)
    (tmp_path / "caption.json").mkdir()
    assert "its caption cannot be read" in refused(read_caption, tmp_path / "caption.json")
    for number in range(40):
        content = f"extends: {number + 1}.yaml\n"
        (tmp_path / f"{number}.yaml").write_text(content)
    assert "extends more than 16 recipes in a row" in refused(load_recipe, tmp_path / "0.yaml")
    shots = parse_script([{"caption": "x", "seconds": 3600}] * 3, "here")
    start = time.monotonic()
    assert "112500 chunks at 1000 fps are more than" in refused(Chunking(24, 1000).chunks, shots)
    assert time.monotonic() - start < 0.5
    for text in ("[" * 200_000, "{a: " * 5000, "- " * 50_000):
        deep = tmp_path / "deep.yaml"
        deep.write_text(text)
        for read in (load_recipe, load_script):
            assert str(deep) in refused(read, deep)
