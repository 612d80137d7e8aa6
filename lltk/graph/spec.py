"""What a pass may know about a model: its sizes and the names of its parts."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lltk.graph.contract import Role


@dataclass(frozen=True)
class Spec(ABC):
    """Names and sizes of one captured model; passes read them instead of hard-coding a model.

    Attributes:
        channels: latent channels.
        patch: latent (frames, height, width) that the model takes as one; frames is 1.
        stride: video (frames, height, width) of one latent.
        output: name of the result in the captured contract.
        keep_fp32: parameters whose dotted name holds one of these parts run in float32.
    """

    channels: int
    patch: tuple[int, int, int]
    stride: tuple[int, int, int]
    output: str
    keep_fp32: tuple[str, ...]

    @abstractmethod
    def captured_roles(self, graph: str) -> tuple[Role, ...]:
        """The roles of a captured graph's inputs."""

    @property
    def captured_outputs(self) -> set[str]:
        """The names of a captured graph's outputs."""
        return {self.output}


@dataclass(frozen=True)
class ModelSpec(Spec):
    """Names and sizes of one captured transformer.

    Module paths hold ``{layer}`` where the layer index stands.

    Attributes:
        layers: number of blocks.
        heads, head_dim: attention heads H and their width D.
        text_dim: width of a text embedding.
        block, self_attention, cross_attention: module paths.
        rope, rope_tables: module that computes the rotary tables, and its cos and sin buffers.
        rope_theta: base of the rotary frequencies.
    """

    layers: int
    heads: int
    head_dim: int
    text_dim: int
    rope_theta: float
    block: str
    self_attention: str
    cross_attention: str
    rope: str
    rope_tables: tuple[str, str]

    def captured_roles(self, graph: str) -> tuple[Role, ...]:
        """The same for every graph."""
        return Role.LATENTS, Role.TIME, Role.TEXT

    def layer_of(self, module: str, template: str | None = None) -> int | None:
        """Layer index if ``module`` lies in ``template`` (the block by default), else None."""
        pattern = re.escape(template or self.block).replace(r"\{layer\}", r"(\d+)")
        found = re.match(pattern + r"(?:\.|$)", module)
        return int(found.group(1)) if found else None


@dataclass(frozen=True)
class DecoderSpec(Spec):
    """Names and sizes of one captured streaming video decoder.

    Graph ``first`` decodes a video's first latent, which is one frame; ``step`` one latent more;
    ``steps``, if there is one, several more.

    Attributes:
        caches: number of feature caches; ``step`` and ``steps`` read ``cache_{i}``, every graph
            gives ``next_cache_{i}``.
    """

    caches: int

    @property
    def cache_inputs(self) -> tuple[str, ...]:
        """Names of the caches that ``step`` reads, in order."""
        return tuple(f"cache_{index}" for index in range(self.caches))

    @property
    def cache_outputs(self) -> tuple[str, ...]:
        """Names of the caches that both graphs give, in the same order."""
        return tuple(f"next_{name}" for name in self.cache_inputs)

    def captured_roles(self, graph: str) -> tuple[Role, ...]:
        """Latents and the caches; ``first`` reads no caches."""
        return Role.LATENTS, *([Role.CACHE] * (0 if graph == "first" else self.caches))

    @property
    def captured_outputs(self) -> set[str]:
        """The video and the new caches."""
        return {self.output, *self.cache_outputs}
