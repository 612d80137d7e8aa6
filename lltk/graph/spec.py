"""What a pass may know about a model: where its attention, RoPE, time and text are."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Names and sizes of one captured transformer.

    Module paths hold ``{layer}`` where the layer index stands. Passes read this instead of
    hard-coding a model.

    Attributes:
        layers: number of blocks.
        heads, head_dim: attention heads H and their width D.
        channels: latent channels in and out.
        text_dim: width of a text embedding.
        patch: latent (frames, height, width) of one token; frames is 1.
        stride: video (frames, height, width) of one latent.
        block, self_attention, cross_attention: module paths.
        rope, rope_tables: module that computes the rotary tables, and its cos and sin buffers.
        rope_theta: base of the rotary frequencies.
        latent_input, time_input, text_input, output: names in the captured contract.
        keep_fp32: parameters whose dotted name holds one of these parts run in float32.
    """

    layers: int
    heads: int
    head_dim: int
    channels: int
    text_dim: int
    patch: tuple[int, int, int]
    stride: tuple[int, int, int]
    rope_theta: float
    block: str
    self_attention: str
    cross_attention: str
    rope: str
    rope_tables: tuple[str, str]
    latent_input: str
    time_input: str
    text_input: str
    output: str
    keep_fp32: tuple[str, ...]

    def layer_of(self, module: str, template: str | None = None) -> int | None:
        """Layer index if ``module`` lies in ``template`` (the block by default), else None."""
        pattern = re.escape(template or self.block).replace(r"\{layer\}", r"(\d+)")
        found = re.match(pattern + r"(?:\.|$)", module)
        return int(found.group(1)) if found else None
