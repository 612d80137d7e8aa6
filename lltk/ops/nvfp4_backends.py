"""Which backend runs which NVFP4 op, and on what hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Backend:
    """A way to run NVFP4.

    Attributes:
        name: what recipes call it.
        ops: op → ``module:function`` with the signature of the op's reference.
        devices: device types.
        architectures: compute capabilities of CUDA devices, or None for any.
        module: a Python module it needs beyond torch.
        note: how its products are made.
    """

    name: str
    ops: dict[str, str]
    devices: tuple[str, ...]
    architectures: tuple[tuple[int, int], ...] | None
    module: str | None
    note: str


_REFERENCE = {
    op: f"lltk.ops.{op}.reference:{op}"
    for op in (
        "nvfp4_quantise",
        "nvfp4_dequantise",
        "nvfp4_transpose",
        "nvfp4_write_page",
        "hadamard",
        "nvfp4_matmul",
    )
}

BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        "reference",
        _REFERENCE,
        ("cpu", "cuda"),
        None,
        None,
        "plain torch: operands decoded to float32",
    ),
}


@cache
def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that runs ``op`` on a backend.

    Raises:
        ValueError: there is no such backend; lists those there are.
    """
    if backend not in BACKENDS:
        raise ValueError(f"NVFP4 has no backend {backend!r}; it has {', '.join(BACKENDS)}")
    module, _, function = BACKENDS[backend].ops[op].partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
