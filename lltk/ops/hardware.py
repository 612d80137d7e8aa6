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
    modules: Sequence[str] = (),
    capabilities: Sequence[Capability] | None = None,
) -> str | None:
    """What is lacking to run something on a device, in words, or None.

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


def where_it_runs(
    how: str | None, able: Sequence[Capability] | None, among: Sequence[Capability]
) -> str:
    """How something runs on some architectures, in words; a dash where it does not.

    Args:
        how: in words, or None if not at all.
        able: CUDA devices it runs on, or None for any.
        among: those asked for; if it runs on a part of them, that part is named.
    """
    some = [each for each in among if able is None or each in able]
    if how is None or not some:
        return "–"
    return how if len(some) == len(among) else f"{architectures(some)}: {how}"
