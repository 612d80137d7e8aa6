"""Golden values: inputs of a bundle's graphs, and what torch makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lltk.graph.contract import Contract, Role, page_output
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.spec import DecoderSpec
from lltk.ops.rope_table.reference import rope_table

LATE = 100
"""The chunk of a stream whose positions the last cases have."""


@dataclass(frozen=True)
class Case:
    """Inputs and outputs of one graph, by name.

    Attributes:
        stage: ``transformer`` or ``decoder``.
        graph: which.
        inputs, outputs: its tensors. Cases share those that they have in common.
    """

    stage: str
    graph: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@torch.no_grad()
def transformer_cases(program: Program, external: Program) -> Iterator[Case]:
    """Cases of a transformer: no page listed, one, and all but one in another order.

    The page that is never listed holds NaN, which no output may show.

    Args:
        program: a stream Program, with weights.
        external: the same after the pass externalise.
    """
    cases = _Transformer(program, external)
    yield cases.prologue
    last = program.geometry.pages - 1
    for slot in range(last):
        cases.fill(slot)
    cases.spoil(last)
    backwards = tuple(reversed(range(last)))
    for table, chunk in (((), 0), ((0,), 1), (backwards, LATE)):
        for graph in ("step", "commit"):
            yield cases.case(graph, table, last, chunk)


class _Transformer:
    """Runs a Program over pages, and states inputs and outputs as the external graphs have them."""

    def __init__(self, program: Program, external: Program) -> None:
        self._program, self._external = program, external
        self._module = instantiate(program)
        self._draw = torch.Generator().manual_seed(0)
        step = program.contract("step")
        self._latents, self._time = step.input(Role.LATENTS), step.input(Role.TIME)
        self._pages = {n: torch.zeros(s.shape, dtype=s.dtype) for n, s in program.pages.items()}
        contract = program.contract("prologue")
        text = contract.named({Role.TEXT: self._random(contract.input(Role.TEXT).shape)})
        self._prompt = self._module("prologue", dict(text))
        self.prologue = Case("transformer", "prologue", text, self._prompt)

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._draw, dtype=self._program.dtype)

    def fill(self, slot: int) -> None:
        """Commit a chunk to a page, over all pages before it."""
        made = self.case("commit", tuple(range(slot)), slot, slot).outputs
        for name, page in self._pages.items():
            page[:, slot] = made[page_output(name)]

    def spoil(self, slot: int) -> None:
        """Fill a page with NaN."""
        for page in self._pages.values():
            page[:, slot] = torch.nan

    def case(self, graph: str, table: tuple[int, ...], slot: int, chunk: int) -> Case:
        """Random latents at the positions of a chunk."""
        geometry, spec = self._program.geometry, self._program.spec
        positions = torch.arange(geometry.chunk, dtype=torch.float64) + chunk * geometry.chunk
        common = {
            Role.LATENTS: self._random(self._latents.shape),
            Role.TIME: 1000 * torch.rand(self._time.shape, generator=self._draw),
        }
        inside = {
            Role.POSITIONS: positions,
            Role.TABLE: torch.tensor(table, dtype=torch.int64),
            Role.SLOT: torch.tensor([slot]),
        }
        pages = {name: page.clone() for name, page in self._pages.items()}
        own = self._program.contract(graph)
        made = self._module(graph, _given(own, common | inside, self._prompt | pages))
        made |= {page_output(name): page[:, slot].clone() for name, page in pages.items()}
        listed = torch.zeros(geometry.pages, dtype=torch.bool)
        listed[list(table)] = True
        split = list(spec.rope_split)
        cos, sin = rope_table(positions, *geometry.grid(spec), split, spec.rope_theta)
        outside = {Role.LISTED: listed, Role.ROTARY_COS: cos, Role.ROTARY_SIN: sin}
        contract = self._external.contract(graph)
        given = _given(contract, common | outside, self._prompt | self._pages)
        return Case("transformer", graph, given, {name: made[name] for name in contract.outputs})


@torch.no_grad()
def decoder_cases(program: Program) -> Iterator[Case]:
    """Cases of a decoder: a video's first latent, and calls that go on from it."""
    spec, module = program.model, instantiate(program)
    assert isinstance(spec, DecoderSpec)
    draw = torch.Generator().manual_seed(0)
    caches: dict[str, Tensor] = {}
    for graph in ("first", "step", *(name for name in program.graphs if name != "first")):
        contract = program.contract(graph)
        latents = torch.randn(contract.input(Role.LATENTS).shape, generator=draw)
        given = _given(contract, {Role.LATENTS: latents}, caches)
        made = module(graph, dict(given))
        yield Case("decoder", graph, given, made)
        names = zip(spec.cache_inputs, spec.cache_outputs, strict=True)
        caches = {read: made[new] for read, new in names}


def _given(
    contract: Contract, by_role: Mapping[Role, Tensor], by_name: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All inputs of a graph, in order."""
    every = {**by_name, **contract.named(by_role)}
    return {name: every[name] for name in contract.inputs}
