"""ONNX Runtime on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


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
    """The outputs of a graph, by name."""
    names = [each.name for each in session.get_outputs()]
    made = session.run(names, {name: value.numpy() for name, value in given.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, made, strict=True)}
