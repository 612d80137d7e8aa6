"""A session between two chunks, and on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lltk.files.outputs import marked
from lltk.files.reading import parse_json
from lltk.files.tensors import read_tensors, save_tensors
from lltk.graph.recipe import validated
from lltk.stream.cache import CacheState, Held
from lltk.stream.chunks import Chunk, Receipt
from lltk.stream.delivery import DeliveryState
from lltk.stream.timeline import TimelineState

KEY = "lltk.stream"
FORMAT = 4
STATE = marked("a stream's state", f'"{KEY}":')
_log = logging.getLogger(__name__)
_Count = Annotated[int, Field(ge=0)]
_WAITING = 1 << 12
"""More parts of a video than ever wait for the decoder or the sink."""


class _Plain(BaseModel):
    """A part of the header."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Receipt(_Plain):
    number: int = Field(ge=0)
    event: str
    received: int = Field(ge=0)
    applied: int | None = Field(ge=0)


class _Chunk(_Plain):
    index: int = Field(ge=0)
    shot: int = Field(ge=0)
    cuts: int = Field(ge=0)
    prompt: str = Field(min_length=1)
    opens_shot: bool
    frames: tuple[int, int]
    recache: bool
    receipts: tuple[_Receipt, ...]

    def chunk(self) -> Chunk:
        receipts = tuple(Receipt(**receipt.model_dump()) for receipt in self.receipts)
        own = self.model_dump() | {"frames": range(*self.frames), "receipts": receipts}
        return Chunk(**own)


class _Table(_Plain):
    slots: list[tuple[_Count, _Count]]
    shot: int = Field(ge=0)
    next: int = Field(ge=0)


class _Facts(_Plain):
    seed: int = Field(ge=0)
    prompt: str | None
    chunks: tuple[_Chunk, ...]
    last: _Chunk | None
    events: int = Field(ge=0)
    table: _Table
    held: tuple[_Chunk, ...]
    runtimes: int = Field(ge=1, le=2)
    latents: int = Field(ge=0)
    undecoded: int = Field(ge=0, le=_WAITING)
    undelivered: int = Field(ge=0, le=_WAITING)


class _About(_Plain):
    format: int
    identity: dict[str, Any]
    torch: str
    facts: _Facts


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
    metadata = {KEY: json.dumps(about, sort_keys=True)}
    save_tensors(path, _tensors(state), metadata)


def load_state(path: Path, identity: Mapping[str, Any]) -> SessionState:
    """Read a session's state.

    Args:
        path: the file.
        identity: of the stream that is to go on; see `save_state`.

    Raises:
        ValueError: as `read_state`, or it is of another model, sampling or version; says which.
    """
    about, state = _read(path)
    made, wanted = about.identity, json.loads(json.dumps(dict(identity)))
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
    if about.torch != torch.__version__:
        _log.warning(
            "%s: was made with torch %s, this is %s: frames may differ in their last bits",
            path,
            about.torch,
            torch.__version__,
        )
    return state


def read_state(path: Path) -> SessionState:
    """Read a session's state, of whichever model it is.

    Raises:
        ValueError: it is no state of this format, was changed, or contradicts itself.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[_About, SessionState]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name one that lltk stream --save wrote")
    tensors, metadata = read_tensors(path)
    about = parse_json(metadata.get(KEY, "{}"), f"{path}: its header")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(
            f"{path}: is not a stream's state of format {FORMAT}; name one that this lltk wrote, "
            "or stream again from the script"
        )
    checked = validated(_About, about, f"{path}: its header")
    broken = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if broken:
        raise ValueError(f"{path}: {broken[0]} has values that are not finite; use another state")
    try:
        return checked, _state(checked.facts, tensors)
    except Contradiction as error:
        raise ValueError(f"{path}: {error}; it is damaged: use another state") from error


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(wide.isfinite().all())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


class Contradiction(ValueError):
    """A part of a state does not fit another one."""


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


def _state(facts: _Facts, tensors: Mapping[str, Tensor]) -> SessionState:
    """What `_facts` and `_tensors` were made of.

    Raises:
        Contradiction: they do not fit together.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        part, _, own = name.partition(".")
        parts[part][own] = tensor
    last = None if facts.last is None else facts.last.chunk()
    timeline = TimelineState(tuple(c.chunk() for c in facts.chunks), last, facts.events)
    _check_order(timeline)
    held = [chunk.chunk() for chunk in facts.held]
    _check_table(facts.table, held, timeline)
    pages = [f"pages{i}" for i in range(facts.runtimes)]
    wanted = {
        "clean": {str(chunk.index) for chunk in held},
        "undecoded": {str(i) for i in range(facts.undecoded)},
        "undelivered": {str(i) for i in range(facts.undelivered)},
    }
    for part in {*wanted, *parts} - {"decoder", "image", *pages}:
        if other := sorted(parts[part].keys() ^ wanted.get(part, set())):
            raise Contradiction(f"{part}.{other[0]} is missing, or is one too many")
    if parts["image"].keys() - {"first"} or (parts["image"] and timeline.index):
        raise Contradiction("it has an image that is not of the chunk to come")
    return SessionState(
        facts.seed,
        timeline,
        facts.prompt,
        CacheState(
            facts.table.model_dump(),
            tuple(Held(chunk, parts["clean"][str(chunk.index)]) for chunk in held),
        ),
        [parts[part] for part in pages],
        DeliveryState(
            facts.latents,
            parts["decoder"],
            [parts["undecoded"][str(i)] for i in range(facts.undecoded)],
            [parts["undelivered"][str(i)] for i in range(facts.undelivered)],
        ),
        parts["image"].get("first"),
    )


def _check_order(timeline: TimelineState) -> None:
    """Check that the chunks follow one another, and their shots and cuts too."""
    before = timeline.last
    for chunk in timeline.chunks:
        follows = chunk.index == 0 if before is None else (
            chunk.index == before.index + 1
            and chunk.frames.start == before.frames.stop
            and chunk.shot - before.shot in (0, 1)
            and chunk.cuts - before.cuts == int(chunk.opens_shot)
        )  # fmt: skip
        if not follows:
            raise Contradiction(f"chunk {chunk.index} follows no chunk that is there")
        before = chunk
    every = [*timeline.chunks, *([timeline.last] if timeline.last else [])]
    if any(receipt.number >= timeline.events for chunk in every for receipt in chunk.receipts):
        raise Contradiction("a receipt is of an event that was not")


def _check_table(table: _Table, held: Sequence[Chunk], timeline: TimelineState) -> None:
    """Check the page table, and that the chunks are held that it lists."""
    index = timeline.index
    chunks, slots = [chunk for chunk, _ in table.slots], [slot for _, slot in table.slots]
    if len(set(slots)) < len(slots):
        raise Contradiction(f"two chunks are in one page ({slots})")
    if chunks != sorted(set(chunks)) or chunks != [chunk.index for chunk in held]:
        raise Contradiction("its page table lists other chunks than it holds")
    if table.next != index or table.shot > index or any(chunk >= index for chunk in chunks):
        raise Contradiction(f"its page table is not that before chunk {index}")
    for before, after in pairwise(held):
        if after.shot < before.shot or after.cuts < before.cuts:
            raise Contradiction(f"chunk {after.index} is of an earlier shot than those before it")
    if held and held[-1] != timeline.last:
        raise Contradiction("the newest chunk that it holds is not the one made last")


def _plain(chunk: Chunk) -> dict[str, Any]:
    return {**asdict(chunk), "frames": [chunk.frames.start, chunk.frames.stop]}
