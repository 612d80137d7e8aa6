"""cuDNN's FP8 attention."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import cudnn
import torch
from torch import Tensor

from lltk.ops.declaration import E2M1, Declaration, Exactness
from lltk.ops.floats import E4M3_MAX

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "probabilities times 448 are rounded to E4M3",
    devices=("cuda",),
    modules=("cudnn",),
    architectures=((9, 0), *E2M1),
    opaque=True,
)

_ONE = ("descale_q", "descale_k", "descale_v")
"""Scales of the operands; all are 1."""


@dataclass(frozen=True)
class _Graph:
    """A graph built for one shape and device. One thread at a time launches it.

    Attributes:
        tensors: the graph's, by name.
        constants: operands that are the same for all.
    """

    graph: Any
    handle: Any
    tensors: Mapping[str, Any]
    constants: Mapping[str, Tensor]
    lock: threading.Lock = field(default_factory=threading.Lock)


def fp8_attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """`reference.fp8_attention`, but the softmax times 448 is rounded to E4M3 before it meets v."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    built = _build(tuple(q.shape), k.shape[1], q.device)
    out = torch.empty_like(q)
    largest = scale.new_empty(2, 1, 1, 1, 1)
    operands = {"q": q, "k": k, "v": v, "scale_o": scale.view(1, 1, 1, 1), "o": out}
    operands |= {"amax_s": largest[0], "amax_o": largest[1], **built.constants}
    space = torch.empty(built.graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
    given = {built.tensors[name]: tensor for name, tensor in operands.items()}
    stream = torch.cuda.current_stream(q.device).cuda_stream
    with built.lock:
        cudnn.set_stream(handle=built.handle, stream=stream)
        built.graph.execute(given, space, handle=built.handle)
    return out


@cache
def _build(shape: tuple[int, int, int, int], keys: int, device: torch.device) -> _Graph:
    batch, queries, heads, width = shape
    e4m3, float32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    with torch.cuda.device(device):
        handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=e4m3,
        intermediate_data_type=float32,
        compute_data_type=float32,
        handle=handle,
    )

    def layout(tokens: int) -> tuple[list[int], list[int]]:
        stride = [tokens * heads * width, width, heads * width, 1]
        return [batch, heads, tokens, width], stride

    tensors = {}
    for name, tokens in (("q", queries), ("k", keys), ("v", keys)):
        dim, stride = layout(tokens)
        tensors[name] = graph.tensor(name=name, dim=dim, stride=stride, data_type=e4m3)
    scalars = {
        name: graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=float32)
        for name in (*_ONE, "descale_s", "scale_s", "scale_o")
    }
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        **tensors, **scalars, attn_scale=width**-0.5, is_inference=True
    )
    dim, stride = layout(queries)
    out.set_output(True).set_dim(dim).set_stride(stride).set_data_type(e4m3)
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(float32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    tensors |= {**scalars, "o": out, "amax_s": amax_s, "amax_o": amax_o}
    values = dict.fromkeys(_ONE, 1.0) | {"descale_s": 1 / E4M3_MAX, "scale_s": E4M3_MAX}
    constants = {n: torch.full((1, 1, 1, 1), x, device=device) for n, x in values.items()}
    return _Graph(graph, handle, tensors, constants)
