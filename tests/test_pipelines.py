"""Pipelines open in diffusers, and give there what lltk's reference program gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streams import save_pipeline
from torch import Tensor

from lltk.compiler import transform
from lltk.graph.module import instantiate
from lltk.graph.recipe import open_recipe
from lltk.models.pipelines import find_pipeline, link_pipeline
from lltk.stream.sampler import Schedule
from lltk.stream.text import TextEncoder
from lltk.train.sampling import sample

pytestmark = pytest.mark.cpu

PROMPT = "a red circle moving right on a dark background"
STEPS, FRAMES, SEED = 4, 3, 7


def opened(folder: Path) -> Any:
    from diffusers import DiffusionPipeline, WanPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline, WanPipeline) and pipeline.config.expand_timesteps
    assert pipeline.scheduler.config.flow_shift == 5.0
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline: Any, noise: Tensor, tokens: int) -> Tensor:
    _, _, frames, height, width = noise.shape
    found: Tensor = pipeline(
        PROMPT,
        height=16 * height,
        width=16 * width,
        num_frames=4 * frames - 3,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=noise,
        max_sequence_length=tokens,
        output_type="latent",
    ).frames
    return found


def test_the_tiny_pipeline_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On lltk's sigmas; on those that diffusers makes for itself, it is nearly the same."""
    folder = find_pipeline("tiny")
    changes = [f"model.checkpoint={folder}", f"geometry.frames={FRAMES}", "geometry.batch=1"]
    program = transform(open_recipe("tiny_reference", [*changes, "model.config=null"]))
    tokens = program.geometry.text_tokens
    text = TextEncoder(folder, tokens).encode([PROMPT])[None]
    ours = sample(program, instantiate(program), text, STEPS, SEED)
    noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(SEED))

    pipeline = opened(folder)
    stock = latents_of(pipeline, noise, tokens)
    assert 1e-3 < (stock - ours).norm() / ours.norm() < 0.2

    scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, flow_shift=1.0)
    stepping, sigmas = scheduler.set_timesteps, Schedule.make(STEPS).sigmas[:-1]
    monkeypatch.setattr(
        scheduler, "set_timesteps", lambda steps, device: stepping(steps, device, np.array(sigmas))
    )
    pipeline.scheduler = scheduler
    theirs = latents_of(pipeline, noise, tokens)
    assert (theirs - ours).abs().max() < 1e-3 * ours.abs().max()


def test_trained_weights_stand_beside_their_pipeline(tmp_path: Path) -> None:
    source, run = save_pipeline(tmp_path / "source"), tmp_path / "run"
    run.mkdir()
    (source / "transformer").rename(run / "transformer")
    for _ in range(2):
        link_pipeline(run / "pipeline", run / "transformer", source)
    assert (run / "pipeline" / "text_encoder").is_symlink()
    assert opened(run / "pipeline").transformer.config.num_layers == 2
    assert not (source / "model_index.json").exists()
