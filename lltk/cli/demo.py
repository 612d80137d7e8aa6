"""``lltk demo``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lltk.cli.tables import pass_table, row_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lltk.graph.program import Program


@click.command("demo")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and inputs.")
def command(seed: int) -> None:
    """Make a tiny diffusers checkpoint, compile it, and run it chunk by chunk.

    The same clip runs once through the train graph (teacher forcing, the whole clip at once) and
    once through the stream graphs (chunk by chunk over the cache); both give the same result.

    \b
    Example:
      lltk demo
    """
    import torch

    from lltk.cli.recipes import open_recipe
    from lltk.compiler import transform
    from lltk.graph.module import instantiate
    from lltk.stream.rollout import Rollout

    console = Console()
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        checkpoint = Path(folder) / "tiny"
        _save_tiny(checkpoint, generator)
        console.print("A tiny WanTransformer3DModel, saved by diffusers with random weights")
        override = (f"model.checkpoint={checkpoint}", "model.config=null")
        with console.status("compiling the stream program"):
            stream = transform(open_recipe("tiny_stream", override))
        with console.status("compiling the train program"):
            train = transform(open_recipe("tiny_train", (*override, "geometry.frames=8")))
        console.print(pass_table(stream.log))

        clip = _inputs(train, generator)
        start = time.perf_counter()
        once = instantiate(train)("train", **clip)["sample"]
        console.print(f"One shot over the clip: {(time.perf_counter() - start) * 1e3:.0f} ms")

        cached = Rollout(stream, instantiate(stream))
        forgetful = Rollout(stream, instantiate(stream))
        rows = []
        for chunk in range(train.geometry.chunks):
            own = slice(chunk * train.geometry.chunk, (chunk + 1) * train.geometry.chunk)
            results = []
            pages = len(cached.table.plan().table)
            start = time.perf_counter()
            for rollout in (cached, forgetful):
                rollout.set_text(clip["encoder_hidden_states"][:, chunk])
                latents, level = clip["noisy"][:, :, own], clip["timestep"][:, own]
                results.append(rollout.step(latents, level, clip["positions"][own]))
            seconds = (time.perf_counter() - start) / len(results)
            cached.commit(clip["clean"][:, :, own], clip["positions"][own])
            scale = once[:, :, own].abs().max()
            off = [float((r - once[:, :, own]).abs().max() / scale) for r in results]
            rows.append(
                {
                    "chunk": str(chunk),
                    "pages read": str(pages),
                    "ms a step": f"{seconds * 1e3:.1f}",
                    "difference": f"{off[0]:.1e}",
                    "without the cache": f"{off[1]:.1e}",
                }
            )
        console.print(row_table("Chunk by chunk against one shot", rows))
        console.print("Differences are relative to the output's largest value.")


def _save_tiny(path: Path, generator: torch.Generator) -> None:
    """diffusers' own class and file layout; weights large enough for attention to matter."""
    from lltk.models.configs import named_config
    from lltk.models.wan22 import build

    model: Any = build(named_config("tiny"))
    for name, parameter in model.named_parameters():
        scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.normal_(mean, scale, generator=generator)
    model.save_pretrained(path)


def _inputs(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Noise for every input; timesteps one a chunk."""
    import torch

    geometry = program.geometry
    inputs = {
        name: torch.randn(spec.shape, dtype=spec.dtype, generator=generator)
        for name, spec in program.contract("train").inputs.items()
    }
    levels = 1000 * torch.rand(geometry.batch, geometry.chunks, generator=generator)
    inputs["timestep"] = levels.repeat_interleave(geometry.chunk, dim=1)
    inputs["positions"] = torch.arange(geometry.frames, dtype=torch.float64)
    return inputs
