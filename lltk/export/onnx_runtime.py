"""ONNX Runtime on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, NodeArg

_TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(uint8)": (torch.uint8, 2),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(float8e4m3fn)": (torch.float8_e4m3fn, 17),
}
"""Dtypes, and numbers of ONNX's TensorProto, of what ONNX Runtime calls types."""


def check_installed() -> None:
    """Check that what export needs is installed.

    Raises:
        ValueError: it is not; says how to install it.
    """
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed; run: pip install 'lltk[export]'")


def open_graph(path: Path) -> InferenceSession:
    """A graph with its weights, ready to run on the CPU.

    Raises:
        ValueError: ONNX Runtime does not load it; says why.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    refusals = (errors.Fail, errors.InvalidGraph, errors.NotImplemented, errors.InvalidArgument)
    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except refusals as error:
        raise ValueError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} does not load it ({error}); install "
            "a newer one"
        ) from error


def run_graph(session: InferenceSession, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a graph, by name. Inputs have the shapes and dtypes that the graph states."""
    binding = session.io_binding()
    held = {name: tensor.contiguous() for name, tensor in given.items()}
    for each in session.get_inputs():
        _bind(binding.bind_input, each, held[each.name])
    made = {
        each.name: torch.empty(each.shape, dtype=_TYPES[each.type][0])
        for each in session.get_outputs()
    }
    for each in session.get_outputs():
        _bind(binding.bind_output, each, made[each.name])
    session.run_with_iobinding(binding)
    return made


def _bind(bind: Callable[..., None], what: NodeArg, tensor: Tensor) -> None:
    """Let a graph read or write a tensor where it lies."""
    dtype, kind = _TYPES[what.type]
    assert (tensor.dtype, list(tensor.shape)) == (dtype, what.shape), what.name
    bind(what.name, "cpu", 0, kind, what.shape, tensor.data_ptr())
