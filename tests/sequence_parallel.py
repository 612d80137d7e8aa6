"""What each rank runs for `test_ulysses`: exchanges, rollouts and a stream; a script."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from helpers import PASSES, Steps, after, make_program, make_recipe, tiny_config
from safetensors.torch import save_file
from streams import planned
from torch import Tensor

from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.parallel import reference
from lltk.parallel.exchange import all_parts, heads_to_tokens, own_part, tokens_to_heads
from lltk.parallel.groups import SEQUENCE
from lltk.parallel.ranks import joined
from lltk.stream.rollout import Rollout
from lltk.streaming import open_stream

CASES: dict[str, tuple[Steps, str]] = {
    "plain": ((), "compute"),
    "fp8": (("fp8_infer",), "fp8"),
    "fp8 pages": (("fp8_cache",), "compute"),
    "nvfp4": (("nvfp4_cache",), "compute"),
    "all": (("fp8_infer", "nvfp4_cache"), "fp8"),
}
"""Passes before the ranks part, and what is exchanged."""
CHUNKS = 6


@cache
def _streaming() -> Program:
    config = tiny_config(2, num_attention_heads=4, attention_head_dim=16, ffn_dim=64)
    sizes = {"chunk": 4, "window": 16, "sink": 4, "frames": 4}
    return make_program(make_recipe("stream", PASSES["stream"][:-2], config=config, **sizes))


def program(name: str, size: int) -> Program:
    """A case's Program; for one rank without exchanges."""
    steps, exchange = CASES[name]
    shared = [{"ulysses_stream": {"size": size, "exchange": exchange}}] if size > 1 else []
    return after(_streaming(), *steps, *shared, "regionalise", "lower")


@torch.no_grad()
def rolled(made: Program) -> dict[str, Tensor]:
    """Samples of chunks over a window that rolls, with a cut, and the pages in the end."""
    run = Rollout(made, instantiate(made))
    generator = torch.Generator().manual_seed(1)
    geometry, spec = made.geometry, made.spec
    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    run.set_text(torch.randn(1, geometry.text_tokens, spec.text_dim, generator=generator))
    samples = []
    for chunk in range(CHUNKS):
        latents = torch.randn(shape, generator=generator)
        positions = torch.arange(geometry.chunk, dtype=torch.float64) + chunk * geometry.chunk
        level = torch.linspace(900, 100, geometry.chunk)[None]
        samples.append(run.step(latents, level, positions))
        run.commit(latents, positions, opens_shot=chunk == 3)
    return {"samples": torch.stack(samples), **run.pages}


def exchanged(rank: int, size: int) -> None:
    """Every op is its reference, for dtypes that a backend knows and one that it does not."""
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        generator = torch.Generator().manual_seed(0)
        shards = [torch.randn(2, 3, 8, 5, generator=generator).to(dtype) for _ in range(size)]
        scales = [shard[..., :1].float() for shard in shards]
        heads, wide = tokens_to_heads([shards[rank], scales[rank]], size, SEQUENCE)
        wanted = [reference.tokens_to_heads(shards, other) for other in range(size)]
        assert torch.equal(heads.float(), wanted[rank].float())
        assert not torch.equal(heads.float(), wanted[1 - rank].float())
        assert torch.equal(wide, reference.tokens_to_heads(scales, rank))
        back = heads_to_tokens(heads, size, SEQUENCE)
        assert torch.equal(back.float(), reference.heads_to_tokens(wanted, rank).float())
        assert torch.equal(back.float(), shards[rank].float())
    whole = torch.arange(24.0).view(2, 6, 2)
    part = own_part(whole, 1, size, SEQUENCE)
    assert torch.equal(part, whole.chunk(size, 1)[rank])
    assert torch.equal(all_parts(part, 1, size, SEQUENCE), whole)


def main(folder: Path, pipeline: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        rank, size = ranks.rank, ranks.size
        assert ranks.any(rank == 1) and not ranks.any(False)
        exchanged(rank, size)
        for name in CASES:
            made = rolled(program(name, size))
            save_file({n: t.contiguous() for n, t in made.items()}, folder / f"{name}.{rank}")
        plan = planned(pipeline, *overrides)
        video: list[Tensor] = []
        sink = video.append if rank == 0 else None
        from streams import SHOTS

        with open_stream(plan, sink, SHOTS) as stream:
            latents = [next(stream.session).latents for _ in range(3)]
            stream.save(folder / "state.safetensors")
        with open_stream(plan, sink, resume=folder / "state.safetensors") as stream:
            latents += [report.latents for report in stream]
        result = {"latents": torch.cat(latents, dim=2)}
        if rank == 0:
            result["video"] = torch.cat(video, dim=2)
        save_file(result, folder / f"stream.{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
