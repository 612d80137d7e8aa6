"""Training from Python: the documented example, and a run that is left and opened again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import refused
from test_train_cli import VAE

from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import shipped
from lltk.models.wan_vae import load_vae
from lltk.train.metrics import Metrics
from lltk.training import TrainingPlan, open_training, plan_training

pytestmark = pytest.mark.cpu

PAGE = Path(__file__).parents[1] / "docs" / "training.md"


def test_the_documented_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs with a smaller model and fewer steps."""
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    small = example.replace('["train.steps=1000"]', repr(VAE))
    assert small != example
    monkeypatch.chdir(tmp_path)
    exec(compile(small, str(PAGE), "exec"), {})
    memory, *steps, exported = capsys.readouterr().out.splitlines()
    assert "AdamW moments" in memory
    assert [line.split()[0] for line in steps] == ["1", "2", "3"]
    assert exported == "runs/vae/vae" and load_vae(tmp_path / exported).config is not None


def plan(*changes: str) -> TrainingPlan:
    return plan_training(read_recipe(shipped()["tiny_vae"], [*VAE, *changes]))


def same(ours: list[Metrics], theirs: list[Metrics]) -> bool:
    return [(m.step, m.loss) for m in ours] == [(m.step, m.loss) for m in theirs]


def test_a_run_may_be_left_and_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = plan("train.checkpoint_every=1", "train.sample_every=null")
    with open_training(often, tmp_path / "whole") as run:
        whole = list(run)
    weights = run.trainer.weights
    with open_training(often, tmp_path / "parts") as run:
        first = next(iter(run))
    with open_training(often, tmp_path / "parts", resume=True) as run:
        rest = list(run)
    assert same([first, *rest], whole) and len(rest) == 2
    assert all(torch.equal(weights[name], own) for name, own in run.trainer.weights.items())
    exported, averages = load_vae(run.export()).weights, run.trainer.ema
    assert all(torch.equal(exported[name], own) for name, own in averages.items())
    assert any(not torch.equal(weights[name], own) for name, own in averages.items())
    monkeypatch.setattr(type(often), "dataset", None)  # it is refused before clips are prepared
    message = refused(open_training(often, tmp_path / "parts").__enter__)
    assert message.endswith("holds a run; resume it, or name another folder")
    other = plan("train.lr=0.1")
    message = refused(open_training(other, tmp_path / "parts", resume=True).__enter__)
    assert "was made by another recipe: train.lr was" in message


def test_clips_of_ones_own(tmp_path: Path) -> None:
    class Grey:
        """Clips of one grey level each."""

        def batch(self, seed: int, indices: range) -> dict[str, torch.Tensor]:
            levels = torch.tensor([(index % 3 - 1) / 2 for index in indices])
            return {"video": levels[:, None, None, None, None].expand(-1, 3, 5, 128, 128)}

    own = plan("train.steps=1", "train.sample_every=null", "train.validate_every=1")
    with open_training(own, tmp_path / "grey", dataset=Grey()) as run:
        (grey,) = run
    with open_training(own, tmp_path / "world") as run:
        (world,) = run
    assert grey.loss != world.loss and grey.validation != world.validation


def test_graphs_need_a_gpu() -> None:
    assert "train.graphs: cpu has no CUDA graphs; set it to false" in refused(
        plan, "train.graphs=true"
    )
