"""What a bundle becomes before its graphs are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lltk.export.belonging import check_bundle
from lltk.export.bundle import read_bundle
from lltk.export.facts import DECODER, MANIFEST, TARGETS, TEXT, TRANSFORMER, Facts
from lltk.files.writing import standing
from lltk.graph.contract import Contract, Role, TensorSpec
from lltk.graph.geometry import Geometry
from lltk.graph.program import LogEntry
from lltk.graph.recipe import overridden, parse_recipe
from lltk.graph.recipe_files import shipped
from lltk.graph.spec import DecoderSpec, ModelSpec, TextSpec
from lltk.models.hub import on_disk
from lltk.models.pipelines import find_pipeline
from lltk.stream.bundle_text import BundleTextEncoder
from lltk.stream.recipe import stream_section
from lltk.stream.runtimes.onnx_graph import CPU, check_installed, provider_device
from lltk.stream.runtimes.tensorrt import check_device
from lltk.stream.text import Encoder, TextEncoder
from lltk.streaming.plan import Plan, check_high_steps

_FREE = frozenset(
    {
        "pipeline", "fps", "steps", "shift", "guidance", "negative_prompt", "scene_cut",
        "shot_offset", "recache", "seed", "text", "serve",
    }
)  # fmt: skip
"""Keys of a recipe's stream section that no graph depends on."""
_TORCHS = frozenset(
    {
        "compile", "cuda_graphs", "decoder.compile", "decoder.cuda_graphs", "decoder.device",
        "decoder.passes",
    }
)  # fmt: skip
"""Keys that say how torch runs a stream."""


@dataclass(frozen=True)
class BundlePlan(Plan):
    """A stream that ONNX Runtime runs, or TensorRT for RTX.

    Attributes:
        path: the bundle's folder.
        facts: what its manifest says.
        provider: ONNX Runtime's execution provider; no engine has one.
        transformer_spec, decoder_spec: of the models.
    """

    path: Path
    facts: Facts
    provider: str
    transformer_spec: ModelSpec
    decoder_spec: DecoderSpec

    def contract(self, stage: str, graph: str) -> Contract:
        """Inputs and outputs of a graph."""
        return self.facts.stages[stage].graphs[graph].contract

    @property
    def high_steps(self) -> Sequence[int]:
        """Which of a chunk's passes ``step_high`` makes."""
        return self.facts.stages[TRANSFORMER].high_steps

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.facts.recipe["model"]["config"]
        return config

    @property
    def geometry(self) -> Geometry:
        return self.recipe.geometry

    @property
    def spec(self) -> ModelSpec:
        return self.transformer_spec

    @property
    def dtype(self) -> torch.dtype:
        return self.contract(TRANSFORMER, "step").input(Role.LATENTS).dtype

    @property
    def pages(self) -> Mapping[str, TensorSpec]:
        return self.contract(TRANSFORMER, "step").pages

    @property
    def log(self) -> Sequence[LogEntry]:
        return self.facts.stages[TRANSFORMER].log

    @property
    def implementations(self) -> Mapping[str, str]:
        return {}  # what runs the graphs chooses its own

    @property
    def ranks(self) -> int:
        return 1

    @property
    def decoder_device(self) -> torch.device:
        return self.device

    @property
    def video_dtype(self) -> torch.dtype:
        return self.contract(DECODER, "first").outputs[self.decoder_spec.output].dtype

    def decoder_caches(self, rank: int) -> Mapping[str, TensorSpec]:
        return self.contract(DECODER, "step").having(Role.CACHE)

    def fingerprints(self) -> tuple[str, str]:
        stages = self.facts.stages
        return stages[TRANSFORMER].fingerprint, stages[DECODER].fingerprint

    @property
    def text_files(self) -> dict[str, str]:
        """The text encoder's files in the bundle, with their SHA-256; none if it is outside."""
        files = self.facts.files.items()
        return {name: digest for name, digest in files if name.startswith(f"{TEXT}/")}

    def text_encoder(self, cache: Path | None) -> Encoder:
        outside = self.facts.text
        if outside is None:
            digest = hashlib.sha256(json.dumps(self.text_files).encode()).hexdigest()
            stage = self.facts.stages[TEXT]
            assert isinstance(stage.model, TextSpec)
            contract = stage.graphs["encode"].contract
            vocabulary = stage.model.vocabulary
            return BundleTextEncoder(self.path / TEXT, contract, vocabulary, digest, cache)
        tokens, device = self.geometry.text_tokens, self.text_device
        return TextEncoder(self.folder, tokens, self.dtype, device, cache, outside.digest)


def is_bundle(name: str) -> bool:
    """Whether a name is that of a folder, which as a stream can only be a bundle.

    A shipped recipe is found beside a folder of its name that is no bundle.
    """
    folder = standing(Path(name))
    return folder.is_dir() and (name not in shipped() or (folder / MANIFEST.name).exists())


def plan_bundle(
    path: Path,
    overrides: Iterable[str] = (),
    provider: str | None = None,
    *,
    download: bool = False,
) -> BundlePlan:
    """Check a bundle, and plan to stream it; no graph is loaded.

    Args:
        path: the bundle.
        overrides: keys of its recipe to change, each ``stream.KEY=VALUE``.
        provider: ONNX Runtime's execution provider, by default the CPU's; engines have none.
        download: whether a pipeline on the Hugging Face hub, which encodes prompts, is downloaded.

    Raises:
        ValueError: it is no bundle that this lltk reads, a file is missing or was changed, a key is
            built into its graphs, ONNX Runtime has no such provider, or there is no GPU that its
            engines are for.
    """
    check_installed()
    facts = read_bundle(path)
    check_bundle(standing(path), facts)
    engines = facts.engines
    if engines and provider is not None:
        raise ValueError(
            f"--provider: {path} has engines of {TARGETS[facts.target]}; drop the option"
        )
    overrides = list(overrides)
    for override in overrides:
        key = override.partition("=")[0].strip()
        part, _, own = key.partition(".")
        if part == "stream" and own in _TORCHS:
            raise ValueError(
                f"{key}: is for torch, and {TARGETS[facts.target]} plays {path}; drop the key"
            )
        if part != "stream" or own.partition(".")[0] not in _FREE:
            raise ValueError(
                f"{key}: is built into {path}, where only keys of stream can change: "
                f"{', '.join(sorted(_FREE))}; export the recipe again with --set {override}"
            )
        if own == "text.device" and facts.text is None:
            raise ValueError(f"{key}: {path} has its text encoder, for the CPU; drop the key")
    data = overridden(facts.recipe, overrides)
    model = {**data["model"], "checkpoint": None, "lora": None, "lora_strength": 1.0}
    recipe = parse_recipe(on_disk({**data, "model": model}, download, needed=False), str(path))
    section = stream_section(recipe.stream, str(path))
    plain: dict[str, Any] = {"compile": False, "cuda_graphs": False}  # choices for torch's kernels
    decoder = section.decoder.model_copy(update={**plain, "device": None, "passes": None})
    text = section.text
    if facts.text is None:
        text = text.model_copy(update={"device": "cpu"})
    section = section.model_copy(update={**plain, "decoder": decoder, "text": text})
    stage, decoder_spec = facts.stages[TRANSFORMER], facts.stages[DECODER].model
    assert isinstance(stage.model, ModelSpec) and isinstance(decoder_spec, DecoderSpec)
    check_high_steps(stage.high_steps, section.steps)
    return BundlePlan(
        recipe,
        section,
        find_pipeline(section.pipeline, needed=False),
        check_device(engines.sm) if engines else provider_device(provider or CPU),
        standing(path),
        facts,
        provider or CPU,
        stage.model,
        decoder_spec,
    )
