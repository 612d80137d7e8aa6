"""Gradients of the train, score and step graphs are those of the masked original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import PASSES, after, reached
from test_identities import (
    CLIP,
    WIDTH,
    Video,
    causal,
    clip_program,
    make_video,
    masked_original,
    one_shot_arguments,
    run_original,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lltk.graph.module import instantiate
from lltk.stream.rollout import Rollout

pytestmark = pytest.mark.cpu

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference allowed, relative to each gradient's largest value."""
FAR = 1e-2
DTYPES = list(BOUND)
IMPLEMENTATIONS = ["reference", "sdpa"]
Gradients = dict[str, Tensor]


def clip(dtype: torch.dtype) -> Video:
    return make_video(**CLIP, dtype=dtype)


def leaves(video: Video) -> Video:
    """The video with latents and prompts that take gradients."""
    fields = ("clean", "noisy", "text")
    return replace(video, **{f: getattr(video, f).clone().requires_grad_() for f in fields})


def loss(sample: Tensor) -> Tensor:
    """A sum that weighs every value differently."""
    generator = torch.Generator().manual_seed(1)
    return (sample * torch.randn(sample.shape, generator=generator).to(sample)).sum()


def gradients(total: Tensor, module: nn.Module, video: Video) -> Gradients:
    """The gradients of every parameter and input. An input that is not read has none."""
    wanted = dict(module.named_parameters())
    wanted |= {name: getattr(video, name) for name in ("clean", "noisy", "text")}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {n: g for n, g in zip(wanted, found, strict=True) if g is not None}


def of_train(video: Video, implementation: str) -> Gradients:
    video = leaves(video)
    module = clip_program("train", implementation, video.clean.dtype)
    result = module(
        "train",
        {
            "clean": video.clean,
            "noisy": video.noisy,
            "timestep": video.timestep,
            "positions": video.positions,
            "encoder_hidden_states": video.text[None],
        },
    )
    return gradients(loss(result["sample"]), module, video)


def of_masked_train(video: Video, seen: list[set[int]]) -> Gradients:
    """The gradients through the noisy half of the masked original."""
    video = leaves(video)
    frames = video.chunks * video.chunk
    sample = run_original(**one_shot_arguments(video, seen))[:, :, frames:]
    module = masked_original(2 * frames, video.chunks, video.clean.dtype)
    return gradients(loss(sample), module, video)


def of_score(video: Video, implementation: str) -> Gradients:
    video = leaves(video)
    module = clip_program("score", implementation, video.clean.dtype)
    result = module(
        "score",
        {
            "hidden_states": video.noisy,
            "timestep": video.timestep,
            "positions": video.positions,
            "encoder_hidden_states": video.text[None],
        },
    )
    return gradients(loss(result["sample"]), module, video)


def of_masked_score(video: Video, seen: list[set[int]]) -> Gradients:
    video = leaves(video)
    frames = video.chunks * video.chunk
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for index, keys in enumerate(seen):
        mask[video.frames(index), sorted(keys)] = True
    sample = run_original(
        video.noisy, video.timestep, video.positions, video.text, video.prompt_of, mask
    )
    module = masked_original(frames, video.chunks, video.clean.dtype)
    return gradients(loss(sample), module, video)


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference, relative to each gradient's largest value."""
    assert ours.keys() == theirs.keys()
    return max(_relative(ours[name], theirs[name]) for name in theirs)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    scale = theirs.abs().max()
    assert scale > 0, "a gradient that is nil proves nothing"
    return float((ours - theirs).abs().max() / scale)


def nearest_attention(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Smallest difference among self-attention's gradients."""
    return min(_relative(ours[name], theirs[name]) for name in theirs if ".attn1." in name)


def one_chunk_off(video: Video) -> list[set[int]]:
    """The causal sets with the last chunk's history one chunk short."""
    seen = causal(video)
    return [*seen[:-1], seen[-1] - seen[0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_train(implementation: str, dtype: torch.dtype) -> None:
    video = clip(dtype)
    ours = of_train(video, implementation)
    names = {name for name, _ in clip_program("train", "sdpa", dtype).named_parameters()}
    assert ours.keys() == names | {"clean", "noisy", "text"}
    assert worst(ours, of_masked_train(video, causal(video))) <= BOUND[dtype]
    assert nearest_attention(ours, of_masked_train(video, one_chunk_off(video))) > FAR


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_score(implementation: str, dtype: torch.dtype) -> None:
    video = clip(dtype)
    ours = of_score(video, implementation)
    assert "clean" not in ours
    assert worst(ours, of_masked_score(video, causal(video))) <= BOUND[dtype]
    assert nearest_attention(ours, of_masked_score(video, one_chunk_off(video))) > FAR


def test_blocks_recompute_to_the_same_gradients() -> None:
    """Attention runs again in every block but those that keep its results."""
    video = leaves(clip(torch.float32))
    counts, found = [], []
    for kept in (None, 0, 1, 2):
        module = instantiate(reached("train", *PASSES["train"], **WIDTH))
        runs = _count_runs(module)
        if kept is not None:
            module.recompute_blocks(kept)
        with _Attentions() as attentions:
            result = module(
                "train",
                {
                    "clean": video.clean,
                    "noisy": video.noisy,
                    "timestep": video.timestep,
                    "positions": video.positions,
                    "encoder_hidden_states": video.text[None],
                },
            )
            once = attentions.count
            found.append(gradients(loss(result["sample"]), module, video))
        counts.append((len(runs), attentions.count / once))
    assert counts == [(2, 1.0), (4, 2.0), (4, 1.5), (4, 1.0)]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


class _Attentions(TorchDispatchMode):
    """Counts how often attention's forward pass runs."""

    count = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        name = str(op)
        self.count += "scaled_dot_product" in name and "backward" not in name
        return op(*args, **(kwargs or {}))


def _count_runs(module: Any) -> list[str]:
    """Wrap the regions so that every run is noted."""
    runs: list[str] = []

    def noting(name: str, region: Any) -> Any:
        def run(*arguments: Tensor) -> Any:
            runs.append(name)
            return region(*arguments)

        return run

    for name in list(module._regions):
        module._regions[name] = noting(name, module._regions[name])
    return runs


# The chunk in flight


def of_step(
    video: Video, pages_train: bool = False, implementation: str = "sdpa"
) -> tuple[Gradients, Iterable[Tensor]]:
    """Gradients of the last chunk's latents and prompt through a step, and the pages it read."""
    program = reached("stream", *PASSES["stream"][:-1], **WIDTH)
    program = after(program, {"lower": {"paged_attention": implementation}})
    module = instantiate(program, dtype=video.clean.dtype)
    rollout = Rollout(program, module)
    for name, arena in rollout.pages.items():
        rollout.pages[name] = arena.to(video.clean.dtype)
    last = video.chunks - 1
    with torch.no_grad():
        for index in range(last):
            frames = video.frames(index)
            rollout.set_text(video.text[index : index + 1])
            rollout.commit(video.clean[:, :, frames], video.positions[frames], index in video.cuts)
    for arena in rollout.pages.values():
        arena.requires_grad_(pages_train)
    frames = video.frames(last)
    noisy = video.noisy[:, :, frames].clone().requires_grad_()
    text = video.text[last:].clone().requires_grad_()
    rollout.set_text(text)
    sample = rollout.step(noisy, video.timestep[:, frames], video.positions[frames])
    loss(sample).backward()
    assert noisy.grad is not None and text.grad is not None
    return {"noisy": noisy.grad, "text": text.grad}, rollout.pages.values()


def of_masked_step(video: Video, seen: list[set[int]]) -> Gradients:
    """The same through the masked original, whose history is held constant."""
    last = video.frames(video.chunks - 1)
    video = replace(video, noisy=video.noisy.clone().requires_grad_())
    frames = video.chunks * video.chunk
    sample = run_original(**one_shot_arguments(video, seen))[:, :, frames:][:, :, last]
    (grad,) = torch.autograd.grad(loss(sample), [video.noisy])
    before = slice(0, last.start)
    assert not grad[:, :, before].any(), "a noisy chunk reads another"
    return {"noisy": grad[:, :, last]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_step(implementation: str, dtype: torch.dtype) -> None:
    video = clip(dtype)
    ours, _ = of_step(video, implementation=implementation)
    theirs = of_masked_step(video, causal(video))
    assert _relative(ours["noisy"], theirs["noisy"]) <= BOUND[dtype]
    off = of_masked_step(video, one_chunk_off(video))
    assert _relative(ours["noisy"], off["noisy"]) > FAR


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_committed_pages_get_no_gradient(implementation: str) -> None:
    ours, pages = of_step(clip(torch.float32), True, implementation)
    assert all(gradient.any() for gradient in ours.values())
    assert [arena.grad for arena in pages] == [None] * 4
