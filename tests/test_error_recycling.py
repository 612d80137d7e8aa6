"""Error recycling: who carries which error, what is kept, and that it does not depend on calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lltk.train.data import Batch
from lltk.train.error_recycling import ErrorBuffer, ErrorRecycling, Errors, Given, without_errors
from lltk.train.noise_levels import noise_grid
from lltk.train.recipe import ErrorRecyclingSection

pytestmark = pytest.mark.cpu

SHAPE = (3, 2, 4, 5)
"""Of a chunk: channels, frames, height, width."""
CHUNKS = 3


def recycling(**settings: Any) -> ErrorRecycling:
    return ErrorRecycling(ErrorRecyclingSection(**settings), SHAPE, torch.float32)


def values(batch: Batch, name: str) -> Tensor:
    channels, frames, *size = SHAPE
    return batch.normal(name, channels, CHUNKS * frames, *size)


def plain(batch: Batch, counted: Tensor | None = None) -> Given:
    """What clips are given without errors."""
    level = batch.integers("level", 1000, CHUNKS)
    sigma = (noise_grid()[level] / 1000).repeat_interleave(SHAPE[1], 1)
    clean, noise = values(batch, "clean"), values(batch, "noise")
    if counted is None:
        counted = torch.ones(sigma.shape, dtype=torch.bool)
    return without_errors(clean, noise, level, sigma, counted)


def turn(
    kept: ErrorRecycling, indices: range, counted: Tensor | None = None
) -> tuple[Batch, Given, Errors]:
    """What clips are given, and the errors of a prediction."""
    batch = Batch(3, indices, {})
    given = kept.inject(batch, plain(batch, counted))
    return batch, given, kept.errors(given, values(batch, "flow").requires_grad_())


def filled(count: int = 40, **settings: Any) -> ErrorRecycling:
    """Recycling that has kept some errors."""
    kept = recycling(**settings)
    for start in range(0, count, 4):
        batch, _, errors = turn(kept, range(start, start + 4))
        kept.store(batch, errors)
    return kept


def multiples(error: Tensor, kept: Tensor) -> list[float]:
    """By what those of the kept errors are multiplied of which an error is a multiple."""
    scales = [float((error * own).sum() / own.square().sum()) for own in kept]
    pairs = zip(scales, kept, strict=True)
    return [scale for scale, own in pairs if torch.allclose(error, scale * own, atol=1e-5)]


@given(st.integers(0, 999))
def test_levels_share_buckets_of_twenty(level: int) -> None:
    buffer = ErrorBuffer(50, 1, (1,), torch.float32)
    buffer.add(torch.tensor([2.0]), level, 0.0)
    assert list(buffer.state()) == [str(level // 20)]
    assert buffer.near(level // 20 * 20, 0.9) is not None
    assert buffer.near((level + 20) % 1000, 0.9) is None


def test_a_full_bucket_replaces_any_error() -> None:
    buffer = ErrorBuffer(2, 3, (1,), torch.float32)
    for number in range(3):
        buffer.add(torch.tensor([float(number)]), 0, 0.99)
    buffer.add(torch.tensor([7.0]), 999, 0.0)
    buffer.add(torch.tensor([9.0]), 0, 0.5)
    assert {name: errors.flatten().tolist() for name, errors in buffer.state().items()} == {
        "0": [0, 9, 2],
        "1": [7],
    }


def test_any_error_is_as_likely_as_another() -> None:
    buffer = ErrorBuffer(4, 3, (1,), torch.float32)
    assert buffer.any(0.5) is None
    for number, level in enumerate((0, 400, 410, 999)):
        buffer.add(torch.tensor([float(number)]), level, 0.0)
    found = [buffer.any(draw) for draw in (0.0, 0.24, 0.25, 0.49, 0.5, 0.75, 0.999)]
    assert [float(error) for error in found if error is not None] == [0, 0, 1, 1, 2, 3, 3]


def test_nothing_is_added_before_errors_are_kept() -> None:
    batch, given, errors = turn(recycling(clean=0, latent=1, noise=1, context=1), range(4))
    assert torch.equal(given.latents, values(batch, "clean"))
    assert torch.equal(given.noise, values(batch, "noise"))
    assert torch.equal(given.context, values(batch, "clean"))
    assert given.kept.all() and errors.kept.all()
    assert not errors.latent.requires_grad and not errors.noise.requires_grad


def test_errors_are_those_of_the_prediction() -> None:
    """x₀ + e is what the model predicts, and the noise that it takes for ε is ε + e."""
    kept = filled(clean=0.0, latent=1.0, noise=1.0, context=1.0)
    batch, given, errors = turn(kept, range(4))
    clean, flow = values(batch, "clean"), values(batch, "flow")
    sigma = given.sigma[:, None, :, None, None]
    assert torch.equal(given.noisy, (1 - sigma) * given.latents + sigma * given.noise)
    latent, noise = (error.movedim(1, 2).flatten(2, 3) for error in (errors.latent, errors.noise))
    assert torch.allclose(clean + latent, given.noisy - sigma * flow, atol=1e-5)
    assert torch.allclose(noise, (1 - sigma) * (flow - (given.noise - clean)), atol=1e-5)
    assert not torch.allclose(noise, (1 - sigma) * (flow - (given.noise - given.latents)), atol=0.1)


@pytest.mark.parametrize(("name", "part"), [("latent", "latents"), ("noise", "noise")])
def test_errors_come_from_near_levels(name: str, part: str) -> None:
    """Each chunk's is one of its bucket, times a number near 1; an empty bucket gives none."""
    shares = {"clean": 0.0, "latent": 0.0, "noise": 0.0, "context": 0.0, name: 1.0}
    kept = filled(**shares)
    state = kept.state()
    batch, given, _ = turn(kept, range(100, 108))
    base = values(batch, "noise" if name == "noise" else "clean")
    added = (getattr(given, part) - base).unflatten(2, (CHUNKS, -1)).movedim(2, 1)
    empty = 0
    for sample, row in enumerate(given.level.tolist()):
        for chunk, level in enumerate(row):
            error, bucket = added[sample, chunk], state.get(f"{name}.{level // 20}")
            if bucket is None:
                assert not error.any()
                empty += 1
                continue
            (scale,) = multiples(error, bucket)
            assert 0.7 <= scale <= 1.3
    assert 0 < empty < 24
    assert torch.equal(given.context, values(batch, "clean"))


def test_clean_chunks_carry_errors_of_any_level() -> None:
    kept = filled(clean=0.0, latent=0.0, noise=0.0, context=1.0)
    every = torch.cat([e for n, e in kept.state().items() if n.startswith("latent")])
    batch, given, _ = turn(kept, range(100, 106))
    assert torch.equal(given.latents, values(batch, "clean"))
    added = (given.context - values(batch, "clean")).unflatten(2, (CHUNKS, -1)).movedim(2, 1)
    found = [multiples(error, every) for error in added.flatten(0, 1)]
    assert all(len(scales) == 1 for scales in found)
    scales = [scale for each in found for scale in each]
    assert 0.7 <= min(scales) < 0.85 and 1.15 < max(scales) <= 1.3


def test_shares() -> None:
    """A fifth carries nothing, of which a tenth is kept; the others carry what their shares say."""
    kept = filled(8, entries=1)
    carried, updates = [], []
    for start in range(0, 2000, 100):
        batch = Batch(3, range(start, start + 100), {})
        # An error of every level, so that what carries errors can be told.
        for number in range(50):
            for buffer in kept._buffers.values():
                buffer.add(torch.ones(SHAPE), 20 * number, 0.0)
        free = plain(batch)
        given = kept.inject(batch, free)
        names = ("latents", "noise", "context")
        pairs = [(getattr(given, name), getattr(free, name)) for name in names]
        carried.append(torch.stack([(a != b).flatten(1).any(1) for a, b in pairs], 1))
        updates.append(given.kept)
    some, whole = torch.cat(carried).double(), torch.cat(updates).double()
    assert some.mean(0).tolist() == pytest.approx([0.72, 0.008, 0.72], abs=0.03)
    assert whole.mean() == pytest.approx(0.82, abs=0.03)
    both = (some[:, 0] * some[:, 2]).mean()
    assert both == pytest.approx(0.8 * 0.81, abs=0.03)


def test_samples_do_not_depend_on_their_calls() -> None:
    """A step in one call and in four: the same inputs, the same errors kept, in the same order."""
    one, four = filled(entries=2), filled(entries=2)
    batch, given, errors = turn(one, range(100, 104))
    parts = [turn(four, range(index, index + 1)) for index in range(100, 104)]
    for name in ("latents", "noise", "context", "kept"):
        assert torch.equal(
            getattr(given, name), torch.cat([getattr(part, name) for _, part, _ in parts])
        )
    assert torch.equal(errors.latent, torch.cat([part.latent for _, _, part in parts]))
    assert torch.equal(errors.noise, torch.cat([part.noise for _, _, part in parts]))
    one.store(batch, errors)
    for own, _, part in parts:
        four.store(own, part)
    assert one.state().keys() == four.state().keys()
    assert all(torch.equal(one.state()[name], four.state()[name]) for name in one.state())


def test_what_does_not_count_carries_no_error() -> None:
    """A given first frame, and padding; a chunk of padding is not kept."""
    kept = filled(clean=0.0, latent=1.0, noise=1.0, context=1.0)
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, 0] = False
    counted[1, 4:] = False
    batch, given, errors = turn(kept, range(100, 102), counted)
    clean = values(batch, "clean")
    for part, base in (
        (given.latents, clean), (given.context, clean), (given.noise, values(batch, "noise"))
    ):  # fmt: skip
        assert torch.equal(part[0, :, 0], base[0, :, 0])
        assert torch.equal(part[1, :, 4:], base[1, :, 4:])
    assert not torch.equal(given.context[0, :, 1], clean[0, :, 1])
    assert not errors.latent[0, 0, :, 0].any() and errors.latent[0, 0, :, 1].all()
    assert not errors.noise[0, 0, :, 0].any()
    assert errors.kept.tolist() == [[True, True, True], [True, True, False]]


def test_memory_is_bounded() -> None:
    entry = 4 * 3 * 2 * 4 * 5
    kept = filled(120, buckets=2, gigabytes=4.5 * 2 * 2 * entry / 1e9)
    assert all(len(errors) == 4 for errors in kept.state().values())
    few = filled(120, buckets=2, entries=3)
    assert all(len(errors) == 3 for errors in few.state().values())
    message = refused(recycling, gigabytes=1e-6)
    assert "0.00048 MB in each of 2·50 buckets; set at least 4.8e-05" in message


def test_a_state_goes_on() -> None:
    kept = filled(entries=2)
    other = recycling(entries=2)
    other.load({name: errors.clone() for name, errors in kept.state().items()})
    results = []
    for each in (kept, other):
        batch, given, errors = turn(each, range(100, 104))
        each.store(batch, errors)
        results.append((given, each.state()))
    (ours, mine), (theirs, own) = results
    assert torch.equal(ours.context, theirs.context)
    assert list(mine) == list(own) and all(torch.equal(mine[n], own[n]) for n in mine)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"latent.50": torch.zeros(1, *SHAPE)}, "errors of latent: bucket 50 with 1 errors"),
        ({"noise.3": torch.zeros(4, *SHAPE)}, "there are 50 buckets of 3"),
        ({"noise.3": torch.zeros(0, *SHAPE)}, "errors of noise: bucket 3 with 0 errors"),
        ({"noise.3": torch.zeros(1, 3, 2, 4, 4)}, "errors of [3, 2, 4, 4] in torch.float32, not"),
        ({"noise.3": torch.zeros(1, *SHAPE).half()}, "in torch.float16, not"),
        ({"clean.3": torch.zeros(1, *SHAPE)}, "errors clean.3: are neither"),
    ],
)
def test_another_state_is_refused(state: dict[str, Tensor], said: str) -> None:
    assert said in refused(recycling(entries=3).load, state)
