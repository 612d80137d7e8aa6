"""Objectives: the noise grid, the loss and what it is divided by, and where a forward goes bad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import captured, clips, inputs, instantiate, make_recipe, refused, runnable
from torch import Tensor, nn

from lltk.graph.diagnose import first_bad_module
from lltk.graph.geometry import Kind
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.parallel.mesh import ALONE
from lltk.train.data import Batch, Batches, Kept, first_samples, generator_at
from lltk.train.error_recycling import ErrorRecycling, without_errors
from lltk.train.flow_matching import FlowMatching
from lltk.train.noise_levels import level_weights, noise_grid
from lltk.train.recipe import ErrorRecyclingSection, VaeSection
from lltk.train.vae import Reconstruction, decode, latent_statistics, roughness

pytestmark = pytest.mark.cpu


@cache
def program_of(kind: Kind, dtype: str = "float32") -> tuple[Program, ProgramModule]:
    """A program of two clips a call; shared, so not to be changed."""
    return runnable(make_recipe(kind, batch=2, dtype=dtype))


class Recorder(ProgramModule):
    """Stands in for a module: notes its inputs and answers with a fixed flow."""

    def __init__(self, flow: Tensor) -> None:
        nn.Module.__init__(self)
        self.flow = nn.Parameter(flow)
        self.given: dict[str, Tensor] = {}

    def forward(self, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.graph, self.given = graph, given
        return {"sample": self.flow}

    def quantised_weights(self) -> dict[str, Tensor]:
        return {}


def recorded(
    kind: Kind, *, seed: int = 7, more: Mapping[str, Tensor] | None = None, **options: float
) -> tuple[Recorder, Batch, Tensor]:
    """A module's inputs, the batch, and the loss where it answers 0; options are `FlowMatching`'s.

    Args:
        kind: of the program.
        seed: of the noise.
        more: tensors of the batch.
        options: of the objective.
    """
    program, _ = program_of(kind)
    batch = replace(clips(program, **(more or {})), seed=seed)
    module = Recorder(torch.zeros_like(batch.tensors["latents"]))
    loss = FlowMatching(program, module, **options).loss(batch).detach()
    return module, batch, loss


def test_grid_and_weights_are_longlives() -> None:
    grid = noise_grid()
    assert grid.dtype == torch.float32 and len(grid) == 1000
    ends = torch.tensor([1000.0, 999.80, 999.60, 9.92, 4.98])
    assert torch.allclose(grid[[0, 1, 2, -2, -1]], ends, atol=5e-3)
    assert grid.mean() == pytest.approx(748, abs=0.5)
    assert grid.median() == pytest.approx(833, abs=0.5)
    assert (grid > 500).float().mean() == pytest.approx(0.83, abs=5e-3)
    assert (grid > 900).float().mean() == pytest.approx(0.36, abs=5e-3)
    weights = level_weights(grid)
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    assert weights[0] == 0
    assert weights.max() == pytest.approx(2.076, abs=1e-3)

    def weight(timestep: float) -> float:
        return float(weights[(grid - timestep).abs().argmin()])

    wanted = {978: 0.14, 937.5: 0.40, 833: 1.02, 625: 1.91, 500: 2.076, 4.98: 0.032}
    for timestep, value in wanted.items():
        assert weight(timestep) == pytest.approx(value, abs=0.01), timestep
    assert level_weights(noise_grid(shift=1.0)).max() != pytest.approx(2.076, abs=1e-2)


def test_levels_are_one_a_chunk_or_one_a_clip() -> None:
    grid = noise_grid()
    for kind, levels in (("train", 3), ("reference", 1), ("score", 1)):
        module, _, _ = recorded(kind)
        timestep = module.given["timestep"]
        assert timestep.dtype == torch.float32
        assert torch.isin(timestep, grid).all()
        assert module.graph == kind
        runs = [len(row.unique_consecutive()) for row in timestep]
        assert runs == [levels, levels]
        chunk = 6 // levels
        assert all(len(part.unique()) == 1 for row in timestep for part in row.split(chunk))
        assert not torch.equal(timestep[0], timestep[1])


def test_a_score_has_levels_as_in_distillation() -> None:
    """One a chunk where the first frame is given; the first chunk's is that without it."""
    timestep = recorded("score", image=1.0)[0].given["timestep"]
    plain = recorded("score")[0].given["timestep"]
    assert not timestep[:, 0].any() and torch.equal(timestep[:, 1], plain[:, 1])
    assert [len(row[1:].unique_consecutive()) for row in timestep] == [3, 3]


def test_noised_latents_and_loss_by_hand() -> None:
    """From the module's inputs alone: ε follows from x_s, so loss = Σ w(t)·mean (ε − x₀)²."""
    module, batch, loss = recorded("train")
    clean, grid = batch.tensors["latents"], noise_grid()
    assert torch.equal(module.given["clean"], clean)
    sigma = (module.given["timestep"].double() / 1000)[:, None, :, None, None]
    noise = (module.given["noisy"].double() - (1 - sigma) * clean) / sigma
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    weights = level_weights(grid)
    total = 0.0
    for clip in range(2):
        for frame in range(6):
            index = int((grid == module.given["timestep"][clip, frame]).nonzero())
            flow = noise[clip, :, frame] - clean[clip, :, frame]
            total += float(weights[index] * flow.square().mean())
    assert float(loss) == pytest.approx(total, rel=1e-4)
    assert total > 1


def test_noise_and_levels_follow_from_seed_and_sample() -> None:
    program, _ = program_of("train")
    batch = clips(program)
    alone = Batch(7, range(1, 2), {name: t[1:] for name, t in batch.tensors.items()})
    other = replace(batch, seed=8)
    both, one, unlike = (
        [b.normal("noise", 4), b.integers("level", 1000, 3).float()] for b in (batch, alone, other)
    )
    assert all(torch.equal(x[1:], y) for x, y in zip(both, one, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(both, unlike, strict=True))
    assert torch.equal(torch.rand(3, generator=generator_at(1, "a", 2)),
                       torch.rand(3, generator=generator_at(1, "a", 2)))  # fmt: skip


def test_padding_counts_neither_in_the_loss_nor_in_its_divisor() -> None:
    program, _ = program_of("train")
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    module, batch, loss = recorded("train", more={"valid": valid})
    objective = FlowMatching(program, module)
    assert objective.count(batch) == 10
    assert objective.count(clips(program)) == 12
    batch.tensors["latents"][1, :, 4:] += 100
    assert float(objective.loss(batch).detach()) == pytest.approx(float(loss), rel=1e-6)
    batch.tensors["latents"][1, :, 3] += 100
    assert float(objective.loss(batch).detach()) > 2 * float(loss)


def test_a_given_first_frame_is_clean_and_uncounted() -> None:
    program, _ = program_of("train")
    plain, _, _ = recorded("train")
    module, batch, loss = recorded("train", image=1.0)
    assert torch.equal(module.given["noisy"][:, :, 0], batch.tensors["latents"][:, :, 0])
    assert not module.given["timestep"][:, 0].any()
    for name in ("noisy", "timestep"):
        axis = {"noisy": 2, "timestep": 1}[name]
        ours, theirs = (m.given[name].narrow(axis, 1, 5) for m in (module, plain))
        assert torch.equal(ours, theirs)
    objective = FlowMatching(program, module, image=1.0)
    assert objective.count(batch) == 10
    module.flow.data[:, :, 0] = 1e6
    assert torch.equal(objective.loss(batch), loss)
    module.flow.data[:, :, 1] = 1e6
    assert not torch.equal(objective.loss(batch), loss)


def test_context_noise_is_in_the_clean_chunks_alone() -> None:
    """Each chunk has one level, at most the largest. A clip is multiplied by (1 − level)."""
    plain, batch, loss = recorded("train")
    module, _, noised_loss = recorded("train", context_noise=0.3)
    assert torch.equal(plain.given["clean"], batch.tensors["latents"])
    assert not torch.equal(module.given["clean"], plain.given["clean"])
    for name in module.given.keys() - {"clean"}:
        assert torch.equal(module.given[name], plain.given[name]), name
    assert torch.equal(noised_loss, loss)
    flat = {"latents": torch.full_like(batch.tensors["latents"], 1000.0)}
    levels, spread = [], []
    for seed in range(20):
        module, _, _ = recorded("train", seed=seed, more=flat, context_noise=0.3)
        context = module.given["clean"].transpose(1, 2).unflatten(1, (3, 2)).flatten(3)
        frames = 1 - context.mean(-1) / 1000
        assert torch.allclose(frames[..., 0], frames[..., 1], atol=1e-3)
        levels.append(frames.mean(-1).flatten())
        spread.append(context.std(-1).mean(-1).flatten())
    level = torch.cat(levels)
    assert level.min() < 0.03 and 0.27 < level.max() < 0.301
    assert level.mean() == pytest.approx(0.15, abs=0.02)
    assert torch.allclose(torch.cat(spread), level, atol=0.1)


def test_errors_of_earlier_steps_are_recycled() -> None:
    """In the clean chunks and in what is noised; the target has the clips and the noise given."""
    program, _ = program_of("train")
    plain, batch, _ = recorded("train")
    clean = batch.tensors["latents"]
    module = Recorder(torch.full_like(clean, 0.5))
    every = ErrorRecyclingSection(clean=0, latent=1, noise=1, context=1, buckets=1)
    objective = FlowMatching(program, module, error_recycling=every)
    memory = objective.memory
    assert memory is not None
    objective.loss(batch)
    assert all(torch.equal(module.given[name], plain.given[name]) for name in plain.given)
    assert not memory.state()
    memory.end_step(ALONE)
    sigma = (module.given["timestep"] / 1000)[:, None, :, None, None]
    noise = batch.normal("noise", *clean.shape[1:])
    kept = {kind: recycled_chunks(memory, kind) for kind in ("latent", "noise")}
    wanted = {"latent": sigma * (noise - clean - 0.5), "noise": (1 - sigma) * (0.5 - noise + clean)}
    for kind, errors in wanted.items():
        assert torch.allclose(kept[kind], errors, atol=1e-5)
    loss = objective.loss(batch).detach()
    assert not torch.allclose(module.given["clean"], clean, atol=0.1)
    given = memory.inject(
        batch,
        without_errors(
            clean,
            noise,
            batch.integers("level", 1000, 3),
            module.given["timestep"] / 1000,
            torch.ones(2, 6, dtype=torch.bool),
        ),
    )
    assert torch.equal(module.given["clean"], given.context)
    assert torch.allclose(module.given["noisy"], given.noisy, atol=1e-6)
    weight = level_weights(noise_grid())[batch.integers("level", 1000, 3)].repeat_interleave(2, 1)
    error = (0.5 - (given.noise - clean)).square().mean((1, 3, 4))
    assert float(loss) == pytest.approx(float((weight * error).sum()), rel=1e-5)
    with torch.no_grad():
        objective.loss(batch)
    assert torch.equal(module.given["clean"], clean)


def recycled_chunks(memory: ErrorRecycling, kind: str) -> Tensor:
    """All errors of a kind that were kept, [2, C, 6, h, w], in the order of clips and chunks."""
    errors = [error for name, error in memory.state().items() if name.startswith(kind)]
    return torch.stack(errors).unflatten(0, (2, 3)).movedim(1, 2).flatten(2, 3)


def test_a_given_frame_carries_no_recycled_error() -> None:
    program, _ = program_of("train")
    _, batch, _ = recorded("train")
    clean = batch.tensors["latents"]
    module = Recorder(torch.full_like(clean, 0.5))
    every = ErrorRecyclingSection(clean=0, latent=1, noise=1, context=1, buckets=1)
    objective = FlowMatching(program, module, image=1.0, error_recycling=every)
    for _ in range(2):
        objective.loss(batch)
        assert objective.memory is not None
        objective.memory.end_step(ALONE)
    for name in ("clean", "noisy"):
        assert torch.equal(module.given[name][:, :, 0], clean[:, :, 0])
    assert not torch.allclose(module.given["clean"][:, :, 1], clean[:, :, 1], atol=0.1)


LONG = 5
"""Chunks of clips of which a sample shows three."""


def numbered(seed: int, **options: float) -> tuple[list[int], Recorder]:
    """Which chunks of long clips a sample shows, and the inputs; options are `FlowMatching`'s.

    A chunk's latents and its text are its number. Latents and text must be of the same chunks;
    only errors may change the latents.
    """
    program, _ = program_of("train")
    short = clips(program)
    number = torch.arange(LONG).float()
    *shape, _, height, width = short.tensors["latents"].shape
    latents = number.repeat_interleave(2)[:, None, None].expand(*shape, -1, height, width)
    text = number[:, None, None].expand(2, -1, *short.tensors["text"].shape[2:]).contiguous()
    more = {"latents": latents, "text": text, "opens": torch.zeros(2, LONG, dtype=torch.bool)}
    batch = replace(short, seed=seed, tensors=more)
    module = Recorder(torch.zeros_like(short.tensors["latents"]))
    FlowMatching(program, module, **options).loss(batch)
    seen = module.given["encoder_hidden_states"][0, :, 0, 0]
    shown = module.given["clean"][:, 0, ::2, 0, 0]
    assert "context_error" in options or torch.equal(shown, seen.expand(2, -1))
    return [int(value) for value in seen], module


def test_an_excerpt_is_single_chunks_and_then_consecutive_ones() -> None:
    found = {tuple(numbered(seed)[0]) for seed in range(200)}
    begun = {seen for seen in found if seen[0] == 0 and all(a < b for a, b in pairwise(seen))}
    assert found == begun
    one = {(0, at, at + 1) for at in range(1, LONG - 1)}
    two = {(0, first, last) for last in range(2, LONG) for first in range(1, last)}
    assert found == one | two | {(0, 1, 2)}


def test_leaps_are_longer_in_positions_by_whole_frames() -> None:
    lengths = []
    for seed in range(100):
        (seen, plain), (_, module) = numbered(seed), numbered(seed, gap=4096.0)
        own, longer = (m.given["positions"] for m in (plain, module))
        assert own.dtype == torch.float64
        assert own.tolist() == [2 * chunk + frame for chunk in seen for frame in range(2)]
        assert torch.equal(longer, longer.floor()) and longer[0] == 0
        extra = (longer - own).diff()
        leaps = torch.tensor(seen).diff() > 1
        assert not extra[[0, 2, 4]].any()
        assert not extra[[1, 3]][~leaps].any()
        lengths += extra[[1, 3]][leaps].tolist()
        for name in module.given.keys() - {"positions"}:
            assert torch.equal(module.given[name], plain.given[name]), name
    assert min(lengths) == 0 and 256 < max(lengths) < 4096


def test_clips_that_do_not_fit_are_refused() -> None:
    program, module = program_of("train")
    batch = clips(program)
    short = batch.tensors["latents"][:, :, :4]
    objective = FlowMatching(program, module)
    message = refused(objective.loss, replace(batch, tensors={**batch.tensors, "latents": short}))
    assert message.startswith("clips of 4 latent frames: the program is for 6, in chunks of 2")


def test_context_errors_are_those_of_the_models_prediction() -> None:
    """With a flow of 0 the model predicts x_s itself, so its error is x_s − x₀."""
    opens = torch.tensor([[True, False, False], [True, False, True]])
    plain, batch, loss = recorded("train", more={"opens": opens})
    clean, sizes = batch.tensors["latents"], []
    for seed in range(30):
        module, _, _ = recorded("train", seed=seed, more={"opens": opens}, context_error=0.5)
        change = module.given["clean"] - clean
        size = (change / (module.given["noisy"] - clean)).mean((1, 3, 4))
        error = (module.given["noisy"] - clean) * size[:, None, :, None, None]
        assert torch.allclose(change, error, atol=1e-4)
        per_chunk = size.unflatten(1, (3, 2))
        assert torch.allclose(per_chunk[..., 0], per_chunk[..., 1], atol=1e-4)
        assert not per_chunk[opens].any()
        sizes += per_chunk[..., 0][~opens].tolist()
    assert max(sizes) == pytest.approx(2, abs=0.1) and min(sizes) >= 0
    assert sum(size > 0 for size in sizes) / len(sizes) == pytest.approx(0.5, abs=0.12)
    module, _, own = recorded("train", more={"opens": opens}, context_error=0.5)
    assert torch.equal(own, loss)
    for name in module.given.keys() - {"clean"}:
        assert torch.equal(module.given[name], plain.given[name]), name


def test_context_errors_spare_what_follows_a_leap() -> None:
    """Latents are whole numbers, and with an error they are not."""
    spared = 0
    for seed in range(20):
        seen, module = numbered(seed, context_error=1.0)
        changed = module.given["clean"][:, 0, ::2, 0, 0] != torch.tensor(seen)
        follows = [True, *(after == before + 1 for before, after in pairwise(seen))]
        assert changed.tolist() == [follows, follows], seen
        spared += follows.count(False)
    assert spared >= 5


def test_context_errors_follow_the_flow() -> None:
    """A model that is right, whose flow is ε − x₀, makes no errors."""
    program, _ = program_of("train")
    plain, batch, _ = recorded("train", more={"opens": torch.zeros(2, 3, dtype=torch.bool)})
    clean = batch.tensors["latents"]
    sigma = (plain.given["timestep"] / 1000)[:, None, :, None, None]
    right = (plain.given["noisy"] - clean) / sigma
    for flow, same in ((right, True), (right + 1, False)):
        module = Recorder(flow)
        FlowMatching(program, module, context_error=1.0).loss(batch)
        assert torch.allclose(module.given["clean"], clean, atol=1e-4) is same


@pytest.mark.parametrize("option", ["context_error", "context_noise"])
def test_a_reference_has_no_context(option: str) -> None:
    program, module = program_of("reference")
    assert "sees no clean chunks" in refused(FlowMatching, program, module, **{option: 0.5})


@pytest.mark.parametrize("kind", ["train", "reference"])
def test_gradients_reach_every_parameter(kind: Kind) -> None:
    program, module = program_of(kind)
    FlowMatching(program, module).loss(clips(program)).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    assert all(bool(g.any()) for g in gradients.values() if g is not None)


@pytest.mark.parametrize("kind", ["train", "reference"])
def test_graphs_flow_is_what_the_loss_sees(kind: Kind) -> None:
    """The loss of the real module is that of a module that answers with the graph's own output."""
    program, module = program_of(kind)
    batch = clips(program)
    noted = Recorder(torch.zeros_like(batch.tensors["latents"]))
    FlowMatching(program, noted).loss(batch)
    with torch.no_grad():
        flow = module(kind, noted.given)["sample"]
        loss = FlowMatching(program, module).loss(batch)
        answering = FlowMatching(program, Recorder(flow)).loss(batch)
        off = FlowMatching(program, Recorder(flow * 1.01)).loss(batch)
    assert torch.equal(loss, answering)
    assert not torch.equal(loss, off)


def test_low_precision_programs_have_a_float32_loss() -> None:
    program, module = program_of("train", "bfloat16")
    objective = FlowMatching(program, module)
    low, high = objective.loss(clips(program)), FlowMatching(*program_of("train")).loss
    assert low.dtype == torch.float32
    assert float(low.detach()) == pytest.approx(float(high(clips(program)).detach()), rel=0.02)


def test_other_programs_have_no_objective() -> None:
    message = refused(FlowMatching, captured("stream", layers=1), nn.Module())
    assert message.endswith("set the recipe's program to train, reference or score")


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        ("blocks.1.attn1.norm_q.weight", "parameter blocks.1.attn1.norm_q.weight"),
        ("proj_out.bias", "parameter proj_out.bias"),
        (None, None),
    ],
)
def test_bad_parameters_are_named(spoil: str | None, where: str | None) -> None:
    program, module = runnable(make_recipe("train", batch=2))
    if spoil is not None:
        module.get_parameter(spoil).data[0] = torch.nan
    assert FlowMatching(program, module).first_bad(clips(program)) == where


def test_a_module_that_overflows_is_named() -> None:
    program, module = runnable(make_recipe("train", batch=2))
    module.get_parameter("blocks.1.ffn.net.0.proj.weight").data.fill_(1e38)
    where = FlowMatching(program, module).first_bad(clips(program))
    assert where is not None and where.endswith("(blocks.1.ffn.net.0.proj)")


def test_bad_inputs_are_named() -> None:
    program, module = program_of("train")
    batch = clips(program)
    batch.tensors["text"][0, 0, 0, 0] = torch.inf
    found = FlowMatching(program, module).first_bad(batch)
    assert found == "input encoder_hidden_states"


def test_bad_submodules_are_named_by_hooks() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    given = torch.ones(1, 2)
    assert first_bad_module(model, lambda: model(given)) is None
    model[1][1].weight.data.fill_(3e38)
    model[0].weight.data.fill_(1.0)
    assert first_bad_module(model, lambda: model(given)) == "1.1"
    model[0].bias.data.fill_(torch.nan)
    assert first_bad_module(model, lambda: model(given)) == "parameter 0.bias"


TINY_VAE: Mapping[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def tiny_vae() -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(**TINY_VAE)


def videos(clips: int = 2, frames: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(clips, 3, frames, 32, 32, generator=generator) * 2 - 1


def test_roughness_by_hand() -> None:
    rows = torch.arange(8.0)[:, None].expand(8, 8)
    difference = torch.stack([torch.ones(8, 8), rows])[:, None, None]
    flat, steep = roughness(difference, edges=0.5)
    assert flat == pytest.approx(1)
    slopes = (1 + 2 + 4) / 3
    assert steep == pytest.approx(3.5 + 0.5 * slopes)


def test_decode_is_the_models_own_but_for_the_cut_off() -> None:
    vae = tiny_vae()
    latents = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = decode(vae, latents * 20), vae.decode(latents * 20).sample
    assert ours.shape == (1, 3, 9, 32, 32)
    assert torch.equal(ours.clamp(-1, 1), theirs)
    assert not torch.equal(decode(vae, latents).clamp(-1, 1), theirs)


def test_reconstruction_trains_every_parameter() -> None:
    objective = Reconstruction(tiny_vae(), VaeSection(config=dict(TINY_VAE), frames=5, kl=0.1))
    batch = Batch(0, range(2), {"video": videos()})
    assert objective.count(batch) == 2
    loss = objective.loss(batch)
    assert loss.shape == () and torch.equal(loss, objective.loss(batch))
    assert not torch.equal(loss, objective.loss(replace(batch, seed=1)))
    loss.backward()
    idle = [n for n, p in objective.module.named_parameters() if p.grad is None]
    assert not idle
    batch.tensors["video"][0, 0, 0, 0, 0] = torch.nan
    assert objective.first_bad(batch) == "input video"


def test_the_divergence_is_that_of_the_posterior() -> None:
    vae, batch = tiny_vae(), Batch(0, range(2), {"video": videos()})
    heavy, none = (
        Reconstruction(vae, VaeSection(config={}, frames=5, kl=kl)).loss(batch) for kl in (1.0, 0.0)
    )
    posterior = vae.encode(batch.tensors["video"]).latent_dist
    normal = torch.distributions.Normal(0.0, 1.0)
    own = torch.distributions.Normal(posterior.mean, posterior.std)
    wanted = torch.distributions.kl_divergence(own, normal).mean() * 2
    assert float((heavy - none).detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)


def test_latent_statistics_normalise() -> None:
    vae = tiny_vae()
    batches = [videos(), videos(1, 9)]
    mean, std = latent_statistics(vae, batches)
    with torch.no_grad():
        latents = [vae.encode(video).latent_dist.mean for video in batches]
    flat = torch.cat([each.transpose(0, 1).flatten(1) for each in latents], 1)
    shape = (-1, 1)
    normal = (flat - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    assert torch.allclose(normal.mean(1), torch.zeros(4), atol=1e-4)
    assert torch.allclose(normal.std(1), torch.ones(4), atol=1e-4)


def test_clips_that_are_no_whole_latents_are_refused() -> None:
    assert "the nearest that fit: 5 and 9" in refused(VaeSection, config={}, frames=7)


class Counting:
    """Sample i is the number i."""

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        return {"index": torch.tensor(list(indices))}


def test_batches_go_on_from_a_position() -> None:
    data = Batches(Counting(), seed=3, size=4)
    first, second = next(data), next(data)
    assert first.tensors["index"].tolist() == [0, 1, 2, 3]
    assert second.indices == range(4, 8) and data.position == 8
    again = Batches(Counting(), seed=3, size=4)
    again.position = 4
    assert next(again).tensors["index"].tolist() == second.tensors["index"].tolist()


def test_kept_samples_are_the_datasets_first() -> None:
    made: list[range] = []

    class Noting(Counting):
        def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
            made.append(indices)
            return {"index": super().batch(seed, indices)["index"] + 1000 * seed}

    kept = Kept(Noting(), 3, first_samples(Noting(), 3, 70))
    assert made == [range(64), range(64, 70)]
    drawn = kept.batch(3, range(1000))["index"]
    assert set(drawn.tolist()) == set(range(3000, 3070))
    assert torch.equal(kept.batch(3, range(10, 13))["index"], drawn[10:13])
    assert len(made) == 2
    assert kept.batch(~3, range(2))["index"].tolist() == [-4000, -3999]
    assert made[2:] == [range(2)]


def test_inputs_are_the_contracts() -> None:
    """What the objective feeds is what the graph declares, in names, shapes and dtypes."""
    for kind in ("train", "reference"):
        module, _, _ = recorded(kind)
        program, _ = program_of(kind)
        declared = inputs(program, kind)
        assert module.given.keys() == declared.keys()
        for name, value in declared.items():
            assert (module.given[name].shape, module.given[name].dtype) == (
                value.shape,
                value.dtype,
            )
        assert torch.equal(module.given["positions"], declared["positions"])


def test_instantiated_copies_do_not_share_gradients() -> None:
    program, module = program_of("train")
    twin = instantiate(program)
    FlowMatching(program, twin).loss(clips(program)).backward()
    assert all(p.grad is None for p in module.parameters())
