"""Stream, train and score programs are diffusers' own graph under a mask.

The oracle is the canonical captured graph over all frames at once, with explicit masks on its
attentions and rotary tables from diffusers' own formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from helpers import CANONICAL, PASSES, after, reached, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pages import SetRule, geometry_of, rules
from torch import Tensor

from lltk.graph.edit import copy_graph, module_of
from lltk.graph.geometry import Kind
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program
from lltk.stream.pages import ChunkPages, PageTable
from lltk.stream.rollout import Rollout

pytestmark = pytest.mark.cpu

BOUND = {torch.float32: 3e-6, torch.float64: 1e-13}
"""Largest difference allowed, relative to the output's largest value."""
FAR = 1e-2
"""What every negative control must exceed."""
WIDTH = {"width": 96}
"""Beside a height of 64, so that the two cannot be exchanged unnoticed."""
FRAME_TOKENS = 6
TEXT_TOKENS = 5
DTYPES = list(BOUND)


# The oracle


@cache
def masked_original(frames: int, prompts: int, dtype: torch.dtype) -> ProgramModule:
    """The canonical graph of a clip, its masks and rotary tables made inputs."""
    program = reached(
        "score", "canonicalise", frames=frames, text_tokens=prompts * TEXT_TOKENS, **WIDTH
    )
    graph = copy_graph(program.graphs["forward"])
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        masks = {name: graph.placeholder(name) for name in ("self_mask", "cross_mask")}
        for buffer in graph.find_nodes(op="get_attr"):
            if buffer.target in program.spec.rope_tables:
                table = graph.placeholder(buffer.target.rpartition(".")[2])
                buffer.replace_all_uses_with(table)
                graph.erase_node(buffer)
    target = torch.ops.aten.scaled_dot_product_attention.default
    for node in graph.find_nodes(op="call_function", target=target):
        name = "self_mask" if ".attn1" in module_of(node) else "cross_mask"
        node.args = (*node.args[:3], masks[name])
    return instantiate(replace(program, graphs={"forward": graph}), dtype=dtype)


def rotary_tables(positions: Tensor, head_dim: int = 12) -> dict[str, Tensor]:
    """diffusers' tables, their temporal columns at ``positions`` instead of 0, 1, …"""
    program = reached("score", "canonicalise", **WIDTH)
    side = 2 * (head_dim // 6)
    time = get_1d_rotary_pos_embed(
        head_dim - 2 * side,
        positions,
        10000.0,
        use_real=True,
        repeat_interleave_real=True,
        freqs_dtype=torch.float64,
    )
    tables = {}
    for name, columns in zip(program.spec.rope_tables, time, strict=True):
        table = program.constants[name].clone()
        table[: len(positions), : columns.shape[1]] = columns.float()
        tables[name.rpartition(".")[2]] = table
    return tables


def run_original(
    latents: Tensor,
    timestep: Tensor,
    positions: Tensor,
    text: Tensor,
    prompt_of: Tensor,
    seen: Tensor,
) -> Tensor:
    """The masked original on a sequence of frames.

    Args:
        latents: [1, C, F, h, w].
        timestep: [1, F].
        positions: float64 [F].
        text: [N, S, E], the prompts.
        prompt_of: [F], the prompt of each frame.
        seen: bool [F, F], which frame sees which, or [F·T, F·T], which token.
    """
    frames, prompts = latents.shape[2], len(text)
    if len(seen) == frames:
        seen = seen.repeat_interleave(FRAME_TOKENS, 0).repeat_interleave(FRAME_TOKENS, 1)
    reads = prompt_of[:, None] == torch.arange(prompts)
    module = masked_original(frames, prompts, latents.dtype)
    result = module(
        "forward",
        {
            "hidden_states": latents,
            "timestep": timestep.repeat_interleave(FRAME_TOKENS, 1),
            "encoder_hidden_states": text.flatten(0, 1)[None],
            "self_mask": seen,
            "cross_mask": reads.repeat_interleave(FRAME_TOKENS, 0).repeat_interleave(
                TEXT_TOKENS, 1
            ),
            **rotary_tables(positions),
        },
    )
    return result["sample"]


# Videos, and the ways to run one


@dataclass(frozen=True)
class Video:
    """Inputs of a video of whole chunks.

    Attributes:
        chunk: frames of a chunk.
        clean, noisy: [1, C, F, h, w].
        timestep: [1, F], of the noisy latents.
        positions: float64 [F].
        text: [N, S, E], a prompt a chunk.
        cuts: chunks that open a shot.
    """

    chunk: int
    clean: Tensor
    noisy: Tensor
    timestep: Tensor
    positions: Tensor
    text: Tensor
    cuts: frozenset[int] = frozenset()

    @property
    def chunks(self) -> int:
        return len(self.text)

    @property
    def prompt_of(self) -> Tensor:
        return torch.arange(self.chunks).repeat_interleave(self.chunk)

    def frames(self, index: int) -> slice:
        return slice(index * self.chunk, (index + 1) * self.chunk)


def make_video(
    chunks: int,
    chunk: int,
    dtype: torch.dtype = torch.float32,
    cuts: frozenset[int] = frozenset(),
    phi: float = 0.0,
    seed: int = 0,
) -> Video:
    """Random latents, prompts and timesteps; every shot's positions are ``phi`` further on."""
    generator = torch.Generator().manual_seed(seed)
    frames = chunks * chunk

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shot = [sum(cut <= frame // chunk for cut in cuts) for frame in range(frames)]
    return Video(
        chunk,
        normal(1, 4, frames, 4, 6),
        normal(1, 4, frames, 4, 6),
        (torch.rand(1, frames, generator=generator) * 1000).to(dtype),
        torch.arange(frames, dtype=torch.float64) + phi * torch.tensor(shot, dtype=torch.float64),
        normal(chunks, TEXT_TOKENS, 16),
        cuts,
    )


@dataclass(frozen=True)
class Outputs:
    """What a run predicts for the noisy latents, and for the clean ones at t = 0."""

    noisy: Tensor
    clean: Tensor


@cache
def streaming(rule: SetRule, dtype: torch.dtype) -> tuple[Program, ProgramModule]:
    """The stream program of a geometry."""
    sizes = {"chunk": rule.chunk, "window": 8 * rule.chunk, "sink": 2 * rule.chunk}
    program = reached("stream", *CANONICAL, "hoist_text", **sizes, **WIDTH)
    program = replace(program, geometry=geometry_of(rule))
    program = after(program, "cached_step", "commit", "regionalise", "lower")
    return program, instantiate(program, dtype=dtype)


class NoHistory(PageTable):
    """Lists no page."""

    def next_pages(self) -> ChunkPages:
        return replace(super().next_pages(), table=())


@torch.no_grad()
def stream(video: Video, rule: SetRule, forget: bool = False) -> Outputs:
    """Stream chunk by chunk with the cache; with ``forget`` nothing of it is read."""
    program, module = streaming(replace(rule, cuts=frozenset()), video.clean.dtype)
    rollout = Rollout(program, module)
    for name, arena in rollout.pages.items():
        rollout.pages[name] = arena.to(video.clean.dtype)
    if forget:
        rollout._table = NoHistory(program.geometry)
    noisy, clean = [], []
    for index in range(video.chunks):
        frames = video.frames(index)
        rollout.set_text(video.text[index : index + 1])
        positions, latents = video.positions[frames], video.clean[:, :, frames]
        time = video.timestep[:, frames]
        noisy.append(rollout.step(video.noisy[:, :, frames], time, positions))
        clean.append(rollout.step(latents, torch.zeros_like(time), positions))
        rollout.commit(latents, positions, opens_shot=index in video.cuts)
    return Outputs(torch.cat(noisy, 2), torch.cat(clean, 2))


def one_shot_arguments(
    video: Video, seen: Sequence[set[int]], hide: bool = False
) -> dict[str, Tensor]:
    """`run_original`'s arguments for [clean; noisy].

    Args:
        video: the inputs.
        seen: the frames that each chunk attends to, its own among them.
        hide: whether the first token of every chunk's history is masked out.
    """
    frames = video.chunks * video.chunk
    clean = torch.zeros(frames, frames, dtype=torch.bool)
    own = torch.zeros(frames, frames, dtype=torch.bool)
    for index, keys in enumerate(seen):
        clean[video.frames(index), sorted(keys)] = True
        own[video.frames(index), video.frames(index)] = True
    never = torch.zeros(frames, frames, dtype=torch.bool)
    mask = torch.cat([torch.cat([clean, never], 1), torch.cat([clean & ~own, own], 1)])
    if hide:
        mask = mask.repeat_interleave(FRAME_TOKENS, 0).repeat_interleave(FRAME_TOKENS, 1)
        mask[video.chunk * FRAME_TOKENS :, 0] = False
    return {
        "latents": torch.cat([video.clean, video.noisy], 2),
        "timestep": torch.cat([torch.zeros_like(video.timestep), video.timestep], 1),
        "positions": video.positions.repeat(2),
        "text": video.text,
        "prompt_of": video.prompt_of.repeat(2),
        "seen": mask,
    }


@torch.no_grad()
def one_shot(video: Video, seen: Sequence[set[int]], hide: bool = False) -> Outputs:
    """[clean; noisy] in one run of the masked original; see `one_shot_arguments`."""
    out = run_original(**one_shot_arguments(video, seen, hide))
    clean, noisy = out.chunk(2, dim=2)
    return Outputs(noisy, clean)


def causal(video: Video) -> list[set[int]]:
    """Every chunk sees all chunks up to its own."""
    return [set(range((index + 1) * video.chunk)) for index in range(video.chunks)]


@cache
def clip_program(kind: Kind, implementation: str, dtype: torch.dtype) -> ProgramModule:
    """The train or score program of a clip of `CLIP`'s size."""
    program = reached(kind, *PASSES[kind][:-1], frames=6, **WIDTH)
    lowered = after(program, {"lower": {"block_causal_attention": implementation}})
    return instantiate(lowered, dtype=dtype)


@torch.no_grad()
def train(video: Video, implementation: str = "sdpa") -> Tensor:
    """The teacher-forcing program's prediction."""
    result = clip_program("train", implementation, video.clean.dtype)(
        "train",
        {
            "clean": video.clean,
            "noisy": video.noisy,
            "timestep": video.timestep,
            "positions": video.positions,
            "encoder_hidden_states": video.text[None],
        },
    )
    return result["sample"]


@torch.no_grad()
def score(video: Video, latents: Tensor, timestep: Tensor, implementation: str = "sdpa") -> Tensor:
    """The block-causal program's prediction."""
    result = clip_program("score", implementation, video.clean.dtype)(
        "score",
        {
            "hidden_states": latents,
            "timestep": timestep,
            "positions": video.positions,
            "encoder_hidden_states": video.text[None],
        },
    )
    return result["sample"]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def apart(ours: Outputs, theirs: Outputs) -> float:
    """The largest difference between two runs."""
    return max(difference(ours.noisy, theirs.noisy), difference(ours.clean, theirs.clean))


CLIP: dict[str, Any] = {"chunks": 3, "chunk": 2, "cuts": frozenset({1}), "phi": 2.5}
WHOLE = SetRule(2, 8, 0, False, frozenset())
"""A window that a clip does not fill."""


# The oracle itself


@torch.no_grad()
def test_the_oracle_is_diffusers_model() -> None:
    program = reached("score", "canonicalise", **WIDTH)
    model = WanTransformer3DModel(**tiny_config())
    model.load_state_dict(program.weights)
    video = make_video(1, 6)
    theirs = model(
        hidden_states=video.noisy,
        timestep=video.timestep.repeat_interleave(FRAME_TOKENS, 1),
        encoder_hidden_states=video.text,
        return_dict=False,
    )[0]
    everything = torch.ones(6, 6, dtype=torch.bool)

    def off(changes: dict[str, Tensor], seen: Tensor = everything) -> float:
        changed = replace(video, **changes)
        ours = run_original(
            changed.noisy, changed.timestep, changed.positions, video.text, video.prompt_of, seen
        )
        return difference(ours, theirs)

    assert off({}) <= BOUND[torch.float32]
    assert off({}, seen=everything.tril()) > FAR
    assert off({"positions": video.positions * 1.5}) > FAR
    assert off({"timestep": video.timestep.flip(1)}) > FAR


# Chunk by chunk with the cache = one-shot under a block-causal mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_steps_are_a_block_causal_one_shot(dtype: torch.dtype) -> None:
    video = make_video(**CLIP, dtype=dtype)
    assert apart(stream(video, WHOLE), one_shot(video, causal(video))) <= BOUND[dtype]


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_cached_clean_steps_are_the_score_program(implementation: str) -> None:
    video = make_video(**CLIP)
    still = torch.zeros_like(video.timestep)
    ours = stream(video, WHOLE).clean
    theirs = score(video, video.clean, still, implementation)
    assert difference(ours, theirs) <= BOUND[torch.float32]
    assert difference(ours, score(video, video.clean, video.timestep)) > FAR


CONTROLS: dict[str, Callable[[Video], Outputs]] = {
    "start frame stuck": lambda video: stream(
        replace(video, positions=video.positions[: video.chunk].repeat(video.chunks)), WHOLE
    ),
    "cache dropped": lambda video: stream(video, WHOLE, forget=True),
    "one token short": lambda video: one_shot(video, causal(video), hide=True),
    "timesteps swapped": lambda video: stream(
        replace(video, timestep=video.timestep.flip(1)), WHOLE
    ),
    "prompts swapped": lambda video: stream(replace(video, text=video.text.roll(1, 0)), WHOLE),
    "sees the future": lambda video: one_shot(video, causal(video)[-1:] * video.chunks),
}
"""Runs whose prediction for noisy chunks must not agree with the video's."""


@pytest.mark.parametrize("name", CONTROLS)
def test_what_breaks_the_identity_is_seen(name: str) -> None:
    video = make_video(**CLIP)
    assert difference(CONTROLS[name](video).noisy, stream(video, WHOLE).noisy) > FAR


def test_only_relative_positions_matter() -> None:
    video = make_video(**CLIP)
    moved = stream(replace(video, positions=video.positions + 700), WHOLE)
    assert apart(moved, stream(video, WHOLE)) <= BOUND[torch.float32]


# Rolling sink and window = masked one-shot

ROLLING = SetRule(1, 6, 2, True, frozenset({2, 7}))
CHUNKS = 9


def rolling_video(dtype: torch.dtype = torch.float32) -> Video:
    return make_video(CHUNKS, ROLLING.chunk, dtype, frozenset(ROLLING.cuts), phi=8.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rolling_cache_is_a_masked_one_shot(dtype: torch.dtype) -> None:
    video = rolling_video(dtype)
    assert apart(stream(video, ROLLING), one_shot(video, ROLLING.attended(CHUNKS))) <= BOUND[dtype]


@pytest.mark.parametrize(
    "changes",
    [
        {"sink": 0},
        {"sink": 1},
        {"shot_sink": False},
        {"window": 5},
        {"window": 7},
        {"cuts": frozenset({2})},
        {"cuts": frozenset({3, 7})},
    ],
    ids=str,
)
def test_another_set_of_keys_is_seen(changes: dict[str, Any]) -> None:
    video = rolling_video()
    theirs = one_shot(video, replace(ROLLING, **changes).attended(CHUNKS))
    assert apart(stream(video, ROLLING), theirs) > FAR


def test_an_evicted_frame_that_returns_is_seen() -> None:
    video, seen = rolling_video(), ROLLING.attended(CHUNKS)
    assert seen[8] == {0, 1, 7, 6, 3, 8}, "5 is newer than 3, but was evicted"
    theirs = one_shot(video, [*seen[:8], {0, 1, 7, 6, 5, 8}])
    assert apart(stream(video, ROLLING), theirs) > FAR


def test_a_missing_shot_offset_is_seen() -> None:
    video = rolling_video()
    plain = replace(video, positions=torch.arange(CHUNKS, dtype=torch.float64))
    assert apart(stream(video, ROLLING), one_shot(plain, ROLLING.attended(CHUNKS))) > FAR


def hold_to_the_rule(rule: SetRule, chunks: int, phi: float, seed: int) -> None:
    """Two videos, the second cut at the mirrored chunks."""
    for cuts in (frozenset(rule.cuts), frozenset(chunks - cut for cut in rule.cuts)):
        cut_rule = replace(rule, cuts=cuts)
        video = make_video(chunks, rule.chunk, cuts=cuts, phi=phi, seed=seed)
        theirs = one_shot(video, cut_rule.attended(chunks))
        assert apart(stream(video, cut_rule), theirs) <= BOUND[torch.float32]


OFFSETS = st.sampled_from([0.0, 8.0, 2.5, 0.7])


@given(rules(8, largest_chunk=1), OFFSETS, st.integers(0, 99))
@settings(max_examples=12)
def test_any_rolling_cache_of_one_frame_chunks(rule: SetRule, phi: float, seed: int) -> None:
    hold_to_the_rule(rule, 8, phi, seed)


@given(rules(5, largest_chunk=1), OFFSETS, st.integers(0, 99))
@settings(max_examples=12)
def test_any_rolling_cache_of_two_frame_chunks(rule: SetRule, phi: float, seed: int) -> None:
    doubled = replace(rule, chunk=2, window=2 * rule.window, sink=2 * rule.sink)
    hold_to_the_rule(doubled, 5, phi, seed)


# Teacher forcing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_teacher_forcing_is_the_masked_original(implementation: str, dtype: torch.dtype) -> None:
    video = make_video(**CLIP, dtype=dtype)
    theirs = one_shot(video, causal(video)).noisy
    assert difference(train(video, implementation), theirs) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_noisy_chunks_are_the_noisy_half_of_teacher_forcing(dtype: torch.dtype) -> None:
    video = make_video(**CLIP, dtype=dtype)
    whole, cached = train(video), stream(video, WHOLE).noisy
    for index in range(video.chunks):
        frames = video.frames(index)
        assert difference(cached[:, :, frames], whole[:, :, frames]) <= BOUND[dtype]


@pytest.mark.parametrize("name", CONTROLS)
def test_what_breaks_teacher_forcing_is_seen(name: str) -> None:
    video = make_video(**CLIP)
    assert difference(CONTROLS[name](video).noisy, train(video)) > FAR


def test_clean_and_noisy_swapped_is_seen() -> None:
    video = make_video(**CLIP)
    swapped = replace(video, clean=video.noisy, noisy=video.clean)
    assert difference(train(swapped), train(video)) > FAR


# Per-frame timesteps


@torch.no_grad()
def test_a_timestep_a_frame_is_the_same_timestep_on_its_tokens() -> None:
    video = make_video(**CLIP)
    per_token = reached("score", "canonicalise", **WIDTH)
    per_frame = reached("score", "canonicalise", "per_frame_timesteps", **WIDTH)
    given = {"hidden_states": video.noisy, "encoder_hidden_states": video.text[:1]}
    repeated = video.timestep.repeat_interleave(FRAME_TOKENS, 1)
    theirs = instantiate(per_token)("forward", {"timestep": repeated, **given})["sample"]
    module = instantiate(per_frame)
    ours = module("forward", {"timestep": video.timestep, **given})["sample"]
    assert difference(ours, theirs) <= BOUND[torch.float32]
    swapped = module("forward", {"timestep": video.timestep.flip(1), **given})["sample"]
    assert difference(swapped, theirs) > FAR


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_score_is_the_masked_original(implementation: str, dtype: torch.dtype) -> None:
    video = make_video(**CLIP, dtype=dtype)
    ours = score(video, video.noisy, video.timestep, implementation)

    def masked(timestep: Tensor, positions: Tensor, seen: list[set[int]]) -> Tensor:
        mask = torch.zeros(6, 6, dtype=torch.bool)
        for index, keys in enumerate(seen):
            mask[video.frames(index), sorted(keys)] = True
        return run_original(video.noisy, timestep, positions, video.text, video.prompt_of, mask)

    seen = causal(video)
    assert difference(ours, masked(video.timestep, video.positions, seen)) <= BOUND[dtype]
    assert difference(ours, masked(video.timestep.flip(1), video.positions, seen)) > FAR
    assert difference(ours, masked(video.timestep, video.positions * 2, seen)) > FAR
    short = [*seen[:2], seen[2] - {0}]
    assert difference(ours, masked(video.timestep, video.positions, short)) > FAR
