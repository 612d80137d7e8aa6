"""What each rank of a training step has to do, by how a clip is divided; counted, not timed.

python benchmarks/layouts.py
python benchmarks/layouts.py tiny_train --frames 12 --vae tiny_vae
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lltk.bench.layouts import with_layout
from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.compiler import transform
from lltk.graph.contract import Role
from lltk.graph.edit import op_of
from lltk.graph.flops import forward_flops
from lltk.graph.memory import readable
from lltk.graph.program import Program
from lltk.graph.recipe import parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.graph.regions import nodes_of_pass
from lltk.models.vae_frames import Way, encoded_frames
from lltk.models.wan_vae import CONFIGS, validate_config
from lltk.ops.implementations import overload
from lltk.parallel.exchange import TOKENS_TO_HEADS
from lltk.streaming.traffic import sent_bytes

_METHOD = """\
Counted from the graphs of {recipe} at {frames} latent frames, batch 1, for each rank of one clip.
Loss-bearing tokens are noisy tokens that the rank predicts for. Frames encoded are video frames
that its VAE encoder takes: all of the clip, the rank's own with those that it looks back to, or the
rank's own with what the convolutions look back to handed on. Sent is what the rank sends to the
others in a forward pass; a backward pass sends as much. Permuted are bytes of queries, keys and
values that are moved between their exchange and attention. FLOPs are those of products in a forward
pass."""
WAYS: Mapping[str, tuple[str, Way]] = {
    "balanced, encoder handed on": ("balanced_sp", "shared"),
    "balanced, encoder looks back": ("balanced_sp", "lookback"),
    "naive, whole encoder": ("naive_sp", "whole"),
}
"""How a clip's tokens are divided, and its frames for the encoder."""
_ATTENTION = overload("block_causal_attention")


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, device=False)
    made.add_argument("recipe", nargs="?", default="wan22_5b_train_16s", metavar="RECIPE")
    made.add_argument("--frames", type=int, default=96, help="latent frames (default: 96)")
    made.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="(default: 2 4)")
    made.add_argument("--vae", default="wan22_vae", help="the encoder's named configuration")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return [
        f"{way}, rank {rank} of {size}"
        for size in options.ranks
        for way in WAYS
        for rank in range(size)
    ]


def main() -> None:
    """Count, and write the record."""
    options = script_options(parser())
    results = [row for size in options.ranks for way in WAYS for row in counted(way, size, options)]
    facts = {"recipe": options.recipe, "frames": options.frames}
    record = script_record("layouts", _METHOD.format(**facts), results)
    write_record(options.output, record, text(record))
    print(text(record))


def counted(way: str, size: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each of so many ranks has to do."""
    layout, encoder = WAYS[way]
    program = program_of(layout, size, options)
    frames = encoded_frames(validate_config(CONFIGS[options.vae]), options.frames, size, encoder)
    for rank in range(size):
        yield {
            "name": f"{way}, rank {rank} of {size}",
            "tokens": noisy_frames(program, rank) * program.geometry.frame_tokens(program.spec),
            "encoded": frames[rank],
            "sent": sent_bytes(program, "train"),
            "permuted": permuted_bytes(program),
            "flops": forward_flops(program, "train"),
        }


def program_of(layout: str, size: int, options: argparse.Namespace) -> Program:
    """A recipe's Program, divided among ranks; without weights."""
    changes = [f"geometry.frames={options.frames}", "geometry.batch=1", "model.checkpoint=null"]
    data = dict(read_recipe(find_recipe(options.recipe), changes))
    data["passes"] = with_layout(data["passes"], layout, size)
    return transform(parse_recipe(data, options.recipe), weights=False)


def noisy_frames(program: Program, rank: int) -> int:
    """How many noisy latent frames a rank has."""
    contract, frames = program.contract("train"), program.geometry.frames
    own = contract.input(Role.LATENTS).shape[2]
    noisy = torch.ones(frames)
    if not contract.having(Role.CLEAN):  # one input has parts of [clean; noisy]
        noisy = torch.cat([torch.zeros(frames), noisy])
    return int(noisy[rank * own : (rank + 1) * own].sum())


def permuted_bytes(program: Program) -> int:
    """Bytes that a pass moves between an exchange and the attention that it is for."""
    moved = 0
    for node in nodes_of_pass(program, "train"):
        if op_of(node) is _ATTENTION:
            for operand in node.args[:3]:
                source = operand.all_input_nodes[0]
                if op_of(source) is not TOKENS_TO_HEADS:
                    moved += operand.meta["val"].nbytes
    return moved


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "row": lambda row: row["name"],
        "loss-bearing tokens": column("tokens", ",d"),
        "frames encoded": column("encoded", "d"),
        "sent": lambda row: readable(row["sent"]),
        "permuted": lambda row: readable(row["permuted"]),
        "PFLOP": lambda row: f"{row['flops'] / 1e15:.3f}",
    }
    return markdown(record, "What ranks that share a clip have to do", columns)


if __name__ == "__main__":
    main()
