"""The runtime over torch modules, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lltk.graph.contract import Role
from lltk.graph.diagnose import first_bad_node
from lltk.graph.edit import op_of
from lltk.graph.facts import HighSteps, Ranks
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.graph.verify import STEP_HIGH
from lltk.ops.implementations import overload
from lltk.parallel.exchange import all_parts
from lltk.parallel.groups import SEQUENCE
from lltk.parallel.transfer import upload
from lltk.stream.lanes import Lane
from lltk.stream.runtimes.cuda_graph import CudaGraphs
from lltk.stream.runtimes.paged import PagedRuntime, check_indices

DECODE_PAGE = overload("fp8_decode_page")


class TorchRuntime(PagedRuntime):
    """Runs a stream Program; see `lltk.stream.runtimes.Runtime`.

    Args:
        program: a causal stream Program (or later).
        module: the same Program, runnable; runtimes may share it.
        cuda_graphs: whether passes are recorded once for each count of listed pages, and then
            replayed; without gradients.
        lane: where the calls take turns; by default a lane for this runtime alone.

    Raises:
        ValueError: CUDA graphs where there is no GPU.
    """

    def __init__(
        self,
        program: Program,
        module: ProgramModule,
        cuda_graphs: bool = False,
        lane: Lane | None = None,
    ) -> None:
        lane = lane or Lane(next(module.parameters()).device)
        super().__init__(program.geometry, program.spec, program.dtype, lane, program.pages)
        self._program, self._module = program, module
        self._high_steps = program.fact(HighSteps).indices
        self._ranks = program.fact(Ranks).count
        self._contracts = {name: program.contract(name) for name in program.graphs}
        self._turns_pages = program.turns_pages
        self._slots = torch.arange(program.geometry.pages, device=lane.device)
        self._listed: tuple[tuple[int, ...], Tensor] | None = None
        self._text: dict[str, Tensor] = {}
        self._graphs = CudaGraphs(lane) if cuda_graphs else None

    @property
    def turns_pages(self) -> bool:
        return self._turns_pages

    def set_prompt(self, text: Tensor) -> None:
        made = self._module("prologue", self._contracts["prologue"].named({Role.TEXT: text}))
        held = self._text
        if not held or torch.is_grad_enabled() or any(t.requires_grad for t in held.values()):
            self._text = made  # the first prompt, or one that gradients may need
            return
        for name, buffer in held.items():
            buffer.copy_(made[name])

    def step(
        self,
        latents: Tensor,
        timestep: Tensor,
        positions: Tensor,
        table: Sequence[int],
        index: int = 0,
    ) -> Tensor:
        graph, inputs = self._step_inputs(latents, timestep, positions, index)
        return self._run(graph, inputs, table)[self._spec.output]

    def first_bad(
        self,
        latents: Tensor,
        timestep: Tensor,
        positions: Tensor,
        table: Sequence[int],
        index: int = 0,
    ) -> str | None:
        graph, inputs = self._step_inputs(latents, timestep, positions, index)
        given = self._given(graph, self._moving(graph, inputs, table))
        return first_bad_node(self._program, self._module, graph, given)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        slot_name = self._contracts["commit"].name(Role.SLOT)
        decodings = [n for n in self._program.graphs["commit"].nodes if op_of(n) is DECODE_PAGE]
        for slot in self._slots.split(1):
            given = {**self._pages, slot_name: slot}
            for node in decodings:
                assert callable(node.target)
                node.target(*(given[str(each.target)] for each in node.all_input_nodes))

    def _step_inputs(
        self, latents: Tensor, timestep: Tensor, positions: Tensor, index: int
    ) -> tuple[str, dict[Role, Tensor]]:
        """The graph that makes a pass, and what it reads besides prompt and cache."""
        inputs = {Role.LATENTS: latents, Role.TIME: timestep, Role.POSITIONS: positions}
        return STEP_HIGH if index in self._high_steps else "step", inputs

    def commit(self, latents: Tensor, positions: Tensor, table: Sequence[int], slot: int) -> None:
        self._run("commit", self._commit_inputs(latents, positions, table, slot), table)

    def magnitudes(self, slot: int) -> Tensor:
        found = super().magnitudes(slot)
        return all_parts(found, 0, self._ranks, SEQUENCE) if self._ranks > 1 else found

    def first_bad_commit(
        self,
        latents: Tensor,
        positions: Tensor,
        table: Sequence[int],
        slot: int,
        magnitudes: Tensor,
    ) -> str:
        inputs = self._commit_inputs(latents, positions, table, slot)
        given = self._given("commit", self._moving("commit", inputs, table))
        # Pages that the table does not list may be broken, and so may the page that it writes.
        if found := first_bad_node(self._program, self._module, "commit", given, self._pages):
            return found
        first = int(magnitudes.isfinite().logical_not().nonzero()[0])
        rank, index = divmod(first, len(self._telling))
        of_rank = f" of rank {rank}" if self._ranks > 1 else ""
        return f"{list(self._telling)[index]}{of_rank}"

    def _commit_inputs(
        self, latents: Tensor, positions: Tensor, table: Sequence[int], slot: int
    ) -> dict[Role, Tensor]:
        """What a commit reads besides prompt and cache."""
        check_indices((*table, slot), self._geometry.pages)
        own = self._slots[slot : slot + 1]
        return {Role.LATENTS: latents, Role.POSITIONS: positions, Role.SLOT: own}

    def _run(
        self, graph: str, inputs: dict[Role, Tensor], table: Sequence[int]
    ) -> dict[str, Tensor]:
        moving = self._moving(graph, inputs, table)
        if self._graphs is None:
            return self._call(graph, moving)
        return self._graphs((graph, len(table)), partial(self._call, graph), moving)

    def _call(self, graph: str, moving: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._module(graph, self._given(graph, moving))

    def _moving(
        self, graph: str, inputs: dict[Role, Tensor], table: Sequence[int]
    ) -> dict[str, Tensor]:
        """The inputs of a graph that change from call to call, by name."""
        listed = self._indices(tuple(table))
        if self._turns_pages:
            inputs = {**inputs, **self._placed(inputs[Role.POSITIONS], listed)}
        return self._contracts[graph].named({**inputs, Role.TABLE: listed})

    def _placed(self, positions: Tensor, listed: Tensor) -> dict[Role, Tensor]:
        """The positions of the chunk in flight, and of all pages: 0 where a page is not listed."""
        own, count = self._geometry.chunk, len(listed)
        assert len(positions) == (count + 1) * own, (
            "positions are not the listed pages' and its own"
        )
        pages = positions.new_zeros(self._geometry.pages, own)
        pages[listed] = positions[:-own].view(count, own)
        return {Role.POSITIONS: positions[-own:], Role.PAGE_POSITIONS: pages.flatten()}

    def _given(self, graph: str, moving: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All inputs of a graph by name: prompt and cache too."""
        every = {**moving, **self._text, **self._pages}
        return {name: every[name] for name in self._contracts[graph].inputs}

    def _indices(self, table: tuple[int, ...]) -> Tensor:
        """The table on the device; a chunk's passes share it."""
        if self._listed is None or self._listed[0] != table:
            check_indices(table, self._geometry.pages)
            indices = torch.tensor(table, dtype=torch.int64)
            self._listed = table, upload(indices, self.device)
        return self._listed[1]
