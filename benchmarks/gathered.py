"""Count what ranks that share the weights send each other in a training step of the 5B's width.

torchrun --nproc-per-node 2 benchmarks/gathered.py
torchrun --nproc-per-node 2 benchmarks/gathered.py --device cpu --frames 4 --small
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lltk.bench.random_weights import with_random_weights
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.compiler import transform
from lltk.graph.memory import readable
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models.configs import named_config
from lltk.parallel.mesh import Mesh, meshed
from lltk.parallel.ranks import Ranks, joined
from lltk.train.flow_matching import FlowMatching
from lltk.train.loop import Trainer
from lltk.train.recipe import TrainSection

_METHOD = """\
One step of {layers} layers of the 5B's width at {frames} latent frames, one clip for each rank,
weights divided among {ranks} ranks; the second of two. Bytes are counted as torch is asked for the
exchange: what a rank receives of weights that it gathers (FSDP2's, and 4-bit values with their
scales), and what it sends of gradients. Without blocks that are recomputed. NVFP4 keeps the last
layers in bfloat16 as the recipe does, and its products are emulated where the device has none.
Weights and clips are random."""
ROWS = {"bfloat16": "wan22_5b_train", "NVFP4": "wan22_5b_train_nvfp4"}
_SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 32}


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__)
    made.add_argument("--frames", type=int, default=8, help="latent frames (default: 8)")
    made.add_argument("--layers", type=int, default=8, help="(default: 8)")
    made.add_argument("--small", action="store_true", help="a narrow model, to try the script")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(ROWS)


def main() -> None:
    """Count, and write the record."""
    options = script_options(parser())
    with joined(options.device) as ranks:
        results = [{"name": name} | measure(ROWS[name], options, ranks) for name in ROWS]
        if ranks.rank == 0:
            facts = {"layers": options.layers, "frames": options.frames, "ranks": ranks.size}
            record = script_record("gathered", _METHOD.format(**facts), results, ranks.size)
            write_record(options.output, record, text(record))
            print(text(record))


_WHOLE = {
    "_reduce_scatter_base_": ("reduced", 1),
    "_allgather_base_": ("gathered", 0),
    "reduce_scatter_tensor": ("reduced", 0),
    "all_to_all_single": ("gathered", 0),
}
"""Of torch's exchanges: what is exchanged, and which argument has all ranks' parts."""


class Exchanged(TorchDispatchMode):
    """Adds up what this rank gathers and sends within the block, in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self.bytes = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func._opname
        if name in _WHOLE:
            kind, place = _WHOLE[name]
            self.bytes[kind] += args[place].nbytes * (self._size - 1) // self._size
        return func(*args, **(kwargs or {}))


class Clips:
    """Random clips."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program, self._device = program, device

    def batch(self, seed: int, indices: range) -> Mapping[str, Tensor]:
        geometry, spec = self._program.geometry, self._program.spec
        generator = torch.Generator(self._device).manual_seed(indices.start)

        def drawn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=self._device)

        frames = (geometry.frames, *geometry.latent(spec))
        return {
            "latents": drawn(len(indices), spec.channels, *frames),
            "text": drawn(len(indices), geometry.chunks, geometry.text_tokens, spec.text_dim),
        }


def measure(recipe: str, options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """What a recipe's step exchanges, and its loss."""
    changes = [f"geometry.frames={options.frames}", "geometry.batch=1"]
    if options.small:
        changes += ["geometry.height=64", "geometry.width=64", "geometry.text_tokens=16"]
    data: dict[str, Any] = dict(read_recipe(find_recipe(recipe), changes))
    config = dict(named_config("wan22_5b")) | {"num_layers": options.layers}
    config |= _SMALL if options.small else {}
    data["model"] = dict(data["model"]) | {"checkpoint": None, "config": config}
    data["passes"] = [*data["passes"][:-1], "lower"]
    program = transform(parse_recipe(data, recipe), weights=False)
    program = with_random_weights(program, ranks.device)
    settings = {
        "steps": 1000,
        "batch": ranks.size,
        "shards": ranks.size,
        "ema_decay": None,
        "lr": 1e-5,
    }
    section = TrainSection.model_validate(settings | {"checkpoint_every": 100})
    with meshed(ranks, 1, ranks.size) as mesh, TemporaryDirectory() as folder:
        run = trainer(program, section, Path(folder), ranks, mesh)
        next(run)
        with Exchanged(ranks.size) as found:
            step = next(run)
    weights = sum(weight.numel() for weight in program.weights.values())
    return {"loss": step.loss, "weights": weights} | dict(found.bytes)


def trainer(
    program: Program, section: TrainSection, folder: Path, ranks: Ranks, mesh: Mesh
) -> Trainer:
    """A run on the ranks' own clips."""
    objective = FlowMatching(program, instantiate(program, ranks.device))
    return Trainer(objective, Clips(program, ranks.device), section, folder, {}, mesh=mesh)


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "row": lambda row: row["name"],
        "weights": column("weights", ",d"),
        "gathered": lambda row: readable(row["gathered"]),
        "bytes gathered a weight": lambda row: f"{row['gathered'] / row['weights']:.3f}",
        "gradients sent": lambda row: readable(row["reduced"]),
        "loss": column("loss", ".4f"),
    }
    return markdown(record, "What ranks that share weights exchange", columns)


if __name__ == "__main__":
    main()
