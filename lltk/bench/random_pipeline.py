"""A pipeline and clips of the true sizes with random content, to time training without them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lltk.bench.random_weights import with_random_weights
from lltk.compiler import transform
from lltk.graph.loading import LOADING
from lltk.graph.recipe import parse_recipe
from lltk.models.checkpoint import save_checkpoint
from lltk.models.configs import named_config
from lltk.models.pipelines import find_pipeline
from lltk.models.wan_vae import CONFIGS, build, save_vae, validate_config
from lltk.stream.video import VideoWriter, pixels

UMT5_XXL: Mapping[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""The sizes of Wan's text encoder."""


def make_pipeline(
    folder: Path, model: str, vae: str, text: Mapping[str, Any], device: torch.device
) -> None:
    """Write a pipeline in diffusers' layout, with random weights in bfloat16.

    Its tokenizer is that of the tiny world, which writes any text.

    Args:
        folder: gets ``transformer``, ``vae``, ``text_encoder`` and ``tokenizer``.
        model: the name of the transformer's configuration.
        vae: that of the autoencoder's.
        text: arguments of transformers' UMT5Config.
        device: where random numbers are drawn.
    """
    with LOADING:
        from transformers import UMT5Config, UMT5EncoderModel

    config = named_config(model)
    recipe = parse_recipe(
        {
            "program": "reference",
            "model": {"config": dict(config)},
            "geometry": {"height": 64, "width": 64},
            "passes": [],
        },
        "random",
    )
    program = with_random_weights(transform(recipe, weights=False), device)
    save_checkpoint(folder / "transformer", program.weights, "diffusers", dict(config))
    del program
    sizes = validate_config(CONFIGS[vae])
    torch.manual_seed(0)
    weights = {name: p.detach().bfloat16() for name, p in build(sizes).named_parameters()}
    save_vae(folder / "vae", weights, sizes)
    with torch.device(device):
        encoder = UMT5EncoderModel._from_config(UMT5Config(**text), dtype=torch.bfloat16)
    encoder.save_pretrained(folder / "text_encoder")
    shutil.copytree(find_pipeline("tiny") / "tokenizer", folder / "tokenizer")


def wan22_5b_pipeline(folder: Path, device: torch.device) -> Path:
    """``pipeline`` in a folder, of the 5B's sizes with random weights; made unless it is there."""
    path = folder / "pipeline"
    if not path.exists():
        make_pipeline(path, "wan22_5b", "wan22_vae", UMT5_XXL, device)
    return path


def make_clips(folder: Path, count: int, frames: int, size: tuple[int, int], fps: float) -> None:
    """Write captioned clips of drifting colours, as ``train.data.folder`` reads them.

    Args:
        folder: gets ``video`` and ``caption``.
        count: how many clips.
        frames: of a clip.
        size: height and width.
        fps: frames a second.
    """
    for name in ("video", "caption"):
        (folder / name).mkdir(parents=True)
    for clip in range(count):
        generator = torch.Generator().manual_seed(clip)
        ends = torch.randn(3, 2, 12, 20, generator=generator)
        with VideoWriter(folder / "video" / f"{clip}.mp4", *size, fps) as writer:
            for place in torch.linspace(0, 1, frames):
                colours = torch.lerp(ends[None, :, 0], ends[None, :, 1], place)
                frame = F.interpolate(colours, size, mode="bilinear").clamp(-1, 1)
                writer.write(pixels(frame[:, :, None]))
        text = f"Colours that drift, seen for the {clip + 1}th time."
        (folder / "caption" / f"{clip}.txt").write_text(text, encoding="utf-8")
