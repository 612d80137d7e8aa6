"""Replay recorded training calls of LongLive-2.0's own ranks through `balanced_sp`."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ranks import LIMIT, free_port, grouped
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from lltk.compiler import transform, with_weights
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe
from lltk.models.layouts import WEIGHT_LAYOUTS
from lltk.parallel.groups import SEQUENCE, find_group

Data = Mapping[str, Tensor]


def program_of(recipe: Recipe, weights: Data) -> Program:
    """The recorded model for the ranks of a file, with weights in LongLive's names."""
    names = WEIGHT_LAYOUTS["wan"].read(weights, "weights")
    program = transform(recipe, weights=False)
    return with_weights(program, {names[key]: value.float() for key, value in weights.items()})


def call(program: Program, meta: Mapping[str, Any], data: Data, rank: int) -> dict[str, Tensor]:
    """What a rank makes of its part: ``flow``, ``loss``, and gradients by LongLive's names."""
    module = instantiate(program)
    own = {part: data[f"rank{rank}.{part}"] for part in ("clean", "x_t", "t", "text")}
    frames = own["t"].shape[1]
    part = slice(rank * frames, (rank + 1) * frames)
    text = pad(own["text"], (0, 0, 0, meta["text_len"] - own["text"].shape[2]))
    inputs = {
        "clean": own["clean"],
        "noisy": own["x_t"],
        "timestep": own["t"],
        "positions": torch.arange(part.start, part.stop, dtype=torch.float64),
        "encoder_hidden_states": text,
    }
    flow = module("train", inputs)["sample"]
    target = data["global.noise"][:, :, part] - data["global.clean"][:, :, part]
    error = data["global.weight"][:, part] * (flow - target).square().mean(dim=(1, 3, 4))
    counted = counted_frames(meta)
    loss = error.mean()
    if counted is not None:
        loss = (error * counted[:, part]).sum() / meta["global_valid_count"]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    names = WEIGHT_LAYOUTS["wan"].write(gradients, "gradients")
    return {"flow": flow.detach(), "loss": loss.detach()[None]} | {
        f"grad.{names[name]}": value for name, value in gradients.items() if value is not None
    }


def counted_frames(meta: Mapping[str, Any]) -> Tensor | None:
    """Which frames count, bool [B, F]; None where all do."""
    valid = meta["num_valid_latent_frames"]
    if valid is None and not meta["i2v"]:
        return None
    frames, batch = meta["frames"], meta["batch"]
    counts = torch.tensor(frames if valid is None else valid).expand(batch)
    counted = torch.arange(frames) < counts[:, None]
    counted[:, 0] &= not meta["i2v"]
    return counted


def worst(made: list[dict[str, Tensor]], data: Data) -> float:
    """The largest difference of what ranks made, relative to each tensor's largest value."""
    pairs = []
    for rank, own in enumerate(made):
        pairs += [(own[part], data[f"rank{rank}.{part}"]) for part in ("flow", "loss")]
    sums = {key: value for key, value in data.items() if key.startswith("grad_sum.")}
    assert sums, "the file has no gradients"
    for key, value in sums.items():
        name = key.removeprefix("grad_sum.")
        pairs.append((torch.stack([own[f"grad.{name}"] for own in made]).sum(0), value))
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


def save_call(
    rank: int, port: int, recipe: Recipe, meta: Mapping[str, Any], file: Path, folder: Path
) -> None:
    """Write what a rank makes; for a process of its own."""
    torch.set_num_threads(1)
    data = load_file(file)
    with grouped(rank, meta["ranks"], port):
        assert find_group(SEQUENCE, meta["ranks"]).rank() == rank
        program = program_of(recipe, weights_beside(file))
        save_file(call(program, meta, data, rank), folder / str(rank))


def weights_beside(file: Path) -> dict[str, Tensor]:
    """The student's weights, which lie in a file of their own."""
    both = load_file(file.with_name("dmd_weights.safetensors"))
    prefix = "student."
    return {n.removeprefix(prefix): v for n, v in both.items() if n.startswith(prefix)}


def replay_sp(recipe: Recipe, meta: Mapping[str, Any], file: Path) -> float:
    """The largest difference of one file, in as many processes as it has ranks."""
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    with TemporaryDirectory() as folder:
        ranks = [
            spawn.Process(target=save_call, args=(rank, port, recipe, meta, file, Path(folder)))
            for rank in range(meta["ranks"])
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(LIMIT)
            process.kill()
        made = [load_file(Path(folder) / str(rank)) for rank in range(meta["ranks"])]
    return worst(made, load_file(file))
