"""Names for kinds of hardware, and what a device or an installation lacks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

Capability = tuple[int, int]
"""CUDA compute capability, as (9, 0)."""

ARITHMETIC: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9), (9, 0))
"""CUDA architectures that run our kernels and compute E2M1 as integers and floats."""
E2M1: tuple[Capability, ...] = ((10, 0), (10, 3), (11, 0), (12, 0), (12, 1))
"""CUDA architectures with instructions that convert to and multiply E2M1."""
E2M1_PRODUCTS: tuple[Capability, ...] = ((10, 0), (10, 3), (11, 0), (12, 0))
"""Those of `E2M1` for which Triton 3.6 and 3.7 compile the instruction that multiplies."""
E4M3: tuple[Capability, ...] = ((8, 9), (9, 0), *E2M1)
"""CUDA architectures that multiply E4M3."""

_DENSE_BFLOAT16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense floating-point operations a second in bfloat16, from NVIDIA's data sheets."""

_PACKAGES = {"cudnn": "nvidia-cudnn-frontend"}
"""The packages whose names differ from their modules'."""


def package_of(module: str) -> str:
    """The package that a module is installed with, as pip knows it."""
    return _PACKAGES.get(module, module.replace("_", "-"))


def lacking(
    device: torch.device,
    devices: Sequence[str],
    modules: Sequence[str] = (),
    capabilities: Sequence[Capability] | None = None,
) -> str | None:
    """What a device or the installation lacks to run something, in words; None if nothing.

    Args:
        device: where it is to run.
        devices: device types it runs on.
        modules: Python modules it needs.
        capabilities: CUDA devices it runs on, or None for any.
    """
    if device.type not in devices:
        return f"runs on {' and '.join(devices)}, not on {device.type}"
    for module in modules:
        if find_spec(module) is None:
            return f"needs the package {package_of(module)}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        if capabilities is not None:
            found = torch.cuda.get_device_capability(device)
            if found not in capabilities:
                return f"runs on {architectures(capabilities)}, not on {architectures([found])}"
    return None


def bfloat16_flops(device: torch.device) -> float | None:
    """How many floating-point operations a second a device could do; None where that is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for model, flops in _DENSE_BFLOAT16.items() if model in name), None)


def architectures(capabilities: Sequence[Capability]) -> str:
    """Their names, as ``sm_89, sm_90``."""
    return ", ".join(f"sm_{major}{minor}" for major, minor in capabilities)


def has_e2m1(device: torch.device, among: Sequence[Capability] = E2M1) -> bool:
    """Whether a device is one of those that know E2M1."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in among
