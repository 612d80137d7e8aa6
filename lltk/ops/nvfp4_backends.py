"""Which backend runs which NVFP4 op, and on what hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

from lltk.ops.hardware import Capability, lacking

ARITHMETIC: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9), (9, 0))
"""CUDA architectures that run our kernels and compute E2M1 as integers and floats."""
E2M1: tuple[Capability, ...] = ((10, 0), (10, 3), (11, 0), (12, 0), (12, 1))
"""CUDA architectures with instructions that convert to and multiply E2M1."""
MULTIPLIED: tuple[Capability, ...] = ((10, 0), (10, 3), (11, 0), (12, 0))
"""Those of `E2M1` for which Triton 3.6 and 3.7 compile the instruction that multiplies."""


@dataclass(frozen=True)
class Way:
    """How a backend runs an op.

    Attributes:
        where: ``module:function`` with the signature of the op's reference.
        arithmetic: how on the architectures of `ARITHMETIC`, or None if not.
        native: how on those of `E2M1`.
    """

    where: str
    arithmetic: str | None
    native: str


@dataclass(frozen=True)
class Backend:
    """A way to run NVFP4.

    Attributes:
        name: what recipes call it.
        ops: how it runs each.
        devices: device types.
        architectures: compute capabilities of CUDA devices, or None for any.
        modules: Python modules it needs beyond torch.
    """

    name: str
    ops: dict[str, Way]
    devices: tuple[str, ...]
    architectures: tuple[Capability, ...] | None = None
    modules: tuple[str, ...] = ()

    def missing(self, device: torch.device) -> str | None:
        """What the device or installation lacks to run it, or None."""
        return lacking(device, self.devices, self.modules, self.architectures)


def _ways(module: str, arithmetic: str | None, native: str, *ops: str) -> dict[str, Way]:
    return {op: Way(f"lltk.ops.{op}.{module}:{op}", arithmetic, native) for op in ops}


_QUANTISE = (
    "nvfp4_quantise",
    "nvfp4_quantise_norm",
    "nvfp4_quantise_transposed",
    "nvfp4_write_page",
)
_PRODUCT = "nvfp4_matmul"
_OPS = (*_QUANTISE, "nvfp4_dequantise", "nvfp4_transpose", "hadamard", _PRODUCT)

_REFERENCE = _ways("reference", "float32 in torch", "float32 in torch", *_OPS)
_TRITON = (
    _ways("triton", "arithmetic", "arithmetic", *_OPS)
    | _ways("triton", "arithmetic", "cvt.e2m1x2; stochastic: arithmetic", *_QUANTISE)
    | _ways("triton", "bfloat16 tensor cores", "NVFP4 tensor cores; sm_121: bfloat16", _PRODUCT)
)
_SCALED_MM = _TRITON | _ways("scaled_mm", None, "cuBLAS, NVFP4", _PRODUCT)
_TE = _TRITON | _ways("te", None, "TransformerEngine, NVFP4", _PRODUCT)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", _REFERENCE, ("cpu", "cuda")),
        Backend("triton", _TRITON, ("cuda",), ARITHMETIC + E2M1, ("triton",)),
        Backend("scaled_mm", _SCALED_MM, ("cuda",), E2M1, ("triton",)),
        Backend("te", _TE, ("cuda",), E2M1, ("transformer_engine", "triton")),
    )
}


def check_backend(name: str, device: torch.device) -> None:
    """Check that a device can run a backend.

    Raises:
        ValueError: there is no such backend, or the device lacks what it needs; lists those that
            the device has.
    """
    reason = find_backend(name).missing(device)
    if reason is not None:
        able = [b.name for b in BACKENDS.values() if not b.missing(device)]
        raise ValueError(
            f"nvfp4: {name} {reason}; {device.type} has {' and '.join(able)}: set nvfp4 of the "
            "recipe's lower pass"
        )


def find_backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in BACKENDS:
        raise ValueError(f"NVFP4 has no backend {name!r}; it has {', '.join(BACKENDS)}")
    return BACKENDS[name]


@cache
def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that runs ``op`` on a backend.

    Raises:
        ValueError: there is no such backend; lists those there are.
    """
    module, _, function = find_backend(backend).ops[op].where.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def has_e2m1(device: torch.device, among: tuple[Capability, ...] = E2M1) -> bool:
    """Whether a device is one of those that know E2M1."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in among
