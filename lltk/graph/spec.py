"""What passes may know of a model: its sizes, and where its parts are."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from lltk.graph.contract import Role


class LinearRole(StrEnum):
    """What a linear of a transformer's block is for."""

    SELF_QUERY = "self-attention's queries"
    SELF_KEY = "self-attention's keys"
    SELF_VALUE = "self-attention's values"
    SELF_QKV = "self-attention's queries, keys and values"
    """Of the pass merge_qkv, which puts it in the place of the three before."""
    SELF_OUT = "self-attention's output"
    CROSS_QUERY = "cross-attention's queries"
    CROSS_KEY = "cross-attention's keys"
    CROSS_VALUE = "cross-attention's values"
    CROSS_OUT = "cross-attention's output"
    UP = "the feed-forward's first"
    DOWN = "the feed-forward's second"


@dataclass(frozen=True)
class Spec(ABC):
    """Names and sizes of a captured model. Passes read them, so that no pass is for one model only.

    Attributes:
        channels: latent channels.
        patch: latent (frames, height, width) that the model takes as one token; frames is 1.
        stride: video (frames, height, width) of one latent.
        output: name of the result in the captured contract.
        keep_fp32: parameters with one of these parts in their dotted name run in float32.
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
    """Names and sizes of a captured transformer.

    Module paths hold ``{layer}`` where the layer's index stands, as in ``blocks.{layer}.attn1``.

    Attributes:
        layers: number of blocks.
        heads, head_dim: number of attention heads H, and their width D.
        text_dim: width of a text embedding.
        block, self_attention, cross_attention: module paths.
        linears: module paths of a block's linears.
        rope: path of the module that computes the rotary tables.
        rope_tables: names of its buffers, cos and sin.
        rope_theta: base of the rotary frequencies.
        rope_split: how many of a head's D channels turn by time, height and width.
    """

    layers: int
    heads: int
    head_dim: int
    text_dim: int
    block: str
    self_attention: str
    cross_attention: str
    linears: Mapping[LinearRole, str]
    rope: str
    rope_tables: tuple[str, str]
    rope_theta: float
    rope_split: tuple[int, int, int]

    def captured_roles(self, graph: str) -> tuple[Role, ...]:
        """The same for every graph."""
        return Role.LATENTS, Role.TIME, Role.TEXT

    def layer_of(self, module: str, template: str | None = None) -> int | None:
        """Layer index if a module lies in a path with ``{layer}``, by default the block's."""
        pattern = re.escape(template or self.block).replace(r"\{layer\}", r"(\d+)")
        found = re.match(pattern + r"(?:\.|$)", module)
        return int(found.group(1)) if found else None

    def linear_role(self, module: str) -> LinearRole | None:
        """What a block's linear is for, by its module path; None for any other module."""
        layer = self.layer_of(module)
        roles = (role for role, path in self.linears.items() if path.format(layer=layer) == module)
        return None if layer is None else next(roles, None)


@dataclass(frozen=True)
class TextSpec(Spec):
    """Names and sizes of a captured text encoder. It has ``channels`` a token, and no patches.

    Attributes:
        vocabulary: how many tokens it knows.
    """

    vocabulary: int

    def captured_roles(self, graph: str) -> tuple[Role, ...]:
        """The same for every graph."""
        return Role.TOKENS, Role.TOKEN_MASK


@dataclass(frozen=True)
class CachedSpec(Spec):
    """Names and sizes of a captured half of a video autoencoder, which goes through a video once.

    Graph ``first`` does a video's first latent, which is one frame. ``step`` does one latent more,
    and ``steps``, if there is one, several more.

    Attributes:
        caches: number of feature caches. ``step`` and ``steps`` read ``cache_{i}``, and every graph
            gives ``next_cache_{i}``.
    """

    reads: ClassVar[Role]
    """What its graphs read besides the caches."""
    caches: int

    @property
    def cache_inputs(self) -> tuple[str, ...]:
        """Names of the caches that ``step`` reads, in order."""
        return tuple(f"cache_{index}" for index in range(self.caches))

    @property
    def cache_outputs(self) -> tuple[str, ...]:
        """Names of the caches that every graph gives, in the same order."""
        return tuple(f"next_{name}" for name in self.cache_inputs)

    def captured_roles(self, graph: str) -> tuple[Role, ...]:
        """What it reads, and the caches; ``first`` reads no caches."""
        return self.reads, *([Role.CACHE] * (0 if graph == "first" else self.caches))

    @property
    def captured_outputs(self) -> set[str]:
        """The result and the new caches."""
        return {self.output, *self.cache_outputs}


@dataclass(frozen=True)
class DecoderSpec(CachedSpec):
    """Names and sizes of a captured video decoder, which makes latents into a video."""

    reads = Role.LATENTS


@dataclass(frozen=True)
class EncoderSpec(CachedSpec):
    """Names and sizes of a captured video encoder, which makes a video into latents."""

    reads = Role.VIDEO
