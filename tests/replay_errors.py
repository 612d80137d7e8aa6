"""Replay LongLive-2.0's recorded error recycling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lltk.train.error_recycling import GATES, ErrorRecycling, without_errors
from lltk.train.noise_levels import level_weights, noise_grid
from lltk.train.recipe import ErrorRecyclingSection


class Recorded:
    """The draws of a recorded step, as the numbers in [0, 1) that they follow from.

    A gate that was not drawn does not happen. Other numbers that were not drawn are 0.

    Args:
        info: what was recorded.
        batch: the number of samples; a recorded gate is that of all of them.
        section: the settings.
    """

    def __init__(self, info: Mapping[str, Any], batch: int, section: ErrorRecyclingSection) -> None:
        self._draws = info["draws"]
        self._batch = batch
        self._section = section

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        if purpose == "recycling":
            gates = {d["gate"]: d["value"] for d in self._draws if d["kind"] == "gate"}
            return torch.tensor([[gates.get(name, 1.0) for name in GATES]] * self._batch).double()
        drawn = torch.zeros(self._batch, *shape, dtype=torch.float64)
        for whose, place, number in map(self._number, self._draws):
            if whose == purpose:
                drawn[place] = number
        return drawn

    def _number(self, draw: Mapping[str, Any]) -> tuple[str, tuple[int, ...], float]:
        """The purpose of a draw, its place among the numbers for that, and its number."""
        if draw["kind"] in ("gate", "empty_bucket"):
            return "", (), 0.0
        sample, chunk = draw["sample"], draw["chunk"]
        if draw["kind"] == "replace":
            number = (draw["index"] + 0.5) / self._section.entries
            return f"replaced {draw['buffer']}", (sample, chunk), number
        purpose = f"recycled {'context' if draw['bucket'] is None else draw['buffer']}"
        if draw["kind"] == "choice":
            return purpose, (sample, 0, chunk), (draw["index"] + 0.5) / draw["of"]
        return purpose, (sample, 1, chunk), 0.5 + (draw["value"] - 1) / (2 * self._section.scale)


def section_of(settings: Mapping[str, Any]) -> ErrorRecyclingSection:
    """A recording's settings."""
    if settings["replacement_strategy"] != "random":
        raise ValueError(
            f"errors are replaced at random, not by {settings['replacement_strategy']}"
        )
    return ErrorRecyclingSection(
        clean=settings["clean_prob"],
        latent=settings["latent_inject_prob"],
        noise=settings["noise_inject_prob"],
        context=settings["context_inject_prob"],
        update=settings["clean_buffer_update_prob"],
        scale=settings["modulate_factor"],
        buckets=settings["num_buckets"],
        entries=settings["buffer_size_per_bucket"],
    )


def replay_errors(meta: Mapping[str, Any], data: Mapping[str, Tensor]) -> float:
    """Worst relative difference of all that a model was given, of losses and of kept errors."""
    section = section_of(meta["error_recycling"])
    chunk, grid = meta["frames_per_chunk"], noise_grid()
    shape = (meta["channels"], chunk, *meta["latent"])
    recycling = ErrorRecycling(section, shape, torch.float32, meta["frames"] // chunk)
    differences = []
    for number, info in enumerate(meta["step_info"]):
        step = {
            name: data[f"step{number}.{name}"]
            for name in ("clean", "noise", "index", "sigma", "flow", "x_t", "context", "loss")
        }
        clean, level = step["clean"], step["index"].long()
        counted = torch.ones(clean.shape[0], clean.shape[2], dtype=torch.bool)
        sigma = step["sigma"].repeat_interleave(chunk, 1)
        draws = Recorded(info, len(clean), section)
        plain = without_errors(clean, step["noise"], level, sigma, counted)
        given = recycling.inject(draws, plain)
        error = (step["flow"] - given.target).square().mean((1, 3, 4))
        weight = level_weights(grid)[level].repeat_interleave(chunk, 1)
        found = {"x_t": given.noisy, "context": given.context, "loss": (weight * error).mean()}
        differences += [_difference(ours, step[name]) for name, ours in found.items()]
        recycling.note(draws, given, step["flow"])
        recycling.end_step()
    kept = buckets(recycling)
    wanted = {name: tensor for name, tensor in data.items() if name.startswith("buffer.")}
    if {n: t.shape for n, t in kept.items()} != {n: t.shape for n, t in wanted.items()}:
        return float("inf")
    return max(differences + [_difference(kept[name], wanted[name]) for name in wanted])


def buckets(recycling: ErrorRecycling) -> dict[str, Tensor]:
    """All that is kept, a tensor for each bucket that has some."""
    rows: dict[str, list[Tensor]] = {}
    for name, error in recycling.state().items():
        rows.setdefault(f"buffer.{name.rpartition('.')[0]}", []).append(error)
    return {name: torch.stack(row) for name, row in rows.items()}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
