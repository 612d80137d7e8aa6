"""Calls recorded once as CUDA graphs, and replayed without launching their kernels one by one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from threading import Lock

import torch
from torch import Tensor

from lltk.stream.lanes import Lane

_CAPTURING = Lock()
"""Held while a thread captures: to begin, torch waits for devices and empties their caches."""
Call = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From inputs to outputs, by name; whatever else it reads stays where it is."""


class CudaGraphs:
    """Graphs that are replayed one at a time, in the turns of a lane.

    All graphs of a lane share the memory for their intermediate results.

    Args:
        lane: of a GPU.
        option: the recipe's key that asks for CUDA graphs.

    Raises:
        ValueError: the lane's device is no GPU.
    """

    def __init__(self, lane: Lane, option: str = "stream.cuda_graphs") -> None:
        check_graphs(lane.device, option)
        self._lane = lane
        self._recorded: dict[Hashable, _Recorded] = {}

    def __len__(self) -> int:
        """How many graphs are recorded."""
        return len(self._recorded)

    def __call__(
        self, key: Hashable, call: Call, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The outputs of a call. A new key's call is run and then recorded, others are replayed.

        Args:
            key: one for each call and set of shapes.
            call: may allocate, compile and choose kernels when it runs; only what it launches on
                the device is repeated.
            inputs: copied to where they were when the call was recorded.
        """
        if key not in self._recorded:
            outputs = call(inputs)
            with _CAPTURING, torch.cuda.device(self._lane.device):
                self._recorded[key] = _Recorded(call, inputs, self._lane)
            return outputs
        return self._recorded[key](inputs)


def empty_cache() -> None:
    """Give the device the memory back that torch holds unused; a recording is waited for."""
    with _CAPTURING:  # which this would break
        torch.cuda.empty_cache()


def check_graphs(device: torch.device, option: str) -> None:
    """Refuse a device that cannot record.

    Args:
        device: where graphs are wanted.
        option: the recipe's key that asks for them.

    Raises:
        ValueError: the device is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(
            f"{option}: is for GPUs, not for {device}; set it to false, as with "
            f"--set {option}=false"
        )


class _Recorded:
    """One graph, its inputs and outputs at fixed addresses."""

    def __init__(self, call: Call, inputs: Mapping[str, Tensor], lane: Lane) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as a decoder's, may do meanwhile what may not be recorded.
        pool, stream, mode = lane.graph_pool, lane.graph_stream, "thread_local"
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode=mode):
            self._outputs = call(self._inputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}
