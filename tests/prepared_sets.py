"""Recipes of a small model on a small folder of clips, and the sets that are prepared for them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from footage import FPS, numbered, write_clip
from torch import Tensor

from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import shipped
from lltk.models import wan_vae
from lltk.models.tiny.text import save_text_encoder
from lltk.parallel.ranks import Ranks
from lltk.tasks.preparing import plan_preparing, prepare
from lltk.train import clip_shards

VAE = wan_vae.validate_config(
    {
        "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
        "scale_factor_spatial": 16, "base_dim": 4, "decoder_base_dim": 4, "z_dim": 4,
        "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.5, 0.8, 1.1],
    }
)  # fmt: skip
TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 64, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1,
}  # fmt: skip
CLIPS = 5
SMALL = (
    f"model.config={json.dumps(TRANSFORMER)}", "geometry.batch=3", "geometry.frames=4",
    "geometry.height=32", "geometry.width=32", "geometry.chunk=2", "geometry.window=8",
    "geometry.sink=2", f"train.data.clips={CLIPS}", "train.data.shots=2", f"train.data.fps={FPS}",
    "train.data.frames=6", "train.batch=3", "train.steps=4", "train.ema_start=2",
    "train.checkpoint_every=1", "train.validate_every=2", "train.sample_every=4", "train.warmup=0",
    "train.keep=4",
)  # fmt: skip


def save_clips(folder: Path) -> None:
    """Clips, and a pipeline beside them."""
    torch.manual_seed(0)
    wan_vae.save_vae(folder / "vae", wan_vae.build(VAE).state_dict(), VAE)
    save_text_encoder(folder)
    write_clip(folder, "a", 0, numbered(0, 24), "a red square")
    write_clip(folder, "a", 1, numbered(30, 17), "a blue star pulsing")


def changes(folder: Path, *more: str) -> list[str]:
    """What the shipped recipe is changed by to train on `save_clips`."""
    own = (f"train.data.folder={folder}", f"train.data.pipeline={folder}")
    return [*SMALL, *own, *more]


def recipe(folder: Path, *more: str) -> dict[str, Any]:
    return read_recipe(shipped()["tiny_train"], changes(folder, *more))


def prepared(folder: Path, made: Path, ranks: Ranks | None = None, resume: bool = False) -> None:
    """Prepare the clips of a folder, two a shard."""
    with patch("lltk.tasks.preparing._SHARD", 2):
        prepare(plan_preparing(recipe(folder)), made, ranks=ranks, resume=resume)


def dies_preparing(folder: Path, made: Path) -> None:
    """Kill this very process while it writes the fourth clip, the second of its shard."""
    written = 0
    whole = clip_shards.tensor_bytes

    def half(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytearray:
        nonlocal written
        written += 1
        if written == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(tensors, metadata)

    with patch.object(clip_shards, "tensor_bytes", half):
        prepared(folder, made)


def contents(made: Path) -> dict[str, bytes]:
    """Every file of a set."""
    return {path.name: path.read_bytes() for path in made.iterdir() if path.name != "run.lock"}
