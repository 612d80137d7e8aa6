"""The training loop: it learns, averages, accumulates, keeps its books, and stops when it must."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import make_recipe, randomise, refused, runnable
from torch import Tensor
from toy import SETTINGS, Regression, Samples, finish, settings, trainer

from lltk.compiler import with_weights
from lltk.graph.facts import Trainable
from lltk.graph.geometry import Kind
from lltk.graph.module import instantiate
from lltk.train.data import Batch, Batches, generator_at
from lltk.train.flow_matching import FlowMatching
from lltk.train.loop import Diverged, Trainer
from lltk.train.masters import Masters
from lltk.train.metrics import Metrics, plot_loss, read_metrics
from lltk.train.objective import mean_loss
from lltk.train.recipe import ErrorRecyclingSection, TrainSection, train_section, vae_recipe
from lltk.train.saving import save_training_state
from lltk.train.state import load_training_state, training_states

pytestmark = pytest.mark.cpu


def history(folder: Path) -> list[Metrics]:
    return read_metrics(folder / "metrics.jsonl")


def test_the_loss_falls_and_is_recorded(tmp_path: Path) -> None:
    run = trainer(tmp_path, ema_decay=None)
    before = run.weights
    given = list(run)
    metrics = history(tmp_path)
    assert given == metrics and [m.step for m in metrics] == list(range(1, 61))
    losses = [m.loss for m in metrics]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert not torch.equal(run.weights["1.weight"], before["1.weight"])
    assert metrics[0].lr == pytest.approx(0.002) and metrics[4].lr == pytest.approx(0.01)
    assert metrics[-1].lr < 1e-4
    assert all(m.samples_per_second == pytest.approx(8 / m.seconds) for m in metrics)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first) == {
        "step", "loss", "grad_norm", "lr", "seconds", "samples_per_second", "validation",
        "parts", "tokens_per_second", "mfu", "memory", "losses",
    }  # fmt: skip
    for each in metrics:
        assert each.parts.keys() == {"data", "forward", "backward", "exchange", "optimiser"}
        assert 0 < sum(each.parts.values()) <= each.seconds
    weights = sum(tensor.nbytes for tensor in run.weights.values())
    moments = 2 * weights + 4 * len(run.weights)  # and a counter each
    held = {"weights": weights, "gradients": weights, "AdamW moments": moments}
    assert [each.memory for each in metrics] == [held, *[{}] * 59]
    assert ElementTree.parse(tmp_path / "loss.svg").getroot().tag.endswith("svg")
    assert not run.ema


def test_the_rate_warms_up_then_stays_or_falls() -> None:
    constant, cosine = settings(schedule="constant"), settings()
    assert [constant.rate(step) for step in (0, 4, 5, 59)] == pytest.approx(
        [0.002, 0.01, 0.01, 0.01]
    )
    middle = 5 + 55 / 2
    assert cosine.rate(int(middle)) == pytest.approx(0.005, rel=0.1)
    assert cosine.rate(60) == pytest.approx(0)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """With β₁ = β₂ = 0 and a large ε an update is lr/ε times the clipped gradient."""
    for clip in (1e9, 0.1):
        run = trainer(tmp_path / str(clip), steps=1, clip=clip, warmup=0, betas=[0.0, 0.0])
        run._updates.optimiser._adamw.param_groups[0]["eps"] = 1e3
        before = run.weights
        finish(run)
        (metrics,) = history(tmp_path / str(clip))
        change = torch.cat([(run.weights[n] - before[n]).flatten() for n in before])
        moved = float(change.norm()) * 1e3 / 0.01
        assert metrics.grad_norm > 1
        assert moved == pytest.approx(min(clip, metrics.grad_norm), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_is_a_big_batch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Calls of 1, 2 and 8 samples, of unequal weights, take the same steps of 8."""
    ends, losses = [], []
    for clips in (1, 2, 8):
        folder = tmp_path / str(clips)
        run = trainer(folder, Regression(clips, dtype=dtype), steps=12)
        finish(run)
        ends.append(run.weights)
        losses.append([m.loss for m in history(folder)])
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for end, loss in zip(ends[:2], losses[:2], strict=True):
        assert loss == pytest.approx(losses[2], rel=bound)
        assert all(torch.allclose(end[n], ends[2][n], rtol=0.1, atol=bound) for n in end)
    smaller = trainer(tmp_path / "smaller", Regression(4, dtype=dtype), steps=12, batch=4)
    finish(smaller)
    assert [m.loss for m in history(tmp_path / "smaller")] != pytest.approx(losses[2], rel=bound)


def test_a_step_of_padding_alone_changes_nothing(tmp_path: Path) -> None:
    """The first sample does not count."""
    run = trainer(tmp_path, Regression(1), steps=2, batch=1, warmup=0, lr=0.1)
    before = run.weights
    first = next(run)
    assert (first.loss, first.grad_norm) == (0.0, 0.0)
    assert all(torch.equal(run.weights[name], weight) for name, weight in before.items())
    assert next(run).loss > 0
    assert not torch.equal(run.weights["1.weight"], before["1.weight"])


def test_a_batch_is_whole_calls(tmp_path: Path) -> None:
    message = refused(trainer, tmp_path, Regression(4), batch=6)
    assert message.endswith("of the 4 of a call; the nearest that fit: 4 and 8")
    assert refused(trainer, tmp_path, Regression(4), batch=3).endswith("nearest that fit: 4")


def test_averages_by_hand(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=14, ema_start=10, ema_decay=0.75)
    steps = [run.weights for _ in run]
    wanted = steps[9]["1.weight"]
    for weights in steps[10:]:
        wanted = 0.75 * wanted + 0.25 * weights["1.weight"]
    assert torch.allclose(run.ema["1.weight"], wanted, atol=1e-6)
    assert not torch.allclose(run.ema["1.weight"], run.weights["1.weight"], atol=1e-4)
    early = load_training_state(training_states(tmp_path / "checkpoints")[-1])
    assert torch.equal(early.ema["1.weight"], run.ema["1.weight"])
    assert run.ema["1.weight"].dtype == torch.float32


def test_masters_keep_what_low_precision_loses() -> None:
    module = torch.nn.Linear(3, 3, bias=False, dtype=torch.bfloat16)
    start = {"weight": torch.full((3, 3), 1.001)}
    masters = Masters(module, start, lambda: None)
    assert torch.equal(masters.parameters["weight"], start["weight"])
    for _ in range(3):
        module(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        masters.collect()
    gradient = masters.parameters["weight"].grad
    assert module.weight.grad is None and gradient is not None
    assert gradient.dtype == torch.float32 and torch.equal(gradient, torch.full((3, 3), 3.0))
    masters.parameters["weight"].data += 1e-4
    masters.publish()
    assert torch.equal(module.weight, (start["weight"] + 1e-4).bfloat16())
    with masters.replaced({"weight": torch.zeros(3, 3)}):
        assert not module.weight.any()
    assert torch.equal(masters.parameters["weight"], start["weight"] + 1e-4)


def test_nothing_to_train_is_refused() -> None:
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    assert refused(Masters, frozen, {}, lambda: None).startswith("nothing trains")


class Spoilt(Samples):
    """Samples that are NaN from a number on."""

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        tensors = super().batch(seed, indices)
        if 40 in indices:
            tensors["x"][0] = torch.nan
        return tensors


def test_a_bad_loss_stops_and_names_the_module(tmp_path: Path) -> None:
    section = settings(checkpoint_every=2)
    run = Trainer(Regression(), Spoilt(), section, tmp_path, {"recipe": {}})
    with pytest.raises(Diverged) as caught:
        finish(run)
    newest = training_states(tmp_path / "checkpoints")[-1]
    assert newest.name == "step_00000004"
    message = str(caught.value)
    assert message.startswith("step 6: the loss is nan")
    assert f"first not finite: 0; the last good training state is {newest}" in message
    assert [m.step for m in history(tmp_path)] == [1, 2, 3, 4, 5]
    assert all(bool(t.isfinite().all()) for t in run.weights.values())


def test_a_bad_gradient_names_its_parameter(tmp_path: Path) -> None:
    objective = Regression()
    run = trainer(tmp_path, objective)
    objective.module[1].bias.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(Diverged, match=r"first not finite: the gradient of 1\.bias; there is no"):
        finish(run)


def test_a_program_that_goes_bad_is_named(tmp_path: Path) -> None:
    program, module = runnable(make_recipe("train", batch=2))
    run = Trainer(
        FlowMatching(program, module), Clips(program.geometry.frames), flow_settings(), tmp_path, {}
    )
    module.get_parameter("blocks.1.attn2.to_k.weight").data.fill_(torch.inf)
    with pytest.raises(Diverged, match=r"first not finite: parameter blocks\.1\.attn2\.to_k\.w"):
        finish(run)


class Watched(Regression):
    """Keeps a weight as each held-out loss sees it; dropout draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.seen: list[Tensor] = []

    def loss(self, batch: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            self.seen.append(self.module[1].weight.clone())
            assert batch.seed == ~SETTINGS["seed"]
        return super().loss(batch)


def test_validation_and_samples_see_averages_and_leave_no_trace(tmp_path: Path) -> None:
    """What they draw does not change a run with dropout."""
    objective = Watched()

    def sample(folder: Path) -> None:
        torch.rand(10)
        assert not torch.is_grad_enabled()
        torch.save(objective.module[1].weight, folder / "weight")

    changes = {"steps": 12, "ema_start": 8, "ema_decay": 0.5}
    run = trainer(
        tmp_path / "a", objective, sample=sample, validate_every=4, sample_every=6, **changes
    )
    metrics = list(run)
    assert [m.step for m in metrics if m.validation] == [4, 8, 12]
    assert len(objective.seen) == 3 * 4, "16 clips, 4 a call"
    assert torch.equal(objective.seen[-1], run.ema["1.weight"])
    assert torch.equal(objective.module[1].weight, run.weights["1.weight"])
    sampled = torch.load(tmp_path / "a" / "samples" / "step_00000012" / "weight")
    assert torch.equal(sampled, run.ema["1.weight"])
    assert not torch.equal(sampled, run.weights["1.weight"])

    plain = trainer(tmp_path / "b", Regression(dropout=0.3), **changes)
    assert [m.loss for m in metrics] == [m.loss for m in plain]


def test_samples_that_nothing_can_make_are_refused(tmp_path: Path) -> None:
    assert "train.sample_every" in refused(trainer, tmp_path, sample_every=5)


class Clips:
    """One shape a clip: latents that depend on the text alone."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.patterns = torch.randn(3, 4, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        self.words = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(6))

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        drawn = [int(torch.randint(3, (), generator=generator_at(seed, i))) for i in indices]
        latents = self.patterns[drawn].expand(-1, -1, self.frames, -1, -1)
        text = self.words[drawn][:, None].expand(-1, self.frames // 2, -1, -1)
        return {"latents": latents.contiguous(), "text": text.contiguous()}


def flow_settings(**changes: object) -> TrainSection:
    known = {"steps": 30, "batch": 4, "lr": 3e-3, "ema_decay": None, "checkpoint_every": 1000}
    return TrainSection.model_validate(known | changes)


@pytest.mark.parametrize("kind", ["train", "reference"])
def test_flow_matching_learns_through_a_program(tmp_path: Path, kind: Kind) -> None:
    program, _ = runnable(make_recipe(kind, layers=1, batch=4))
    small = {n: t * 0.3 for n, t in randomise(program.weights).items()}
    program = with_weights(program, small)
    data, objective = Clips(6), FlowMatching(program, instantiate(program))
    held_out = list(islice(Batches(data, seed=~0, size=4), 4))
    before = mean_loss(objective, held_out)
    run = Trainer(objective, data, flow_settings(), tmp_path, {})
    finish(run)
    assert mean_loss(objective, held_out) < 0.75 * before
    tokens = 4 * program.geometry.frames * program.geometry.frame_tokens(program.spec)
    for metrics in history(tmp_path):
        assert metrics.tokens_per_second == pytest.approx(tokens / metrics.seconds)
        assert metrics.mfu is None  # of a CPU
    # The Program's own weights are left as they were.
    assert mean_loss(FlowMatching(program, instantiate(program)), held_out) == before
    trained = with_weights(program, run.weights)
    after = mean_loss(FlowMatching(trained, instantiate(trained)), held_out)
    assert after == mean_loss(objective, held_out)


def test_recomputing_blocks_changes_nothing(tmp_path: Path) -> None:
    program, plain = runnable(make_recipe("train", batch=4))
    recomputing = instantiate(program)
    recomputing.recompute_blocks()
    ends = []
    for name, module in (("plain", plain), ("recomputing", recomputing)):
        section = flow_settings(steps=2)
        run = Trainer(FlowMatching(program, module), Clips(6), section, tmp_path / name, {})
        finish(run)
        ends.append(run.weights)
    assert all(torch.allclose(ends[0][n], ends[1][n], atol=1e-5) for n in ends[0])


def recycling_run(folder: Path, clips: int, **changes: object) -> Trainer:
    """A run whose model is given its own errors."""
    program, _ = runnable(make_recipe("train", layers=1, batch=clips))
    section = flow_settings(error_recycling={"entries": 3, "buckets": 5}, **changes)
    objective = FlowMatching(program, instantiate(program), error_recycling=section.error_recycling)
    return Trainer(objective, Clips(6), section, folder, {}, resume=True)


def test_errors_are_recycled_alike_in_any_calls(tmp_path: Path) -> None:
    """Calls of 1 and of 4 clips take the same steps, and keep the same errors."""
    runs = [recycling_run(tmp_path / str(clips), clips, steps=4) for clips in (1, 4)]
    for run in runs:
        finish(run)
    one, four = (run.weights for run in runs)
    assert all(torch.allclose(one[n], four[n], atol=1e-5) for n in one)
    kept = [load_training_state(training_states(tmp_path / n / "checkpoints")[-1]).memory
            for n in ("1", "4")]  # fmt: skip
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) > 20
    assert all(torch.allclose(kept[0][n], kept[1][n], atol=1e-3) for n in kept[0])


@pytest.mark.parametrize("lost", [False, True])
def test_recycled_errors_are_part_of_a_state(tmp_path: Path, lost: bool) -> None:
    """A resumed run goes on with them; negative control: without them it ends elsewhere."""
    finish(whole := recycling_run(tmp_path / "whole", 4, steps=6))
    finish(recycling_run(tmp_path / "stopped", 4, steps=3))
    states = tmp_path / "stopped" / "checkpoints"
    state = load_training_state(training_states(states)[-1])
    if lost:
        save_training_state(states, replace(state, memory={}), keep=1)
    finish(resumed := recycling_run(tmp_path / "stopped", 4, steps=6))
    ends = whole.weights, resumed.weights
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0]) != lost
    wrong = {"noise.9.0": next(iter(state.memory.values()))}
    save_training_state(states, replace(state, step=7, position=28, memory=wrong), keep=1)
    message = refused(recycling_run, tmp_path / "stopped", 4, steps=8)
    assert "errors of the noise: 9.0 is none of 5 buckets of 3 errors; remove it to" in message


def test_errors_of_one_kind_only() -> None:
    data = {"steps": 1, "lr": 1.0, "error_recycling": {}, "context_error": 0.5}
    message = refused(train_section, data, "x")
    assert "train.error_recycling and train.context_error: both add errors" in message
    program, module = runnable(make_recipe("reference"))
    section = train_section(data | {"context_error": 0}, "x").error_recycling
    message = refused(FlowMatching, program, module, error_recycling=section)
    assert "a reference program sees no clean chunks" in message


def test_adapters_alone_train(tmp_path: Path) -> None:
    steps = ["canonicalise", "per_frame_timesteps", "frame_positions", "text_per_chunk",
             "teacher_forcing", {"lora": {"rank": 2, "alpha": 2.0}}, "regionalise"]  # fmt: skip
    program, module = runnable(make_recipe("train", steps, batch=4))
    run = Trainer(FlowMatching(program, module), Clips(6), flow_settings(steps=2), tmp_path, {})
    finish(run)
    names = program.fact(Trainable).names
    assert names is not None and run.weights.keys() == names
    saved = load_training_state(training_states(tmp_path / "checkpoints")[-1])
    assert saved.weights.keys() == names


def test_the_section_refuses_typos() -> None:
    message = refused(train_section, {"stps": 3, "lr": 1.0}, "my.yaml")
    assert message.startswith("my.yaml: train: ")
    assert "unknown key 'stps'; did you mean 'steps'?" in message
    assert "no train section" in refused(train_section, None, "my.yaml")
    nested = {"steps": 1, "lr": 1.0, "data": {"shot": 2}}
    assert "unknown key 'data.shot'; did you mean 'shots'?" in refused(train_section, nested, "x")
    typo = {"vae": {"config": {}, "frames": 5, "edge": 1}, "train": {"steps": 1, "lr": 1}}
    assert "unknown key 'vae.edge'; did you mean 'edges'?" in refused(vae_recipe, typo, "x")


def test_the_defaults_are_longlives() -> None:
    section = train_section({"steps": 600, "lr": 1e-5}, "x")
    assert (section.betas, section.weight_decay, section.clip) == ((0.0, 0.999), 0.0, 10.0)
    assert (section.ema_decay, section.ema_start, section.schedule) == (0.99, 100, "constant")
    assert section.error_recycling is None
    errors = ErrorRecyclingSection().model_dump(exclude={"gigabytes", "owners"})
    assert list(errors.values()) == [0.2, 0.9, 0.01, 0.9, 0.1, 0.3, 50, 500]


def test_plots_hold_every_loss() -> None:
    one = Metrics(1, 2.0, 1.0, 0.1, 1.0, 1.0)
    for count in (1, 7, 5000):
        metrics = [replace(one, step=i + 1, loss=math.sin(i)) for i in range(count)]
        root = ElementTree.fromstring(plot_loss(metrics))
        lines = root.findall("{http://www.w3.org/2000/svg}polyline")
        points = [[float(v) for v in p.split(",")] for p in lines[0].attrib["points"].split()]
        assert len(lines) == 2 and 1 <= len(points) <= 1200
        assert all(0 <= x <= 720 and 0 <= y <= 360 for x, y in points)
