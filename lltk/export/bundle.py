"""Bundles: folders that hold a stream's graphs in ONNX, their weights and golden values.

::

    manifest.json               what the bundle is, and the SHA-256 of every file
    transformer/*.onnx          prologue, step, commit
    transformer/weights.safetensors
    decoder/*.onnx              first, step
    decoder/weights.safetensors
    text/encode.onnx            the text encoder, unless it is kept outside
    text/weights.safetensors
    text/tokenizer.json
    golden.safetensors          inputs of every graph, and what torch made of them

A bundle is written once its graphs gave the golden values in ONNX Runtime, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lltk import __version__
from lltk.export.belonging import check_bundle, check_files, check_golden
from lltk.export.facts import (
    BUNDLE,
    GOLDEN,
    MANIFEST,
    TEXT,
    TOKENIZER,
    Facts,
    GoldenFacts,
    GraphFacts,
    StageFacts,
    TensorFacts,
    TextFacts,
)
from lltk.files.outputs import Output, check_outputs
from lltk.files.tensors import read_tensors, write_tensors
from lltk.files.writing import NewFolder, standing, whole_folder
from lltk.graph.contract import TensorSpec
from lltk.graph.facts import HighSteps
from lltk.graph.fingerprint import fingerprint
from lltk.graph.memory import activations
from lltk.graph.recipe import validated
from lltk.graph.spec import DecoderSpec, ModelSpec, TextSpec
from lltk.graph.text import dtype_name
from lltk.stream.bundle_text import read_tokenizer
from lltk.stream.runtimes.onnx_graph import OnnxGraph, check_installed

if TYPE_CHECKING:
    from onnx import ModelProto

    from lltk.export.golden import Case
    from lltk.export.weights import WeightPool
    from lltk.graph.program import Program

BOUND = 1e-5
"""How far an output may be from torch's, relative to its largest value."""
FLIPPED = 0.01
"""The share of elements that may differ from torch's where they are rounded to 16 bits or fewer."""
_SPREADS = 2
"""How many times torch's own spread an output may be from torch's, where there is one."""
_VERSIONS = ("onnx", "onnxruntime", "torch", "diffusers")


@dataclass(frozen=True)
class Difference:
    """How far ONNX Runtime is from a golden value.

    Attributes:
        case: number of the case.
        graph: ``transformer/step`` or the like.
        output: the one that is farthest beside its bound.
        relative: how far, as `distance` has it.
        bound: how far it may be.
    """

    case: int
    graph: str
    output: str
    relative: float
    bound: float

    @property
    def is_within(self) -> bool:
        """Whether it is no farther than it may be."""
        return self.relative <= self.bound

    def plain(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        return asdict(self)

    def row(self) -> dict[str, str]:
        """As a row of a table."""
        return {
            "graph": self.graph,
            "farthest output": self.output,
            "largest difference": f"{self.relative:.1e}",
            "allowed": f"{self.bound:.1e}",
        }


def write_bundle(
    path: Path,
    programs: Mapping[str, Program],
    cases: Iterable[Case],
    recipe: Mapping[str, Any],
    rotary: Mapping[str, Any],
    sampler: Sequence[Sequence[float]],
    text: str | TextFacts,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda what: None,
) -> list[Difference]:
    """Write a bundle, whole or not at all, and compare its golden values before it is there.

    Args:
        path: a new or empty folder, or a bundle, which is replaced.
        programs: by stage, with weights; their graphs mutate nothing.
        cases: golden values for each graph.
        recipe, rotary, sampler: see `Facts`.
        text: the tokenizer of the stage ``text``, as JSON; or the encoder that stays outside.
        overwrite: whether a folder that holds anything else may be replaced.
        note: is told what is being done.

    Returns:
        How far each case is from its golden values.

    Raises:
        ValueError: an op has no form in ONNX, or an output is farther than it may be.
        OSError: the folder cannot be written.
    """
    check_installed()
    from lltk.export.emitter import OPSET

    check_outputs([Output(path, BUNDLE)], [], overwrite)
    with whole_folder(path) as folder:
        stages = {}
        for stage, program in programs.items():
            note(f"writing the {stage}")
            stages[stage] = _write_stage(folder, stage, program)
        if isinstance(text, str):
            folder.write_text(f"text/{TOKENIZER}", text)
        note("computing golden values")
        golden = _write_golden(folder, cases)
        note("comparing golden values")
        tensors, _ = read_tensors(folder.path / GOLDEN)
        found = list(_compared(folder.path, stages, golden, tensors))
        if bad := [each for each in found if not each.is_within]:
            raise ValueError(f"export: {_said(bad[0])}; the bundle is not written")
        versions = {name: version(name) for name in _VERSIONS}
        facts = {
            "target": "ort", "opset": OPSET, "versions": {"lltk": __version__, **versions},
            "recipe": recipe, "rotary": rotary, "sampler": sampler,
            "stages": {stage: each.model_dump(mode="json") for stage, each in stages.items()},
            "text": text.model_dump() if isinstance(text, TextFacts) else None,
            "golden": [case.model_dump() for case in golden],
        }  # fmt: skip
        MANIFEST.write(folder, facts)
    return found


def read_bundle(path: Path) -> Facts:
    """What a bundle's manifest says, once every file has been checked.

    Raises:
        ValueError: it is no bundle, of another format or for another runtime; or a file is missing,
            was changed, lies outside of the folder, or is none of a bundle's.
    """
    where = standing(path)
    if not (where / MANIFEST.name).is_file():
        raise ValueError(
            f"{where}: has no {MANIFEST.name}, so it is not a bundle of lltk's, or not whole; "
            f"make one with: lltk export RECIPE --target ort -o {path}"
        )
    content = MANIFEST.read(path)
    try:
        facts = validated(Facts, content, str(where / MANIFEST.name))
    except ValueError as error:
        raise ValueError(f"{str(error).split('; ')[0]}; {MANIFEST.remedy}") from error
    check_files(where, facts)
    return facts


def verify_bundle(path: Path) -> list[Difference]:
    """Check a bundle whole, then compare its golden values through ONNX Runtime.

    Raises:
        ValueError: as `read_bundle` and `check_bundle`; or an output is farther from its golden
            value than the manifest says, with stage, graph and output.
    """
    facts = read_bundle(path)
    check_installed()
    where = standing(path)
    check_bundle(where, facts)
    tensors, _ = read_tensors(where / GOLDEN)
    check_golden(where, facts, tensors)
    if facts.text is None and isinstance(text := facts.stages[TEXT].model, TextSpec):
        read_tokenizer(where / TEXT / TOKENIZER, text.vocabulary)
    found = list(_compared(where, facts.stages, facts.golden, tensors))
    if bad := [each for each in found if not each.is_within]:
        raise ValueError(
            f"{path}: {_said(bad[0])}; this ONNX Runtime computes something else than "
            "the one that made the bundle: use the versions that `lltk bundle show` lists"
        )
    return found


def emit(program: Program) -> tuple[WeightPool, dict[str, ModelProto]]:
    """The models of a Program's graphs, and the parameters that they read.

    Raises:
        ValueError: an op has no form in ONNX.
    """
    from lltk.export.emitter import Emitter
    from lltk.export.weights import WeightPool

    pool = WeightPool()
    return pool, {name: Emitter(program, pool).emit(name) for name in program.graphs}


def _write_stage(folder: NewFolder, stage: str, program: Program) -> StageFacts:
    pool, models = emit(program)
    pool.write(folder, stage, models)
    assert isinstance(program.model, ModelSpec | DecoderSpec | TextSpec)
    contracts = {name: program.contract(name) for name in program.graphs}
    graphs = {
        name: GraphFacts(inputs=_facts(each.inputs), outputs=_facts(each.outputs))
        for name, each in contracts.items()
    }
    return StageFacts(
        fingerprint=fingerprint(program),
        model=program.model,
        high_steps=tuple(sorted(program.fact(HighSteps).indices)),
        activations=activations(program),
        log=list(program.log),
        graphs=graphs,
    )


def _facts(specs: Mapping[str, TensorSpec]) -> dict[str, TensorFacts]:
    return {
        name: TensorFacts(shape=spec.shape, dtype=dtype_name(spec.dtype), role=spec.role)
        for name, spec in specs.items()
    }


def _write_golden(folder: NewFolder, cases: Iterable[Case]) -> list[GoldenFacts]:
    """Write the tensors of all cases, each once."""
    held: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    facts = []

    def noted(number: int, given: Mapping[str, Tensor]) -> dict[str, str]:
        names = {}
        for name, tensor in given.items():
            known = held.setdefault(id(tensor), f"{number}.{name}")
            tensors[known] = tensor
            names[name] = known
        return names

    for number, case in enumerate(cases):
        inputs, outputs = noted(number, case.inputs), noted(number, case.outputs)
        bounds = {
            name: bound_of(value, case.spread.get(value.dtype, 0))
            for name, value in case.outputs.items()
        }
        facts.append(
            GoldenFacts(
                stage=case.stage, graph=case.graph, inputs=inputs, outputs=outputs, bounds=bounds
            )
        )
    with folder.file(GOLDEN) as file:
        write_tensors(file, tensors, {})
    return facts


def bound_of(output: Tensor, spread: float) -> float:
    """How far an output may be from its golden value; where that is a share, less than all.

    Args:
        output: the value, whose dtype counts.
        spread: how far torch is from itself; 0 where nothing is rounded to few bits.
    """
    if output.dtype is torch.float32:
        return max(BOUND, _SPREADS * spread)
    return max(FLIPPED, min(_SPREADS * spread, (1 + spread) / 2))


def _compared(
    folder: Path,
    stages: Mapping[str, StageFacts],
    golden: Sequence[GoldenFacts],
    tensors: Mapping[str, Tensor],
) -> Iterator[Difference]:
    """Run each golden case."""
    from lltk.export.golden import given

    for (stage, graph), cases in groupby(
        enumerate(golden), key=lambda case: (case[1].stage, case[1].graph)
    ):
        contract = stages[stage].graphs[graph].contract
        run = OnnxGraph(folder / stage / f"{graph}.onnx", contract)
        for number, case in cases:
            held = {name: tensors[of] for name, of in case.inputs.items()}
            yield _farthest(number, case, run(given(held, contract)), tensors)


def _farthest(
    number: int, case: GoldenFacts, made: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Difference:
    """The output that is farthest from its golden value, beside its bound."""
    from lltk.export.golden import distance

    each = {name: distance(made[name], tensors[of]) for name, of in case.outputs.items()}
    share = {name: far / case.bounds[name] for name, far in each.items()}
    worst = max(share, key=lambda name: math.inf if math.isnan(share[name]) else share[name])
    graph = f"{case.stage}/{case.graph}"
    return Difference(number, graph, worst, each[worst], case.bounds[worst])


def _said(bad: Difference) -> str:
    return (
        f"{bad.graph} (golden case {bad.case}): output {bad.output} is {bad.relative:.1e} from "
        f"torch's, and may be {bad.bound:.0e}"
    )
