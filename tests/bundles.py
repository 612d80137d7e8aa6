"""A bundle at the tests' sizes, and what torch streams by the same Programs; made once a run."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from streams import SHOTS, SIZES, save_pipeline, streamed
from torch import Tensor

from lltk.cli.main import cli
from lltk.export.facts import MANIFEST
from lltk.exporting import ExportPlan, export, plan_export
from lltk.files.manifest import _digest
from lltk.files.tensors import checksum
from lltk.graph.recipe import open_recipe
from lltk.stream.recipe import stream_section
from lltk.streaming import BundlePlan, Placed, Plan, Stream, StreamPlan, plan_bundle

WORDS = "a yellow star circling"


@dataclass(frozen=True)
class Exported:
    """What was made once.

    Attributes:
        folder: holds all.
    """

    folder: Path

    @property
    def pipeline(self) -> Path:
        """The pipeline that the recipe names."""
        return self.folder / "pipeline"

    @property
    def recipe(self) -> Path:
        """The recipe that was exported."""
        return self.folder / "small.yaml"

    @property
    def bundle(self) -> Path:
        """The bundle."""
        return self.folder / "bundle"

    @property
    def outside(self) -> Path:
        """The same bundle without the text encoder."""
        return self.folder / "outside"

    def said(self, command: str) -> Any:
        """What ``export``, its ``dry`` run, or ``compare`` printed as JSON."""
        return json.loads((self.folder / f"{command}.json").read_text())

    def torchs(self, scene: str) -> tuple[Tensor, Tensor]:
        """Latents and video that torch made of one of `SCENES`."""
        made = load_file(self.folder / "scenes.safetensors")
        return made[f"{scene}.latents"], made[f"{scene}.video"]


def _switch(stream: Stream, chunk: int) -> None:
    if chunk == 2:
        stream.switch(WORDS, recache=True)


def image() -> Tensor:
    """A first frame, [1, 3, 32, 64]; no two of its pixels are alike."""
    ramp = torch.linspace(-1, 1, 3 * 32 * 64).view(1, 3, 32, 64)
    return ramp.flip(1) * ramp.flip(-1).cos()


SCENES: dict[str, Callable[[Plan], tuple[Tensor, Tensor]]] = {
    "plain": streamed,
    "switched": lambda plan: streamed(plan, act=_switch),
    "guided": lambda plan: streamed(with_section(plan, guidance=2.5, negative_prompt="a square")),
    "image": lambda plan: streamed(plan, SHOTS[:1], image=image()),
}


def with_section(plan: Plan, **changes: Any) -> Plan:
    """The plan, streamed otherwise."""
    return replace(plan, section=plan.section.model_copy(update=changes))


def exported(root: Path) -> Exported:
    """Make all in a folder, or wait for the process that makes it."""
    made = Exported(root / "exported")
    with (root / "exported.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "exported.done").exists():
            made.folder.mkdir()
            _make(made)
            (root / "exported.done").touch()
    return made


def _make(made: Exported) -> None:
    save_pipeline(made.pipeline)
    recipe = open_recipe("tiny_stream", (*SIZES, f"stream.pipeline={made.pipeline}"))
    made.recipe.write_text(yaml.safe_dump(recipe.resolved()))
    plan = plan_export(recipe)
    with patch("lltk.exporting.plan_export", lambda recipe, **options: plan):
        line = ["export", str(made.recipe), "--target", "ort", "-o", str(made.bundle), "--json"]
        _note(made, "dry", [*line, "--dry-run"])
        assert not made.bundle.exists()
        _note(made, "export", line)
    export(replace(plan, text=None), made.outside)
    ours = _planned(plan, made)
    scenes = {name: scene(ours) for name, scene in SCENES.items()}
    parts = {
        f"{name}.{what}": part
        for name, made_of in scenes.items()
        for what, part in zip(("latents", "video"), made_of, strict=True)
    }
    save_file(parts, made.folder / "scenes.safetensors")
    with (
        patch("lltk.streaming.plan_stream", lambda *_, **__: ours),
        patch("lltk.bench.comparison.SHOTS", 1),
        patch("lltk.bench.comparison.CHUNKS", 3),
    ):
        both = [str(made.recipe), str(made.bundle)]
        _note(made, "compare", ["compare", *both, "--shots", "0", "--device", "cpu", "--json"])


def _planned(plan: ExportPlan, made: Exported) -> StreamPlan:
    """A stream by the Programs that the bundle's golden values come from."""
    cpu, section = torch.device("cpu"), stream_section(plan.recipe.stream, "test")
    decoder = Placed(plan.decoder, cpu)
    return StreamPlan(plan.recipe, section, made.pipeline, cpu, plan.reference, (decoder,))


def _note(made: Exported, name: str, line: list[str]) -> None:
    """Run a command, and keep what it prints."""
    result = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (made.folder / f"{name}.json").write_text(result.stdout)


def bundle_plan(made: Exported, *overrides: str) -> BundlePlan:
    """The bundle's stream."""
    return plan_bundle(made.bundle, overrides)


def resealed(folder: Path, change: Callable[[Any], object] = lambda content: None) -> None:
    """Change a bundle's manifest, and seal what is in the folder, as whoever made it would."""
    path = folder / MANIFEST.name
    content = json.loads(path.read_text())
    del content["digest"]
    content["files"] = {name: checksum(folder / name) for name in content["files"]}
    change(content)
    content["digest"] = _digest(content)
    path.write_text(json.dumps(content))


Change = Callable[[Any], object]


def at(*keys: Any, to: Any) -> Change:
    """Set what is at some keys; ``...`` stands for every one."""

    def change(content: Any) -> None:
        key, *rest = keys
        own = list(content) if isinstance(content, dict) else range(len(content))
        for each in own if key is ... else [key]:
            if rest:
                at(*rest, to=to)(content[each])
            else:
                content[each] = to

    return change
