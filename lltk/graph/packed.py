"""Weights that a state dict holds in NVFP4."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CODES, SCALES, DECODE_SCALE = PARTS = ("codes", "scales", "decode_scale")
"""``<module>.weight_<part>`` for each: uint8 [N, K/2], float8_e4m3fn [N, K/16], float32 []."""
_BLOCK = 16
_NAN = 0x7F


def is_packed(state: Mapping[str, Tensor], module: str) -> bool:
    """Whether the state holds this module's weight in NVFP4."""
    return f"{module}.weight_{CODES}" in state


def check_packed(state: Mapping[str, Tensor]) -> None:
    """Check every weight that a state holds in NVFP4.

    Raises:
        ValueError: a part is missing or does not fit the codes, a scale is NaN or negative, or a
            decode scale is not a positive number; names it.
    """
    for name in state:
        module, found, _ = name.partition(f".weight_{CODES}")
        if found:
            _check(state, f"{module}.weight_")


def _check(state: Mapping[str, Tensor], prefix: str) -> None:
    rows, half = state[prefix + CODES].shape
    wanted = {
        CODES: ((rows, half), torch.uint8),
        SCALES: ((rows, 2 * half // _BLOCK), torch.float8_e4m3fn),
        DECODE_SCALE: ((), torch.float32),
    }
    for part, (size, dtype) in wanted.items():
        name = prefix + part
        if name not in state:
            raise ValueError(f"{name}: is missing beside the other parts; write the file again")
        found = state[name]
        if tuple(found.shape) != size or found.dtype != dtype:
            raise ValueError(
                f"{name}: is {found.dtype} {list(found.shape)}; beside codes of {[rows, half]} "
                f"bytes NVFP4 has {dtype} {list(size)}"
            )
    scales = state[prefix + SCALES]
    if scales.is_meta:
        return
    if bool((scales.view(torch.uint8) >= _NAN).any()):
        raise ValueError(
            f"{prefix}{SCALES}: holds NaN or negative scales; quantise the weight again"
        )
    scale = float(state[prefix + DECODE_SCALE])
    if not 0 < scale < float("inf"):
        raise ValueError(
            f"{prefix}{DECODE_SCALE}: is {scale}, not a positive number; quantise the weight again"
        )
