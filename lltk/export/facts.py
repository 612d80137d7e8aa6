"""What the manifest of a bundle says, and its form."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    StringConstraints,
)

from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind
from lltk.graph.contract_facts import GraphFacts
from lltk.graph.program import LogEntry
from lltk.graph.spec import DecoderSpec, ModelSpec, TextSpec
from lltk.graph.stages import Stage

TRANSFORMER, DECODER, TEXT = "transformer", "decoder", "text"
"""Stages of a bundle, which are folders in it."""
MANIFEST = Manifest(
    "manifest.json", "a bundle", format=1, remedy="restore it, or export the recipe again"
)
BUNDLE = Kind("a bundle", MANIFEST.recognises, folder=True)
GOLDEN = "golden.safetensors"
WEIGHTS = "weights.safetensors"
"""The file in a stage's folder that holds the parameters of its graphs."""
ORT, TENSORRT_RTX = "ort", "tensorrt-rtx"
TARGETS = {ORT: "ONNX Runtime", TENSORRT_RTX: "TensorRT for RTX"}
"""What runs a bundle."""
TOKENIZER = "tokenizer.json"
ENGINES = "engines"
"""The folder of engines."""
KERNELS = "kernels"
"""The folder of a plugin's kernels."""


def _entry(data: Any) -> Any:
    """An entry of a log, in which the stage has its name."""
    if not isinstance(data, dict):
        return data
    return {**data, "stage": next((s for s in Stage if str(s) == data.get("stage")), None)}


Entry = Annotated[LogEntry, BeforeValidator(_entry), PlainSerializer(LogEntry.plain)]
"""What a pass did, which JSON holds as `LogEntry.plain` has it."""


class StageFacts(BaseModel):
    """A Program of the bundle.

    Attributes:
        fingerprint: its digest.
        model: its spec.
        high_steps: passes of a chunk that the graph ``step_high`` makes.
        activations: the most bytes of intermediate results that live at once in torch.
        log: what its passes did.
        graphs: by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    model: ModelSpec | DecoderSpec | TextSpec
    high_steps: tuple[NonNegativeInt, ...] = ()
    activations: NonNegativeInt
    log: list[Entry]
    graphs: dict[str, GraphFacts]


class GoldenFacts(BaseModel):
    """A golden case: names in the file of golden values, by the graph's names.

    Attributes:
        stage, graph: which graph it is of.
        inputs: of each input the first elements, which are repeated to fill it.
        outputs: of outputs every n-th element. A graph that is step and commit has cases of either
            use, with the outputs of that use.
        bounds: how far each of them may be from its golden value; see `distance`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    graph: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    bounds: dict[str, PositiveFloat]


class EngineFacts(BaseModel):
    """A graph that TensorRT for RTX has compiled.

    Attributes:
        stage, graph: which.
        seconds: that the build took.
        peak_bytes: the most memory that the build held.
        layers: how many layers do what.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    graph: str
    seconds: PositiveFloat
    peak_bytes: NonNegativeInt
    layers: dict[str, NonNegativeInt]

    @property
    def file(self) -> str:
        """The engine's file in the bundle."""
        return f"{ENGINES}/{self.stage}.{self.graph}.engine"

    @property
    def table(self) -> str:
        """The file that lists its layers."""
        return f"{ENGINES}/{self.stage}.{self.graph}.layers.json"


class EnginesFacts(BaseModel):
    """The engines of a bundle.

    Attributes:
        version: of TensorRT for RTX; no other loads them.
        sm: the compute capability that they are for, 120 for 12.0.
        waived: paths of modules whose layers may be slow ones.
        built: the engines.
        kernels: files of the kernels that their plugin runs; none without a plugin.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)*$")]
    sm: NonNegativeInt
    waived: tuple[str, ...]
    built: tuple[EngineFacts, ...]
    kernels: tuple[str, ...] = ()


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
        engines: of a bundle for TensorRT for RTX.
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
    engines: EnginesFacts | None = None
    files: dict[str, str]
