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
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from lltk import __version__
from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind, Output, check_outputs
from lltk.files.tensors import read_tensors, write_tensors
from lltk.files.writing import NewFolder, standing, whole_folder
from lltk.graph.contract import Contract, Role, TensorSpec
from lltk.graph.facts import HighSteps
from lltk.graph.fingerprint import fingerprint
from lltk.graph.memory import activations
from lltk.graph.text import dtype_name, dtype_named
from lltk.stream.runtimes.onnx_graph import OnnxGraph, check_installed

if TYPE_CHECKING:
    from onnx import ModelProto

    from lltk.export.golden import Case
    from lltk.export.weights import WeightPool
    from lltk.graph.program import Program

MANIFEST = Manifest(
    "manifest.json", "a bundle", format=1, remedy="restore it, or export the recipe again"
)
BUNDLE = Kind("a bundle", MANIFEST.recognises, folder=True)
GOLDEN = "golden.safetensors"
TOKENIZER = "tokenizer.json"
BOUND = 1e-5
"""How far an output may be from torch's, relative to its largest value."""
FLIPPED = 0.01
"""The share of elements that may differ from torch's where they are rounded to 16 bits or fewer."""
_SPREADS = 2
"""How many times torch's own spread an output may be from torch's, where there is one."""
_VERSIONS = ("onnx", "onnxruntime", "torch", "diffusers")


class TensorFacts(BaseModel):
    """An input or output of a graph."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int, ...]
    dtype: str
    role: Role | None = None

    @property
    def spec(self) -> TensorSpec:
        """The same as code has it."""
        return TensorSpec(self.shape, dtype_named(self.dtype), self.role)


class GraphFacts(BaseModel):
    """Inputs and outputs of a graph, by name and in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: dict[str, TensorFacts]
    outputs: dict[str, TensorFacts]

    @property
    def contract(self) -> Contract:
        """The graph's contract."""
        return Contract(*({n: t.spec for n, t in s.items()} for s in (self.inputs, self.outputs)))


class StageFacts(BaseModel):
    """A Program of the bundle.

    Attributes:
        fingerprint: its digest.
        model: its spec, `ModelSpec` or `DecoderSpec`.
        high_steps: passes of a chunk that the graph ``step_high`` makes.
        activations: the most bytes of intermediate results that live at once in torch.
        log: what its passes did.
        graphs: by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    model: dict[str, Any]
    high_steps: tuple[int, ...] = ()
    activations: int
    log: list[dict[str, Any]]
    graphs: dict[str, GraphFacts]


class GoldenFacts(BaseModel):
    """A golden case: names in the file of golden values, by the graph's names.

    Attributes:
        stage, graph: which graph it is of.
        inputs: of each input the first elements, which are repeated to fill it.
        outputs: of each output every n-th element.
        bounds: how far each output may be from its golden value; see `distance`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    graph: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    bounds: dict[str, float]


class TextFacts(BaseModel):
    """The text encoder that a bundle needs and does not hold.

    Attributes:
        folder: the pipeline that has it, as the recipe named it.
        digest: SHA-256 over its files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    digest: str


class Facts(BaseModel):
    """What a manifest says besides the checksums of the files.

    Attributes:
        target: what runs the graphs.
        opset: of ONNX.
        versions: of what made the bundle.
        recipe: the resolved recipe: geometry, sampler and passes too.
        rotary: arguments of the rotary tables: rows and columns of tokens, split, theta.
        sampler: a row for each of the recipe's passes: timestep, sigma, c0 to c3, p0 to p2, as
            `lltk.stream.sampler.Sampler` has them.
        stages: ``transformer``, ``decoder`` and, if the bundle holds it, ``text``.
        text: the text encoder, if the bundle does not hold it.
        golden: the golden cases.
        files: SHA-256 by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    opset: int
    versions: dict[str, str]
    recipe: dict[str, Any]
    rotary: dict[str, Any]
    sampler: list[list[float]]
    stages: dict[str, StageFacts]
    text: TextFacts | None
    golden: list[GoldenFacts]
    files: dict[str, str]


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
        found = list(_compared(folder.path, stages, golden))
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
        ValueError: it is no bundle, of another format, or a file is missing or was changed, or a
            graph names a file other than its weights or needs more than the opset it states.
    """
    where = standing(path)
    if not (where / MANIFEST.name).is_file():
        raise ValueError(
            f"{where}: has no {MANIFEST.name}, so it is not a bundle of lltk's, or not whole; "
            f"make one with: lltk export RECIPE --target ort -o {path}"
        )
    content = MANIFEST.read(path)
    try:
        facts = Facts.model_validate(content)
    except ValidationError as error:
        what = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(
            f"{where / MANIFEST.name}: {what} is none of a bundle's; {MANIFEST.remedy}"
        ) from error
    for stage, each in facts.stages.items():
        for graph in each.graphs:
            if f"{stage}/{graph}.onnx" not in facts.files:
                raise ValueError(f"{where}: has no {stage}/{graph}.onnx; {MANIFEST.remedy}")
    return facts


def verify_bundle(path: Path) -> list[Difference]:
    """Check every file of a bundle, then compare its golden values through ONNX Runtime.

    Raises:
        ValueError: as `read_bundle`; or an output is farther from its golden value than the
            manifest says, with stage, graph and output.
    """
    facts = read_bundle(path)
    check_installed()
    check_graphs(standing(path), facts)
    found = list(_compared(standing(path), facts.stages, facts.golden))
    if bad := [each for each in found if not each.is_within]:
        raise ValueError(
            f"{path}: {_said(bad[0])}; this ONNX Runtime computes something else than "
            "the one that made the bundle: use the versions that `lltk bundle show` lists"
        )
    return found


def check_graphs(folder: Path, facts: Facts) -> None:
    """Check that graphs read no file but their weights, and have the opset that is stated.

    Raises:
        ValueError: one does not.
    """
    import onnx

    from lltk.export.emitter import OPSET
    from lltk.export.weights import FILE

    for name in sorted(facts.files):
        if not name.endswith(".onnx"):
            continue
        model = onnx.load(folder / name, load_external_data=False)
        opsets = {each.domain: each.version for each in model.opset_import}
        if opsets != {"": facts.opset} or facts.opset > OPSET:
            raise ValueError(
                f"{folder / name}: has opsets {opsets}, this lltk reads {OPSET}; {MANIFEST.remedy}"
            )
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location" and entry.value != FILE:
                    raise ValueError(
                        f"{folder / name}: reads {entry.value!r}, and may read {FILE} alone; "
                        f"{MANIFEST.remedy}"
                    )


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
    contracts = {name: program.contract(name) for name in program.graphs}
    graphs = {
        name: GraphFacts(inputs=_facts(each.inputs), outputs=_facts(each.outputs))
        for name, each in contracts.items()
    }
    log = [entry.plain() for entry in program.log]
    return StageFacts(
        fingerprint=fingerprint(program),
        model=TypeAdapter(type(program.model)).dump_python(program.model, mode="json"),
        high_steps=tuple(sorted(program.fact(HighSteps).indices)),
        activations=activations(program),
        log=log,
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
            name: _bound(value, case.spread.get(value.dtype, 0))
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


def _bound(output: Tensor, spread: float) -> float:
    """How far an output may be from its golden value."""
    least = BOUND if output.dtype is torch.float32 else FLIPPED
    return max(least, _SPREADS * spread)


def _compared(
    folder: Path, stages: Mapping[str, StageFacts], golden: Sequence[GoldenFacts]
) -> Iterator[Difference]:
    """Run each golden case."""
    tensors, _ = read_tensors(folder / GOLDEN)
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
