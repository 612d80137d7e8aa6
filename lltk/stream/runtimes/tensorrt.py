"""Engines of TensorRT for RTX over tensors of torch, where they lie.

Written against the documented API. No engine was run: the project has no GPU that these engines
are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lltk.graph.contract import Contract
from lltk.stream.runtimes.operands import operands
from lltk.stream.runtimes.tensorrt_types import DTYPES, tensor_shape

BINDINGS = "tensorrt_rtx_bindings"
"""The Python module of TensorRT for RTX."""
PACKAGES = ("tensorrt_rtx_cu13_libs", "tensorrt_rtx_cu13_bindings")
"""What to install for it."""
GPUS = {
    80: "A100",
    86: "GeForce RTX 30",
    89: "GeForce RTX 40, L4, L40",
    120: "GeForce RTX 50, RTX PRO Blackwell",
    121: "DGX Spark",
}
"""What TensorRT for RTX builds for, of what computes in bfloat16, by compute capability."""


def check_installed() -> None:
    """Check that TensorRT for RTX is installed.

    Raises:
        ValueError: it is not; says how to install it.
    """
    if find_spec(BINDINGS) is None:
        raise ValueError("TensorRT for RTX is not installed; run: pip install 'lltk[tensorrt-rtx]'")


def library_version() -> str:
    """The version of TensorRT for RTX, which must be installed."""
    version: str = import_module(BINDINGS).__version__
    return version


def check_device(sm: int) -> torch.device:
    """The GPU that engines for a compute capability run on.

    Args:
        sm: the capability, 120 for 12.0.

    Raises:
        ValueError: there is none.
    """
    wanted = f"{sm // 10}.{sm % 10}"
    if not torch.cuda.is_available():
        raise ValueError(
            f"the engines run on a GPU of compute capability {wanted}, and torch sees none; export "
            "the recipe with --target ort for a CPU"
        )
    major, minor = torch.cuda.get_device_capability()
    if (here := 10 * major + minor) != sm:
        instead = f"export the recipe again with --sm {here}"
        if here not in GPUS:
            instead = "TensorRT for RTX has none for it: stream the recipe itself"
        raise ValueError(
            f"the engines are for compute capability {wanted}, and "
            f"{torch.cuda.get_device_name()} has {major}.{minor}; {instead}"
        )
    return torch.device("cuda", torch.cuda.current_device())


class EngineGraph:
    """A graph as an engine, loaded. Threads take turns.

    An engine is code. Load one only from a bundle whose files were checked.

    Args:
        path: of the engine.
        contract: the graph's inputs and outputs.
        device: where they are; see `check_device`.

    Raises:
        ValueError: TensorRT does not load it, or it has other inputs or outputs.
    """

    def __init__(self, path: Path, contract: Contract, device: torch.device) -> None:
        self.contract, self.device, self._path = contract, device, path
        self._turn = Lock()
        trt = import_module(BINDINGS)
        self._said = _logger(trt)
        self._runtime = trt.Runtime(self._said)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ValueError(
                f"{path}: TensorRT for RTX {trt.__version__} does not load it "
                f"({'; '.join(self._said.errors)}); export the recipe again on this version"
            )
        self._check(trt)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ValueError(
                f"{path}: the GPU has no memory for it ({'; '.join(self._said.errors)}); end what "
                "else uses the GPU, or export a smaller geometry"
            )

    def _check(self, trt: Any) -> None:
        """Hold the engine's tensors against the contract."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for mode, specs in (
            (trt.TensorIOMode.INPUT, self.contract.inputs),
            (trt.TensorIOMode.OUTPUT, self.contract.outputs),
        ):
            own = {name for name in names if engine.get_tensor_mode(name) == mode}
            if odd := sorted(own ^ specs.keys()):
                raise ValueError(
                    f"{self._path}: {odd[0]} is in the engine or in the manifest alone; export the "
                    "recipe again"
                )
            for name, spec in specs.items():
                found = engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))
                if found != (getattr(trt.DataType, DTYPES[spec.dtype]), tensor_shape(spec)):
                    raise ValueError(
                        f"{self._path}: {name} is {found[0]} {found[1]}, and not {spec} as the "
                        "manifest says; export the recipe again"
                    )

    def __call__(
        self, given: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The outputs of a call, which is launched on torch's current stream.

        Args:
            given: every input, as the contract says and on the graph's device.
            into: where outputs are put, contiguous and as the contract says; the others are
                new tensors.

        Raises:
            ValueError: TensorRT does not launch it; says why.
        """
        inputs, put = operands(self.contract, given, into, self.device)
        with self._turn:
            for tensors in inputs, put:
                for name, tensor in tensors.items():
                    assert tensor.device == self.device, name
                    self._context.set_tensor_address(name, tensor.data_ptr())
            self._said.errors.clear()
            stream = torch.cuda.current_stream(self.device)
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise ValueError(
                    f"{self._path}: fails in TensorRT ({'; '.join(self._said.errors)}); export the "
                    "recipe again"
                )
        return put


def _logger(trt: Any) -> Any:
    """A logger that keeps errors."""

    class Errors(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Errors()
