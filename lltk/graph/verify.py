"""What every stage promises, checked after every pass. A failure is a defect of that pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from lltk.graph.contract import page_output
from lltk.graph.edit import module_of, op_of, output
from lltk.graph.program import Program
from lltk.graph.spec import ModelSpec
from lltk.graph.stages import Stage
from lltk.ops.implementations import op_called, ops_with_choices

aten = torch.ops.aten

_NO_OPS = {
    aten._assert_tensor_metadata.default: "a metadata check",
    aten.type_as.default: "a data-free dependency (type_as)",
    aten.to.dtype_layout: "a cast with a layout",
}
CAUSAL_GRAPHS = {
    "train": {"train"},
    "score": {"score"},
    "stream": {"prologue", "step", "commit"},
    "reference": {"reference"},
}

WEIGHTS = "weights"
"""The graph that quantises weights, which other graphs read as inputs."""
STEP_HIGH = "step_high"
"""The graph of a denoising pass in high precision, beside a quantised ``step``."""


def verify(program: Program) -> None:
    """Check what the Program's stage and those before it promise.

    Raises:
        ValueError: a promise is broken; names the node, its module and what is required.
    """
    for name, graph in program.every_graph():
        _check_attributes(program, name, graph)
    for stage, check in _CHECKS.items():
        if program.stage >= stage and (
            stage in _WITHOUT_BLOCKS or isinstance(program.model, ModelSpec)
        ):
            check(program)


def _check_attributes(program: Program, name: str, graph: fx.Graph) -> None:
    known = program.weights.keys() | program.constants.keys()
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in known:
            raise ValueError(f"{name}: {node.target} is neither a weight nor a constant")
    if name in program.graphs:
        values = output(graph).args[0]
        if not isinstance(values, dict):
            raise ValueError(f"{name}: the output is {type(values).__name__}, not named values")
        inputs = {str(n.target) for n in graph.find_nodes(op="placeholder")}
        mutated = any(is_mutation(node) for node in graph.nodes)
        if not values and not mutated:
            raise ValueError(f"{name}: gives nothing and writes nothing")
        if both := inputs & values.keys():
            raise ValueError(f"{name}: {sorted(both)} name an input and an output")


def is_mutation(node: fx.Node) -> bool:
    """Whether a call writes to one of its arguments."""
    schema = getattr(op_of(node), "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _canonical(program: Program) -> None:
    for name, graph in program.every_graph():
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            what = _NO_OPS.get(node.target)
            if is_mutation(node) and not str(op_of(node)).startswith("lltk."):
                what = "a mutation"
            elif node.target is aten.to.dtype and _same_dtype(node):
                what = "a cast that changes nothing"
            elif "device" in node.kwargs:
                what = f"a fixed device ({node.kwargs['device']})"
            if what:
                raise ValueError(
                    f"{name}: {node.name} ({module_of(node) or 'root'}) is {what}; "
                    "a canonical graph has none"
                )


def _same_dtype(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: Tensor = source.meta["val"]
    return value.dtype == node.meta["val"].dtype


def _causal(program: Program) -> None:
    wanted = CAUSAL_GRAPHS[program.kind]
    if program.commit_graph != "commit":
        wanted = wanted - {"commit"}
    if program.graphs.keys() - {WEIGHTS, STEP_HIGH} != wanted:
        raise ValueError(
            f"a causal {program.kind} program has the graphs {sorted(wanted)}, "
            f"this one has {sorted(program.graphs)}"
        )
    if program.kind == "stream":
        _same_pages(program)
    if program.kind == "reference":
        return  # dense by design
    for name, graph in program.every_graph():
        for node in graph.find_nodes(
            op="call_function", target=aten.scaled_dot_product_attention.default
        ):
            layer = program.spec.layer_of(module_of(node), program.spec.self_attention)
            if layer is not None:
                raise ValueError(
                    f"{name}: {node.name} ({module_of(node)}) still attends to every frame"
                )


def _same_pages(program: Program) -> None:
    read, commit = program.pages, program.contract(program.commit_graph)
    given = {name: spec for name, spec in read.items() if page_output(name) in commit.outputs}
    if differing := dict(read.items() ^ (commit.pages | given).items()):
        raise ValueError(f"step and commit differ in their pages: {', '.join(sorted(differing))}")


def _regional(program: Program) -> None:
    called = set()
    for name, graph in program.graphs.items():
        for node in graph.nodes:
            inside = program.spec.layer_of(module_of(node))
            if node.op == "call_module":
                called.add(node.args[0])
                region = program.regions.get(str(node.args[0]))
                if region is None or len(node.args) != 1 + len(region.inputs):
                    raise ValueError(f"{name}: {node.name} does not fit region {node.args[0]}")
            elif node.op == "call_function" and inside is not None and not is_outer(node):
                raise ValueError(f"{name}: {node.name} ({module_of(node)}) is outside its region")
    if unused := program.regions.keys() - called:
        raise ValueError(f"no graph calls the regions {sorted(unused)}")


def is_outer(node: fx.Node) -> bool:
    """Whether a node of a block stays outside of its region.

    Such nodes write pages, or read the results of the region's call.
    """
    return is_mutation(node) or any(s.op == "call_module" for s in node.all_input_nodes)


def _captured(program: Program) -> None:
    if program.stage is not Stage.CAPTURED:
        return
    for name in program.graphs:
        contract = program.contract(name)
        found = sorted(str(spec.role) for spec in contract.inputs.values()), set(contract.outputs)
        wanted = sorted(program.model.captured_roles(name)), program.model.captured_outputs
        if found != wanted:
            raise ValueError(f"{name}: inputs and outputs are {found}, the spec says {wanted}")


def _lowered(program: Program) -> None:
    waiting = {op for op in ops_with_choices() if program.implementations.get(op) != "reference"}
    for name, graph in program.every_graph():
        for node in graph.nodes:
            if (op := op_called(node.target)) in waiting:
                raise ValueError(f"{name}: {op} has no implementation")


_CHECKS: dict[Stage, Callable[[Program], None]] = {
    Stage.CAPTURED: _captured,
    Stage.CANONICAL: _canonical,
    Stage.CAUSAL: _causal,
    Stage.REGIONAL: _regional,
    Stage.LOWERED: _lowered,
}
_WITHOUT_BLOCKS = (Stage.CAPTURED, Stage.CANONICAL, Stage.LOWERED)
"""The stages of models that no pass makes causal or cuts into regions."""
