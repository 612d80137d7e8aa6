"""Golden values: inputs of a bundle's graphs, and what torch makes of them.

What is large is not held whole, so that golden values stay small beside any model. Of an input the
file holds the first elements, which are repeated to fill it; of an output every n-th element, from
the first on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from lltk.graph.contract import Contract, Role, TensorSpec, page_output
from lltk.graph.edit import op_of
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.spec import Spec, TextSpec
from lltk.ops.implementations import overload
from lltk.ops.rope_table.reference import rope_table

LATE = 100
"""The chunk of a stream whose positions the last cases have."""
_PERIOD = 65521
"""How many elements of a large input are drawn: a prime, so that no two rows of it are alike."""
_SAMPLE = 1 << 16
"""How many elements of a large output are held, at most."""
_DRAWS, _NOISE = 2, 1e-6
"""How often torch runs each case with other noise on its latents, and its size beside them."""
_BFLOAT16_NOISE = 2**-8
"""That size where every step is rounded to bfloat16: the distance of its neighbours beside 1."""


@dataclass(frozen=True)
class Case:
    """Inputs and outputs of one graph, by name.

    Attributes:
        stage: ``transformer``, ``decoder`` or ``text``.
        graph: which.
        inputs: what fills its inputs; see `whole`. Cases share those that they have in common.
        outputs: samples of its outputs, or of some of them; see `sample`.
        spread: how far torch's own outputs of each dtype differ at most where its latents are not
            quite the same, as `distance` has it. It is there if the graph rounds activations to few
            bits, where what one rounding does spreads, or computes in bfloat16.
    """

    stage: str
    graph: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    spread: Mapping[torch.dtype, float] = field(default_factory=dict)


def whole(held: Tensor, spec: TensorSpec) -> Tensor:
    """An input, from what golden values hold of it: its elements, repeated as often as needed."""
    flat, count = _bits(held).reshape(-1), torch.Size(spec.shape).numel()
    filled = flat.repeat(-(-count // len(flat)))[:count]
    return filled.view(held.dtype).reshape(spec.shape)


def sample(value: Tensor) -> Tensor:
    """What golden values hold of an output: all of it, or every n-th element, n odd."""
    every = -(-value.numel() // _SAMPLE)
    return value if every == 1 else value.reshape(-1)[:: every | 1].clone()


def distance(made: Tensor, held: Tensor, norms: bool = False) -> float:
    """How far an output is from the `sample` of another.

    In float32, the largest difference relative to the largest value; NaN or infinity where a value
    is not finite. In narrower dtypes, the share of the elements that differ.

    Args:
        made: the output.
        held: the sample.
        norms: whether in float32 and bfloat16 it is the difference's norm relative to the sample's,
            as for runtimes that round every step to bfloat16.
    """
    ours = made.reshape(-1)[:: -(-made.numel() // held.numel())]
    theirs = held.reshape(-1)
    if norms and held.dtype in (torch.float32, torch.bfloat16):
        apart = torch.linalg.vector_norm(ours.float() - theirs.float())
        whole = torch.linalg.vector_norm(theirs.float())
        return float(apart / whole) if apart else 0.0
    if held.dtype != torch.float32:
        return float((_bits(ours) != _bits(theirs)).float().mean())
    largest_difference = float((ours - theirs).abs().max())
    return largest_difference / float(theirs.abs().max()) if largest_difference else 0.0


def spoil(pages: Tensor, listed: Tensor) -> None:
    """Fill the pages that are not listed with bytes of 255: NaN, where the dtype has one."""
    pages.view(torch.uint8)[:, ~listed] = 255


def given(inputs: Mapping[str, Tensor], contract: Contract) -> dict[str, Tensor]:
    """All inputs of a graph, in order, from what golden values hold of them."""
    made = {name: whole(inputs[name], spec) for name, spec in contract.inputs.items()}
    for listed in contract.having(Role.LISTED):
        for name in contract.pages:
            spoil(made[name], made[listed])
    return made


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(value: Tensor) -> Tensor:
    """The same memory as integers, which torch compares and repeats whatever they stand for."""
    return value.view(_INTEGERS[value.dtype.itemsize])


@torch.no_grad()
def transformer_cases(program: Program, external: Program) -> Iterator[Case]:
    """Cases of a transformer: no page listed, one, some in another order, and all but one.

    The last is at the positions of a late chunk. Where a step makes the commit too, it has the
    cases of both.

    Args:
        program: a stream Program, with weights.
        external: the same after the pass externalise, and maybe join_commit.
    """
    module, draw = instantiate(program), _Draw(program)
    last = program.geometry.pages - 1
    moments = (((), 0), ((0,), 1), (tuple(reversed(range(1, last))), 2), (tuple(range(last)), LATE))
    for graph in program.graphs:
        runs = graph if graph in external.graphs else external.commit_graph
        own, contract = program.contract(graph), external.contract(runs)
        run = partial(run_external, partial(module, graph), own)
        cases = []
        spread: Mapping[torch.dtype, float] = {}
        for table, chunk in moments if own.having(Role.TABLE) else moments[:1]:
            here = places(program, table, last, chunk)
            if graph == "commit":
                here = {**here, Role.TIME: torch.zeros(1, program.geometry.chunk)}
            held = draw.inputs(contract, here)
            made = run(given(held, contract), here)
            outputs = {name: sample(made[name]) for name in contract.outputs if name in made}
            if _is_rough(program):
                found = _spread(partial(run, here=here), held, outputs, contract, draw)
                spread = {dtype: max(far, spread.get(dtype, 0)) for dtype, far in found.items()}
            cases.append(Case("transformer", runs, held, outputs))
        yield from (replace(case, spread=spread) for case in cases)


@torch.no_grad()
def plain_cases(stage: str, program: Program) -> Iterator[Case]:
    """A case of each graph of a decoder or a text encoder, which is the stage."""
    module, draw = instantiate(program), _Draw(program)
    for graph in program.graphs:
        contract = program.contract(graph)
        held = draw.inputs(contract, {})
        run = partial(module, graph)
        made = run(given(held, contract))
        outputs = {name: sample(value) for name, value in made.items()}
        rough = _is_rough(program)
        spread = _spread(run, held, outputs, contract, draw) if rough else {}
        yield Case(stage, graph, held, outputs, spread)


class _Draw:
    """Draws a model's inputs; pages, prompts and caches are the same in every case."""

    def __init__(self, program: Program) -> None:
        self._model: Spec = program.model
        self.norms = program.dtype is torch.bfloat16
        """Whether distances are those of norms."""
        self._noise = _BFLOAT16_NOISE if self.norms else _NOISE
        self._generator = torch.Generator().manual_seed(0)
        self._known: dict[str, Tensor] = {}

    def inputs(self, contract: Contract, places: Mapping[Role, Tensor]) -> dict[str, Tensor]:
        """What golden values hold of a graph's inputs; of some roles they are given."""
        made = contract.named(places)
        for name, spec in contract.inputs.items():
            if name in made:
                continue
            if spec.role in (Role.LATENTS, Role.TIME):
                made[name] = self._new(spec)
                continue
            if name not in self._known:
                self._known[name] = self._new(spec)
            made[name] = self._known[name]
        return made

    def noisy(self, value: Tensor) -> Tensor:
        """A value with a little noise."""
        noise = torch.randn(value.shape, generator=self._generator)
        return (value * (1 + self._noise * noise)).to(value.dtype)

    def _new(self, spec: TensorSpec) -> Tensor:
        count = torch.Size(spec.shape).numel()
        shape = (_PERIOD,) if count > _PERIOD else spec.shape
        uniform = torch.rand(shape, generator=self._generator)
        if spec.role is Role.TIME:
            return 1000 * uniform
        if spec.role is Role.TOKENS:
            assert isinstance(self._model, TextSpec)
            return (self._model.vocabulary * uniform).to(torch.int64)
        if spec.role is Role.TOKEN_MASK:
            return torch.arange(count).view(shape) <= count // 2
        if spec.role is Role.PAGE_CODES:
            return (256 * uniform).to(torch.uint8)
        if spec.role is Role.PAGE_SCALES:
            return (64 + 256 * uniform).to(spec.dtype)
        if spec.role is Role.PAGE_DECODE_SCALES:
            return (0.5 + uniform) / 500  # so that decoded values are near 1
        return torch.randn(shape, generator=self._generator).to(spec.dtype)


def places(program: Program, table: Sequence[int], slot: int, chunk: int) -> Mapping[Role, Tensor]:
    """What says where a chunk is, in the forms of a program and of its external graphs.

    Args:
        program: gives the sizes.
        table: the pages to attend to.
        slot: the page that a commit writes.
        chunk: its number in the video.
    """
    geometry, spec = program.geometry, program.spec
    positions = torch.arange(geometry.chunk, dtype=torch.float64) + chunk * geometry.chunk
    split = list(spec.rope_split)
    cos, sin = rope_table(positions, *geometry.grid(spec), split, spec.rope_theta)
    listed = torch.zeros(geometry.pages, dtype=torch.bool)
    listed[list(table)] = True
    return {
        Role.POSITIONS: positions,
        Role.TABLE: torch.tensor(table, dtype=torch.int64),
        Role.SLOT: torch.tensor([slot]),
        Role.ROTARY_COS: cos,
        Role.ROTARY_SIN: sin,
        Role.LISTED: listed,
    }


def run_external(
    graph: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    own: Contract,
    inputs: Mapping[str, Tensor],
    here: Mapping[Role, Tensor],
) -> dict[str, Tensor]:
    """What a program's graph makes of the inputs of its external one; pages that it writes too.

    Args:
        graph: runs the program's graph.
        own: its contract.
        inputs: of the external graph; they are left as they are.
        here: the same place as `places` gives it.
    """
    pages = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in own.pages.items()}
    pages |= {name: inputs[name].clone() for name in pages.keys() & inputs.keys()}
    every = {**inputs, **pages, **own.named(here)}
    made = graph({name: every[name] for name in own.inputs})
    if own.having(Role.SLOT):
        slot = int(here[Role.SLOT])
        made |= {page_output(name): page[:, slot] for name, page in pages.items()}
    return made


def _is_rough(program: Program) -> bool:
    """Whether activations are rounded to few bits, or all is to bfloat16."""
    if program.dtype is torch.bfloat16:
        return True
    ops = overload("nvfp4_quantise"), overload("row_pipeline")
    return any(
        op_of(node) == ops[0]
        or (op_of(node) == ops[1] and node.kwargs.get("to", "plain") != "plain")
        for _, graph in program.every_graph()
        for node in graph.nodes
    )


def _spread(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    held: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    contract: Contract,
    draw: _Draw,
) -> dict[torch.dtype, float]:
    """How far outputs of each dtype differ at most where latents, or text, have a little noise."""
    changed = {**contract.having(Role.LATENTS), **contract.having(Role.TEXT)}
    spread = dict.fromkeys((value.dtype for value in outputs.values()), 0.0)
    for _ in range(_DRAWS):
        noisy = {**held, **{name: draw.noisy(held[name]) for name in changed}}
        other = run(given(noisy, contract))
        for name, value in outputs.items():
            far = distance(other[name], value, draw.norms)
            spread[value.dtype] = max(far, spread[value.dtype])
    return spread
