"""What a stream is made of before anything is allocated; what a stream recipe becomes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lltk.graph.contract import Role, TensorSpec
from lltk.graph.facts import HighSteps, Ranks
from lltk.graph.fingerprint import fingerprint
from lltk.graph.geometry import Geometry
from lltk.graph.program import LogEntry, Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.graph.spec import ModelSpec
from lltk.models.pipelines import find_pipeline
from lltk.parallel.groups import SEQUENCE, rank_in
from lltk.stream.chunks import Chunking
from lltk.stream.columns import column_cache
from lltk.stream.recipe import EVERY_RANK, DecoderSection, StreamSection, stream_section
from lltk.stream.session import Sampling
from lltk.stream.text import Encoder, TextEncoder


@dataclass(frozen=True)
class Plan(ABC):
    """A stream before anything is allocated, whatever runs its models.

    Attributes:
        recipe: what the models were made from.
        section: how it is streamed.
        folder: the pipeline's folder.
        device: where the transformer runs, and what the recipe puts nowhere else.
    """

    recipe: Recipe
    section: StreamSection
    folder: Path
    device: torch.device

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The transformer's configuration: the arguments of its class."""

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """The transformer's sizes."""

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """The transformer's names and sizes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The transformer's dtype, and that of embeddings."""

    @property
    @abstractmethod
    def pages(self) -> Mapping[str, TensorSpec]:
        """The transformer's cache, [B, P, …] each."""

    @property
    @abstractmethod
    def log(self) -> Sequence[LogEntry]:
        """What the transformer's passes did."""

    @property
    @abstractmethod
    def implementations(self) -> Mapping[str, str]:
        """What runs the transformer's ops; empty where that is not chosen by lltk."""

    @property
    @abstractmethod
    def ranks(self) -> int:
        """How many processes run the transformer together."""

    @property
    @abstractmethod
    def decoder_device(self) -> torch.device:
        """Where the frames are made; with several decoders, the first one's device."""

    @property
    @abstractmethod
    def video_dtype(self) -> torch.dtype:
        """The dtype of what the decoders make."""

    @abstractmethod
    def decoder_caches(self, rank: int) -> Mapping[str, TensorSpec]:
        """The feature caches of a rank's decoders, by the names in its decoder's state."""

    @abstractmethod
    def fingerprints(self) -> tuple[str, str]:
        """Digests of the transformer and the decoders; may read every weight."""

    @abstractmethod
    def text_encoder(self, cache: Path | None) -> Encoder:
        """What encodes prompts, not loaded yet; ``cache`` is a folder that keeps embeddings.

        Raises:
            ValueError: its files are not there.
        """

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        return self.geometry.height, self.geometry.width

    @property
    def sampling(self) -> Sampling:
        """What a session needs of the section."""
        return Sampling(**{f.name: getattr(self.section, f.name) for f in fields(Sampling)})

    @property
    def guided(self) -> bool:
        """Whether a session also runs the negative prompt, over a cache of its own."""
        return self.section.guidance != 1

    @property
    def chunking(self) -> Chunking:
        """How a script becomes chunks."""
        section, size, stride = self.section, self.geometry.chunk, self.spec.stride[0]
        return Chunking(size, section.fps, stride, section.scene_cut, section.recache)

    @property
    def text_device(self) -> torch.device:
        """Where prompts are encoded."""
        return torch.device(self.section.text.device or self.device)

    @property
    def writer_threads(self) -> int:
        """For a `VideoWriter`: one where a model runs on the CPU, whose cores it would take.

        Beside GPUs half of the cores, up to twelve; x264 cuts a frame of 704 rows into eleven.
        """
        if "cpu" in (self.device.type, self.decoder_device.type):
            return 1
        return max(1, min(12, (os.cpu_count() or 1) // 2))

    @property
    def rank(self) -> int:
        """Which of the processes this one is.

        Raises:
            ValueError: there are not as many as the recipe is for.
        """
        return rank_in(SEQUENCE, self.ranks)


@dataclass(frozen=True)
class Placed:
    """A Program and the device that it runs on."""

    program: Program
    device: torch.device


@dataclass(frozen=True)
class StreamPlan(Plan):
    """A stream that torch runs; weights are mapped from their files.

    Attributes:
        transformer: the transformer's Program.
        decoders: the decoders' Programs and devices. Several make a part of the columns each, on
            this process's devices or, where each rank has one, on the ranks'.
    """

    transformer: Program
    decoders: tuple[Placed, ...]

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.transformer.recipe["model"]["config"]
        return config

    @property
    def geometry(self) -> Geometry:
        return self.transformer.geometry

    @property
    def spec(self) -> ModelSpec:
        return self.transformer.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def pages(self) -> Mapping[str, TensorSpec]:
        return self.transformer.pages

    @property
    def log(self) -> Sequence[LogEntry]:
        return self.transformer.log

    @property
    def implementations(self) -> Mapping[str, str]:
        return self.transformer.implementations

    @property
    def ranks(self) -> int:
        return self.transformer.fact(Ranks).count

    @property
    def decoder_device(self) -> torch.device:
        return self.decoders[0].device

    @property
    def video_dtype(self) -> torch.dtype:
        program = self.decoders[0].program
        return program.contract("first").outputs[program.model.output].dtype

    def decoder_caches(self, rank: int) -> Mapping[str, TensorSpec]:
        placed = self.decoders_of(rank)
        caches = [each.program.contract("step").having(Role.CACHE) for each in placed]
        if len(caches) == 1:
            return caches[0]
        return {column_cache(i, name): own[name] for i, own in enumerate(caches) for name in own}

    def fingerprints(self) -> tuple[str, str]:
        decoders = "+".join(fingerprint(decoder.program) for decoder in self.decoders)
        return fingerprint(self.transformer), decoders

    def text_encoder(self, cache: Path | None) -> Encoder:
        tokens = self.geometry.text_tokens
        return TextEncoder(self.folder, tokens, self.dtype, self.text_device, cache)

    def decoders_of(self, rank: int) -> tuple[Placed, ...]:
        """The decoders that a rank runs: rank 0 runs all of them, unless each rank has its own."""
        if self.section.decoder.device == EVERY_RANK:
            return self.decoders[rank : rank + 1]
        return self.decoders if rank == 0 else ()


def plan_stream(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    *,
    weights: bool = True,
    where: str = "recipe",
    transformer: Program | None = None,
) -> StreamPlan:
    """Make the Programs of a stream recipe.

    Args:
        recipe: with a ``stream`` section; ``model.checkpoint`` is by default the pipeline's.
        device: where the stream will run.
        weights: whether to map the weights. A plan without weights can only be looked at.
        where: what errors call the recipe.
        transformer: made by the recipe already; by default it is made here.

    Raises:
        ValueError: the recipe, its checkpoint or its pipeline does not fit.
    """
    from lltk.compiler import fitting, transform  # bundles do without

    if recipe.program != "stream":
        raise ValueError(f"program: {recipe.program} cannot be streamed; name a stream recipe")
    section = stream_section(recipe.stream, where)
    folder = find_pipeline(section.pipeline, needed=weights)
    model = recipe.model
    if model.checkpoint is None and weights:
        model = model.model_copy(update={"checkpoint": str(folder)})
    own = recipe.model_copy(update={"model": model})
    if transformer is None:
        transformer = transform(own, weights=weights, observe=None if weights else fitting(own))
    check_high_steps(transformer.fact(HighSteps).indices, section.steps)
    _, width = transformer.geometry.latent(transformer.spec)
    place = torch.device(device)
    devices = _decoder_devices(section, place, transformer.fact(Ranks).count)
    return StreamPlan(
        own,
        section,
        folder,
        place,
        transformer,
        tuple(_decoders(own, section, folder if weights else None, devices, width)),
    )


def check_high_steps(indices: Iterable[int], steps: int) -> None:
    """Refuse passes in high precision that a chunk of so many steps does not have.

    Raises:
        ValueError: there is one.
    """
    if late := [index for index in sorted(indices) if index >= steps]:
        raise ValueError(
            f"keep_steps: {late} are no passes of a chunk, which has {steps} "
            f"(0 to {steps - 1}); set keep_steps or stream.steps"
        )


def _decoder_devices(
    section: StreamSection, device: torch.device, ranks: int
) -> Sequence[torch.device]:
    """Where the decoders run, from the left column to the right.

    Args:
        section: names them.
        device: the transformer's.
        ranks: how many processes run the transformer.
    """
    own = section.decoder
    if own.device == EVERY_RANK:
        devices = [device] * ranks
    else:
        names = own.device if isinstance(own.device, tuple) else (own.device or device,)
        devices = [torch.device(name) for name in names]
    return devices


def _decoders(
    recipe: Recipe,
    section: StreamSection,
    folder: Path | None,
    devices: Sequence[torch.device],
    width: int,
) -> Iterator[Placed]:
    """The decoders of latents ``width`` columns wide, a device each.

    Their weights are those of the pipeline in ``folder``; without one they have none.
    """
    from lltk.compiler import transform

    own = section.decoder
    if len(devices) > width:
        raise ValueError(
            f"stream.decoder.device: names {len(devices)}, and a frame's latents are {width} wide; "
            "name fewer"
        )
    if own.latents > recipe.geometry.chunk:
        raise ValueError(
            f"stream.decoder.latents: {own.latents} are never at hand, a chunk has "
            f"{recipe.geometry.chunk}; name at most so many"
        )
    model: dict[str, Any] = {
        "config": own.config if folder is None else None,
        "checkpoint": None if folder is None else str(folder),
        "dtype": own.dtype,
        "latents": own.latents,
    }
    for index, place in enumerate(devices):
        if len(devices) > 1:
            model["columns"] = [width * i // len(devices) for i in (index, index + 1)]
        decode = {
            "program": "decode",
            "model": model,
            "geometry": recipe.geometry.model_dump(),
            "passes": _decoder_passes(own, devices),
        }
        parsed = parse_recipe(decode, "stream.decoder")
        yield Placed(transform(parsed, weights=folder is not None, section="stream.decoder"), place)


def _decoder_passes(section: DecoderSection, devices: Sequence[torch.device]) -> list[Any]:
    """The recipe's passes. By default: canonicalise, and what makes a CPU's decoder faster."""
    if section.passes is not None:
        return section.passes
    wanted = section.dtype == "float32" and all(device.type == "cpu" for device in devices)
    wanted &= torch.backends.mkldnn.is_available() and not section.compile
    onednn = ["onednn_conv3d"] if wanted else []
    return ["canonicalise", *onednn]
