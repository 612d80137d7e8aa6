"""How long a graph's products take alone: the least that fusing all the rest can reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from lltk.bench.clock import Clock
from lltk.graph.attention import paged_op
from lltk.graph.edit import op_of, shape
from lltk.graph.program import Program
from lltk.graph.regions import nodes_of_pass
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import Implementation, find_implementation, overload
from lltk.ops.paged_attention.sdpa import attend

aten = torch.ops.aten
FP8_MATMUL = overload("fp8_matmul")
NVFP4_LINEAR = overload("nvfp4_linear")
NVFP4_MATMUL = overload("nvfp4_matmul")


@dataclass(frozen=True)
class Product:
    """A matrix product or an attention.

    Attributes:
        attends: whether it is an attention.
        implementation: what runs ``fp8_matmul`` or attention to pages; None for torch's own op.
        sizes: (M, K, N) of a matrix product; (queries, keys, heads, head width) of an attention.
    """

    attends: bool
    implementation: Implementation | None
    sizes: tuple[int, ...]

    @property
    def flops(self) -> int:
        """How many floating-point operations it takes."""
        return (4 if self.attends else 2) * prod(self.sizes)

    def on(self, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
        """A call that makes only this product, from random operands."""

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, dtype=dtype)

        if self.attends:
            queries, keys, heads, width = self.sizes
            q, k, v = (normal(1, tokens, heads, width) for tokens in (queries, keys, keys))
            parts = self.implementation.declared.parts if self.implementation else {}
            if "fp8_attention" not in parts:
                return lambda: attend(q, k, v)
            fp8_attention = find_implementation("fp8_attention", parts["fp8_attention"]).load()
            scale = torch.ones((), device=device)
            codes = [each.to(torch.float8_e4m3fn) for each in (q, k, v)]
            return lambda: fp8_attention(*codes, scale)
        rows, depth, columns = self.sizes
        a, b = normal(rows, depth), normal(columns, depth)
        if self.implementation is None:
            return lambda: torch.nn.functional.linear(a, b)
        multiply = self.implementation.load()
        operands = (*fp8_quantise(a), *fp8_quantise(b))
        return lambda: multiply(*operands, None, dtype)


def products(program: Program, graph: str) -> Counter[Product]:
    """A stream's products, and how often a pass makes each when all pages are listed.

    Raises:
        ValueError: the graph has no products, or products in NVFP4, which cannot be timed here.
    """
    nodes = list(nodes_of_pass(program, graph))
    if unknown := {str(node.target) for node in nodes if _is_nvfp4(node)}:
        raise ValueError(f"{graph}: {', '.join(unknown)} cannot be timed alone; leave it out")
    found = Counter(filter(None, (_product(program, node) for node in nodes)))
    if not found:
        raise ValueError(f"{graph}: has no linears and no attention; name another graph")
    return found


def ceiling(program: Program, graph: str, device: torch.device, runs: int) -> dict[str, Any] | None:
    """Time each of a pass's products alone, and count it as often as the pass makes it.

    Returns:
        For ``linears`` and for ``attention``: ``ms``, ``tflop``, and ``rates``, which are TFLOP/s
        by implementation and sizes. None if linears are in NVFP4.
    """
    if any(map(_is_nvfp4, nodes_of_pass(program, graph))):
        return None
    clock = Clock(device, runs)
    made: dict[str, Any] = {
        kind: {"ms": 0.0, "tflop": 0.0, "rates": {}} for kind in ("linears", "attention")
    }
    for product, count in products(program, graph).items():
        with torch.no_grad():
            ms = clock(product.on(device, program.dtype))["median_ms"]
        part = made["attention" if product.attends else "linears"]
        part["ms"] += count * ms
        part["tflop"] += count * product.flops / 1e12
        sizes = "×".join(map(str, product.sizes))
        how = product.implementation.name if product.implementation else "torch"
        part["rates"][f"{how} {sizes}"] = product.flops / ms / 1e9
    return made


def _is_nvfp4(node: fx.Node) -> bool:
    return op_of(node) in (NVFP4_LINEAR, NVFP4_MATMUL)


def _product(program: Program, node: fx.Node) -> Product | None:
    op = op_of(node)
    operands: list[Any] = [each for each in node.args if isinstance(each, fx.Node)]
    if op is aten.linear.default or op is FP8_MATMUL:
        weight = shape(operands[1 if op is aten.linear.default else 2])
        how = _chosen(program, "fp8_matmul") if op is FP8_MATMUL else None
        return Product(False, how, (prod(shape(node)[:-1]), weight[1], weight[0]))
    if op is aten.scaled_dot_product_attention.default:
        (_, heads, queries, width), keys = shape(operands[0]), shape(operands[1])[2]
        return Product(True, None, (queries, keys, heads, width))
    if (paged := paged_op(node)) is not None:
        (_, queries, heads, width), own = shape(operands[0]), shape(operands[1])[1]
        sizes = (queries, own * program.geometry.pages, heads, width)
        return Product(True, _chosen(program, paged), sizes)
    return None


def _chosen(program: Program, op: str) -> Implementation | None:
    """The implementation that a lowered program runs an op by."""
    name = program.implementations.get(op)
    return None if name is None else find_implementation(op, name)
