"""Copies between main memory and a GPU, through pages that the GPU reads and writes itself."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from main memory to a device, without waiting for the device."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def download(values: Tensor) -> Tensor:
    """A contiguous tensor in main memory, once the current stream has made it."""
    if not values.is_cuda:
        return values.contiguous()
    copy = values.contiguous().to("cpu", non_blocking=True)  # torch pins the pages of such a copy
    torch.cuda.current_stream(values.device).synchronize()
    return copy
