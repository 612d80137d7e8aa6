"""What a stream recipe becomes before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lltk.compiler import fitting, transform
from lltk.graph.facts import HighSteps, Ranks
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.models.pipelines import find_pipeline
from lltk.parallel.groups import SEQUENCE, rank_in
from lltk.stream.chunks import Chunking
from lltk.stream.recipe import EVERY_RANK, DecoderSection, StreamSection, stream_section
from lltk.stream.session import Sampling


@dataclass(frozen=True)
class Placed:
    """A Program and the device that it runs on."""

    program: Program
    device: torch.device


@dataclass(frozen=True)
class StreamPlan:
    """A recipe's stream before anything is allocated; weights are mapped from their files.

    Attributes:
        recipe: what the plan was made from.
        section: the recipe's ``stream`` section.
        folder: the pipeline's folder.
        transformer: the transformer's Program.
        decoders: the decoders' Programs and devices. Several make a part of the columns each, on
            this process's devices or, where each rank has one, on the ranks'.
        device: where the transformer runs, and what the recipe puts nowhere else.
    """

    recipe: Recipe
    section: StreamSection
    folder: Path
    transformer: Program
    decoders: tuple[Placed, ...]
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        return self.recipe.geometry.height, self.recipe.geometry.width

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
        section, program = self.section, self.transformer
        size, stride = program.geometry.chunk, program.spec.stride[0]
        return Chunking(size, section.fps, stride, section.scene_cut, section.recache)

    @property
    def decoder_device(self) -> torch.device:
        """Where the frames are made; with several decoders, the first one's device."""
        return self.decoders[0].device

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

    def decoders_of(self, rank: int) -> tuple[Placed, ...]:
        """The decoders that a rank runs: rank 0 runs all of them, unless each rank has its own."""
        if self.section.decoder.device == EVERY_RANK:
            return self.decoders[rank : rank + 1]
        return self.decoders if rank == 0 else ()

    @property
    def ranks(self) -> int:
        """How many processes run the transformer together."""
        return self.transformer.fact(Ranks).count

    @property
    def rank(self) -> int:
        """Which of these processes this one is.

        Raises:
            ValueError: there are not as many as the recipe is for.
        """
        return rank_in(SEQUENCE, self.ranks)


def plan_stream(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    *,
    weights: bool = True,
    where: str = "recipe",
) -> StreamPlan:
    """Make the Programs of a stream recipe.

    Args:
        recipe: with a ``stream`` section; ``model.checkpoint`` is by default the pipeline's.
        device: where the stream will run.
        weights: whether to map the weights. A plan without weights can only be looked at.
        where: what errors call the recipe.

    Raises:
        ValueError: the recipe, its checkpoint or its pipeline does not fit.
    """
    if recipe.program != "stream":
        raise ValueError(f"program: {recipe.program} cannot be streamed; name a stream recipe")
    section = stream_section(recipe.stream, where)
    folder = find_pipeline(section.pipeline, needed=weights)
    model = recipe.model
    if model.checkpoint is None and weights:
        model = model.model_copy(update={"checkpoint": str(folder)})
    own = recipe.model_copy(update={"model": model})
    transformer = transform(own, weights=weights, observe=None if weights else fitting(own))
    if late := [index for index in transformer.fact(HighSteps).indices if index >= section.steps]:
        raise ValueError(
            f"keep_steps: {late} are no passes of a chunk, which has {section.steps} "
            f"(0 to {section.steps - 1}); set keep_steps or stream.steps"
        )
    _, width = transformer.geometry.latent(transformer.spec)
    place = torch.device(device)
    devices = _decoder_devices(section, place, transformer.fact(Ranks).count)
    return StreamPlan(
        own,
        section,
        folder,
        transformer,
        tuple(_decoders(own, section, folder if weights else None, devices, width)),
        place,
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
