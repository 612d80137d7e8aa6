"""A session between two chunks, and on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lltk.graph.files import written_whole
from lltk.stream.cache import CacheState, Held
from lltk.stream.chunks import Chunk, Receipt
from lltk.stream.delivery import DeliveryState
from lltk.stream.timeline import TimelineState

KEY = "lltk.stream"
FORMAT = "3"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SessionState:
    """A session between two chunks: all that it needs to go on, bit for bit.

    Attributes:
        seed: of the noise.
        timeline: the chunks that are still to be made, and the events that wait for them.
        prompt: of the latest chunk; None before the first.
        cache: which chunks the cache holds.
        pages: each runtime's cache, by name.
        delivery: what is decoded and delivered, and what is not.
        image: normalised latent of the video's first frame, float32 [B, C, 1, h, w], as long as the
            first chunk is to be made.
    """

    seed: int
    timeline: TimelineState
    prompt: str | None
    cache: CacheState
    pages: Sequence[Mapping[str, Tensor]]
    delivery: DeliveryState
    image: Tensor | None


def save_state(path: Path, state: SessionState, identity: Mapping[str, Any]) -> None:
    """Write a session's state.

    Args:
        path: the file; replaced if it is there.
        state: of the session.
        identity: what must be the same where the stream goes on, as plain data.

    Raises:
        OSError: the file cannot be written.
    """
    about = {
        "format": FORMAT,
        "identity": dict(identity),
        "torch": torch.__version__,
        "facts": _facts(state),
    }
    # One entry, because safetensors writes several in any order: equal states are equal files.
    metadata = {KEY: json.dumps(about, sort_keys=True)}
    tensors = {n: tensor.detach().cpu().contiguous() for n, tensor in _tensors(state).items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_state(path: Path, identity: Mapping[str, Any]) -> SessionState:
    """Read a session's state.

    Args:
        path: the file.
        identity: of the stream that is to go on; see `save_state`.

    Raises:
        ValueError: no state, damaged, or of another model, sampling or version; says which.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name one that lltk stream --save wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no state, or damaged ({error})") from error
    about = json.loads(metadata.get(KEY, "{}"))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(
            f"{path}: is not a stream's state of format {FORMAT}; name one that this lltk wrote, "
            "or stream again from the script"
        )
    made, wanted = about["identity"], json.loads(json.dumps(dict(identity)))
    differing = [key for key in {**made, **wanted} if made.get(key) != wanted.get(key)]
    if differing:
        found = "; ".join(
            f"{key}: {_short(made.get(key))} there, {_short(wanted.get(key))} here"
            for key in differing
        )
        raise ValueError(
            f"{path}: was made with another model, recipe or version ({found}); resume it with "
            "what made it"
        )
    if about["torch"] != torch.__version__:
        _log.warning(
            "%s: was made with torch %s, this is %s: frames may differ in their last bits",
            path,
            about["torch"],
            torch.__version__,
        )
    return _state(about["facts"], tensors)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


# The parts of a file


def _tensors(state: SessionState) -> dict[str, Tensor]:
    """A state's tensors, by part and name, such as ``pages0.k_pages_1``."""
    delivery = state.delivery
    parts: dict[str, Mapping[Any, Tensor]] = {
        "clean": {held.chunk.index: held.clean for held in state.cache.held},
        "decoder": delivery.caches,
        "undecoded": dict(enumerate(delivery.undecoded)),
        "undelivered": dict(enumerate(delivery.undelivered)),
        "image": {} if state.image is None else {"first": state.image},
        **{f"pages{i}": pages for i, pages in enumerate(state.pages)},
    }
    return {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}


def _facts(state: SessionState) -> dict[str, Any]:
    """All else of a state, as plain data."""
    timeline = state.timeline
    return {
        "seed": state.seed,
        "prompt": state.prompt,
        "chunks": [_plain(chunk) for chunk in timeline.chunks],
        "last": None if timeline.last is None else _plain(timeline.last),
        "events": timeline.events,
        "table": state.cache.table,
        "held": [_plain(held.chunk) for held in state.cache.held],
        "runtimes": len(state.pages),
        "latents": state.delivery.latents,
        "undecoded": len(state.delivery.undecoded),
        "undelivered": len(state.delivery.undelivered),
    }


def _state(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SessionState:
    """What `_facts` and `_tensors` were made of."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        part, _, own = name.partition(".")
        parts[part][own] = tensor
    undecoded, undelivered = (
        [parts[part][str(i)] for i in range(facts[part])] for part in ("undecoded", "undelivered")
    )
    held = (_chunk(data) for data in facts["held"])
    last = facts["last"]
    return SessionState(
        facts["seed"],
        TimelineState(
            tuple(_chunk(data) for data in facts["chunks"]),
            None if last is None else _chunk(last),
            facts["events"],
        ),
        facts["prompt"],
        CacheState(
            facts["table"],
            tuple(Held(chunk, parts["clean"][str(chunk.index)]) for chunk in held),
        ),
        [parts[f"pages{i}"] for i in range(facts["runtimes"])],
        DeliveryState(facts["latents"], parts["decoder"], undecoded, undelivered),
        parts["image"].get("first"),
    )


def _plain(chunk: Chunk) -> dict[str, Any]:
    return {**asdict(chunk), "frames": [chunk.frames.start, chunk.frames.stop]}


def _chunk(data: Mapping[str, Any]) -> Chunk:
    receipts = tuple(Receipt(**receipt) for receipt in data["receipts"])
    return Chunk(**{**data, "frames": range(*data["frames"]), "receipts": receipts})
