"""The least that a step of training can take on a GPU that is not here: a roofline.

python benchmarks/training_roofline.py
python benchmarks/training_roofline.py wan22_5b_train_16s --ranks 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lltk.bench.record import Record, markdown, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.compiler import transform
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.parallel.alike import alike

_METHOD = """\
A roofline, not a measurement. One rank's forward and backward pass of one clip of {frames} latent
frames that {ranks} ranks share, every block computed again for the backward pass, ran on tensors
without memory; each op's operations and bytes were counted as it ran. A part takes the longer of
its operations at the peak rate and its bytes at the bandwidth, one part after the other. Peaks are
those of a B200's data sheet, dense: 9 PFLOP/s in FP4, 2.25 in bfloat16, 8 TB/s of memory, 0.9 TB/s
of NVLink each way. Attention counts every pair of tokens that it sees and no bytes. Norms, gates,
RoPE and the optimiser are left out, as if other parts hid them."""
FP4, BFLOAT16, MEMORY, NVLINK = 9e15, 2.25e15, 8e12, 0.9e12
PARTS = ("products in NVFP4", "products in bfloat16", "attention", "quantising", "exchanges")


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, device=False)
    made.add_argument("recipe", nargs="?", default="wan22_5b_train_nvfp4", metavar="RECIPE")
    made.add_argument("--frames", type=int, default=96, help="latent frames (default: 96)")
    made.add_argument("--ranks", type=int, default=4, help="that share a clip (default: 4)")
    made.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return [*PARTS, "step"]


def main() -> None:
    """Count, and write the record."""
    options = script_options(parser())
    results = list(_results(options))
    method = _METHOD.format(frames=options.frames, ranks=options.ranks)
    record = script_record("training_roofline", method, results)
    write_record(options.output, record, text(record))


def _results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    changes = [f"geometry.frames={options.frames}", f"passes.balanced_sp.size={options.ranks}"]
    program = transform(open_recipe(options.recipe, [*changes, *options.changes]), weights=False)
    with alike(options.ranks), Counted(options.ranks) as counted:
        _step(program)
    total = 0.0
    for name, (flops, size) in counted.parts.items():
        peak = FP4 if name == "products in NVFP4" else BFLOAT16
        seconds = max(flops / peak, size / (NVLINK if name == "exchanges" else MEMORY))
        total += seconds
        yield {"name": name, "tflop": flops / 1e12, "gb": size / 1e9, "s": seconds}
    yield {"name": "step", "s": total}


def _step(program: Program) -> None:
    """A forward and a backward pass without memory."""
    for name, weight in program.weights.items():
        program.weights[name] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    module = ProgramModule(program, torch.device("meta"), None, {})
    module.recompute_blocks()
    inputs = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in program.contract("train").inputs.items()
    }
    result = module("train", inputs | module.quantised_weights())
    result[program.spec.output].float().square().mean().backward()


class Counted(TorchDispatchMode):
    """Adds up the operations and bytes of what runs within the block, by part."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.parts = {name: [0, 0] for name in PARTS}
        self._ranks = ranks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        packet, made = func._overloadpacket, tree_leaves(result)
        tensors = [each for each in tree_leaves((args, result)) if isinstance(each, Tensor)]
        name, size, flops = func._opname, sum(each.nbytes for each in tensors), 0
        if func.namespace != "lltk":
            if packet not in flop_registry:
                return result
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            part = "attention" if name == "bmm" else "products in bfloat16"
        elif "linear" in name or "matmul" in name:
            part = "products in NVFP4"
            depth = args[1].shape[1] if "linear" in name else 2 * args[0].shape[-1]
            flops = 2 * prod(made[0].shape) * depth
            if "linear" in name:  # x and the weight are there for their gradients
                size -= args[0].nbytes + args[1].nbytes
        elif "tokens" in name or "heads" in name or name == "rounded_exchange":
            part = "exchanges"
            size = sum(each.nbytes for each in made) * (self._ranks - 1) // self._ranks
        elif "quantise" in name or "largest" in name or "transpose" in name:
            part = "quantising"
        else:
            return result
        found = self.parts[part]
        found[0] += flops
        found[1] += 0 if part == "attention" else size
        return result


def text(record: Record) -> str:
    """The record as Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "part": lambda row: row["name"],
        "TFLOP": column("tflop", ".0f"),
        "GB": column("gb", ".0f"),
        "s, at least": column("s", ".3f"),
    }
    return markdown(record, "Roofline of a training step", columns)


if __name__ == "__main__":
    main()
