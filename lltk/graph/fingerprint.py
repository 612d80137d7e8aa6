"""Digests of tensors, and of everything that decides what a Program computes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lltk.graph.program import Program
from lltk.graph.text import dtype_name, print_graph


def fingerprint(program: Program) -> str:
    """SHA-256 over graphs, geometry, dtype, constants and weights. It reads every weight."""
    digest = hashlib.sha256()
    digest.update(f"{program.kind} {program.dtype} {program.geometry!r}".encode())
    for name, graph in program.every_graph():
        digest.update(print_graph(graph, name).encode())
    digest.update(tensors_digest({**program.weights, **program.constants}).encode())
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
