"""How much memory a Program needs, before anything is allocated."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lltk.graph.attention import paged_op
from lltk.graph.contract import Role
from lltk.graph.edit import op_of, role_of
from lltk.graph.facts import Ranks, Trainable
from lltk.graph.program import Program
from lltk.graph.spec import CachedSpec, TextSpec
from lltk.graph.verify import WEIGHTS
from lltk.ops.implementations import find_implementation

_MEMINFO = Path("/proc/meminfo")


def estimate(program: Program) -> dict[str, int]:
    """Bytes by owner on the device that runs the Program.

    All kinds: weights, in the dtypes they run in.

    - Streaming: the pages of the cache, counted in the compute dtype until the graphs have them,
      and the cross-attention K/V of one prompt.
    - Training and scoring: the blocks' inputs, all that activation checkpointing keeps. Training
      also: float32 gradients and AdamW's two moments of the parameters that train, and the 4-bit
      values of the weights that train in NVFP4. Activations inside a block come on top.
    - Decoding, encoding: the feature caches before a latent. Those after it count as activations.
    """
    weights = {n: t.numel() * program.run_dtype(n).itemsize for n, t in program.weights.items()}
    owners = {"weights": sum(weights.values())}
    if isinstance(program.model, CachedSpec):
        owners["feature caches"] = _cached(program)
        return owners
    if isinstance(program.model, TextSpec):
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
    frames = geometry.captured_frames(program.kind) // program.fact(Ranks).count
    owners["block inputs"] = spec.layers * frames * frame
    if program.kind in ("train", "reference", "score"):
        trains = program.fact(Trainable).names or program.weights.keys()
        count = sum(program.weights[name].numel() for name in trains)
        owners["gradients"] = count * torch.float32.itemsize
        owners["AdamW moments"] = 2 * owners["gradients"]
    if WEIGHTS in program.graphs:
        made = program.contract(WEIGHTS).outputs.values()
        owners["quantised weights"] = sum(part.nbytes for part in made)
    return owners


def activations(program: Program, leaving: Collection[str] = (), held: bool = False) -> int:
    """The most bytes of intermediate results that live at once in any graph.

    They are counted along the graphs as inference runs them, with the keys and values that
    attention over pages gathers. An op's own workspace comes on top.

    Args:
        program: with graphs whose values have shapes.
        leaving: names of graphs that are left out.
        held: whether feature caches live until its graph ends. If not, a cache's room
            is free once it was read, and a graph that reads no caches has their room from the
            start.
    """
    caches = 0 if held else _cached(program)
    graphs = (graph for name, graph in program.graphs.items() if name not in leaving)
    return max(_peak(program, graph, caches) for graph in graphs)


def _cached(program: Program) -> int:
    """Bytes of the feature caches that ``step`` reads; 0 where there are none."""
    if not isinstance(program.model, CachedSpec):
        return 0
    return sum(cache.nbytes for cache in program.contract("step").having(Role.CACHE).values())


def _peak(program: Program, graph: fx.Graph, caches: int) -> int:
    """The most bytes that live at once, less those of caches that are allocated anyway."""
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(graph.nodes):
        owner[node] = owner[node.all_input_nodes[0]] if _is_view(node) else node
        for read in node.all_input_nodes:
            last[owner[read]] = index
    live, peak = -caches, 0
    freed = [0] * (len(owner) + 1)
    for index, node in enumerate(graph.nodes):
        made = node.op in ("call_function", "call_module") and owner[node] is node
        if made or (caches and role_of(node) is Role.CACHE):
            size = _bytes(node.meta["val"])
            live += size
            freed[last.get(node, index)] += size
        if node.op == "call_module":
            inside = _peak(program, program.regions[str(node.args[0])].graph, 0)
        else:
            inside = _results(node) + _gathered(program, node)
        peak = max(peak, live + inside)
        live -= freed[index]
    return peak


def _results(node: fx.Node) -> int:
    """Bytes of all results of a call that gives several; else 0."""
    made = node.meta.get("val")
    return sum(map(_bytes, made)) if isinstance(made, (list, tuple)) else 0


def _gathered(program: Program, node: fx.Node) -> int:
    """Bytes of the copies that attention over pages makes of keys and values; else 0."""
    op = paged_op(node)
    if op is None:
        return 0
    name = program.implementations.get(op, "reference")
    chosen = find_implementation(op, name).declared
    if chosen.in_place:
        return 0
    operands: tuple[Any, ...] = node.args[1:3]
    own = [each.meta["val"] for each in operands]
    # The reference of nvfp4_gather_fp8 decodes to float32 first.
    if chosen.parts.get("nvfp4_gather_fp8", "reference") != "reference":
        return sum(program.geometry.pages * each.numel() for each in own)
    pages = [program.geometry.pages * _bytes(each) for each in own]
    return sum(pages) + max(pages)


def _is_view(node: fx.Node) -> bool:
    """Whether the result lies in the memory of the call's first argument."""
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    target = op_of(node)
    if not isinstance(target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


def _bytes(value: Any) -> int:
    """Bytes of a tensor; 0 for several results, each of which is counted where it is read."""
    return value.numel() * value.dtype.itemsize if isinstance(value, Tensor) else 0


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.exists():
        fields = dict(line.split(":") for line in _MEMINFO.read_text("utf-8").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def readable(count: float) -> str:
    """A number of bytes as text, such as ``1.5 GiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def total(owners: Mapping[str, int]) -> int:
    """The sum over owners, in bytes."""
    return sum(owners.values())
