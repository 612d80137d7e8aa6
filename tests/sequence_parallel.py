"""What each of two ranks makes, for the tests; run by torchrun, on two GPUs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from helpers import PASSES, after, make_program, make_recipe, tiny_config
from ranks import forked, free_port, grouped
from safetensors.torch import save_file
from streams import SHOTS, SIZES
from torch import Tensor

from lltk import streaming
from lltk.cli.main import main as cli
from lltk.graph.module import instantiate
from lltk.graph.passes import run_passes
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.ops.fp8_dequantise.reference import fp8_dequantise
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise
from lltk.parallel import reference
from lltk.parallel.exchange import (
    all_max,
    all_parts,
    heads_to_tokens,
    own_part,
    own_seed,
    receive_heads,
    send_tokens,
    tokens_to_heads,
)
from lltk.parallel.groups import SEQUENCE, rank_in, same_on_all
from lltk.parallel.ranks import joined
from lltk.passes.ulysses_stream import UlyssesStream
from lltk.stream.chunks import Chunk, Chunking
from lltk.stream.decoder import DecodedElsewhere
from lltk.stream.report import ChunkReport
from lltk.stream.rollout import Rollout
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.stream.script import Shot
from lltk.stream.session import Sampling, Session
from lltk.stream.timeline import Timeline
from lltk.stream.video import VideoWriter
from lltk.streaming import StreamPlan, load_models, plan_stream

rounded_exchange = overload("rounded_exchange")

SIZE = 2
_EXACT = {"exchange": "compute"}
CASES: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "plain": ((), _EXACT),
    "plain in fp8": ((), {"exchange": "fp8"}),
    "plain in nvfp4": ((), {"exchange": "nvfp4"}),
    "queries in fp8": ((), {"exchange": "compute", "exchange_queries": "fp8"}),
    "bounded": (("bounded_positions",), _EXACT),
    "nvfp4 pages": (("nvfp4_cache",), _EXACT),
    "nvfp4 pages in nvfp4": (
        ("nvfp4_cache",),
        {"exchange": "nvfp4", "exchange_queries": "fp8"},
    ),
    "all": (
        (
            "fuse_norm_rope",
            "nvfp4_cache",
            "fp8_infer",
            "fuse_rows",
        ),
        {"exchange": "fp8"},
    ),
}
"""Passes before the frames are shared, and how they are."""
EXACT = [case for case, (_, options) in CASES.items() if options == _EXACT]
"""Cases in which nothing is rounded before it is sent."""
_TORCH = {"prefer": ["triton"], "paged_attention": "sdpa"}
_DECODED = {"prefer": ["triton"], "nvfp4_paged_attention": "decode_triton"}
RECORDABLE: dict[str, dict[str, Any]] = {
    "plain": {"paged_attention": "sdpa"},
    "plain in fp8": _TORCH,
    "plain in nvfp4": _TORCH,
    "queries in fp8": _TORCH,
    "bounded": {"paged_attention": "sdpa"},
    "nvfp4 pages": _DECODED,
    "nvfp4 pages in nvfp4": _DECODED,
    "all": {**_DECODED, "fp8_matmul": "scaled_mm"},
}
"""What runs a case's ops in CUDA graphs, which may not wait for the host."""
CHUNKS = 6
"""Over a window of 4."""
WAYS = ("eager", "compiled", "graphs")
"""Ways in which a GPU runs a Program."""


@cache
def _streaming() -> Program:
    config = tiny_config(2, num_attention_heads=4, attention_head_dim=16, ffn_dim=64)
    sizes = {"chunk": 4, "window": 16, "sink": 4, "frames": 4}
    return make_program(make_recipe("stream", PASSES["stream"][:-2], config=config, **sizes))


def programs(size: int) -> list[Program]:
    """The Programs of every case, for so many ranks."""
    return [program(case, size) for case in CASES]


@cache
def program(case: str, size: int, how: str = "eager") -> Program:
    """A case's Program for so many ranks. How is one of `WAYS`."""
    steps, options = CASES[case]
    shared = [{"ulysses_stream": {"size": size, **options}}] if size > 1 else []
    lower = {"lower": RECORDABLE[case] if how == "graphs" else {}}
    return after(_streaming(), *steps, *shared, "regionalise", lower)


@cache
def program_of_one(case: str, how: str = "eager") -> Program:
    """A case's Program whose exchanges are within a group of one rank, which no recipe asks for."""
    steps, options = CASES[case]
    config = UlyssesStream.Config(**options).model_copy(update={"size": 1})
    shared = run_passes(after(_streaming(), *steps), [UlyssesStream(config)])
    return after(shared, "regionalise", {"lower": RECORDABLE[case] if how == "graphs" else {}})


@torch.no_grad()
def rolled(made: Program, device: str = "cpu", how: str = "eager") -> dict[str, Tensor]:
    """The samples of chunks over a window that rolls, with a cut, and the pages at the end.

    How is one of `WAYS`.
    """
    module = instantiate(made, device)
    if how == "compiled":
        module.compile_blocks()
    run = Rollout(made, module, how == "graphs")
    generator = torch.Generator().manual_seed(1)
    geometry, spec = made.geometry, made.spec
    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    text = torch.randn(1, geometry.text_tokens, spec.text_dim, generator=generator)
    run.set_text(text.to(device))
    samples = []
    for chunk in range(CHUNKS):
        latents = torch.randn(shape, generator=generator).to(device)
        positions = run.positions()
        level = torch.linspace(900, 100, geometry.chunk, device=device)[None]
        samples.append(run.step(latents, level, positions))
        run.commit(latents, positions, opens_shot=chunk == 3)
    found = {"samples": torch.stack(samples), **run.pages}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def session(made: Program, seed: int = 5) -> Session:
    """A guided session with a cut, which makes latents alone."""
    geometry, spec = made.geometry, made.spec
    module = instantiate(made)
    script = [Shot(caption=f"shot {i}", seconds=length) for i, length in enumerate((3, CHUNKS - 3))]

    def embedded(prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(prompt) + ord(prompt[-1]))
        return torch.randn(1, geometry.text_tokens, spec.text_dim, generator=generator)

    return Session(
        TorchRuntime(made, module),
        DecodedElsewhere(torch.device("cpu")),
        lambda video: None,
        embedded,
        Timeline(Chunking(geometry.chunk, geometry.chunk, stride=1), script),
        Sampling(steps=2, guidance=1.5, negative_prompt="none", shot_offset=0.5),
        seed,
        TorchRuntime(made, module),
    )


def streamed(made: Program) -> Tensor:
    """The latents of a session that is saved and restored on its way."""
    with session(made) as before:
        latents = [next(before).latents for _ in range(2)]
        state = before.state()
        with session(made, seed=0) as after_:
            after_.restore(state)
            latents += [report.latents for report in after_]
    return torch.cat(latents, dim=2)


def stopped(made: Program, rank: int) -> str:
    """What each rank says of a commit in which the last rank's heads are not finite."""
    with session(made) as stream:
        runtime: Any = stream._runtime
        commit = runtime.commit

        def broken(*given: Any) -> None:
            commit(*given)
            if rank == SIZE - 1:
                runtime.pages["k_pages_decode_scales_1"][:, given[-1]] = torch.nan

        runtime.commit = broken
        try:
            next(stream)
        except ValueError as error:
            return str(error)
    return "nothing"


def wide(pipeline: Path, *changes: str) -> StreamPlan:
    """A stream of frames so wide that no decoder of two makes all columns."""
    given = f"stream.pipeline={pipeline}", "geometry.width=128", *changes
    return plan_stream(open_recipe("tiny_stream", (*SIZES, *given)))


def filmed(pipeline: Path) -> dict[str, Tensor]:
    """A video of which each rank decodes a part of the columns, and its latents.

    It is saved and resumed after a chunk. Every rank but the first gets no frames of it.
    """
    passes = [*open_recipe("tiny_stream", ()).passes]
    passes.insert(6, {"ulysses_stream": {"exchange": "compute"}})
    plan = wide(pipeline, f"passes={json.dumps(passes)}", "stream.decoder.device=ranks")
    video: list[Tensor] = []
    sink, state = video.append if plan.rank == 0 else None, pipeline.with_name("film.state")
    models = load_models(plan)
    with models.open(sink, SHOTS[:1]) as stream:
        latents = [next(stream).latents]
        stream.save(state)
    with models.open(sink, resume=state) as stream:
        latents += [report.latents for report in stream]
    film = torch.cat(video, dim=2) if video else torch.empty(0)
    return {"film": film, "film latents": torch.cat(latents, dim=2)}


def exchanged(rank: int, size: int) -> None:
    """See that every op gives what its reference does, in dtypes that backends may not know too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        generator = torch.Generator().manual_seed(0)
        shards = [torch.randn(2, 3, 8, 5, generator=generator).to(dtype) for _ in range(size)]
        scales = [shard[..., :1].float() for shard in shards]
        heads, few = tokens_to_heads([shards[rank], scales[rank]], size, SEQUENCE)
        wanted = [reference.tokens_to_heads(shards, other) for other in range(size)]
        assert torch.equal(heads.float(), wanted[rank].float())
        assert not torch.equal(heads.float(), wanted[rank - 1].float())
        assert torch.equal(few, reference.tokens_to_heads(scales, rank))
        sent = send_tokens([scales[rank], shards[rank]], size, SEQUENCE)
        back, own = heads_to_tokens([heads, few], size, SEQUENCE)
        (alone,) = heads_to_tokens([heads], size, SEQUENCE)
        received = receive_heads(sent, [scales[rank], shards[rank]], size, SEQUENCE)
        assert torch.equal(received[0], few)
        assert torch.equal(received[1].float(), heads.float())
        assert torch.equal(back.float(), reference.heads_to_tokens(wanted, rank).float())
        assert torch.equal(back.float(), shards[rank].float())
        assert torch.equal(alone.float(), back.float()) and torch.equal(own, scales[rank])
        # Two sessions' exchanges, begun before either is ended.
        both = [scales[rank]], [2 * scales[rank], shards[rank]]
        under_way = [(send_tokens(values, size, SEQUENCE), values) for values in both]
        (one,), (other, _) = (receive_heads(*each, size, SEQUENCE) for each in under_way)
        assert torch.equal(one, few) and torch.equal(other, 2 * few)
    seen = torch.tensor([float(rank), -1.0 - rank, torch.nan if rank == 1 else 0.0])
    largest = all_max(seen, size, SEQUENCE)
    assert largest[:2].tolist() == [size - 1, -1] and bool(largest[2].isnan())
    assert own_seed(torch.tensor([7, 9]), size, SEQUENCE).tolist() == [7, 9, rank, size]
    whole = torch.arange(48.0).view(2, 12, 2)
    part = own_part(whole, 1, size, SEQUENCE)
    assert torch.equal(part, whole.chunk(size, 1)[rank])
    assert torch.equal(all_parts(part, 1, size, SEQUENCE), whole)
    assert rank_in(SEQUENCE, size) == rank
    assert same_on_all("same", SEQUENCE, size) and not same_on_all(rank, SEQUENCE, size)


def differentiated(size: int) -> None:
    """See that gradients through every exchange are those of one process."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 2, 3 * size, 8, 5)
    *values, weight = torch.randn(shape, generator=generator, dtype=torch.float64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("blhd,bmhd->bhlm", q, k)
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)

    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (own_part(x, 1, size, SEQUENCE) for x in (q, k, v))
        sent = send_tokens([k, v], size, SEQUENCE)
        (heads,) = tokens_to_heads([q], size, SEQUENCE)
        made = attend(heads, *receive_heads(sent, [k, v], size, SEQUENCE))
        (tokens,) = heads_to_tokens([made], size, SEQUENCE)
        return all_parts(tokens, 1, size, SEQUENCE)

    found, wanted = (
        torch.autograd.grad((call(*inputs).pow(3) * weight).sum(), inputs)
        for call in (shared, attend)
        for inputs in [[x.clone().requires_grad_() for x in values]]
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(ours.roll(1, 1), theirs)


def rounded(rank: int, size: int) -> None:
    """See that what is sent rounded, and its gradient, are what one process rounds."""
    generator = torch.Generator().manual_seed(0)
    rounds: dict[str, Callable[[Tensor], Tensor]] = {
        "fp8": lambda x: fp8_dequantise(*fp8_quantise(x), x.dtype),
        "nvfp4": lambda x: nvfp4_dequantise(*nvfp4_quantise(x), x.dtype),
    }
    for form, to_heads in product(rounds, (True, False)):
        # Each token is larger than the one before, so that ranks' largest magnitudes differ.
        both = torch.randn(2, 2, 3 * size, 8, 16, generator=generator)
        both *= torch.arange(1.0, 3 * size + 1).view(-1, 1, 1)
        grads = torch.randn(both.shape, generator=generator)
        given, made = (1, 2) if to_heads else (2, 1)
        own = [x.chunk(size, given)[rank].clone().requires_grad_() for x in both]
        found = rounded_exchange(own, to_heads, form, size, SEQUENCE)
        for ours, whole in zip(found, both, strict=True):
            assert torch.equal(ours, rounds[form](whole).chunk(size, made)[rank])
            assert not torch.equal(ours, whole.chunk(size, made)[rank])
        received = torch.autograd.grad(found, own, [x.chunk(size, made)[rank] for x in grads])
        for ours, whole in zip(received, grads, strict=True):
            assert torch.equal(ours, rounds[form](whole).chunk(size, given)[rank])


def made_by(rank: int, size: int, port: int, pipeline: Path | None) -> dict[str, Tensor]:
    """All that a rank makes, by ``case.what``; with a pipeline also sessions and a video."""
    with grouped(rank, size, port):
        exchanged(rank, size)
        differentiated(size)
        rounded(rank, size)
        made: dict[str, Any] = {}
        for case in CASES:
            shared = program(case, size)
            made |= {f"{case}.{name}": t for name, t in rolled(shared).items()}
        if pipeline is None:
            return made
        made["session"] = streamed(program("nvfp4 pages", size))
        made |= filmed(pipeline)
        said = stopped(program("nvfp4 pages", size), rank)
        made["stopped"] = torch.tensor(list(said.encode()), dtype=torch.uint8)
    return made


def save_made(rank: int, size: int, port: int, pipeline: Path | None, path: Path) -> None:
    """Write `made_by` to a file; for a process of its own."""
    save_file(made_by(rank, size, port, pipeline), path)


def save_all(groups: Sequence[tuple[Sequence[Path], Path | None]]) -> None:
    """Write what each rank of some groups makes to a file of its own; for a new process.

    The ranks are forks of it, so that they share its programs. A process that has run gradients or
    several threads must not be forked.

    Args:
        groups: of each the ranks' files, and the pipeline that `made_by` takes.
    """
    torch.set_num_threads(1)
    for paths, pipeline in groups:
        size, port = len(paths), free_port()
        programs(size)
        given = [(rank, size, port, pipeline, path) for rank, path in enumerate(paths)]
        forked(save_made, given)


def run_command(
    rank: int, port: int, plan: StreamPlan, files: Path, number: int | None, given: Sequence[str]
) -> None:
    """Run ``lltk stream`` as a rank; for a process of its own.

    Args:
        rank: of `SIZE`.
        port: of the first rank.
        plan: of the stream.
        files: where the rank's frames and messages go, with endings for the rank.
        number: a signal that the rank gets within its second chunk; None for none.
        given: the command's arguments.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(SIZE)}
    os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    frames: list[Tensor] = []
    write, make = VideoWriter.write, Session._make

    def writing(self: VideoWriter, video: Tensor) -> None:
        write(self, video)
        frames.append(video)

    def making(self: Session, chunk: Chunk) -> ChunkReport:
        if chunk.index == 1 and number is not None:
            os.kill(os.getpid(), number)
        return make(self, chunk)

    with (
        patch.object(VideoWriter, "write", writing),
        patch.object(Session, "_make", making),
        patch.object(streaming, "plan_stream", lambda *given, **options: plan),
        patch.object(sys, "argv", ["lltk", "stream", "tiny_stream", *given, "--device", "cpu"]),
        open(f"{files}.err{rank}", "w") as sys.stderr,
        open(os.devnull, "w") as sys.stdout,
    ):
        try:
            cli()
        finally:
            if frames:
                save_file({"frames": torch.cat(frames)}, f"{files}.frames")


def main(folder: Path) -> None:
    """Run every case on the GPUs that torchrun gave, blocks compiled or not.

    Each rank writes a file.
    """
    with joined("cuda") as ranks:
        made = {
            f"{case}.{how}.{name}": tensor
            for case in CASES
            for how in WAYS
            for name, tensor in rolled(program(case, SIZE, how), str(ranks.device), how).items()
        }
        save_file(made, folder / f"{ranks.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
