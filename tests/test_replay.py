"""Recorded runs of LongLive-2.0's own code replay: its model, its clips and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import replay_dmd
import replay_longlive
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lltk.compiler import transform
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe
from lltk.stream.denoise import Velocity
from lltk.stream.rollout import Rollout
from lltk.stream.sampler import guided
from lltk.train import distribution_matching, simulation
from lltk.train.distribution_matching import Scores, direction
from lltk.train.error_recycling import Draws, ErrorBuffer, ErrorRecycling, Given
from lltk.train.recipe import ErrorRecyclingSection

pytestmark = pytest.mark.cpu

FOLDER = Path(__file__).parent / "data" / "longlive"
WITH_RANKS = {"dmd_weights", "sp_2ranks"}
"""Recorded with several ranks, whose test is beside the others of ranks, and its weights."""
FILES = [file for file in sorted(FOLDER.glob("*.safetensors")) if file.stem not in WITH_RANKS]
commit = Rollout.commit
note, inject = ErrorRecycling.note, ErrorRecycling.inject
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


@cache
def transformed(recipe: str) -> Program:
    return transform(Recipe.model_validate_json(recipe), weights=False)


@pytest.fixture(autouse=True)
def one_transform_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one geometry share their program."""

    def shared(recipe: Recipe, weights: bool) -> Program:
        assert not weights
        return transformed(recipe.model_dump_json())

    monkeypatch.setattr(replay_longlive, "transform", shared)


def test_every_kind_of_run_is_recorded() -> None:
    assert [file.stem for file in FILES] == [
        "critic_t2v",
        "dmd_step_i2v",
        "dmd_step_t2v",
        "error_recycling_basic",
        "rollout_i2v",
        "rollout_multi_shot",
        "rollout_single_shot",
        "rollout_wide",
        "teacher_forcing",
        "teacher_forcing_wide",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_replay(file: Path) -> None:
    assert replay_longlive.replay(file) <= replay_longlive.bound(file)


def no_offset(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    meta["phi"] = 0.0


def late_cut(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    meta["cuts"] = [4, 8]


def one_weight(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    data["weights.blocks.0.self_attn.k.weight"][0, 0] += 0.1


def swapped_times(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    data["t"] = data["t"].flip(1).contiguous()


def perturbed(source: Path, change: Change, target: Path) -> Path:
    """The file with something changed."""
    with safe_open(source, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        data = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(meta, data)
    save_file(data, target, {"meta": json.dumps(meta)})
    return target


@pytest.mark.parametrize(
    ("stem", "change"),
    [
        ("rollout_multi_shot", no_offset),
        ("rollout_multi_shot", late_cut),
        ("rollout_i2v", one_weight),
        ("teacher_forcing", swapped_times),
    ],
)
def test_a_perturbed_run_is_too_far(
    stem: str, change: Change, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = perturbed(FOLDER / f"{stem}.safetensors", change, tmp_path / "run.safetensors")
    assert replay_longlive.main([str(file)]) == 1
    assert "TOO FAR" in capsys.readouterr().out


def leaking(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    """The gradients of the published code, which flow into earlier chunks through the cache."""
    for name in [name for name in data if name.startswith("exact.student_grad.")]:
        data[name] = data["ref.leaky." + name.removeprefix("exact.")].clone()


def further_cut(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    meta["cuts"] = [3]


def fractional_offset(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    meta["phi"] = 7.75


def other_levels(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    meta["score_u"] = [[draw + 2 for draw in draws] for draws in meta["score_u"]]


@pytest.mark.parametrize(
    ("stem", "change"),
    [
        ("dmd_step_t2v", leaking),
        ("dmd_step_i2v", further_cut),
        ("dmd_step_i2v", fractional_offset),
        ("critic_t2v", other_levels),
    ],
)
def test_a_perturbed_distillation_is_too_far(stem: str, change: Change, tmp_path: Path) -> None:
    weights = FOLDER / "dmd_weights.safetensors"
    (tmp_path / weights.name).symlink_to(weights)
    file = perturbed(FOLDER / f"{stem}.safetensors", change, tmp_path / "run.safetensors")
    assert replay_longlive.replay(file) > 10 * replay_longlive.bound(file)


def doubled(meta: dict[str, Any], data: dict[str, Tensor]) -> None:
    """The same clip twice in a call: means are as they were, and dx is that of half the loss."""
    meta["batch"] = 2
    meta["score_u"] = meta["score_u"] * 2
    for name, tensor in data.items():
        if "lora" in name or name.endswith(".loss") or name == "negative_text":
            continue
        axis = 1 if ".rollout." in name else 0
        data[name] = torch.cat([tensor, tensor], dim=axis) / (2 if name.endswith(".dx") else 1)


@pytest.mark.parametrize("stem", ["dmd_step_i2v", "critic_t2v"])
def test_several_clips_in_a_call(stem: str, tmp_path: Path) -> None:
    weights = FOLDER / "dmd_weights.safetensors"
    (tmp_path / weights.name).symlink_to(weights)
    file = perturbed(FOLDER / f"{stem}.safetensors", doubled, tmp_path / "run.safetensors")
    assert replay_longlive.replay(file) <= replay_longlive.bound(file)


def noisy_commit(rollout: Rollout, latents: Tensor, *rest: Any) -> None:
    """What is committed has the noise that the published code adds at t = 0."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    commit(rollout, (1 - 0.00498) * latents + 0.00498 * noise, *rest)


def swapped(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    return guided(unconditional, conditional, scale)


def every_pass(
    velocity: Velocity, last: int, latents: Tensor, timestep: Tensor, index: int
) -> Tensor:
    """Gradients flow through all passes of a chunk."""
    return velocity(latents, timestep, index)


def one_normaliser(clip: Tensor, scores: Scores, chunks: int) -> tuple[Tensor, Tensor]:
    """A clip's distance, not a chunk's."""
    g, each = direction(clip, scores, 1)
    return g, each.expand(-1, chunks)


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (Rollout, "commit", noisy_commit),
        (distribution_matching, "guided", swapped),
        (simulation, "_last_with_gradients", every_pass),
        (replay_dmd, "direction", one_normaliser),
    ],
)
def test_another_distillation_is_too_far(
    owner: Any, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    path = FOLDER / "dmd_step_i2v.safetensors"
    assert replay_longlive.replay(path) > 10 * replay_longlive.bound(path)


@pytest.mark.parametrize("stem", ["data_gaps", "data_shots"])
def test_clips_are_put_together_as_recorded(stem: str) -> None:
    assert replay_longlive.replay(FOLDER / f"{stem}.json") == 0


def next_bucket(buffer: ErrorBuffer, level: int) -> int:
    return (level * 50 // 1000 + 1) % 50


def of_what_was_noised(recycling: ErrorRecycling, draws: Draws, given: Given, flow: Tensor) -> None:
    """The errors of a target from the x₀ that carries errors."""
    note(recycling, draws, replace(given, clean=given.latents), flow)


def unscaled(recycling: ErrorRecycling, draws: Draws, given: Given) -> Given:
    """Errors that are added as they were kept."""
    section = recycling._section.model_copy(update={"scale": 0.0})
    return inject(copy_with(recycling, section), draws, given)


def copy_with(recycling: ErrorRecycling, section: ErrorRecyclingSection) -> ErrorRecycling:
    other = copy(recycling)
    other._section = section
    return other


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (ErrorBuffer, "_bucket", next_bucket),
        (ErrorRecycling, "note", of_what_was_noised),
        (ErrorRecycling, "inject", unscaled),
    ],
)
def test_other_error_recycling_is_too_far(
    owner: type, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    path = FOLDER / "error_recycling_basic.safetensors"
    assert replay_longlive.replay(path) > replay_longlive.BOUND


def other_fps(record: dict[str, Any]) -> None:
    record["folders"][1]["clips"][-1]["fps"] = "29"


def no_captions(record: dict[str, Any]) -> None:
    record["folders"][2]["clips"][0]["caption"] = ""


def longer_shots(record: dict[str, Any]) -> None:
    for settings in record["settings"]:
        settings["max_chunks_per_shot"] += settings["max_chunks_per_shot"] > 0


def other_reason(record: dict[str, Any]) -> None:
    record["results"][0]["folders"]["f_nothing"]["reason"] = "single-video sample is too short"


def one_tie(record: dict[str, Any]) -> None:
    """Without its mark, a frame that the reference rounds otherwise is a difference."""
    chunk = record["results"][0]["folders"]["c_missing_captions"]["chunks"][3]
    assert chunk.pop("inexact_ties") == [12]


@pytest.mark.parametrize("change", [other_fps, no_captions, longer_shots, other_reason, one_tie])
def test_other_clips_or_rules_differ(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    record = json.loads((FOLDER / "data_gaps.json").read_text(encoding="utf-8"))
    change(record)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(record))
    assert replay_longlive.replay(path) > replay_longlive.BOUND


def test_main_says_how_far(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(FOLDER / "teacher_forcing.safetensors")
    assert replay_longlive.main([file]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{file}: ") and line.endswith("(ok)\n")
    assert replay_longlive.main([]) == 2
