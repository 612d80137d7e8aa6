"""Distillation: its networks, its updates, and runs that go on where they were left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from helpers import PASSES, Run, randomise, refused, same, tiny_config
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streams import AUTOENCODER, SIZES, TRANSFORMER, save_pipeline
from test_train_cli import AUTOENCODER as WORLD_AUTOENCODER
from torch import Tensor

from lltk.compiler import transform
from lltk.graph.low_rank import LowRank
from lltk.graph.memory import total
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe, read_recipe
from lltk.graph.recipe_files import shipped
from lltk.models import wan22, wan_vae
from lltk.models.adapters import load_adapter
from lltk.models.checkpoint import save_checkpoint
from lltk.models.configs import named_config
from lltk.models.tiny.text import save_text_encoder
from lltk.passes.lora import is_adapter
from lltk.stream.rollout import GraphedRollout, Rollout, RuntimeRollout
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.stream.sampler import Schedule
from lltk.tasks.clips import encoded_clips
from lltk.tasks.distillation import DistillationPlan, plan_distillation
from lltk.tasks.transformer import ADAPTERS
from lltk.train.data import Batch, Batches, generator_at
from lltk.train.distillation import Distillation
from lltk.train.loop import Diverged
from lltk.train.saving import save_training_state
from lltk.train.simulation import Scene, simulate
from lltk.train.state import load_training_state, training_states
from lltk.training import open_training, plan_training

pytestmark = pytest.mark.cpu

CHUNKS = 3
RECORDED = Path(__file__).parent / "data" / "longlive"
SMALL = [
    *SIZES, "geometry.frames=6", "geometry.batch=2", "train.batch=4", "train.steps=3",
    "train.checkpoint_every=1", "train.sample_every=null", "train.ema_start=1", "train.warmup=0",
    "train.lr=0.01", "distil.fake.updates=2", "distil.fake.lead=0",
    "passes.lora.rank=4", "passes.lora.alpha=4",
]  # fmt: skip


SCORES = "canonicalise, per_frame_timesteps, frame_positions, text_per_chunk, block_causal"


class Prompts:
    """Random prompts and latents; the second chunk of every other sample opens a shot."""

    def __init__(self, chunks: int = CHUNKS) -> None:
        self._chunks = chunks

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        def drawn(*shape: int) -> Tensor:
            draws = [torch.randn(shape, generator=generator_at(seed, i, *shape)) for i in indices]
            return torch.stack(draws)

        opens = torch.zeros(len(indices), self._chunks, dtype=torch.bool)
        opens[:, 0], opens[:, 1] = True, torch.tensor([bool(i % 2) for i in indices])
        latents = drawn(AUTOENCODER["z_dim"], 2 * self._chunks, 2, 4)
        return {"text": drawn(self._chunks, 12, 64), "latents": latents, "opens": opens}


@pytest.fixture(scope="module")
def distilled(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run writes in each layout, and the run's own adapters."""
    folder, plan = tmp_path_factory.mktemp("distilled"), planned(pipeline, "train.steps=2")
    with open_training(plan, folder / "run", dataset=Prompts()) as run:
        assert len(list(run)) == 2
        trained = run.trainer.ema
    for layout, name in ADAPTERS.items():
        own = replace(plan, section=plan.section.model_copy(update={"adapter": layout}))
        assert own.export(run.objective, Prompts(), trained, folder) == folder / name
    save_file(trained, folder / "own.safetensors")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same model."""
    folder = tmp_path_factory.mktemp("teacher") / "transformer"
    weights = randomise(wan22.build(TRANSFORMER).state_dict(), 5)
    save_checkpoint(folder, weights, "diffusers", TRANSFORMER)
    return folder


WORLD = [
    "geometry.frames=6", "geometry.batch=2", "train.batch=2", "train.steps=2",
    "train.data.clips=2", "train.data.shots=2", "train.sample_every=2", "model.config=null",
    "distil.fake.updates=1", "distil.fake.lead=0",
]  # fmt: skip
"""Over clips of the tiny world."""


def save_world_pipeline(folder: Path) -> Path:
    """Random weights for clips of the tiny world."""
    config = wan22.validate_config({
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
        "text_dim": 64, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1,
    })  # fmt: skip
    save_text_encoder(folder)
    autoencoder = wan_vae.validate_config(WORLD_AUTOENCODER)
    wan_vae.save_vae(folder / "vae", wan_vae.build(autoencoder).state_dict(), autoencoder)
    weights = wan22.build(config).state_dict()
    save_checkpoint(folder / "transformer", weights, "diffusers", config)
    return folder


def pipelines(folder: Path) -> list[str]:
    return [f"stream.pipeline={folder}", f"train.data.pipeline={folder}"]


def recipe(pipeline: Path, *changes: str) -> dict[str, Any]:
    return read_recipe(shipped()["tiny_distil"], [*SMALL, *pipelines(pipeline), *changes])


@cache
def planned(pipeline: Path, *changes: str) -> DistillationPlan:
    return plan_distillation(recipe(pipeline, *changes), torch.device("cpu"), "test")


def objective_of(plan: DistillationPlan) -> Distillation:
    made = plan.objective(Prompts())
    assert isinstance(made, Distillation)
    return made


def batch(objective: Distillation, seed: int = 0) -> Batch:
    return next(Batches(Prompts(), seed, objective.clips))


def test_equal_weights_are_held_once(pipeline: Path, teacher: Path) -> None:
    objective = objective_of(planned(pipeline))
    networks = [objective._real.module, objective.critic.objective.module, objective.module]
    real, fake, student = (dict(network.named_parameters()) for network in networks)
    adapters = {name for name in student if is_adapter(name)}
    assert adapters and real.keys() == student.keys() - adapters == fake.keys() - adapters
    assert all(real[name] is fake[name] is student[name] for name in real)
    assert all(fake[name] is not student[name] for name in adapters)
    assert all(p.requires_grad == (n in adapters) for n, p in [*student.items(), *fake.items()])
    assert not any(parameter.requires_grad for parameter in real.values())

    other = planned(pipeline, f"distil.real.weights={teacher}")
    apart = objective_of(other)
    real = dict(apart._real.module.named_parameters())
    fake = dict(apart.critic.objective.module.named_parameters())
    student = dict(apart.module.named_parameters())
    assert not any(real[name] is student[name] for name in real)
    assert all(fake[name] is student[name] for name in real)
    size = sum(4 * parameter.numel() for parameter in real.values())
    assert other.memory["weights"] == planned(pipeline).memory["weights"] + size


def test_both_losses_reach_their_own_adapters_alone(pipeline: Path) -> None:
    objective = objective_of(planned(pipeline))
    given, critic = batch(objective), objective.critic.objective
    student, fake = objective.module, critic.module
    for adapters in (student, fake):
        for name, parameter in adapters.named_parameters():
            if is_adapter(name):  # B begins at 0, where A has no gradient
                torch.nn.init.normal_(parameter, 0, 0.1)
    objective.loss(given).backward()
    assert all((p.grad is not None) == p.requires_grad for p in student.parameters())
    assert all(p.grad is None for p in fake.parameters())
    student.zero_grad()
    critic.loss(given).backward()
    assert all((p.grad is not None) == p.requires_grad for p in fake.parameters())
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("quantised", ["fp8_infer", "nvfp4_infer"])
def test_a_quantised_teacher(quantised: str, pipeline: Path) -> None:
    passes = f"distil.real.passes=[{SCORES}, {quantised}, regionalise, lower]"
    objective = objective_of(planned(pipeline, passes))
    real, student = (
        dict(module.named_parameters()) for module in (objective._real.module, objective.module)
    )
    assert any(each.dtype.itemsize == 1 for each in real.values())
    plain = {n for n, each in real.items() if n in student and each.dtype == torch.float32}
    assert plain == {name for name, each in real.items() if each is student.get(name)}
    assert len(plain) < len(real)
    loss = objective.loss(batch(objective))
    loss.backward()
    assert loss > 1e-3 and any(p.grad is not None for p in objective.module.parameters())


QUANTISERS = ["fp8_infer", "nvfp4_infer"]


@pytest.mark.parametrize("quantised", QUANTISERS)
def test_quantised_backbones_under_adapters(quantised: str, pipeline: Path) -> None:
    """All three networks read one set of quantised weights, and gradients reach every adapter."""
    lora = "lora: {rank: 4, alpha: 4}"
    stream = "canonicalise, per_frame_timesteps, frame_positions, hoist_text, cached_step, commit"
    changes = (
        f"passes=[{stream}, {{{lora}}}, {quantised}, regionalise, lower]",
        f"distil.real.passes=[{SCORES}, {quantised}, regionalise, lower]",
        f"distil.fake.passes=[{SCORES}, {{{lora}}}, {quantised}, regionalise, lower]",
        "train.recompute=true",
    )
    plan = planned(pipeline, *changes)
    objective = objective_of(plan)
    modules = [objective.module, objective.critic.objective.module, objective._real.module]
    student, fake, real = (dict(module.named_parameters()) for module in modules)
    adapters = {name for name in student if is_adapter(name)}
    assert all(real[name] is fake[name] is student[name] for name in student.keys() - adapters)
    assert any(each.dtype.itemsize == 1 for each in real.values())
    for name in adapters:
        torch.nn.init.normal_(student[name], 0, 0.1)
        torch.nn.init.normal_(fake[name], 0, 0.1)
    given = batch(objective)
    for each in (objective, objective.critic.objective):
        each.loss(given).backward()
    gradients = [network[name].grad for network in (student, fake) for name in adapters]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
    assert plan.memory["weights"] < 0.7 * planned(pipeline).memory["weights"]


def test_quantised_adapters_are_refused(pipeline: Path) -> None:
    passes = f"[{SCORES}, {{lora: {{rank: 16}}}}, {{nvfp4_infer: {{include: '.*lora_A'}}}}]"
    message = refused(planned, pipeline, f"distil.fake.passes={passes}")
    assert "distil.fake.passes: adapters are quantised, and so cannot train" in message


def test_a_student_has_absolute_positions(pipeline: Path) -> None:
    steps = [*PASSES["stream"][:6], "bounded_positions", "lora", "regionalise", "lower"]
    message = refused(planned, pipeline, f"passes=[{', '.join(steps)}]")
    assert message.startswith("test: passes: bounded_positions is for streaming")


@pytest.mark.parametrize("name", ["wan22_5b_distil", "wan22_5b_distil_fp8"])
def test_the_5b_is_planned_without_weights(name: str) -> None:
    """With one block of thirty. What shards divide they divide; other weights add up."""
    config = json.dumps(named_config("wan22_5b", wan22.CONFIGS) | {"num_layers": 1})

    def plan(*changes: str) -> DistillationPlan:
        data = read_recipe(shipped()[name], [f"model.config={config}", *changes])
        return plan_distillation(data, torch.device("cpu"), "test", weights=False)

    alone, long = plan(), plan("geometry.frames=48")
    owners = {
        "weights", "AdamW moments", "average", "float32 weights", "cache pages",
        "cross-attention K/V", "block inputs", "inside a block",
    }  # fmt: skip
    assert alone.memory.keys() == owners
    assert long.memory["block inputs"] == alone.memory["block inputs"] * 48 // 32
    assert long.memory["cache pages"] == 3 * alone.memory["cache pages"]
    section = alone.section.model_copy(update={"shards": 4})
    divided = replace(alone, section=section).memory
    for owner in ("weights", "AdamW moments", "average", "float32 weights"):
        assert divided[owner] == alone.memory[owner] // 4
    assert alone.memory["AdamW moments"] == 2 * alone.memory["float32 weights"]
    (less,) = alone.ways_to_fit(total(divided) + 1)
    assert less.startswith("4 ranks, --set train.shards=4: ")
    assert alone.ways_to_fit(1) == []


@pytest.mark.parametrize("steps", [4, 3, 2, 1])
def test_any_number_of_passes(steps: int, pipeline: Path) -> None:
    plan = planned(pipeline)
    distil = plan.distil.model_copy(update={"steps": (steps,)})
    objective = objective_of(replace(plan, distil=distil))
    drawn = {objective.simulation.passes(Batch(1, range(4 * n, 4 * n + 1), {}), "student")[1]
             for n in range(60)}  # fmt: skip
    assert drawn == set(range(1, steps + 1))


def test_only_first_frames_are_encoded(tmp_path: Path) -> None:
    pipeline = save_world_pipeline(tmp_path / "pipeline")
    data = read_recipe(shipped()["tiny_distil"], [*WORLD, *pipelines(pipeline)])
    plan = plan_distillation(data, torch.device("cpu"), "test")
    first, section = plan.dataset(), plan.section
    encoder, cpu = plan._encoder(), torch.device("cpu")
    whole = encoded_clips(section, plan.recipe.geometry, encoder, cpu)
    ours, theirs = (each.batch(section.seed, range(2)) for each in (first, whole))
    assert ours["latents"].shape[2] == 1 < theirs["latents"].shape[2]
    assert torch.allclose(ours["latents"], theirs["latents"][:, :, :1], atol=1e-5)
    assert torch.equal(ours["opens"], theirs["opens"])


def test_prompts_alone(pipeline: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    change = f"train.data.prompts={prompts}"
    alone = ["train.data.shots=1", "train.data.clips=null", "train.image=0", change]
    plan = planned(pipeline, *alone)
    assert "there are no prompts; write a text file" in refused(plan.check_clips)
    prompts.write_text("a red circle\na blue square\na green star\n")
    data = plan.dataset()
    seen = [data.batch(0, range(n, n + 1))["text"] for n in range(3)]
    assert all(not torch.equal(seen[0], other) for other in seen[1:])
    with open_training(plan, tmp_path / "run") as run:
        assert next(iter(run)).losses["critic"] > 0
    for changes, message in (
        (["train.image=0.2", *alone[:2], change], "prompts have no first frames; name clips"),
        (["train.image=0", change], "are instead of clips, and train.data.clips is about clips"),
    ):
        assert message in refused(planned, pipeline, *changes)
    other = read_recipe(shipped()["tiny_train"], [change, "train.data.clips=null",
                                                  "train.data.frames=null"])  # fmt: skip
    assert "a model trains on clips; name them" in refused(plan_training, other)


def test_equal_scores_leave_the_student_alone(pipeline: Path) -> None:
    """At first the critic is the real score, and so nothing but guidance moves the student."""
    given = batch(objective_of(planned(pipeline)))
    alone, guided = (objective_of(planned(pipeline, f"distil.guidance={g}")) for g in (1.0, 4.0))
    assert float(alone.loss(given).detach()) < 1e-10 < 1e-3 < float(guided.loss(given).detach())


def test_clips_depend_on_the_batch_and_the_purpose_alone(pipeline: Path) -> None:
    objective = objective_of(planned(pipeline))
    makes, given = objective.simulation, batch(objective)
    with torch.no_grad():
        first, again = (makes.clips(given, "a", makes.scene(given, "a")) for _ in range(2))
        other = makes.clips(given, "b", makes.scene(given, "b"))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.1


def test_every_pass_may_be_the_last(pipeline: Path) -> None:
    """Each number of passes, and each exit of it, is drawn equally often, once an update."""
    objective = objective_of(planned(pipeline, "distil.steps=[4,2]"))
    batches = (Batch(3, range(4 * update, 4 * update + 2), {}) for update in range(400))
    drawn = (objective.simulation.passes(each, "student") for each in batches)
    counts = [(schedule.steps, passes - 1) for schedule, passes in drawn]
    share = {pair: counts.count(pair) / 400 for pair in set(counts)}
    assert share.keys() == {(4, e) for e in range(4)} | {(2, e) for e in range(2)}
    assert all(abs(value - 1 / (2 * steps)) < 0.06 for (steps, _), value in share.items())
    calls = [Batch(3, range(index, index + 2), {}) for index in range(0, 64, 2)]
    drawn = (objective.simulation.passes(each, "student") for each in calls)
    counts = [(schedule.steps, passes) for schedule, passes in drawn]
    assert counts[::2] == counts[1::2] and len(set(counts)) > 3  # two calls an update


def scene(program: Program, chunks: int) -> Scene:
    geometry, generator = program.geometry, torch.Generator().manual_seed(1)
    frames = geometry.chunk * chunks
    size = (program.spec.channels, frames, *geometry.latent(program.spec))
    return Scene(
        torch.randn(geometry.batch, *size, generator=generator),
        torch.randn(geometry.batch, chunks, 12, 64, generator=generator),
        torch.arange(frames, dtype=torch.float64),
        [number in (0, 2) for number in range(chunks)],
    )


class Kept(Rollout):
    """Keeps what each pass made, and takes its gradients before its chunk's commit unless later."""

    def __init__(self, program: Program, module: Any, later: bool) -> None:
        super().__init__(program, module)
        self.later, self.made = later, list[Tensor]()

    def step(self, *given: Any) -> Tensor:
        self.made.append(super().step(*given))
        return self.made[-1]

    def commit(self, *given: Any) -> None:
        if not self.later:
            self.made[-1].square().sum().backward()
        super().commit(*given)


def test_a_cache_serves_one_clip_after_another(pipeline: Path) -> None:
    """What is in the pages before does not matter."""
    objective = objective_of(planned(pipeline, "geometry.window=6"))
    program, module = objective._program, objective.module
    runtime = TorchRuntime(program, module)
    schedule = Schedule.make(2)
    with torch.no_grad():
        for chunks in (5, 3):
            given = scene(program, chunks)
            made = simulate(RuntimeRollout(runtime), schedule, given, 2)
            assert torch.equal(made, simulate(Rollout(program, module), schedule, given, 2))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_past_the_window(recompute: bool, pipeline: Path) -> None:
    """Chunks that were evicted before the backward pass count as they did when they were read."""
    changes = ["geometry.window=6", "passes.lower.paged_attention=reference"]
    objective = objective_of(planned(pipeline, *changes))
    program, plain = objective._program, objective.module
    gradients = []
    for at_once in (True, False):
        student = plain
        if at_once and recompute:
            student = objective_of(planned(pipeline, *changes, "train.recompute=true")).module
        student.zero_grad()
        rollout = Kept(program, student, at_once)
        simulate(rollout, Schedule.make(1), scene(program, 6), 1)
        assert len(rollout.made) == 6 > program.geometry.pages
        last = rollout.made if at_once else rollout.made[-1:]  # no commit follows the last
        torch.cat(last).square().sum().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, ours in gradients[0].items():
        assert torch.allclose(ours, gradients[1][name], rtol=1e-3, atol=1e-5 * float(ours.max()))


def test_the_student_always_makes_all_passes(pipeline: Path) -> None:
    """Where it is to stop at the last."""
    objective = objective_of(planned(pipeline, "distil.steps=[4,2]", "distil.exit=last"))
    drawn = [objective.simulation.passes(Batch(1, range(4 * n, 4 * n + 1), {}), "student")
             for n in range(20)]  # fmt: skip
    assert {(schedule.steps, passes) for schedule, passes in drawn} == {(4, 4), (2, 2)}


def test_passes_of_two_runtimes(pipeline: Path) -> None:
    """Those with gradients are made by one, all else by the other, over one cache."""
    objective = objective_of(planned(pipeline))
    program, module = objective._program, objective.module
    graphed, eager = TorchRuntime(program, module), TorchRuntime(program, module)
    given, schedule = scene(program, 3), Schedule.make(2)
    made = []
    alone, both = partial(Rollout, program, module), partial(GraphedRollout, graphed, eager)
    for rollout in (alone, both, both):
        module.zero_grad()
        clip = simulate(rollout(), schedule, given, 2)
        clip.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        made.append({"clip": clip.detach(), **gradients})
    assert len(made[0]) > 1 and same(made[0], made[1]) and same(made[0], made[2])


def test_the_critic_leads(pipeline: Path, tmp_path: Path) -> None:
    """By the first of the student's updates it knows what the student makes."""
    losses = []
    for lead in (0, 2):
        changes = (f"distil.fake.lead={lead}", "train.warmup=2", "train.steps=1")
        folder = tmp_path / str(lead)
        with open_training(planned(pipeline, *changes), folder, dataset=Prompts()) as run:
            (first,) = run
        losses.append(first.loss)
        state = load_training_state(folder / "checkpoints" / "step_00000001")
        moments = state.critic.optimiser.items()
        assert {float(t) for name, t in moments if name.startswith("step.")} == {2 + lead}
    assert losses[0] == 0 < losses[1]  # both scores begin with the same weights


@pytest.mark.parametrize("lead", [0, 1])
def test_a_run_goes_on_bit_for_bit(lead: int, pipeline: Path, tmp_path: Path) -> None:
    plan = planned(pipeline, "train.image=0.5", f"distil.fake.lead={lead}")
    prompts = Prompts()
    with open_training(plan, tmp_path / "whole", dataset=prompts) as run:
        whole = list(run)
    with open_training(plan, tmp_path / "parts", dataset=prompts) as left:
        first = next(iter(left))
    with open_training(plan, tmp_path / "parts", dataset=prompts, resume=True) as other:
        rest = list(other)
    losses = [[(m.loss, m.losses["critic"], m.grad_norm) for m in each] for each in (whole, rest)]
    assert [(first.loss, first.losses["critic"], first.grad_norm), *losses[1]] == losses[0]
    assert same(run.trainer.weights, other.trainer.weights)
    assert same(run.trainer.ema, other.trainer.ema)
    ours, theirs = (
        load_training_state(tmp_path / name / "checkpoints" / "step_00000003")
        for name in ("whole", "parts")
    )
    assert same(dict(ours.critic.weights), dict(theirs.critic.weights)) and ours.critic.weights
    assert same(dict(ours.critic.optimiser), dict(theirs.critic.optimiser))
    assert same(dict(ours.optimiser), dict(theirs.optimiser))
    counters = [t for name, t in ours.critic.optimiser.items() if name.startswith("step.")]
    assert counters and all(counter == 6 + lead for counter in counters)

    path = other.export()
    assert path == tmp_path / "parts" / "lora.safetensors"
    ema = other.trainer.ema
    for name, change in load_adapter(path).changes.items():
        module = name.removesuffix(".weight")
        assert torch.equal(change.b, ema[f"{module}.lora_B.weight"])  # type: ignore[union-attr]
        assert change.b.any()  # type: ignore[union-attr]
    assert "critic" in (tmp_path / "parts" / "loss.svg").read_text()


def test_a_state_without_its_critic_is_refused(pipeline: Path, tmp_path: Path) -> None:
    plan, prompts = planned(pipeline), Prompts()
    with open_training(plan, tmp_path, dataset=prompts) as run:
        next(iter(run))
    states = tmp_path / "checkpoints"
    state = load_training_state(training_states(states)[-1])
    weights, moments = state.critic.weights, state.critic.optimiser
    first, many = next(iter(weights)), next(n for n in moments if n.startswith("step."))
    for critic, message in (
        (replace(state.critic, weights={}), f"critic_weights: {first} is missing"),
        (replace(state.critic, weights=dict(weights) | {"x": torch.ones(1)}), "x is one too many"),
        (
            replace(state.critic, optimiser=dict(moments) | {many: torch.tensor(3.0)}),
            f"critic_optimiser: {many} has values that no run gives",
        ),
    ):
        save_training_state(states, replace(state, critic=critic), keep=1)

        def resumed() -> None:
            with open_training(plan, tmp_path, dataset=prompts, resume=True):
                pass

        assert message in refused(resumed)


@pytest.mark.parametrize("name", ADAPTERS.values())
def test_an_adapter_is_what_was_trained(name: str, distilled: Path) -> None:
    own = load_file(distilled / "own.safetensors")
    changes = load_adapter(distilled / name).changes
    assert {f"{n.removesuffix('.weight')}.lora_{x}.weight" for n in changes for x in "AB"} == (
        own.keys()
    )
    for parameter, change in changes.items():
        module = parameter.removesuffix(".weight")
        assert isinstance(change, LowRank) and change.scale == 1
        assert torch.equal(change.a, own[f"{module}.lora_A.weight"])
        assert torch.equal(change.b, own[f"{module}.lora_B.weight"]) and change.b.any()


def test_longlives_layout(distilled: Path) -> None:
    """The names are those that LongLive's own code has for a model of as many blocks."""
    found = torch.load(distilled / "lora.pt", weights_only=True)
    assert found.keys() == {"generator_lora"}
    with safe_open(RECORDED / "dmd_step_t2v.safetensors", "pt") as file:
        names = {key.removeprefix("student_lora.") for key in file.keys()}  # noqa: SIM118
    assert found["generator_lora"].keys() == {n for n in names if n.startswith("base_model.")}


def test_peft_loads_it(distilled: Path) -> None:
    model = wan22.build(TRANSFORMER)
    own = load_file(distilled / "own.safetensors")
    theirs = PeftModel.from_pretrained(model, str(distilled / "lora")).state_dict()
    loaded = {
        key.removeprefix("base_model.model.").replace(".default", ""): value
        for key, value in theirs.items()
        if ".lora_" in key
    }
    assert same(loaded, own)


@pytest.mark.parametrize("passes", ["cached_step, commit", "cached_step, commit, nvfp4_infer"])
def test_it_is_merged_alike_from_every_layout(passes: str, pipeline: Path, distilled: Path) -> None:
    """Into weights in float32, and into those that are packed in NVFP4."""
    steps = "canonicalise, per_frame_timesteps, frame_positions, hoist_text"
    made = []
    for name in (None, *ADAPTERS.values()):
        lora = "null" if name is None else str(distilled / name)
        changes = (f"passes=[{steps}, {passes}]", f"model.lora={lora}")
        weights = f"model.checkpoint={pipeline}"
        made.append(transform(open_recipe("tiny_stream", [*SIZES, weights, *changes])).weights)
    plain, *merged = map(dict, made)
    assert all(same(each, merged[0]) for each in merged) and not same(plain, merged[0])


def test_a_run_goes_on_from_an_adapter(pipeline: Path, distilled: Path) -> None:
    """The student begins with it; the scores are without."""
    lora = f"model.lora={distilled / 'lora.pt'}"
    plan, own = planned(pipeline, lora), load_file(distilled / "own.safetensors")
    assert same({name: plan.program.weights[name] for name in own}, own)
    assert not any(plan.fake.weights[name].any() for name in own if "lora_B" in name)
    for other in ("passes.lora.include='.*to_q'", "passes.lora.rank=3"):
        assert "remove that (model.lora_strength" in refused(planned, pipeline, lora, other)


@pytest.mark.parametrize("network", ["_real", "fake"])
def test_what_is_not_finite_is_named(network: str, pipeline: Path, tmp_path: Path) -> None:
    with open_training(planned(pipeline), tmp_path, dataset=Prompts()) as run:
        objective = run.objective
        assert isinstance(objective, Distillation)
        critic = objective.critic.objective
        owner, name = (objective, "_real") if network == "_real" else (critic, "score")
        score = getattr(owner, name)

        def broken(*given: Any) -> Tensor:
            velocity: Tensor = score(*given)
            velocity[:, :, 3] = torch.nan
            return velocity

        setattr(owner, name, broken)
        with pytest.raises(Diverged, match=f"first not finite: the {network[-4:]} score, chunk 1"):
            next(iter(run))


def test_a_critic_that_is_not_finite_is_named(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's update, of two calls, is done by then."""
    with open_training(planned(pipeline), tmp_path, dataset=Prompts()) as run:
        assert isinstance(run.objective, Distillation)
        critic, calls = run.objective._fake, 0
        score = critic.score

        def broken(*given: Any) -> Tensor:
            nonlocal calls
            calls += 1
            velocity: Tensor = score(*given)
            return velocity if calls <= 2 else velocity * torch.nan

        monkeypatch.setattr(critic, "score", broken)
        told = r"step 1, the critic: .* the fake score, chunk 0; .* lower distil.fake.lr"
        with pytest.raises(Diverged, match=told):
            next(iter(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distil.steps=[0]"], "distil.steps: [0] are not different numbers of passes, from 1 to"),
        (["distil.steps=[1001]"], "distil.steps: [1001] are not"),
        (["distil.steps=[2,2]"], "distil.steps: [2, 2] are not different numbers"),
        (["distil.stepps=[2]"], "unknown key 'stepps'; did you mean 'steps'?"),
        (["train.gap=3.0"], "test: train.gap: is not for distillation; remove it"),
        (["train.data.frames=12"], "test: train.data.frames: a clip has geometry.frames"),
        (["stream.shot_offset=8.0"], "clips of a call have cuts at different chunks, which "),
        (["geometry.window=6", "geometry.frames=10"], "which geometry.shot_sink has act on"),
        (
            ["train.adapter=longlive", "passes.lora.alpha=8"],
            "longlive means a scale of 1, and lora has alpha 8 of rank 4; set passes.lora.alpha=4",
        ),
        (["train.graphs=true", "train.shards=2", "train.batch=2"], "train.graphs: ranks exchange"),
        (["train.batch=3"], "train.batch: 3 clips a step are not a multiple of the 2"),
        (["distil.fake.passes=[canonicalise, block_causal]"], "passes: no adapters train; add"),
    ],
)
def test_refusals(changes: list[str], message: str, pipeline: Path) -> None:
    assert message in refused(planned, pipeline, *changes)


def test_other_networks_are_refused(pipeline: Path, tmp_path: Path) -> None:
    config = tiny_config(layers=3, text_dim=64, attention_head_dim=16)
    folder = tmp_path / "transformer"
    save_checkpoint(folder, wan22.build(config).state_dict(), "diffusers", config)
    message = refused(planned, pipeline, f"distil.real.weights={folder}")
    assert message.startswith("test: distil.real.weights:") and "num_layers" in message


def test_the_weights_of_all_networks_are_told(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    copytree(pipeline / "transformer", folder)
    plan = planned(pipeline, f"distil.real.weights={folder}")
    student = plan.recipe.model.checkpoint
    assert plan.origin == (f"{student} (student), {folder} (real score), {student} (fake score)")


def test_the_command(run: Run, tmp_path: Path) -> None:
    changes = [*WORLD, *pipelines(save_world_pipeline(tmp_path / "pipeline"))]
    options = [part for change in changes for part in ("--set", change)]
    code, out, err = run("distil", "tiny_distil", *options, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["fits"]["as_is"] and plan["memory"]["weights"] > plan["memory"]["average"] > 0
    folder = tmp_path / "run"
    code, out, err = run("distil", "tiny_distil", *options, "-o", folder, "--json")
    assert code == 0, err
    assert json.loads(out) == {"steps": 2, "weights": str(folder / "lora.safetensors")}
    assert (folder / "samples" / "step_00000002" / "samples.mp4").stat().st_size > 1000
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["losses"]["critic"] > 0 for line in lines)
    for command, recipe_, hint in (
        ("train", "tiny_distil", "use lltk distil"),
        ("distil", "tiny_train", "has no distil section"),
    ):
        code, _, err = run(command, recipe_, "-o", tmp_path / "other")
        assert code == 2 and hint in " ".join(err.split())
