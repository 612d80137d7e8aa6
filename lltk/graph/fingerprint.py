"""A digest of everything that decides what a Program computes."""

from __future__ import annotations

import hashlib

import torch

from lltk.graph.program import Program
from lltk.graph.text import dtype_name, print_graph


def fingerprint(program: Program) -> str:
    """SHA-256 over graphs, geometry, dtype, constants and weights. It reads every weight."""
    digest = hashlib.sha256()
    digest.update(f"{program.kind} {program.dtype} {program.geometry!r}".encode())
    for name, graph in program.every_graph():
        digest.update(print_graph(graph, name).encode())
    for name, tensor in sorted({**program.weights, **program.constants}.items()):
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
