"""A graph's contract: its inputs and outputs by name, and what each input is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


class Role(StrEnum):
    """What an input of a graph is for. Code finds inputs by their roles, and names are for people.

    B is the batch, F are latent frames, N chunks, S text tokens, P pages, T the tokens of a page,
    H heads of D channels.
    """

    LATENTS = "latents"
    """The latents that the graph works on, [B, C, F, h, w]."""
    CLEAN = "clean"
    """In training, the clean latents of the clip that is also seen noisy, [B, C, F, h, w]."""
    VIDEO = "video"
    """The frames that an encoder makes into latents, [B, 3, n, H, W] in [-1, 1]."""
    TIME = "time"
    """Timesteps, float32 [B, F] once they are per frame; 0 for clean latents, 1000 for noise."""
    POSITIONS = "positions"
    """Positions of the frames in the video, float64 [F]."""
    PAGE_POSITIONS = "page_positions"
    """Positions of the frames of all pages, float64 [P · F], where keys are cached before RoPE."""
    TEXT = "text"
    """Embedded prompts, [B, S, E], or [B, N, S, E] where every chunk has its own."""
    TOKENS = "tokens"
    """The numbers of a text's tokens, int64 [B, S]; any number after the last."""
    TOKEN_MASK = "token_mask"
    """Which of them are a text's, bool [B, S]."""
    PROMPT = "prompt"
    """A layer's keys or values of the text, [B, S, H, D], which the graph ``prologue`` gives."""
    PAGES = "pages"
    """A layer's cached keys or values, [B, P, T, H, D]."""
    PAGE_CODES = "page_codes"
    """The codes of pages in NVFP4, uint8 [B, P, T, H, D/2]."""
    PAGE_SCALES = "page_scales"
    """The scales of their blocks of 16, float8_e4m3fn [B, P, T, H, D/16]."""
    PAGE_DECODE_SCALES = "page_decode_scales"
    """The scale of each head of such a page, float32 [B, P, H]."""
    PAGE_DECODED = "page_decoded"
    """Such pages decoded to E4M3, less the means of page 0, float8_e4m3fn [B, P, T, H, D]."""
    PAGE_LARGEST = "page_largest"
    """The largest magnitude that each of these had before it was rounded, float32 [B, P]."""
    PAGE_MEANS = "page_means"
    """The mean of each channel of such a page, which its codes leave out, bfloat16 [B, P, H, D]."""
    TABLE = "table"
    """The committed pages to attend to, int64, as many as there are."""
    SLOT = "slot"
    """The page that a commit writes, int64 [1]."""
    LISTED = "listed"
    """In graphs for export, which pages to attend to, bool [P]."""
    ROTARY_COS = "rotary_cos"
    """There too, what `rope_table` makes of the positions, float32 [1, L, 1, D]; cos, …"""
    ROTARY_SIN = "rotary_sin"
    """… and sin."""
    CACHE = "cache"
    """Features that a call of an autoencoder's half leaves for the next call."""
    WEIGHTS = "weights"
    """A part of a weight in NVFP4, which the graph ``weights`` gives."""
    RANDOM = "random"
    """What stochastic rounding draws by: seed and number of the batch, int64 [2]."""
    PARAMETER = "parameter"
    """A parameter of the layer that a region runs for."""

    @property
    def is_page(self) -> bool:
        """Whether such an input is a part of the cache, with the pages as its second axis."""
        return self in _OF_PAGES


_OF_PAGES = frozenset(
    {
        Role.PAGES,
        Role.PAGE_CODES,
        Role.PAGE_SCALES,
        Role.PAGE_DECODE_SCALES,
        Role.PAGE_MEANS,
        Role.PAGE_DECODED,
        Role.PAGE_LARGEST,
    }
)


_FOLLOWING = frozenset({Role.PAGE_DECODED, Role.PAGE_LARGEST})
"""Those that follow from the others."""


def saved_pages(pages: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The parts of a cache that a saved state holds: all that do not follow from others."""
    return {name: spec for name, spec in pages.items() if spec.role not in _FOLLOWING}


def page_output(arena: str) -> str:
    """The output of a commit that is the new page of an arena, [B, T, …], where it writes none."""
    return f"new_{arena}"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor. The role, which only inputs of graphs have, is not compared."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, value: Tensor, role: Role | None = None) -> TensorSpec:
        return cls(tuple(int(size) for size in value.shape), value.dtype, role)


@dataclass(frozen=True)
class Contract:
    """Inputs and outputs of a graph by name, in order.

    What one graph gives and another reads has the same name in both. The outputs of ``prologue``
    are the inputs of ``step`` whose role is `Role.PROMPT`, and those of ``weights`` are the inputs
    of ``train`` whose role is `Role.WEIGHTS`. Feature caches, which the next call of the same
    model reads, are paired by its spec. The result has the name of the spec's ``output``.
    """

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def having(self, role: Role) -> dict[str, TensorSpec]:
        """The inputs of a role."""
        return {name: spec for name, spec in self.inputs.items() if spec.role is role}

    @property
    def gives_pages(self) -> bool:
        """Whether it has new pages among its outputs."""
        return any(page_output(name) in self.outputs for name in self.pages)

    @property
    def pages(self) -> dict[str, TensorSpec]:
        """The inputs that are parts of the cache; their second axis is the pages."""
        return {n: spec for n, spec in self.inputs.items() if spec.role and spec.role.is_page}

    def name(self, role: Role) -> str:
        """The name of the one input of a role."""
        (name,) = self.having(role)
        return name

    def input(self, role: Role) -> TensorSpec:
        """The one input of a role."""
        return self.inputs[self.name(role)]

    def named(self, values: Mapping[Role, V]) -> dict[str, V]:
        """Values by the names of the inputs that have their roles, as far as there are such."""
        return {
            name: values[spec.role]
            for name, spec in self.inputs.items()
            if spec.role is not None and spec.role in values
        }


def commit_graph(contracts: Mapping[str, Contract]) -> str:
    """Which of a stream's graphs makes a commit: ``commit``, or a step that gives pages too.

    Args:
        contracts: of the graphs, by name.
    """
    steps = (name for name, each in contracts.items() if each.gives_pages)
    return "commit" if "commit" in contracts else next(steps, "commit")
