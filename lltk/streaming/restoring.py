"""Whether a saved state fits a plan, before any of it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lltk.graph.contract import TensorSpec, saved_pages
from lltk.stream.state import SessionState
from lltk.streaming.plan import Plan


def check_state(path: Path, state: SessionState, plan: Plan) -> None:
    """Check a state against the plan of the stream that is to go on.

    Page indices are bounded here; runtimes only assert that they are, and kernels go by them.

    Args:
        path: what errors call it.
        state: which does not contradict itself; see `lltk.stream.state.read_state`.
        plan: of the stream.

    Raises:
        ValueError: a page index, a size, a shape or a dtype is none of this plan's streams.
    """
    wrong = next(_wrong(state, plan), None)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}; it is damaged: use another state")


def _wrong(state: SessionState, plan: Plan) -> Iterator[str]:
    """What does not fit."""
    timeline, delivery = state.timeline, state.delivery
    geometry, spec = plan.geometry, plan.spec
    own = [*timeline.chunks, *([timeline.last] if timeline.last else [])]
    for chunk in (*own, *(held.chunk for held in state.cache.held)):
        if chunk.frames != plan.chunking.frames(chunk.index):
            yield f"chunk {chunk.index} has frames {chunk.frames.start} to {chunk.frames.stop}"
    slots = dict(state.cache.table["slots"])
    for chunk_index, slot in slots.items():
        if not 0 <= slot < geometry.pages:
            yield f"chunk {chunk_index} is in page {slot}, and there are {geometry.pages}"
    if len(slots) != min(timeline.index, geometry.pages - 1):
        yield f"{len(slots)} chunks are held before chunk {timeline.index}"
    if delivery.latents != timeline.index * geometry.chunk:
        yield f"{delivery.latents} latent frames were made before chunk {timeline.index}"
    if len(state.pages) != (2 if plan.guided else 1):
        yield f"it has {len(state.pages)} caches"
    for pages in state.pages:
        yield from _other(pages, saved_pages(plan.pages), "cache")
    latent = geometry.latent(spec)

    def frames(count: int | None) -> tuple[int | None, ...]:
        return (geometry.batch, spec.channels, count, *latent)

    for held in state.cache.held:
        if bad := _misshapen(held.clean, frames(geometry.chunk), torch.float32):
            yield f"chunk {held.chunk.index}: its latents are {bad}"
    for part in delivery.undecoded:
        if bad := _misshapen(part, frames(None), torch.float32):
            yield f"latents to decode are {bad}"
    decoded = delivery.latents - sum(part.shape[2] for part in delivery.undecoded)
    if decoded < 0:
        yield "more latents are to be decoded than were made"
    if state.image is not None and (bad := _misshapen(state.image, frames(1), torch.float32)):
        yield f"its image is {bad}"
    sizes = (None, geometry.height, geometry.width) if plan.rank == 0 else (0, 0, 0)
    for part in delivery.undelivered:  # rank 0 has the video
        dtype = plan.video_dtype if plan.rank == 0 else part.dtype
        if bad := _misshapen(part, (geometry.batch, 3, *sizes), dtype):
            yield f"video to deliver is {bad}"
    if sum(part.shape[2] for part in delivery.undelivered) > decoded * spec.stride[0]:
        yield "more video is to be delivered than was decoded"
    yield from _other(delivery.caches, plan.decoder_caches(plan.rank) if decoded else {}, "decoder")


def _other(
    found: Mapping[str, Tensor], wanted: Mapping[str, TensorSpec], what: str
) -> Iterator[str]:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            yield f"{what}: {name} is missing, or is one too many"
            return
        spec = wanted[name]
        if bad := _misshapen(found[name], tuple(spec.shape), spec.dtype):
            yield f"{what}: {name} is {bad}"


def _misshapen(tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> str | None:
    """What a tensor is, if that is not of a shape, in which None stands for any size above 0."""
    fits = len(shape) == tensor.dim() and all(
        size > 0 if wanted is None else size == wanted
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    return None if fits and tensor.dtype == dtype else f"{tensor.dtype} {list(tensor.shape)}"
