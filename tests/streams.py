"""Pipelines with random weights and the streams over them, for the streaming tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers import randomise, tiny_config
from torch import Tensor

from lltk.graph.recipe import open_recipe
from lltk.models import wan22, wan_vae
from lltk.models.checkpoint import save_checkpoint
from lltk.models.configs import named_config
from lltk.models.tiny.text import save_text_encoder
from lltk.stream.recipe import stream_section
from lltk.stream.script import Shot
from lltk.streaming import Models, Stream, StreamPlan, open_stream, plan_stream

TRANSFORMER = tiny_config(layers=2, text_dim=64, attention_head_dim=16)
"""Of the tiny text encoder's width."""
AUTOENCODER = wan_vae.validate_config(
    named_config("tiny_vae", wan_vae.CONFIGS)
    | {
        "base_dim": 4,
        "decoder_base_dim": 4,
        "z_dim": 4,
        "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [0.5, 1.5, 0.8, 1.1],
    }
)
SIZES = (
    "geometry.height=32", "geometry.width=64", "geometry.chunk=2", "geometry.window=8",
    "geometry.sink=2", "geometry.text_tokens=12", "model.config=null", "stream.decoder.config=null",
    "stream.fps=8",
)  # fmt: skip
"""A chunk is 8 video frames, one second; 7 for the first."""
SHOTS = (
    Shot(caption="a red circle moving left", seconds=3),
    Shot(caption="a blue square moving up", seconds=3),
)


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    """Write a pipeline of random weights, large enough for attention to matter."""
    save_text_encoder(folder)
    transformer = randomise(wan22.build(TRANSFORMER).state_dict(), seed)
    save_checkpoint(folder / "transformer", transformer, "diffusers", TRANSFORMER)
    vae = randomise(wan_vae.build(AUTOENCODER).state_dict(), seed)
    wan_vae.save_vae(folder / "vae", vae, AUTOENCODER)
    return folder


def planned(pipeline: Path, *overrides: str) -> StreamPlan:
    """The tiny stream recipe at the tests' sizes; equal Programs are made once."""
    recipe = open_recipe("tiny_stream", (*SIZES, f"stream.pipeline={pipeline}", *overrides))
    programs = tuple(override for override in overrides if not override.startswith("stream."))
    return replace(_planned(pipeline, programs), section=stream_section(recipe.stream, "test"))


@cache
def _planned(pipeline: Path, overrides: tuple[str, ...]) -> StreamPlan:
    return plan_stream(
        open_recipe("tiny_stream", (*SIZES, f"stream.pipeline={pipeline}", *overrides))
    )


def opened(
    plan: StreamPlan, script: Sequence[Shot] = SHOTS, **options: Any
) -> tuple[Stream, list[Tensor]]:
    """A stream, and the list that its video goes to, a tensor for each latent."""
    video: list[Tensor] = []
    return open_stream(plan, video.append, script, **options), video


def streamed(
    plan: StreamPlan,
    script: Sequence[Shot] = SHOTS,
    act: Callable[[Stream, int], None] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Latents and video of a whole stream; ``act`` is called before each chunk."""
    stream, video = opened(plan, script, **options)
    latents = []
    with stream:
        while stream.session.timeline.chunks:
            if act is not None:
                act(stream, stream.session.timeline.index)
            latents.append(next(stream.session).latents)
    return torch.cat(latents, dim=2), torch.cat(video, dim=2)


def shared(models: Models, seed: int) -> tuple[Tensor, Tensor]:
    """Latents and video of a session of `SHOTS` over loaded models."""
    video: list[Tensor] = []
    with models.open(video.append, SHOTS, seed=seed) as stream:
        latents = [report.latents for report in stream]
    return torch.cat(latents, dim=2), torch.cat(video, dim=2)


def resume(pipeline: str, state: str, output: str, *overrides: str) -> None:
    """Go on from a state to the end; latents and video go to a file. For another process."""
    from safetensors.torch import save_file

    stream, video = opened(planned(Path(pipeline), *overrides), (), resume=Path(state))
    with stream:
        latents = torch.cat([report.latents for report in stream], dim=2)
    save_file({"latents": latents, "video": torch.cat(video, dim=2)}, output)


if __name__ == "__main__":
    resume(*sys.argv[1:])
