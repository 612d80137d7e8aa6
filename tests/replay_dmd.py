"""Replay recorded updates of LongLive-2.0's distillation: student and critic, by what is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from lltk.graph.facts import Trainable
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program
from lltk.models.layouts import LORA_LAYOUTS, WEIGHT_LAYOUTS
from lltk.stream.positions import frame_positions
from lltk.stream.rollout import Rollout
from lltk.stream.sampler import Schedule
from lltk.train.distribution_matching import (
    Noised,
    Score,
    Scores,
    critic_loss,
    direction,
    student_loss,
)
from lltk.train.noise_levels import score_levels
from lltk.train.simulation import Scene, simulate

Data = Mapping[str, Tensor]
Make = Callable[[str, bool, Data], Program]
"""A Program by its kind, with adapters or not, over weights under lltk's names."""


NOTHING = Trainable(frozenset())


class Recorder(Rollout):
    """Keeps what each pass of each chunk is given."""

    def __init__(self, program: Program, module: ProgramModule) -> None:
        super().__init__(program, module)
        self.given: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def step(self, latents: Tensor, timestep: Tensor, positions: Tensor, index: int = 0) -> Tensor:
        self.given.setdefault(index, []).append((latents.detach(), timestep))
        return super().step(latents, timestep, positions, index)

    def recorded(self) -> dict[str, Tensor]:
        passes = [self.given[index] for index in sorted(self.given)]
        return {
            "rollout.x": torch.stack([torch.cat([x for x, _ in p], dim=2) for p in passes]),
            "rollout.t": torch.stack([torch.cat([t for _, t in p], dim=1) for p in passes]),
        }


@dataclass
class Networks:
    """The three networks of a file, and under which names it has their gradients."""

    student: tuple[Program, ProgramModule]
    real: Score
    fake: Score
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, data: Data, weights: Data, make: Make) -> Networks:
        def network(kind: str, part: str, lora: str | None) -> tuple[Program, ProgramModule]:
            prefix = f"{part}."
            base = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
            names = WEIGHT_LAYOUTS["wan"].read(base, part)
            own = {names[key]: value.float() for key, value in base.items()}
            if lora is not None:
                pairs = {
                    n.removeprefix(f"{lora}."): t for n, t in data.items() if n.startswith(lora)
                }
                read = LORA_LAYOUTS["longlive"].read(pairs, lora)
                own |= {read[key]: value.float() for key, value in pairs.items()}
            program = make(kind, lora is not None, own)
            if lora is None:
                program = replace(program, facts=program.facts | {Trainable: NOTHING})
            return program, instantiate(program)

        fake = network("score", "fake", "critic_lora")
        trained = fake[0].fact(Trainable).names or ()
        return cls(
            network("stream", "student", "student_lora"),
            Score(*network("score", "real", None)),
            Score(*fake),
            LORA_LAYOUTS["longlive"].write(trained, "adapters"),
        )


def scene_of(meta: Mapping[str, Any], data: Data, phi: float) -> Scene:
    chunk = meta["frames_per_chunk"]
    chunks = meta["frames"] // chunk
    opens = [number == 0 or number in meta["cuts"] for number in range(chunks)]
    shots = torch.tensor([False, *opens[1:]]).cumsum(0).tolist()
    return Scene(
        data["noise"],
        padded(data["text"], meta),
        frame_positions(shots, chunk, phi),
        opens,
        data["image"] if meta["i2v"] else None,
    )


def padded(text: Tensor, meta: Mapping[str, Any]) -> Tensor:
    return pad(text, (0, 0, 0, meta["text_len"] - text.shape[-2]))


def made(meta: Mapping[str, Any], data: Data, networks: Networks, phi: float) -> dict[str, Tensor]:
    """All that a variant records, as lltk makes it."""
    critic = meta["loss"] == "critic_loss"
    scene, chunk = scene_of(meta, data, phi), meta["frames_per_chunk"]
    schedule = Schedule.make(meta["steps"], meta["shift"])
    rollout = Recorder(*networks.student)
    with torch.set_grad_enabled(not critic):
        clip = simulate(rollout, schedule, scene, meta["exit_step"] + 1)
    draws = torch.tensor(meta["score_u"])
    spread = meta["frames"] // draws.shape[1]
    levels = (each.repeat_interleave(spread, dim=1) for each in score_levels(draws, meta["shift"]))
    noised = Noised.make(clip.detach(), data["score_noise"], *levels, scene)
    found = rollout.recorded() | {
        "x0": clip.detach(),
        "score.t": noised.timestep,
        "score.sigma": noised.sigma,
        "score.x_t": noised.latents,
    }
    frames = clip.shape[0] * int((~scene.given()).sum())
    if critic:
        flow = networks.fake(noised, scene.text, scene.positions)
        loss = critic_loss(flow, clip, data["score_noise"], scene).sum() / frames
        found |= {"fake.flow": flow.detach(), "fake.x0": noised.clean(flow).detach()}
        module, prefix = networks.fake.module, "critic_grad"
    else:
        scale = meta["real_guidance_scale"] + 1
        negative = padded(data["negative_text"], meta)
        scores = Scores.of(networks.real, networks.fake, noised, scene, negative, scale)
        g, normaliser = direction(clip, scores, meta["frames"] // chunk)
        loss = student_loss(clip, g, scene).sum() / frames
        (dx,) = torch.autograd.grad(loss, clip, retain_graph=True)
        found |= {
            "real_cond.x0": scores.conditional,
            "real_uncond.x0": scores.unconditional,
            "real.x0": scores.real,
            "fake.x0": scores.fake,
            "normaliser": normaliser,
            "g": g,
            "dx": dx,
        }
        module, prefix = networks.student[1], "student_grad"
    module.zero_grad()
    loss.backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    found |= {f"{prefix}.{networks.names[n]}": g for n, g in gradients.items() if g is not None}
    return found | {"loss": loss.detach()[None]}


def replay_dmd(meta: Mapping[str, Any], data: Data, path: Path, make: Make) -> float:
    """How far a file's exact variants are off, relative to each tensor's largest value."""
    networks = Networks.load(data, load_file(path.with_name(meta["weights"])), make)
    worst = 0.0
    for variant in ("exact", "exact_phi"):
        prefix = f"{variant}."
        wanted = {n.removeprefix(prefix): t for n, t in data.items() if n.startswith(prefix)}
        if variant in meta["variants"]:
            found = made(meta, data, networks, meta["phi"] if variant == "exact_phi" else 0.0)
            assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
            worst = max(worst, *(_difference(found[name], wanted[name]) for name in wanted))
    return worst


def _difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
