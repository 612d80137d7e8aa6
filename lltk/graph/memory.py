"""What a Program needs in memory, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from lltk.graph.program import Program
from lltk.graph.spec import DecoderSpec


def estimate(program: Program) -> dict[str, int]:
    """Bytes by owner on the device that runs the Program.

    Streaming: weights in their run dtypes, the cache's pages and the cross-attention K/V of one
    prompt. Training and scoring: weights, the blocks' inputs that per-block checkpointing keeps,
    and for training float32 gradients and AdamW's two moments of what trains. Activations inside
    one block come on top. Decoding: weights, and the feature caches before and after a latent.
    """
    weights = {n: t.numel() * program.run_dtype(n).itemsize for n, t in program.weights.items()}
    owners = {"weights": sum(weights.values())}
    if isinstance(program.model, DecoderSpec):
        read = program.contract("step").inputs
        caches = [read[name] for name in program.model.cache_inputs]
        owners["feature caches"] = 2 * sum(prod(c.shape) * c.dtype.itemsize for c in caches)
        return owners
    spec, geometry = program.spec, program.geometry
    width, size = spec.heads * spec.head_dim, program.dtype.itemsize
    frame = geometry.batch * geometry.frame_tokens(spec) * width * size
    if program.kind == "stream":
        owners["cache pages"] = 2 * spec.layers * geometry.window * frame
        prompt = geometry.batch * geometry.text_tokens * width * size
        owners["cross-attention K/V"] = 2 * spec.layers * prompt
        return owners
    owners["block inputs"] = spec.layers * geometry.captured_frames(program.kind) * frame
    if program.kind in ("train", "reference"):
        trains = program.trainable or program.weights.keys()
        count = sum(program.weights[name].numel() for name in trains)
        owners["gradients"] = count * torch.float32.itemsize
        owners["AdamW moments"] = 2 * owners["gradients"]
    return owners


def readable(count: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def total(owners: Mapping[str, int]) -> int:
    """Sum over owners, in bytes."""
    return sum(owners.values())
