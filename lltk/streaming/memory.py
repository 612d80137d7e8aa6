"""What a stream needs in memory, and what would fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from lltk.export.facts import DECODER, TRANSFORMER
from lltk.graph.memory import activations, available, estimate, readable, total
from lltk.stream.text import weight_bytes
from lltk.streaming.bundle import BundlePlan
from lltk.streaming.plan import Placed, Plan, StreamPlan

Sizes = dict[str, dict[str, int]]
"""Bytes by device and owner."""
_TEXT, _IMAGE = "text encoder at work", "image encoder"
_GUIDANCE = "second cache, for guidance"
_GRAPHS = "decoder: CUDA graphs"
_DECODING = "decoder: activations"
_CACHE = ("cache pages", "cross-attention K/V")
_OF_A_SESSION = (*_CACHE, _GUIDANCE, "decoder: feature caches")


def stream_memory(plan: Plan, rank: int = 0) -> Sizes:
    """What the models need, and one session while it runs.

    The text encoder counts where it stays. Where it is dropped, a prompt that the script did not
    have needs its memory once more.

    Args:
        plan: of the stream.
        rank: whose memory, of several ranks.
    """
    devices: Sizes = {}
    own = devices.setdefault(str(plan.device), {})
    own |= _transformer(plan)
    if plan.guided:
        own[_GUIDANCE] = sum(own[name] for name in _CACHE)
    for device, sizes in _decoders(plan, rank):
        place = devices.setdefault(str(device), {})
        for name, size in sizes.items():
            owner = f"decoder: {name}"
            place[owner] = place.get(owner, 0) + size
    stays = {"keep": plan.text_device, "offload": torch.device("cpu"), "free": None}
    text = stays[plan.section.text.after]
    if text is not None:
        devices.setdefault(str(text), {})["text encoder"] = text_bytes(plan)
    return devices


def _transformer(plan: Plan) -> dict[str, int]:
    """Bytes by owner, for one prompt's cache."""
    if isinstance(plan, BundlePlan):
        prompt = plan.contract(TRANSFORMER, "prologue").outputs
        return _of_bundle(plan, TRANSFORMER) | {
            "cache pages": sum(page.nbytes for page in plan.pages.values()),
            "cross-attention K/V": sum(each.nbytes for each in prompt.values()),
        }
    assert isinstance(plan, StreamPlan)
    return estimate(plan.transformer) | {"activations": activations(plan.transformer)}


def _decoders(plan: Plan, rank: int) -> Iterator[tuple[torch.device, dict[str, int]]]:
    """Bytes by owner of each decoder of a rank, and its device."""
    if isinstance(plan, BundlePlan):
        caches = plan.decoder_caches(rank).values()
        sizes = _of_bundle(plan, DECODER) | {"feature caches": sum(c.nbytes for c in caches)}
        yield plan.decoder_device, sizes
    elif isinstance(plan, StreamPlan):
        for decoder in plan.decoders_of(rank):
            sizes = {**estimate(decoder.program), "activations": _decoding(plan, decoder)}
            if plan.section.decoder.cuda_graphs:
                sizes["CUDA graphs"] = _held_by_graphs(decoder) + sizes["activations"]
            yield decoder.device, sizes


def _of_bundle(plan: BundlePlan, stage: str) -> dict[str, int]:
    """Bytes of a stage: ONNX Runtime packs the weights for each graph, but for the small prologue.

    The file itself is mapped, and the system may drop it. Every engine has its own weights inside.
    """
    facts = plan.facts.stages[stage]
    if engines := plan.facts.engines:
        files = [plan.path / each.file for each in engines.built if each.stage == stage]
        held = sum(file.stat().st_size for file in files)
        return {"weights": held, "activations": facts.activations}
    size = sum(file.stat().st_size for file in (plan.path / stage).glob("*.safetensors"))
    graphs = len(facts.graphs.keys() - {"prologue"})
    return {"weights": graphs * size, "activations": facts.activations}


def session_memory(plan: Plan, rank: int = 0) -> Sizes:
    """What each session needs of `stream_memory`; all else is shared.

    A session's latents and embeddings come on top, as long as it is under way: they are small.
    Arguments as `stream_memory`'s.
    """
    devices = {
        name: {owner: size for owner, size in owners.items() if owner in _OF_A_SESSION}
        for name, owners in stream_memory(plan, rank).items()
    }
    if isinstance(plan, StreamPlan) and plan.section.decoder.cuda_graphs:
        for decoder in plan.decoders_of(rank):
            place = devices[str(decoder.device)]
            place[_GRAPHS] = place.get(_GRAPHS, 0) + _held_by_graphs(decoder)
    return {name: owners for name, owners in devices.items() if owners}


def _held_by_graphs(decoder: Placed) -> int:
    """Bytes of the feature caches that CUDA graphs read and make, at addresses of their own."""
    graphs = len(decoder.program.graphs) - 1  # all but that of a video's first latent
    return 2 * graphs * estimate(decoder.program)["feature caches"]


def _decoding(plan: StreamPlan, decoder: Placed, leaving: Collection[str] = ()) -> int:
    section = plan.section.decoder
    return activations(decoder.program, leaving, held=section.cuda_graphs or section.compile)


def text_bytes(plan: Plan) -> int:
    """Bytes of the text encoder's weights; 0 if its files are not there."""
    if isinstance(plan, BundlePlan) and plan.text_files:
        return sum((plan.path / name).stat().st_size for name in plan.text_files)
    return weight_bytes(plan.folder / "text_encoder", plan.dtype)


def loading_memory(plan: Plan, image: bool) -> Sizes:
    """What is needed before a stream runs, while prompts and an image are encoded.

    Encoders whose files are not there have no bytes.
    """
    devices: Sizes = {}
    if text := text_bytes(plan):
        devices.setdefault(str(plan.text_device), {})[_TEXT] = text
    if image:
        size = weight_bytes(plan.folder / "vae", plan.video_dtype)
        devices.setdefault(str(plan.decoder_device), {})[_IMAGE] = size
    return devices


def check_memory(plan: Plan, image: bool, rank: int = 0) -> None:
    """Refuse a stream that does not fit into the memory that is free.

    Args:
        plan: of the stream.
        image: whether it begins with an image.
        rank: whose memory, of several ranks.

    Raises:
        ValueError: says the sum, and which changes would fit.
    """
    for devices in (loading_memory(plan, image), stream_memory(plan, rank)):
        for name, owners in devices.items():
            free, need = available(torch.device(name)), total(owners)
            if need > free:
                raise ValueError(
                    f"memory: the stream needs {_sum(name, owners)}, "
                    f"{readable(free)} are free; {_remedies(plan, owners, free)}"
                )


def check_session_memory(plan: Plan, rank: int = 0) -> None:
    """Refuse one more session where it does not fit; arguments as `stream_memory`'s.

    Raises:
        ValueError: says what a session needs.
    """
    for name, owners in session_memory(plan, rank).items():
        free = available(torch.device(name))
        if total(owners) > free:
            raise ValueError(
                f"memory: a session needs {_sum(name, owners)}, {readable(free)} are free; close "
                "another session first"
            )


def check_sessions(plan: Plan, sessions: int, rank: int = 0) -> None:
    """Refuse more sessions at once than fit; other arguments as `stream_memory`'s.

    Raises:
        ValueError: says how many fit.
    """
    own = session_memory(plan, rank)
    for name, owners in stream_memory(plan, rank).items():
        each, free = total(own.get(name, {})), available(torch.device(name))
        if each and total(owners) + (sessions - 1) * each > free:
            fit = (free - total(owners)) // each + 1
            raise ValueError(
                f"memory: {sessions} sessions need {readable(total(owners))} on {name} for the "
                f"models and the first, and {readable(each)} for each further one; "
                f"{readable(free)} are free: {max(fit, 0)} fit"
            )


def _sum(device: str, owners: Mapping[str, int]) -> str:
    listed = ", ".join(f"{owner} {readable(size)}" for owner, size in owners.items())
    return f"{readable(total(owners))} on {device} ({listed})"


def _remedies(plan: Plan, owners: Mapping[str, int], free: int) -> str:
    """What would fit: one change, else all that are possible, else a smaller video."""
    saved = _savings(plan, owners)
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


def _savings(plan: Plan, owners: Mapping[str, int]) -> dict[str, int]:
    """Bytes that a change of the recipe saves."""
    geometry, saved = plan.geometry, {}
    programs = isinstance(plan, StreamPlan)  # a bundle's sizes are fixed
    least = geometry.chunk + geometry.sink * (2 if geometry.shot_sink else 1)
    if programs and least < geometry.window and "cache pages" in owners:
        share = 1 - least / geometry.window
        caches = 1 + (_GUIDANCE in owners)
        saved[f"geometry.window={least}"] = int(share * caches * owners["cache pages"])
    if "text encoder" in owners:
        saved["stream.text.after=free"] = owners["text encoder"]
    if _GUIDANCE in owners:
        saved["stream.guidance=1"] = owners[_GUIDANCE]
    if _GRAPHS in owners:
        saved["stream.decoder.cuda_graphs=false"] = owners[_GRAPHS]
    if isinstance(plan, StreamPlan) and _DECODING in owners and plan.section.decoder.latents > 1:
        saved["stream.decoder.latents=1"] = sum(
            _decoding(plan, placed) - _decoding(plan, placed, leaving=("steps",))
            for placed in plan.decoders
        )
    for owner, key, device in (
        (_TEXT, "stream.text.device", plan.text_device),
        (_IMAGE, "stream.decoder.device", plan.decoder_device),
    ):
        if owner in owners and device.type != "cpu":
            saved[f"{key}=cpu"] = owners[owner]
    return saved
