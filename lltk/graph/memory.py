"""What a Program needs in memory, before anything is allocated."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lltk.graph.attention import paged_op
from lltk.graph.edit import op_of
from lltk.graph.facts import Trainable
from lltk.graph.program import Program
from lltk.graph.spec import DecoderSpec
from lltk.graph.verify import WEIGHTS

_MEMINFO = Path("/proc/meminfo")


def estimate(program: Program) -> dict[str, int]:
    """Bytes by owner on the device that runs the Program.

    Streaming: weights in their run dtypes, the cache's pages (in the compute dtype until the graphs
    have them) and the cross-attention K/V of one prompt. Training and scoring: weights, the blocks'
    inputs that per-block checkpointing keeps, and for training float32 gradients and AdamW's two
    moments of what trains, and the 4-bit values of weights that train in NVFP4. Activations inside
    one block come on top. Decoding: weights, and the feature caches before a latent; those after it
    are among the activations.
    """
    weights = {n: t.numel() * program.run_dtype(n).itemsize for n, t in program.weights.items()}
    owners = {"weights": sum(weights.values())}
    if isinstance(program.model, DecoderSpec):
        owners["feature caches"] = total(_caches(program))
        return owners
    spec, geometry = program.spec, program.geometry
    width, size = spec.heads * spec.head_dim, program.dtype.itemsize
    frame = geometry.batch * geometry.frame_tokens(spec) * width * size
    if program.kind == "stream":
        pages = sum(arena.nbytes for arena in program.pages.values())
        owners["cache pages"] = pages or 2 * spec.layers * geometry.window * frame
        prompt = geometry.batch * geometry.text_tokens * width * size
        owners["cross-attention K/V"] = 2 * spec.layers * prompt
        return owners
    owners["block inputs"] = spec.layers * geometry.captured_frames(program.kind) * frame
    if program.kind in ("train", "reference"):
        trains = program.fact(Trainable).names or program.weights.keys()
        count = sum(program.weights[name].numel() for name in trains)
        owners["gradients"] = count * torch.float32.itemsize
        owners["AdamW moments"] = 2 * owners["gradients"]
    if WEIGHTS in program.graphs:
        made = program.contract(WEIGHTS).outputs.values()
        owners["quantised weights"] = sum(part.nbytes for part in made)
    return owners


def activations(program: Program, leaving: Collection[str] = (), held: bool = False) -> int:
    """Most bytes of intermediate results that live at once in any graph.

    Counted along the graphs as inference runs them, with the keys and values that attention over
    pages gathers; an op's own workspace comes on top.

    Args:
        program: with graphs whose values have shapes.
        leaving: graphs that are left out.
        held: whether a decoder's feature caches stay to a graph's end; if not, a graph that has
            none to read, or has read them, has their room for its results.
    """
    caches = {} if held else _caches(program)
    graphs = (graph for name, graph in program.graphs.items() if name not in leaving)
    return max(_peak(program, graph, caches) for graph in graphs)


def _caches(program: Program) -> dict[str, int]:
    """Bytes of a decoder's feature caches, by the names under which ``step`` reads them."""
    if not isinstance(program.model, DecoderSpec):
        return {}
    read = program.contract("step").inputs
    return {name: read[name].nbytes for name in program.model.cache_inputs}


def _peak(program: Program, graph: fx.Graph, caches: Mapping[str, int]) -> int:
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(graph.nodes):
        owner[node] = owner[node.all_input_nodes[0]] if _is_view(node) else node
        for read in node.all_input_nodes:
            last[owner[read]] = index
    live, peak = -sum(caches.values()), 0
    held = [0] * (len(owner) + 1)
    for index, node in enumerate(graph.nodes):
        made = node.op in ("call_function", "call_module") and owner[node] is node
        if made or (node.op == "placeholder" and node.target in caches):
            size = _bytes(node.meta["val"])
            live += size
            held[last.get(node, index)] += size
        if node.op == "call_module":
            inside = _peak(program, program.regions[str(node.args[0])].graph, {})
        else:
            inside = _results(node) + _gathered(program, node)
        peak = max(peak, live + inside)
        live -= held[index]
    return peak


def _results(node: fx.Node) -> int:
    """Bytes of several results, before each is taken."""
    made = node.meta.get("val")
    return sum(map(_bytes, made)) if isinstance(made, (list, tuple)) else 0


def _gathered(program: Program, node: fx.Node) -> int:
    """Bytes that a call takes to put pages beside the keys and values that it attends to."""
    op = paged_op(node)
    chosen = program.implementations.get(op or "")
    if op is None or chosen == "triton":
        return 0
    operands: tuple[Any, ...] = node.args[1:3]
    own = [each.meta["val"] for each in operands]
    if chosen == "fp8_decode":
        return sum(program.geometry.pages * each.numel() for each in own)
    pages = [program.geometry.pages * _bytes(each) for each in own]
    return sum(pages) + max(pages)


def _is_view(node: fx.Node) -> bool:
    """Whether the result lies in its first argument's memory; each of several has its own."""
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    target = op_of(node)
    if not isinstance(target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


def _bytes(value: Any) -> int:
    """Of several results none: each is counted where it is taken."""
    return value.numel() * value.dtype.itemsize if isinstance(value, Tensor) else 0


def available(device: torch.device) -> int:
    """Bytes that can still be allocated: a GPU's free memory, or what the system has to spare."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.exists():
        fields = dict(line.split(":") for line in _MEMINFO.read_text("utf-8").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def readable(count: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def total(owners: Mapping[str, int]) -> int:
    """Sum over owners, in bytes."""
    return sum(owners.values())
