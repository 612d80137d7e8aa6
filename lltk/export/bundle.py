"""Bundles: folders that hold a stream's graphs in ONNX, their weights and golden values.

::

    manifest.json               what the bundle is, and the SHA-256 of every file
    transformer/*.onnx          prologue, step, commit; for engines, step is the commit too
    transformer/weights.safetensors
    decoder/*.onnx              first, step
    decoder/weights.safetensors
    text/encode.onnx            the text encoder, unless it is kept outside
    text/weights.safetensors
    text/tokenizer.json
    golden.safetensors          inputs of every graph, and what torch made of them
    engines/*.engine            for TensorRT for RTX, the graphs of transformer and decoder compiled
    engines/*.layers.json       what their layers are

A bundle is written once its graphs gave the golden values in ONNX Runtime, or not at all. Engines
cannot run where there is no GPU that they are for: their layers are looked at instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lltk import __version__
from lltk.export.belonging import check_bundle, check_files, check_golden
from lltk.export.engines import EngineOrder, write_engines
from lltk.export.facts import (
    BUNDLE,
    GOLDEN,
    KERNELS,
    MANIFEST,
    ORT,
    TENSORRT_RTX,
    TEXT,
    TOKENIZER,
    EnginesFacts,
    Facts,
    GoldenFacts,
    StageFacts,
    TextFacts,
)
from lltk.export.kernels import kernel_sizes
from lltk.files.outputs import Output, check_outputs
from lltk.files.tensors import read_tensors, write_tensors
from lltk.files.writing import NewFolder, standing, whole_folder
from lltk.graph.contract import Contract
from lltk.graph.contract_facts import GraphFacts
from lltk.graph.facts import HighSteps
from lltk.graph.fingerprint import fingerprint
from lltk.graph.memory import activations
from lltk.graph.recipe import validated
from lltk.graph.spec import DecoderSpec, ModelSpec, TextSpec
from lltk.stream.bundle_text import read_tokenizer
from lltk.stream.runtimes import tensorrt, tensorrt_plugin
from lltk.stream.runtimes.cubin import Kernels
from lltk.stream.runtimes.onnx_graph import OnnxGraph, check_installed

if TYPE_CHECKING:
    from onnx import ModelProto

    from lltk.export.emitter import Dialect
    from lltk.export.golden import Case
    from lltk.export.weights import WeightPool
    from lltk.graph.program import Program

BOUND = 1e-5
"""How far an output may be from torch's, relative to its largest value."""
FLIPPED = 0.01
"""The share of elements that may differ from torch's where they are rounded to 16 bits or fewer."""
_SPREADS = 2
"""How many times torch's own spread an output may be from torch's, where there is one."""
Graph = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
_VERSIONS = ("onnx", "onnxruntime", "torch", "diffusers")


@dataclass(frozen=True)
class Findings:
    """What is known of a bundle that was written or verified.

    Attributes:
        golden: how far each case that was run is from its golden values.
        engines: those that it has.
    """

    golden: list[Difference]
    engines: EnginesFacts | None = None


@dataclass(frozen=True)
class Difference:
    """How far a runtime is from a golden value.

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
    engines: EngineOrder | None = None,
) -> Findings:
    """Write a bundle, whole or not at all, and compare its golden values before it is there.

    Args:
        path: a new or empty folder, or a bundle, which is replaced.
        programs: by stage, with weights; their graphs mutate nothing.
        cases: golden values for each graph.
        recipe, rotary, sampler: see `Facts`.
        text: the tokenizer of the stage ``text``, as JSON; or the encoder that stays outside.
        overwrite: whether a folder that holds anything else may be replaced.
        note: is told what is being done.
        engines: those to build of every graph but the text encoder's; by default none. They are not
            run, so their golden values are not compared.

    Raises:
        ValueError: an op has no form in ONNX, or an output is farther than it may be; TensorRT
            builds no engine of a graph, or one with slow layers.
        OSError: the folder cannot be written.
    """
    check_installed()
    from lltk.export.emitter import OPSET

    check_outputs([Output(path, BUNDLE)], [], overwrite)
    target = TENSORRT_RTX if engines else ORT
    with whole_folder(path) as folder:
        stages = {}
        for stage, program in programs.items():
            note(f"writing the {stage}")
            stages[stage] = _write_stage(folder, stage, program, dialect_of(stage, target))
        if isinstance(text, str):
            folder.write_text(f"text/{TOKENIZER}", text)
        compiled = [(s, g) for s in stages if s != TEXT for g in stages[s].graphs]
        sizes = next(filter(None, map(kernel_sizes, programs.values())), None)
        built = write_engines(folder, compiled, engines, note, sizes) if engines else None
        note("computing golden values")
        golden = _write_golden(folder, cases, target)
        note("comparing golden values")
        tensors, _ = read_tensors(folder.path / GOLDEN)
        runs = {stage: each for stage, each in stages.items() if _is_plain(stage, target)}
        found = list(_compared(runs, golden, tensors, partial(_onnx, folder.path)))
        if bad := [each for each in found if not each.is_within]:
            raise ValueError(f"export: {_said(bad[0])}; the bundle is not written")
        versions = {name: version(name) for name in _VERSIONS}
        facts = {
            "target": target, "opset": OPSET, "versions": {"lltk": __version__, **versions},
            "recipe": recipe, "rotary": rotary, "sampler": sampler,
            "stages": {stage: each.model_dump(mode="json") for stage, each in stages.items()},
            "text": text.model_dump() if isinstance(text, TextFacts) else None,
            "golden": [case.model_dump() for case in golden],
            "engines": built and built.model_dump(),
        }  # fmt: skip
        MANIFEST.write(folder, facts)
    return Findings(found, built)


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


def verify_bundle(path: Path, run: bool = False) -> Findings:
    """Check a bundle whole, then compare the golden values of what runs here.

    Args:
        path: the bundle.
        run: whether engines are run too, on the GPU that they are for.

    Raises:
        ValueError: as `read_bundle` and `check_bundle`; or an output is farther from its golden
            value than the manifest says, with stage, graph and output.
    """
    facts = read_bundle(path)
    check_installed()
    if run and facts.engines is None:
        raise ValueError(f"--run: {path} has no engines, and all its graphs are run; drop it")
    if run:
        tensorrt.check_installed()
    where = standing(path)
    check_bundle(where, facts)
    tensors, _ = read_tensors(where / GOLDEN)
    check_golden(where, facts, tensors)
    if facts.text is None and isinstance(text := facts.stages[TEXT].model, TextSpec):
        read_tokenizer(where / TEXT / TOKENIZER, text.vocabulary)
    plain = {name: each for name, each in facts.stages.items() if _is_plain(name, facts.target)}
    found = list(_compared(plain, facts.golden, tensors, partial(_onnx, where)))
    if run:
        rest = {name: each for name, each in facts.stages.items() if name not in plain}
        engine = partial(_engine, where, facts)
        found += _compared(rest, facts.golden, tensors, engine, norms=True)
    if bad := [each for each in found if not each.is_within]:
        raise ValueError(
            f"{path}: {_said(bad[0])}; what runs it computes something else than the bundle's "
            "maker meant: use the versions that `lltk bundle show` lists"
        )
    return Findings(found, facts.engines)


def open_engine(folder: Path, facts: Facts, stage: str, graph: str) -> tensorrt.EngineGraph:
    """Load an engine of a bundle whose files were checked.

    Raises:
        ValueError: another release of TensorRT for RTX or another GPU is here, or it is not loaded.
    """
    engines = facts.engines
    assert engines is not None, "the bundle has no engines"
    tensorrt.check_installed()
    if (version := tensorrt.library_version()) != engines.version:
        packages = " ".join(f"{name}=={engines.version}" for name in tensorrt.PACKAGES)
        raise ValueError(
            f"{folder}: its engines are for TensorRT for RTX {engines.version}, and {version} is "
            f"installed; run: pip install {packages}, or export the recipe again"
        )
    device = tensorrt.check_device(engines.sm)
    if engines.kernels:
        kernels = Kernels(folder / KERNELS, device)
        tensorrt_plugin.offer(tensorrt.BINDINGS, kernels.facts, kernels)
    file = next(each.file for each in engines.built if (each.stage, each.graph) == (stage, graph))
    contract = facts.stages[stage].graphs[graph].contract
    return tensorrt.EngineGraph(folder / file, contract, device)


def _is_plain(stage: str, target: str) -> bool:
    """Whether ONNX Runtime runs a stage."""
    return target == ORT or stage == TEXT


def dialect_of(stage: str, target: str) -> Dialect:
    """The dialect of a stage's graphs."""
    from lltk.export.emitter import Dialect

    return Dialect.ORT if _is_plain(stage, target) else Dialect.TENSORRT


def emit(
    program: Program, dialect: Dialect | None = None
) -> tuple[WeightPool, dict[str, ModelProto]]:
    """The models of a Program's graphs, and the parameters that they read.

    Args:
        program: whose graphs they are.
        dialect: of ONNX; by default ONNX Runtime's.

    Raises:
        ValueError: an op has no form in ONNX.
    """
    from lltk.export.emitter import Dialect, Emitter
    from lltk.export.weights import WeightPool

    pool, spoken = WeightPool(), dialect or Dialect.ORT
    return pool, {name: Emitter(program, pool, spoken).emit(name) for name in program.graphs}


def _write_stage(folder: NewFolder, stage: str, program: Program, dialect: Dialect) -> StageFacts:
    pool, models = emit(program, dialect)
    pool.write(folder, stage, models)
    assert isinstance(program.model, ModelSpec | DecoderSpec | TextSpec)
    graphs = {name: GraphFacts.of(program.contract(name)) for name in program.graphs}
    return StageFacts(
        fingerprint=fingerprint(program),
        model=program.model,
        high_steps=tuple(sorted(program.fact(HighSteps).indices)),
        activations=activations(program),
        log=list(program.log),
        graphs=graphs,
    )


def _write_golden(folder: NewFolder, cases: Iterable[Case], target: str) -> list[GoldenFacts]:
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
        norms = not _is_plain(case.stage, target)
        bounds = {
            name: bound_of(value, case.spread.get(value.dtype, 0), norms)
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


def bound_of(output: Tensor, spread: float, norms: bool = False) -> float:
    """How far an output may be from its golden value; where that is a share, less than all.

    Args:
        output: the value, whose dtype counts.
        spread: how far torch is from itself; 0 where nothing is rounded to few bits.
        norms: as `lltk.export.golden.distance` has it.
    """
    if output.dtype is torch.float32 or (norms and output.dtype is torch.bfloat16):
        return max(BOUND, _SPREADS * spread)
    return max(FLIPPED, min(_SPREADS * spread, (1 + spread) / 2))


def _compared(
    stages: Mapping[str, StageFacts],
    golden: Sequence[GoldenFacts],
    tensors: Mapping[str, Tensor],
    load: Callable[[str, str, Contract], Graph],
    norms: bool = False,
) -> Iterator[Difference]:
    """Run each golden case of some stages."""
    from lltk.export.golden import given

    for (stage, graph), cases in groupby(
        enumerate(golden), key=lambda case: (case[1].stage, case[1].graph)
    ):
        if stage not in stages:
            continue
        contract = stages[stage].graphs[graph].contract
        run = load(stage, graph, contract)
        for number, case in cases:
            held = {name: tensors[of] for name, of in case.inputs.items()}
            yield _farthest(number, case, run(given(held, contract)), tensors, norms)


def _onnx(folder: Path, stage: str, graph: str, contract: Contract) -> Graph:
    return OnnxGraph(folder / stage / f"{graph}.onnx", contract)


def _engine(folder: Path, facts: Facts, stage: str, graph: str, contract: Contract) -> Graph:
    """An engine that takes and gives tensors on the CPU."""
    engine = open_engine(folder, facts, stage, graph)

    def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = engine({name: value.to(engine.device) for name, value in given.items()})
        return {name: value.cpu() for name, value in made.items()}

    return run


def _farthest(
    number: int,
    case: GoldenFacts,
    made: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    norms: bool,
) -> Difference:
    """The output that is farthest from its golden value, beside its bound."""
    from lltk.export.golden import distance

    each = {name: distance(made[name], tensors[of], norms) for name, of in case.outputs.items()}
    share = {name: far / case.bounds[name] for name, far in each.items()}
    worst = max(share, key=lambda name: math.inf if math.isnan(share[name]) else share[name])
    graph = f"{case.stage}/{case.graph}"
    return Difference(number, graph, worst, each[worst], case.bounds[worst])


def _said(bad: Difference) -> str:
    return (
        f"{bad.graph} (golden case {bad.case}): output {bad.output} is {bad.relative:.1e} from "
        f"torch's, and may be {bad.bound:.0e}"
    )
