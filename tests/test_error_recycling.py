"""Error recycling: who carries which error, what is kept, and that it does not depend on calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lltk.train.data import Batch
from lltk.train.error_recycling import ErrorBuffer, ErrorRecycling, Given, without_errors
from lltk.train.noise_levels import noise_grid
from lltk.train.recipe import ErrorRecyclingSection

pytestmark = pytest.mark.cpu

SHAPE = (3, 2, 4, 5)
"""Of a chunk: channels, frames, height, width."""
CHUNKS = 3


def recycling(**settings: Any) -> ErrorRecycling:
    return ErrorRecycling(ErrorRecyclingSection(**settings), SHAPE, torch.float32, CHUNKS)


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
) -> tuple[Batch, Given]:
    """What clips are given; the errors of a prediction are taken."""
    batch = Batch(3, indices, {})
    given = kept.inject(batch, plain(batch, counted))
    kept.note(batch, given, values(batch, "flow").requires_grad_())
    return batch, given


def filled(count: int = 40, **settings: Any) -> ErrorRecycling:
    """Recycling that has kept some errors."""
    kept = recycling(**settings)
    for start in range(0, count, 4):
        turn(kept, range(start, start + 4))
        kept.end_step()
    return kept


def rows(kept: ErrorRecycling, kind: str) -> dict[int, list[Tensor]]:
    """The errors of a kind, by bucket."""
    found: dict[int, list[Tensor]] = {}
    for name, error in kept.state().items():
        if name.startswith(kind):
            found.setdefault(int(name.split(".")[1]), []).append(error)
    return found


def multiples(error: Tensor, kept: Iterable[Tensor]) -> list[float]:
    """By what those of the kept errors are multiplied of which an error is a multiple."""
    pairs = [(float((error * own).sum() / own.square().sum()), own) for own in kept]
    return [scale for scale, own in pairs if torch.allclose(error, scale * own, atol=1e-5)]


@given(st.integers(0, 999))
def test_levels_share_buckets_of_twenty(level: int) -> None:
    buffer = ErrorBuffer(50, 1, (1,), torch.float32)
    buffer.add(torch.tensor([2.0]), level, 0.0)
    assert list(buffer.state()) == [f"{level // 20}.0"]
    assert buffer.near(level // 20 * 20, 0.9) is not None
    assert buffer.near((level + 20) % 1000, 0.9) is None


def test_a_full_bucket_replaces_any_error() -> None:
    buffer = ErrorBuffer(2, 3, (1,), torch.float32)
    for number in range(3):
        buffer.add(torch.tensor([float(number)]), 0, 0.99)
    buffer.add(torch.tensor([7.0]), 999, 0.0)
    buffer.add(torch.tensor([9.0]), 0, 0.5)
    found = {name: float(error) for name, error in buffer.state().items()}
    assert found == {"0.0": 0, "0.1": 9, "0.2": 2, "1.0": 7}


def test_any_error_is_as_likely_as_another() -> None:
    buffer = ErrorBuffer(4, 3, (1,), torch.float32)
    assert buffer.any(0.5) is None
    for number, level in enumerate((0, 400, 410, 999)):
        buffer.add(torch.tensor([float(number)]), level, 0.0)
    found = [buffer.any(draw) for draw in (0.0, 0.24, 0.25, 0.49, 0.5, 0.75, 0.999)]
    assert [float(error) for error in found if error is not None] == [0, 0, 1, 1, 2, 3, 3]


def test_nothing_is_added_before_errors_are_kept() -> None:
    """Those of a step are kept at its end."""
    kept = recycling(clean=0, latent=1, noise=1, context=1)
    for _ in range(2):
        batch, given = turn(kept, range(4))
        assert torch.equal(given.latents, values(batch, "clean"))
        assert torch.equal(given.noise, values(batch, "noise"))
        assert torch.equal(given.context, values(batch, "clean"))
        assert given.kept.all() and not kept.state()
    kept.end_step()
    assert len(kept.state()) == 2 * 2 * 4 * CHUNKS
    assert not any(error.requires_grad for error in kept.state().values())


def test_errors_are_those_of_the_prediction() -> None:
    """x₀ + e is what the model predicts, and the noise that it takes for ε is ε + e."""
    kept = filled(clean=0.0, latent=1.0, noise=1.0, context=1.0)
    before = kept.state()
    batch, given = turn(kept, range(1))
    kept.end_step()
    clean, flow = values(batch, "clean"), values(batch, "flow")
    sigma = given.sigma[:, None, :, None, None]
    assert torch.equal(given.noisy, (1 - sigma) * given.latents + sigma * given.noise)
    assert torch.equal(given.target, given.noise - clean)
    assert (given.latents != clean).any() and (given.noise != values(batch, "noise")).any()
    wanted = {
        "latent": given.noisy - sigma * flow - clean,
        "noise": (1 - sigma) * (flow - (given.noise - clean)),
    }
    added = {name: error for name, error in kept.state().items() if name not in before}
    for kind, errors in wanted.items():
        chunks = errors.unflatten(2, (CHUNKS, -1)).movedim(2, 1)[0]
        for chunk, level in enumerate(given.level[0].tolist()):
            found = [e for n, e in added.items() if n.startswith(f"{kind}.{level // 20}.")]
            assert any(torch.allclose(error, chunks[chunk], atol=1e-5) for error in found)


@pytest.mark.parametrize(("name", "part"), [("latent", "latents"), ("noise", "noise")])
def test_errors_come_from_near_levels(name: str, part: str) -> None:
    """Each chunk's is one of its bucket, times a number near 1; an empty bucket gives none."""
    shares = {"clean": 0.0, "latent": 0.0, "noise": 0.0, "context": 0.0, name: 1.0}
    kept = filled(**shares)
    kinds = rows(kept, name)
    batch, given = turn(kept, range(100, 108))
    base = values(batch, "noise" if name == "noise" else "clean")
    added = (getattr(given, part) - base).unflatten(2, (CHUNKS, -1)).movedim(2, 1)
    empty = 0
    for sample, row in enumerate(given.level.tolist()):
        for chunk, level in enumerate(row):
            error, bucket = added[sample, chunk], kinds.get(level // 20)
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
    every = [error for row in rows(kept, "latent").values() for error in row]
    batch, given = turn(kept, range(100, 106))
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


def test_clips_do_not_depend_on_their_calls() -> None:
    """A step in one call and in four: the same inputs, the same errors kept, in the same order."""
    one, four = filled(entries=2), filled(entries=2)
    _, given = turn(one, range(100, 104))
    parts = [turn(four, range(index, index + 1))[1] for index in range(100, 104)]
    for name in ("latents", "noise", "context", "kept"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(given, name), joined)
    for each in (one, four):
        each.end_step()
    assert list(one.state()) == list(four.state())
    assert all(torch.equal(one.state()[name], four.state()[name]) for name in one.state())


def test_what_does_not_count_carries_no_error() -> None:
    """A given first frame, and padding; a chunk of padding is not kept."""
    kept = filled(clean=0.0, latent=1.0, noise=1.0, context=1.0)
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, 0] = False
    counted[1, 4:] = False
    batch, given = turn(kept, range(100, 102), counted)
    clean = values(batch, "clean")
    for part, base in (
        (given.latents, clean), (given.context, clean), (given.noise, values(batch, "noise"))
    ):  # fmt: skip
        assert torch.equal(part[0, :, 0], base[0, :, 0])
        assert torch.equal(part[1, :, 4:], base[1, :, 4:])
    assert not torch.equal(given.context[0, :, 1], clean[0, :, 1])
    fresh = recycling()
    turn(fresh, range(100, 102), counted)
    fresh.end_step()
    errors = list(fresh.state().values())
    assert len(errors) == 2 * 5
    firsts = [error for error in errors if not error[:, 0].any()]
    assert len(firsts) == 2 and all(bool(error[:, 1].all()) for error in firsts)


def test_memory_is_bounded() -> None:
    entry = 4 * 3 * 2 * 4 * 5
    kept = filled(120, buckets=2, gigabytes=4.5 * 2 * 2 * entry / 1e9)
    assert [len(row) for kind in ("latent", "noise") for row in rows(kept, kind).values()] == [
        4
    ] * 4
    few = filled(120, buckets=2, entries=3)
    assert len(few.state()) == 2 * 2 * 3
    message = refused(recycling, gigabytes=1e-6)
    assert "0.00048 MB in each of 2·50 buckets; set at least 4.8e-05" in message


def test_a_state_goes_on() -> None:
    kept = filled(entries=2)
    other = recycling(entries=2)
    other.load({name: errors.clone() for name, errors in kept.state().items()})
    results = []
    for each in (kept, other):
        _, given = turn(each, range(100, 104))
        each.end_step()
        results.append((given, each.state()))
    (ours, mine), (theirs, own) = results
    assert torch.equal(ours.context, theirs.context)
    assert list(mine) == list(own) and all(torch.equal(mine[n], own[n]) for n in mine)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "said"),
    [
        ("latent.50.0", SHAPE, torch.float32, "latent: 50.0 is none of 50 buckets of 3 errors"),
        ("noise.3.3", SHAPE, torch.float32, "errors of the noise: 3.3 is none of 50 buckets"),
        ("noise.4.1", SHAPE, torch.float32, "errors of the noise: 4.1 is none of 50 buckets"),
        ("noise.3.0", (3, 2, 4, 4), torch.float32, "[3, 2, 4, 4], not torch.float32 [3, 2, 4, 5]"),
        ("noise.3.0", SHAPE, torch.float16, "noise: 3.0 is torch.float16 [3, 2, 4, 5], not"),
        ("clean.3.0", SHAPE, torch.float32, "error clean.3.0: is neither"),
    ],
)
def test_another_state_is_refused(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, said: str
) -> None:
    before = {f"noise.3.{place}": torch.zeros(SHAPE) for place in range(3)}
    state = before | {name: torch.zeros(shape, dtype=dtype)}
    assert said in refused(recycling(entries=3).load, state)


# Owners


def test_owners_have_every_nth_bucket() -> None:
    """Of levels in another's bucket, an owner has the nearest bucket, and the later of two."""
    buffer = ErrorBuffer(10, 2, (1,), torch.float32, owners=4)
    for bucket in range(10):
        buffer.add(torch.tensor([float(bucket)]), 100 * bucket, 0.0)

    def near(owner: int) -> list[float]:
        found = [buffer.near(100 * bucket + 99, 0.0, owner) for bucket in range(10)]
        return [float(error) for error in found if error is not None]

    assert near(0) == [0, 0, 4, 4, 4, 4, 8, 8, 8, 8]
    assert near(3) == [3, 3, 3, 3, 3, 7, 7, 7, 7, 7]
    assert [buffer.owner(level) for level in (0, 199, 399, 400, 950)] == [0, 1, 3, 0, 1]
    assert [buffer.count(owner) for owner in range(4)] == [3, 3, 2, 2]
    found = [buffer.any(draw, 1) for draw in (0.0, 0.34, 0.99)]
    assert [float(error) for error in found if error is not None] == [1, 5, 9]


EVERYWHERE = {"clean": 0.0, "latent": 1.0, "noise": 0.0, "context": 1.0, "owners": 3}


def test_chunks_carry_errors_of_their_owners() -> None:
    kept = filled(**EVERYWHERE)
    kinds = rows(kept, "latent")
    batch, given = turn(kept, range(300, 306))
    clean = values(batch, "clean")
    for part, name in ((given.latents, "latents"), (given.context, "context")):
        added = (part - clean).unflatten(2, (CHUNKS, -1)).movedim(2, 1)
        for sample, row in enumerate(given.level.tolist()):
            for chunk, level in enumerate(row):
                own = {bucket: kinds[bucket] for bucket in kinds if bucket % 3 == chunk}
                found = [bucket for bucket in own if multiples(added[sample, chunk], own[bucket])]
                if name == "context":
                    assert len(found) == 1
                elif added[sample, chunk].any():
                    assert abs(found[0] - level // 20) <= 2


def test_later_errors_are_kept_by_the_owner_of_their_chunk() -> None:
    """Of the first fifty steps all are; then a third, as three owners have equally many buckets."""
    kept = recycling(**EVERYWHERE)
    grown = []
    for step in range(90):
        _, given = turn(kept, range(step, step + 1))
        before = len(kept.state())
        kept.end_step()
        own = sum(level // 20 % 3 == chunk for chunk, level in enumerate(given.level[0].tolist()))
        grown.append((len(kept.state()) - before, 2 * (CHUNKS if step < 50 else own)))
    assert all(found == wanted for found, wanted in grown)
    assert {wanted for _, wanted in grown[50:]} > {0, 2}


def test_owners_decide_for_themselves() -> None:
    kept = filled(**EVERYWHERE | {"latent": 0.5, "clean": 0.3, "update": 0.0})
    free = plain(batch := Batch(3, range(400, 440), {}))
    given = kept.inject(batch, free)
    carried = (given.context != free.context).unflatten(2, (CHUNKS, -1)).movedim(2, 1)
    assert torch.equal(carried.flatten(2).any(2), given.kept)
    assert {tuple(row) for row in given.kept.tolist()} >= {(True, False, True), (False, True, True)}


def test_owners_go_on_from_a_state() -> None:
    """They know by it whether the first steps are over."""
    state = filled(4 * 51, **EVERYWHERE).state()
    again, new = recycling(**EVERYWHERE), recycling(**EVERYWHERE)
    again.load(state)
    assert again.state().keys() == state.keys()
    for kept in (again, new):
        turn(kept, range(500, 508))
        kept.end_step()
    assert len(new.state()) - 1 == 2 * 8 * CHUNKS > len(again.state()) - len(state)
    del state["steps"]
    assert refused(recycling(**EVERYWHERE).load, state).startswith("steps: is missing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"owners": 2}, "owners: 2 do not divide the 3 chunks of a clip; set one of [1, 3]"),
        ({"owners": 3, "buckets": 2}, "owners: 3 are more than the 2 buckets; set at most so many"),
    ],
)
def test_misfit_owners(settings: dict[str, Any], message: str) -> None:
    assert refused(recycling, **settings) == f"train.error_recycling.{message}"
