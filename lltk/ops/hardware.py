"""What a device or an installation lacks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

Capability = tuple[int, int]
"""CUDA compute capability, as (9, 0)."""
_PACKAGES = {"cudnn": "nvidia-cudnn-frontend", "transformer_engine": "transformer-engine"}
"""What a module is installed as, where its name is another."""


def lacking(
    device: torch.device,
    devices: Sequence[str],
    module: str | None = None,
    capabilities: Sequence[Capability] | None = None,
) -> str | None:
    """What is lacking to run something on a device, in words, or None.

    Args:
        device: where it is to run.
        devices: device types it runs on.
        module: a Python module it needs.
        capabilities: CUDA devices it runs on, or None for any.
    """
    if device.type not in devices:
        return f"runs on {' and '.join(devices)}, not on {device.type}"
    if module is not None and find_spec(module) is None:
        return f"needs the package {_PACKAGES.get(module, module)}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        if capabilities is not None:
            found = torch.cuda.get_device_capability(device)
            if found not in capabilities:
                return f"runs on {architectures(capabilities)}, not on {architectures([found])}"
    return None


def architectures(capabilities: Sequence[Capability]) -> str:
    """Their names."""
    return ", ".join(f"sm_{major}{minor}" for major, minor in capabilities)
