"""What a stream needs in memory, and what would fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lltk.graph.memory import activations, available, estimate, readable, total
from lltk.graph.program import Program
from lltk.stream.recipe import StreamSection

_TEXT, _IMAGE = "text encoder at work", "image encoder"
_GRAPHS = "decoder: CUDA graphs"
_DECODING = "decoder: activations"
_CACHE = ("cache pages", "cross-attention K/V")


@dataclass(frozen=True)
class Placed:
    """A Program and where it runs."""

    program: Program
    device: torch.device


@dataclass(frozen=True)
class Parts:
    """A stream's parts and where they are.

    Attributes:
        section: the recipe's.
        transformer: its Program.
        decoders: their Programs and where they run, the first with the image encoder.
        text, image: bytes of the weights of the text encoder and of the autoencoder.
        device, text_device: where transformer and text encoder run.
    """

    section: StreamSection
    transformer: Program
    decoders: Sequence[Placed]
    text: int
    image: int
    device: torch.device
    text_device: torch.device


def stream_memory(parts: Parts) -> dict[str, dict[str, int]]:
    """Bytes by device and owner while a stream runs.

    The text encoder counts where it stays. Where it is dropped, a prompt that the script did not
    have needs its memory once more.
    """
    devices: dict[str, dict[str, int]] = {}
    own = devices.setdefault(str(parts.device), {})
    own |= estimate(parts.transformer)
    if parts.section.guidance != 1:
        own["second cache, for guidance"] = sum(own[name] for name in _CACHE)
    own["activations"] = activations(parts.transformer)
    for decoder in parts.decoders:
        place = devices.setdefault(str(decoder.device), {})
        sizes = {**estimate(decoder.program), "activations": _decoding(parts, decoder)}
        if parts.section.decoder.cuda_graphs:
            graphs = len(decoder.program.graphs) - 1  # all but a video's first latent's
            caches = 2 * graphs * sizes["feature caches"]  # read and made
            sizes["CUDA graphs"] = caches + sizes["activations"]
        for name, size in sizes.items():
            owner = f"decoder: {name}"
            place[owner] = place.get(owner, 0) + size
    stays = {"keep": parts.text_device, "offload": torch.device("cpu"), "free": None}
    text = stays[parts.section.text.after]
    if text is not None:
        devices.setdefault(str(text), {})["text encoder"] = parts.text
    return devices


def _decoding(parts: Parts, decoder: Placed, leaving: Collection[str] = ()) -> int:
    section = parts.section.decoder
    return activations(decoder.program, leaving, held=section.cuda_graphs or section.compile)


def loading_memory(parts: Parts, image: bool) -> dict[str, dict[str, int]]:
    """Bytes by device and owner before a stream runs, while prompts and an image are encoded.

    Encoders whose files are not there have no bytes.
    """
    devices: dict[str, dict[str, int]] = {}
    if parts.text:
        devices.setdefault(str(parts.text_device), {})[_TEXT] = parts.text
    if image:
        devices.setdefault(str(parts.decoders[0].device), {})[_IMAGE] = parts.image
    return devices


def check_memory(parts: Parts, image: bool, decodes: bool = True) -> None:
    """Refuse a stream that does not fit what is free.

    Args:
        parts: of the stream.
        image: whether it begins with one.
        decodes: whether this process has the decoders.

    Raises:
        ValueError: the sum, and which changes would fit.
    """
    running = parts if decodes else replace(parts, decoders=())
    for devices in (loading_memory(parts, image), stream_memory(running)):
        for name, owners in devices.items():
            free, need = available(torch.device(name)), total(owners)
            if need <= free:
                continue
            listed = ", ".join(f"{owner} {readable(size)}" for owner, size in owners.items())
            raise ValueError(
                f"memory: the stream needs {readable(need)} on {name} ({listed}), "
                f"{readable(free)} are free; {_remedies(parts, owners, free)}"
            )


def _remedies(parts: Parts, owners: Mapping[str, int], free: int) -> str:
    """What would fit: one change, else all that are possible, else a smaller video."""
    saved = _savings(parts, owners)
    need = total(owners)
    single = [
        f"{change} ({readable(need - size)})"
        for change, size in saved.items()
        if need - size <= free
    ]
    if single:
        return f"what would fit: {', or '.join(single)}"
    rest = need - sum(saved.values())
    if saved and rest <= free:
        return f"what would fit: {' with '.join(saved)} ({readable(rest)})"
    fixed = sum(
        size for owner, size in owners.items() if owner.endswith(("weights", "encoder", _TEXT))
    )
    if fixed < free:
        share = (free - fixed) / max(rest - fixed, 1)
        return (
            f"what would fit: about {min(share, 1):.0%} of the pixels (geometry.height, "
            f"geometry.width){', with ' if saved else ''}{' and '.join(saved)}"
        )
    return "its weights alone do not fit; use another device or a smaller model"


def _savings(parts: Parts, owners: Mapping[str, int]) -> dict[str, int]:
    """Bytes that a change of the recipe saves."""
    geometry, saved = parts.transformer.geometry, {}
    least = geometry.chunk + geometry.sink * (2 if geometry.shot_sink else 1)
    if least < geometry.window and "cache pages" in owners:
        share = 1 - least / geometry.window
        caches = 1 + ("second cache, for guidance" in owners)
        saved[f"geometry.window={least}"] = int(share * caches * owners["cache pages"])
    if "text encoder" in owners:
        saved["stream.text.after=free"] = owners["text encoder"]
    if "second cache, for guidance" in owners:
        saved["stream.guidance=1"] = owners["second cache, for guidance"]
    if _GRAPHS in owners:
        saved["stream.decoder.cuda_graphs=false"] = owners[_GRAPHS]
    if _DECODING in owners and parts.section.decoder.latents > 1:
        saved["stream.decoder.latents=1"] = sum(
            _decoding(parts, placed) - _decoding(parts, placed, leaving=("steps",))
            for placed in parts.decoders
        )
    for owner, key, device in (
        (_TEXT, "stream.text.device", parts.text_device),
        (_IMAGE, "stream.decoder.device", parts.decoders[0].device),
    ):
        if owner in owners and device.type != "cpu":
            saved[f"{key}=cpu"] = owners[owner]
    return saved
