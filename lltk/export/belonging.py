"""Whether the parts of a bundle belong together; checked before a graph is loaded.

A bundle comes from elsewhere. A checksum shows that a file is as it was written, and nothing of
what was written. So its files, models, contracts, recipe and golden values are held against each
other here, and whatever runs it may rely on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from lltk.export.facts import (
    GOLDEN,
    KERNELS,
    MANIFEST,
    TARGETS,
    TENSORRT_RTX,
    TEXT,
    TOKENIZER,
    TRANSFORMER,
    WEIGHTS,
    Facts,
)
from lltk.export.streams import contradictions, spec_text
from lltk.files.tensors import Place, tensor_places
from lltk.graph.contract import Contract, TensorSpec
from lltk.stream.runtimes.cubin import FACTS, read_kernels
from lltk.stream.runtimes.tensorrt_plugin import NAME

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

    from lltk.export.emitter import Dialect


def check_files(folder: Path, facts: Facts) -> None:
    """Check that a bundle has the files that its graphs need, and no others.

    Raises:
        ValueError: it has not.
    """
    wanted = {GOLDEN}
    for stage, each in facts.stages.items():
        wanted |= {f"{stage}/{graph}.onnx" for graph in each.graphs} | {f"{stage}/{WEIGHTS}"}
    if facts.text is None:
        wanted.add(f"{TEXT}/{TOKENIZER}")
    for engine in facts.engines.built if facts.engines else ():
        wanted |= {engine.file, engine.table}
    wanted |= set(facts.engines.kernels if facts.engines else ())
    if missing := sorted(wanted - facts.files.keys()):
        _refuse(folder, f"has no {missing[0]}")
    here = {str(each.relative_to(folder)) for each in folder.rglob("*") if not each.is_dir()}
    if extra := sorted((facts.files.keys() | here) - wanted - {MANIFEST.name}):
        raise ValueError(f"{folder}: {extra[0]} is no file of a bundle; move it elsewhere")
    whole = folder.resolve()
    links = {str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_symlink()}
    for name in (*sorted(wanted), *sorted(links)):
        if whole not in (folder / name).resolve().parents:
            raise ValueError(
                f"{folder / name}: is a link that leaves the bundle; copy the bundle with the "
                "files themselves, as `cp -rL` does"
            )


def check_bundle(folder: Path, facts: Facts) -> None:
    """Check the models of a bundle, and that it makes a stream.

    Raises:
        ValueError: a model reads a file but its weights, has a part that no export writes, or is
            not what the manifest says; or the manifest contradicts itself.
    """
    from lltk.export.emitter import OPSET, Dialect

    where = folder / MANIFEST.name
    if facts.target not in TARGETS:
        known = ", ".join(TARGETS)
        raise ValueError(
            f"{where}: is for {facts.target}, this lltk plays {known}; use a newer lltk"
        )
    if facts.opset != OPSET:
        raise ValueError(
            f"{where}: is of opset {facts.opset}, this lltk reads {OPSET}; export the recipe "
            "again, or use the lltk that made it"
        )
    if wrong := next(contradictions(facts), None):
        _refuse(where, wrong)
    if facts.engines and facts.engines.kernels:
        _check_kernels(folder, facts)
    for stage, each in facts.stages.items():
        places = tensor_places(folder / stage / WEIGHTS)
        compiled = facts.target == TENSORRT_RTX and stage != TEXT
        dialect = Dialect.TENSORRT if compiled else Dialect.ORT
        plugin = compiled and bool(facts.engines and facts.engines.kernels)
        for graph, described in each.graphs.items():
            path = folder / stage / f"{graph}.onnx"
            if wrong := next(
                _wrong(_model(path), described.contract, places, dialect, plugin), None
            ):
                _refuse(path, wrong)


def _check_kernels(folder: Path, facts: Facts) -> None:
    """Check that a plugin's kernels are whole, for the engines' GPU, and for the step's pages."""
    assert facts.engines is not None, "kernels are those of engines"
    held = read_kernels(folder / KERNELS)
    pages = facts.stages[TRANSFORMER].graphs["step"].contract.pages.values()
    codes = held.tensors.contract.inputs.get("k_codes")
    if held.sm != facts.engines.sm:
        _refuse(folder / KERNELS / FACTS, "is for another compute capability than the engines")
    if codes is None or codes.shape not in {each.shape for each in pages}:
        _refuse(folder / KERNELS / FACTS, "is for other pages than those of transformer/step")


def check_golden(folder: Path, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    """Check that every output has golden values, of the sizes and dtypes of its contract.

    Raises:
        ValueError: one has not.
    """
    where, told = folder / MANIFEST.name, set[tuple[str, str, str]]()
    for number, case in enumerate(facts.golden):
        stage = facts.stages.get(case.stage)
        if stage is None or case.graph not in stage.graphs:
            _refuse(where, f"golden case {number} is of no graph")
        told |= {(case.stage, case.graph, name) for name in case.outputs}
        contract = stage.graphs[case.graph].contract
        some = case.outputs and case.outputs.keys() <= contract.outputs.keys()
        if case.inputs.keys() != contract.inputs.keys() or not some:
            _refuse(where, f"golden case {number} has other inputs or outputs than its graph")
        for held, specs in (case.inputs, contract.inputs), (case.outputs, contract.outputs):
            for name, key in held.items():
                if not _holds(tensors.get(key), specs[name], specs is contract.outputs):
                    _refuse(where, f"golden case {number}: {name} has no value that fits")
        if case.bounds.keys() != case.outputs.keys():
            _refuse(where, f"golden case {number} has no bound for each output")
    for stage_name, each in facts.stages.items():
        for graph, own in each.graphs.items():
            for name in own.contract.outputs:
                if (stage_name, graph, name) not in told:
                    _refuse(where, f"{stage_name}/{graph} has no golden value of {name}")


def _refuse(where: Path, what: str) -> NoReturn:
    raise ValueError(f"{where}: {what}; {MANIFEST.remedy}")


def _holds(value: Tensor | None, spec: TensorSpec, sampled: bool) -> bool:
    """Whether a golden value can be of a tensor: its first elements, or its every n-th element."""
    count = math.prod(spec.shape)
    if value is None or value.dtype != spec.dtype or not 0 < (held := value.numel()) <= count:
        return False
    every = -(-count // held)
    return not sampled or held == -(-count // every)


def _model(path: Path) -> ModelProto:
    """A model without its parameters."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError:
        _refuse(path, "is no model in ONNX")


def _wrong(
    model: ModelProto,
    contract: Contract,
    places: Mapping[str, Place],
    dialect: Dialect,
    plugin: bool,
) -> Iterator[str]:
    """What is in a model that no export writes."""
    from lltk.export.emitter import IR_VERSION, OPSET, Dialect, described
    from lltk.export.tensorrt import DOMAIN, PLUGIN_DOMAIN, QUANTISE

    if not all(isinstance(name, str) for name in _names(model)):
        yield "has names that are no text"
    opsets = {each.domain: each.version for each in model.opset_import}
    extra, own = {}, set[tuple[str, str]]()
    if dialect is Dialect.TENSORRT:
        extra, own = {DOMAIN: 1}, {(DOMAIN, QUANTISE)}
    if plugin:
        extra, own = {**extra, PLUGIN_DOMAIN: 1}, own | {(PLUGIN_DOMAIN, NAME)}
    if (
        not {"": OPSET}.items() <= opsets.items() <= {"": OPSET, **extra}.items()
        or model.ir_version > IR_VERSION
    ):
        yield f"has opsets {opsets} and version {model.ir_version} of ONNX's format"
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        yield "holds more than a graph"
    for node in graph.node:
        if (node.domain, node.op_type) not in own and not _is_plain(node):
            yield f"node {node.name} ({node.op_type}) is no plain op of ONNX"
    for tensor in graph.initializer:
        if tensor.data_location or tensor.external_data:
            yield from _misplaced(tensor, places.get(tensor.name))
    for values, specs in (graph.input, contract.inputs), (graph.output, contract.outputs):
        found = {value.name: _described(value) for value in values}
        if list(found) != list(specs):
            yield f"has {', '.join(found)}, and not {', '.join(specs)} as the manifest says"
        for name, spec in specs.items():
            if found[name] != _described(described(name, spec, dialect)):
                yield f"{name} is not {spec_text(spec)} as the manifest says"


def _names(model: ModelProto) -> Iterator[str | bytes]:
    """All names in a model; a reader gives bytes for what is not UTF-8."""
    for opset in model.opset_import:
        yield opset.domain
    for node in model.graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for tensor in model.graph.initializer:
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for value in (*model.graph.input, *model.graph.output):
        yield value.name


def _is_plain(node: NodeProto) -> bool:
    """Whether a node is an op of ONNX itself with numbers and texts as attributes."""
    from onnx import AttributeProto, defs

    from lltk.export.emitter import OPSET

    plain = {
        getattr(AttributeProto, kind)
        for kind in ("INT", "FLOAT", "STRING", "INTS", "FLOATS", "STRINGS")
    }
    known = not node.domain and defs.has(node.op_type, OPSET)
    return known and all(each.type in plain for each in node.attribute)


def _misplaced(tensor: TensorProto, place: Place | None) -> Iterator[str]:
    """What is wrong with where a model says that a parameter is."""
    from lltk.export.emitter import TYPES, unpacked

    entries = [(each.key, each.value) for each in tensor.external_data]
    for key, value in entries:
        if key == "location" and value != WEIGHTS:
            yield f"reads {value!r}, and may read {WEIGHTS} alone"
    if place is None:
        yield f"reads {tensor.name}, which is not in {WEIGHTS}"
    else:
        size = place.end - place.start
        rest = {"location": WEIGHTS, "offset": str(place.start), "length": str(size)}
        kind = tensor.data_type, tuple(tensor.dims)
        held: list[tuple[int | None, tuple[int, ...]]] = [(TYPES.get(place.dtype), place.shape)]
        if place.dtype is torch.uint8 and place.shape:
            held.append(unpacked(place.shape))
        if sorted(entries) != sorted(rest.items()) or kind not in held:
            yield f"reads {tensor.name} otherwise than {WEIGHTS} has it"


def _described(value: ValueInfoProto) -> tuple[int, tuple[int, ...]]:
    """Type and shape of a model's input or output; a size that is not fixed is 0."""
    kind = value.type.tensor_type
    return kind.elem_type, tuple(each.dim_value for each in kind.shape.dim)
