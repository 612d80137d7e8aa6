"""Calls recorded once as CUDA graphs, and replayed without launching their kernels one by one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_CAPTURING = Lock()
"""Held while a thread captures: to begin, torch waits for devices and empties their caches."""
Call = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From inputs to outputs, by name; whatever else it reads stays where it is."""


class CudaGraphs:
    """Graphs of one device that share their memory: one replays at a time, on one stream.

    Args:
        device: a GPU.
        option: the recipe's key that asks for them.

    Raises:
        ValueError: the device is none.
    """

    def __init__(self, device: torch.device, option: str = "stream.cuda_graphs") -> None:
        check_graphs(device, option)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # torch's own is the first device's, and shared
        self._recorded: dict[Hashable, _Recorded] = {}

    def __call__(
        self, key: Hashable, call: Call, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The call's outputs: run, then recorded, where the key is new; else replayed.

        Args:
            key: one for each call and set of shapes.
            call: may allocate, compile and choose kernels when it runs; only what it launches on
                the device is repeated.
            inputs: copied to where they were when the call was recorded.
        """
        if key not in self._recorded:
            outputs = call(inputs)
            with _CAPTURING, torch.cuda.device(self._stream.device):
                self._recorded[key] = _Recorded(call, inputs, self._pool, self._stream)
            return outputs
        return self._recorded[key](inputs)


def check_graphs(device: torch.device, option: str) -> None:
    """Refuse a device that records nothing; errors as `CudaGraphs`'s."""
    if device.type != "cuda":
        raise ValueError(
            f"{option}: is for GPUs, not for {device}; set it to false, as with "
            f"--set {option}=false"
        )


class _Recorded:
    """One graph, its inputs and outputs at fixed addresses."""

    def __init__(
        self, call: Call, inputs: Mapping[str, Tensor], pool: Any, stream: torch.cuda.Stream
    ) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, as the decoder's, may do meanwhile what may not be recorded.
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
            self._outputs = call(self._inputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}
