"""A Program as a torch module that runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

from lltk.graph.contract import Role
from lltk.graph.edit import role_of
from lltk.graph.facts import Trainable
from lltk.graph.program import Program
from lltk.graph.recompute import recomputed
from lltk.graph.verify import WEIGHTS
from lltk.ops.implementations import check_device


class Block(nn.Module):
    """Owns one layer's parameters and runs the shared regions with them.

    FSDP shards it and activation checkpointing wraps it; the regions hold no parameters.
    """

    def __init__(self, regions: dict[Hashable, Callable[..., Any]]) -> None:
        super().__init__()
        self.recompute: bool | None = None
        """Whether its backward pass recomputes it, and then whether all but attention's results;
        None if it keeps everything."""
        self._regions = regions
        self._parameters_of: dict[str, tuple[Callable[[Any], Tensor], ...]] = {}

    def bind(self, region: str, parameters: Iterable[str]) -> None:
        """Say which of this layer's parameters a region takes, in order."""
        self._parameters_of[region] = tuple(operator.attrgetter(name) for name in parameters)

    def forward(self, region: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a region with this layer's parameters."""
        recomputes = self.recompute is not None and torch.is_grad_enabled()
        run = self._regions[(region, self.recompute) if recomputes else region]
        parameters = (get(self) for get in self._parameters_of[region])
        result: tuple[Tensor, ...] = run(*inputs, *parameters)
        return result


class ProgramModule(nn.Module):
    """Runs a Program's graphs over one set of parameters, which have diffusers' names.

    ``module("step", {"table": table, …})`` returns the graph's outputs by name.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device,
        dtype: torch.dtype | None,
        held: Mapping[str, nn.Parameter],
    ) -> None:
        super().__init__()
        self.program = program
        """What it runs."""
        self.quantise_by: Callable[[], dict[str, Tensor]] | None = None
        """What quantises weights in place of the graph that does, where ranks have parts of them;
        None where this module has the weights."""
        self._regions: dict[Hashable, Any] = {
            name: fx.GraphModule(nn.Module(), region.graph, class_name=name)
            for name, region in program.regions.items()
        }
        self._table_readers = {
            name: _table_readers(program, name)
            for name, region in program.regions.items()
            if not region.once_a_prompt
        }
        self._graphs: dict[str, Callable[..., dict[str, Tensor]]] = {}
        self.blocks_by_path = self._make_blocks(program)
        trainable = program.fact(Trainable).names
        for name, tensor in program.weights.items():
            if name in held:
                _assign(self, name, held[name])
                continue
            run_dtype = program.run_dtype(name)
            if dtype is not None and run_dtype.is_floating_point and run_dtype.itemsize > 1:
                run_dtype = dtype
            trains = trainable is None or name in trainable
            layout = program.memory_format(name)
            value = tensor.to(device=device, dtype=run_dtype, copy=True, memory_format=layout)
            parameter = nn.Parameter(value, requires_grad=trains and _differentiable(value))
            _assign(self, name, parameter)
        for name, tensor in program.constants.items():
            _assign(self, name, tensor.to(device))
        for name, graph in program.graphs.items():
            made = fx.GraphModule(self, _consuming(graph), class_name=name)
            self._graphs[name] = type(made).forward

    def _make_blocks(self, program: Program) -> dict[str, Block]:
        blocks: dict[str, Block] = {}
        for graph in program.graphs.values():
            for node in graph.find_nodes(op="call_module"):
                owner, region = str(node.target), str(node.args[0])
                if owner not in blocks:
                    blocks[owner] = Block(self._regions)
                    _assign(self, owner, blocks[owner])
                blocks[owner].bind(region, program.regions[region].parameters)
        return blocks

    def forward(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run a named graph.

        Args:
            graph: its name.
            inputs: all that the graph reads, by name. The call empties the dict, so that an input
                nobody else holds is freed after its last use. (A compiled graph holds its inputs to
                its end.) Pass ``dict(inputs)`` to keep yours.

        Returns:
            The graph's outputs, by name.
        """
        result = self._graphs[graph](self, inputs)
        assert not inputs, f"{graph} reads no {', '.join(inputs)}"
        return result

    @torch.no_grad()
    def quantised_weights(self) -> dict[str, Tensor]:
        """Quantise the weights for the graphs that read them so; the inputs by name.

        Empty where no graph reads quantised weights as inputs.
        """
        if WEIGHTS not in self._graphs:
            return {}
        return self(WEIGHTS, {}) if self.quantise_by is None else self.quantise_by()

    def recompute_blocks(self, keep_attention: int = 0) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Call it before `compile_blocks`.

        Args:
            keep_attention: how many blocks, the last ones, keep what attention gives.
        """
        for name in [key for key in self._regions if isinstance(key, str)]:
            for keep in (False, True):
                self._regions[name, keep] = recomputed(self._regions[name], keep)
        blocks = list(self.blocks_by_path.values())
        for index, block in enumerate(blocks):
            block.recompute = len(blocks) - index <= keep_attention

    def compile_blocks(self, **options: Any) -> None:
        """Compile the regions. Layers that share a region share its compiled code.

        What only the prologue runs, which is once a prompt, stays as it is. So do the ops that read
        the page table: it grows while the window fills, and every length would be compiled anew.

        Args:
            options: for torch.compile.
        """
        for name, readers in self._table_readers.items():
            if readers:
                self._regions[name] = _compiled_around(self._regions[name], readers, options)
                continue
            for each in (name, (name, False), (name, True)):
                if each in self._regions:
                    self._regions[each] = torch.compile(self._regions[each], **options)

    def compile_graph(self, name: str, **options: Any) -> None:
        """Compile a named graph as a whole.

        Args:
            name: of a graph without regions.
            options: for torch.compile.
        """
        self._graphs[name] = torch.compile(self._graphs[name], fullgraph=True, **options)


def instantiate(
    program: Program,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    held: Mapping[str, nn.Parameter] | None = None,
) -> ProgramModule:
    """Make a Program runnable, over copies of its weights.

    Args:
        program: at any stage, with real weights.
        device: where it runs.
        dtype: runs every parameter in this dtype, for checks in float64; by default each runs in
            the dtype that the Program says.
        held: parameters of other modules, by name, that it runs over instead of copies of its own;
            see `same_weights`.

    Raises:
        ValueError: the weights are absent, or the device cannot run the chosen implementations.
    """
    check_device(program.implementations, torch.device(device))
    absent = [name for name, tensor in program.weights.items() if tensor.is_meta]
    if absent:
        raise ValueError(
            f"the program has no weights ({len(absent)} absent, first {absent[0]}); transform it "
            "from a recipe with model.checkpoint, or load them with with_weights"
        )
    return ProgramModule(program, torch.device(device), dtype, held or {})


def same_weights(program: Program, other: Program) -> frozenset[str]:
    """The parameters that two Programs' modules can share, by name, so that one holds them.

    They train in neither, have the same value in both, and run in the same dtype. Of Programs
    without weights, those of one checkpoint have the same values.
    """
    trains = [each.fact(Trainable).names for each in (program, other)]
    if None in trains:
        return frozenset()
    files = [each.recipe["model"]["checkpoint"] for each in (program, other)]
    names = program.weights.keys() & other.weights.keys() - frozenset().union(*filter(None, trains))
    return frozenset(
        name
        for name in names
        if program.run_dtype(name) == other.run_dtype(name)
        and _equal(program.weights[name], other.weights[name], files[0] == files[1])
    )


def _equal(ours: Tensor, theirs: Tensor, from_one_file: bool) -> bool:
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    if ours.is_meta or theirs.is_meta:
        return from_one_file
    as_bytes = ours.dtype.itemsize == 1  # torch compares no floats of 8 bits
    pair = (each.view(torch.uint8) if as_bytes else each for each in (ours, theirs))
    return torch.equal(*pair)


def _table_readers(program: Program, region: str) -> frozenset[str]:
    """The nodes of a region that read the page table, by name."""
    call = next(
        node
        for graph in program.graphs.values()
        for node in graph.find_nodes(op="call_module")
        if node.args[0] == region
    )
    inputs = program.regions[region].graph.find_nodes(op="placeholder")
    given = zip(inputs, call.args[1:], strict=False)  # parameters follow
    tables = [own for own, value in given if role_of(value) is Role.TABLE]
    return frozenset(user.name for table in tables for user in table.users)


def _compiled_around(
    region: fx.GraphModule, readers: Collection[str], options: Mapping[str, Any]
) -> fx.GraphModule:
    """The region in parts: what lies between some nodes is compiled, the nodes are not."""
    parts: dict[str, int] = {}
    part = 0
    for node in region.graph.nodes:
        own = node.name in readers
        part += own
        parts[node.name] = part
        part += own
    made = split_module(region, region, lambda node: parts[node.name])
    kept = {f"submod_{parts[name]}" for name in readers}
    for name, module in list(made.named_children()):
        if name not in kept:
            setattr(made, name, torch.compile(module, **options))
    return made


def _consuming(graph: fx.Graph) -> fx.Graph:
    """The graph as a function of one dict of its inputs, from which it takes each."""
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    given = made.placeholder("given")
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = made.call_method("pop", (given, node.target))
        else:
            copies[node] = made.node_copy(node, copies.__getitem__)
    return made


def _differentiable(value: Tensor) -> bool:
    """Whether gradients can flow to a parameter; packed weights are integers or 8-bit floats."""
    return value.is_floating_point() and value.itemsize > 1


def _assign(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Put a module, parameter or buffer at a dotted path."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Module):
        root.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value, persistent=False)
