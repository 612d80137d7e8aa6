"""No option of a command is ignored: each changes what the command does, or is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from helpers import Run
from streams import SIZES, opened, planned
from toy import finish, trainer

from lltk.artefact import save_program
from lltk.compiler import transform
from lltk.export.bundle import Difference, Findings
from lltk.export.facts import Facts
from lltk.exporting import EmittedGraph, ExportPlan
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.train.prepared import Facts as SetFacts
from lltk.train.prepared import write_facts

pytestmark = pytest.mark.cpu

SETS = [part for size in SIZES for part in ("--set", size)]
SMALL = [
    "--set",
    "model.config={num_attention_heads: 2, attention_head_dim: 12, in_channels: 4, "
    "out_channels: 4, text_dim: 8, freq_dim: 8, ffn_dim: 16, num_layers: 1}",
    *("--set", "geometry.height=64", "--set", "geometry.width=64"),
]


@dataclass(frozen=True)
class Line:
    """A command, and how its options are given.

    Attributes:
        contexts: arguments to which the options are added.
        options: a value for each option; those without one are flags.
        elsewhere: options that other tests show to matter, and where.
    """

    contexts: Sequence[Sequence[str]]
    options: Mapping[str, Sequence[str]]
    elsewhere: Mapping[str, str] = field(default_factory=dict)


OVERWRITE = {"--overwrite": "test_outputs.py"}
DOWNLOAD = {"--download": "test_hub.py"}
PROVIDER = {"--provider": "test_ort.py"}
LINES = {
    "stream": Line(
        [
            ["--prompt", "x", "-o", "v.mp4"],
            ["--prompt", "x", "--dry-run"],
            ["--script", "s.yaml", "-o", "v.mp4"],
            ["--script", "s.yaml", "--dry-run", "--json"],
            ["--resume", "state", "-o", "v.mp4"],
            ["--resume", "state", "--dry-run"],
        ],
        {
            "--prompt": ["y"], "--script": ["t.yaml"], "--resume": ["other"], "--seconds": ["3"],
            "--contact-sheet": ["c.png"], "--image": ["red.png"], "--seed": ["5"], "--steps": ["2"],
            "--guidance": ["3"], "--save": ["kept"], "--set": ["stream.shift=3"],
            "--device": ["cuda:99"], "--dry-run": [], "--json": [],
        },
        {**OVERWRITE, **DOWNLOAD, **PROVIDER, "--output": "the contexts",
         "--prompts": "test_stream_cli.py", "--seeds": "test_stream_cli.py",
         "--lora": "test_adapter_programs.py"},
    ),
    "serve": Line(
        [["--dry-run"], ["--dry-run", "--json"]],
        {
            "--sessions": ["3"], "--per-token": ["2"], "--queue": ["5"], "--limit": ["60"],
            "--folder": ["kept"], "--set": ["stream.shift=3"],
            "--device": ["cuda:99"], "--json": [],
        },
        {**DOWNLOAD, **PROVIDER, "--dry-run": "the contexts", "--host": "test_serve_refusals.py",
         "--port": "test_serve_refusals.py", "--token": "test_serve_refusals.py",
         "--token-file": "test_serve_command.py", "--public-host": "test_serve_command.py"},
    ),
    "watch": Line(
        [],
        {},
        dict.fromkeys(
            ["--prompt", "--seconds", "--seed", "--token", "--output", "--overwrite"],
            "test_serve_command.py",
        ),
    ),
    "transform": Line(
        [["--no-weights"], ["--dry-run"], ["--dry-run", "--json"]],
        {
            "--output": ["program"], "--no-weights": [], "--set": ["geometry.chunk=1"],
            "--dump": ["dump"], "--stop-after": ["commit"], "--disable": ["canonicalise"],
            "--dry-run": [], "--json": [],
        },
        {**OVERWRITE, **DOWNLOAD},
    ),
    "train": Line(
        [["-o", "new"], ["-o", "new", "--dry-run"], ["-o", "run"], ["-o", "run", "--dry-run"]],
        {"--resume": [], "--set": ["train.steps=7"], "--device": ["cuda:99"], "--dry-run": [],
         "--device-memory": ["1e-6"], "--json": []},
        {**OVERWRITE, **DOWNLOAD, "--output": "the contexts",
         "--from-scratch": "test_train_cli.py"},
    ),
    "distil": Line(
        [["-o", "new", "--dry-run"]],
        {},
        dict.fromkeys(
            ["--output", "--resume", "--set", "--download", "--overwrite", "--device", "--dry-run",
             "--device-memory", "--json"],
            "the line of train, whose command it runs",
        ),
    ),
    "prepare": Line(
        [["-o", "new"], ["-o", "new", "--dry-run"], ["-o", "set"], ["-o", "set", "--dry-run"]],
        {"--resume": [], "--set": ["train.data.clips=7"], "--device": ["cuda:99"], "--dry-run": [],
         "--json": []},
        {**DOWNLOAD, "--output": "the contexts"},
    ),
    "inspect": Line(
        [[], ["--json"]],
        {"--graph": ["step"], "--joint": [], "--diagram": ["d.svg"], "--json": []},
        OVERWRITE,
    ),
    "bench": Line(
        [["--dry-run"], ["--dry-run", "--json"]],
        {"--output": ["other"], "--seconds": ["3"], "--warmup": ["2"], "--runs": ["2"],
         "--set": ["stream.steps=2"], "--device": ["cuda:99"], "--random-weights": [],
         "--dry-run": [], "--json": []},
        {**OVERWRITE, **DOWNLOAD, **PROVIDER},
    ),
    "compare": Line(
        [["--dry-run"], ["--dry-run", "--json"], ["--dry-run", "--shots", "0"]],
        {"--output": ["other"], "--shots": ["9"], "--minutes": ["3"], "--at-once": ["2"],
         "--workers": ["3"], "--set": ["geometry.window=6"], "--device": ["cuda:99"],
         "--dry-run": [], "--json": []},
        {**OVERWRITE, **DOWNLOAD, **PROVIDER},
    ),
    "demo": Line(
        [[], ["--dry-run"], ["--dry-run", "--json"]],
        {"--output": ["other.mp4"], "--seed": ["5"], "--dry-run": [], "--json": []},
        OVERWRITE,
    ),
    "calibrate": Line(
        [["-o", "new", "--script", "s.yaml"], ["-o", "new", "--script", "s.yaml", "--json"]],
        {"--set": ["stream.steps=2"], "--device": ["cuda:99"], "--dry-run": [], "--json": []},
        {**OVERWRITE, **DOWNLOAD, "--output": "the contexts", "--script": "test_calibrating.py",
         "--checkpoint": "test_calibrating.py"},
    ),
    "export": Line(
        [["-o", "new"], ["-o", "new", "--dry-run"], ["-o", "new", "--dry-run", "--json"]],
        {"--set": ["geometry.window=9"], "--text": ["reference"], "--dry-run": [], "--json": []},
        {**OVERWRITE, **DOWNLOAD, "--output": "the contexts", "--target": "test_engine_facts",
         "--sm": "test_engine_facts", "--waive": "test_engine_facts",
         "--attention": "test_engine_facts"},
    ),
    "bundle show": Line([[]], {"--json": []}),
    "bundle verify": Line([[]], {"--json": [], "--run": []}),
    "doctor": Line([[]], {"--json": []}),
    "recipes": Line([[]], {"--json": []}),
}  # fmt: skip

SET_FACTS = SetFacts(origin={}, seed=0, clips=9, shard=4, held_out=2, versions={}, files={})


@pytest.fixture(scope="module")
def made() -> Program:
    """A small Program."""
    return transform(open_recipe("tiny_stream", SMALL[1::2]), weights=False)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, pipeline: Path, made: Program) -> Path:
    """A folder with the files that the options name."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("named")
    (folder / "s.yaml").write_text("- caption: a red circle\n  seconds: 2\n")
    (folder / "t.yaml").write_text("- caption: a blue square\n  seconds: 2\n")
    Image.new("RGB", (8, 8)).save(folder / "red.png")
    stream, _ = opened(planned(pipeline))
    with stream:
        next(stream.session)
        stream.save(folder / "state")
        next(stream.session)
        stream.save(folder / "other")
    finish(trainer(folder / "run", steps=1))
    (folder / "set").mkdir()
    write_facts(folder / "set", SET_FACTS)
    save_program(made, folder / "in")
    return folder


@pytest.fixture
def place(
    tmp_path: Path, named: Path, pipeline: Path, made: Program, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of `named` to be in. What the commands do is not done, but told."""
    shutil.copytree(named, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def tell(*given: Any) -> dict[str, Any]:
        click.echo(repr(given))
        return {"output": "v.mp4", "state": None}

    def make_plan(recipe: Any, device: torch.device, **options: Any) -> Any:
        stated = recipe.stream or {}
        keys = ("steps", "guidance", "seed", "shift")
        changes = [f"stream.{key}={stated[key]}" for key in keys if key in stated]
        return planned(pipeline, *changes)

    def transformed(recipe: Any, **options: Any) -> Any:
        observe = options.pop("observe", None)
        click.echo(f"{recipe.geometry} {options}")
        if observe is not None:
            observe(made)
        return made

    def plan_export(recipe: Any, **options: Any) -> ExportPlan:
        click.echo(str(options))
        return ExportPlan(recipe, made, made, made, None, Path())

    monkeypatch.setattr("lltk.streaming.plan_stream", make_plan)
    monkeypatch.setattr("lltk.compiler.transform", transformed)
    monkeypatch.setattr("lltk.artefact.load_program", lambda directory: made)
    near = Findings([Difference(0, "transformer/step", "sample", 1e-6, 1e-5)])
    facts = Facts(
        target="ort", opset=23, versions={}, recipe={}, rotary={}, sampler=[], stages={}, text=None,
        golden=[], files={"a": "b"},
    )  # fmt: skip
    monkeypatch.setattr("lltk.export.bundle.read_bundle", lambda path: facts)
    monkeypatch.setattr(
        "lltk.export.bundle.verify_bundle", lambda path, run: click.echo(str(run)) or near
    )
    monkeypatch.setattr("lltk.calibrating.record_scales", lambda *given: tell(given[:3]) and {})
    monkeypatch.setattr("lltk.exporting.plan_export", plan_export)
    monkeypatch.setattr(
        "lltk.exporting.emitted",
        lambda plan: {str(plan.recipe.geometry): EmittedGraph(1, 1, plan.engines is not None)},
    )
    monkeypatch.setattr("lltk.exporting.export", lambda plan, *given: tell(plan.recipe) and near)
    monkeypatch.setattr("lltk.cli.outputs.summary", lambda result: {"done": str(result)})
    monkeypatch.setattr(
        "lltk.cli.stream_to_files.stream_to_files",
        lambda console, ranks, plan, *given: tell(plan.section, *given),
    )

    def train(plan: Any, *given: Any) -> tuple[Any, str]:
        return tell(plan.section, given[:-1]), "weights"

    def prepare(plan: Any, folder: Path, **options: Any) -> SetFacts:
        for name in ("note", "ranks"):
            options.pop(name)
        click.echo(f"{plan.section} {options}")
        return SET_FACTS

    monkeypatch.setattr("lltk.tasks.preparing.prepare", prepare)
    monkeypatch.setattr("lltk.cli.train._train", train)
    return tmp_path


def parameters(command: str) -> set[str]:
    """The long names of a command's options."""
    outer, _, inner = command.partition(" ")
    made = import_module(f"lltk.cli.{outer}").command
    if isinstance(made, click.Group):
        made = made.commands[inner] if inner else next(iter(made.commands.values()))
    options = [each for each in made.params if isinstance(each, click.Option)]
    return {max(each.opts, key=len) for each in options}


@pytest.mark.parametrize("command", LINES)
def test_every_option_is_in_the_table(command: str) -> None:
    line = LINES[command]
    assert parameters(command) == {*line.options, *line.elsewhere}


def test_every_command_is_in_the_table() -> None:
    from lltk.cli.main import _COMMANDS

    assert {name.split()[0] for name in LINES} == set(_COMMANDS)


FIRST = {
    "stream": ["stream", "tiny_stream"],
    "serve": ["serve", "tiny_stream"],
    "watch": ["watch", "http://127.0.0.1:1"],
    "transform": ["transform", "tiny_stream", *SMALL],
    "prepare": ["prepare", "tiny_train"],
    "train": ["train", "tiny_vae"],
    "distil": ["distil", "tiny_distil"],
    "inspect": ["inspect", "in"],
    "bench": ["bench", "stream", "tiny_stream"],
    "compare": ["compare", "tiny_stream", "tiny_stream"],
    "calibrate": ["calibrate", "tiny_stream_w4a4"],
    "export": ["export", "tiny_stream", "--target", "ort"],
    "bundle show": ["bundle", "show", "bundle"],
    "bundle verify": ["bundle", "verify", "bundle"],
    "doctor": ["doctor"],
    "recipes": ["recipes"],
    "demo": ["demo"],
}


@pytest.mark.parametrize("command", LINES)
def test_no_option_is_ignored(run: Run, place: Path, command: str) -> None:
    """Each option is tried alone and with every other one, in every context."""
    line = LINES[command]
    before = {path.name for path in place.iterdir()}

    def outcome(*arguments: str) -> tuple[int, str]:
        code, out, err = run(*FIRST[command], *arguments)
        written = sorted({path.name for path in place.iterdir()} - before)
        for name in written:
            path = place / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return code, f"{out}{err}{written}"

    options = {name: [name, *value] for name, value in line.options.items()}
    pairs: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in options]
    pairs += [(name, (other,)) for name, other in permutations(options, 2)]
    ignored = []
    for context in line.contexts:
        known: dict[frozenset[str], tuple[int, str]] = {}
        for name, others in pairs:
            if name in context and not line.options[name]:
                continue
            for names in (frozenset(others), frozenset({name, *others})):
                if names not in known:
                    given = [part for each in sorted(names) for part in options[each]]
                    known[names] = outcome(*context, *given)
            without, together = known[frozenset(others)], known[frozenset({name, *others})]
            if without[0] == 0 and without == together:
                ignored.append((context, name, others))
    assert not ignored, ignored
