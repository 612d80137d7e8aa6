"""Graphs that ONNX Runtime runs over tensors of torch, where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lltk.graph.contract import Contract, TensorSpec
from lltk.stream.runtimes.operands import operands

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_DEVICES = {CPU: "cpu", CUDA: "cuda"}
"""Where an execution provider's tensors are."""
_TYPES = {
    torch.float32: (1, "float"),
    torch.uint8: (2, "uint8"),
    torch.int32: (6, "int32"),
    torch.int64: (7, "int64"),
    torch.bool: (9, "bool"),
    torch.float16: (10, "float16"),
    torch.bfloat16: (16, "bfloat16"),
    torch.float8_e4m3fn: (17, "float8e4m3fn"),
}
"""Numbers of ONNX's TensorProto, and names of ONNX Runtime's, by dtype."""
_DTYPES = {f"tensor({name})": dtype for dtype, (_, name) in _TYPES.items()}


def check_installed() -> None:
    """Check that what bundles need is installed.

    Raises:
        ValueError: it is not; says how to install it.
    """
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed; run: pip install 'lltk[export]'")


def provider_device(provider: str) -> torch.device:
    """Where an execution provider's tensors are.

    Raises:
        ValueError: lltk knows none of the name, the installed ONNX Runtime has none, or torch sees
            no GPU.
    """
    import onnxruntime

    if provider not in _DEVICES:
        raise ValueError(f"--provider: {provider} is none of {', '.join(_DEVICES)}")
    found = onnxruntime.get_available_providers()
    if provider not in found:
        raise ValueError(
            f"--provider: {provider} is not in the installed ONNX Runtime, which has "
            f"{', '.join(found)}; run: pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )
    if provider == CUDA and not torch.cuda.is_available():
        raise ValueError(f"--provider: {provider} needs a GPU, and torch sees none; use {CPU}")
    return torch.device(_DEVICES[provider])


class OnnxGraph:
    """A graph that is loaded. Threads may run it at once.

    Args:
        path: of the model; its weights lie in the same folder.
        contract: its inputs and outputs; None for what the model says of them, which is all but
            their roles.
        provider: what executes it; see `provider_device`.

    Raises:
        ValueError: ONNX Runtime does not load it; says why.
    """

    def __init__(self, path: Path, contract: Contract | None = None, provider: str = CPU) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        refusals = (
            errors.Fail, errors.InvalidGraph, errors.NotImplemented, errors.InvalidArgument,
            RuntimeError, ValueError,
        )  # fmt: skip
        self._path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait for work leave the core to the other model's, which runs meanwhile.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what is worse than an error; errors are raised
        providers = list(dict.fromkeys((provider, CPU)))
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=providers, enable_fallback=0
            )
        except refusals as error:
            raise ValueError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} does not load it ({error}); "
                "install a newer one, or export the recipe again"
            ) from error
        if (runs := self._session.get_providers()[0]) != provider:
            raise ValueError(
                f"--provider: {provider} does not start here, ONNX Runtime took {runs}; install "
                f"what it needs, or use {CPU}"
            )
        self._device = torch.device(_DEVICES[provider])
        self.contract = contract or _contract(self._session)

    def __call__(
        self, given: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The outputs of a call.

        On a GPU it waits for what was launched before, and ends when the outputs are there.

        Args:
            given: every input, as the contract says and on the graph's device.
            into: where outputs are put, contiguous and as the contract says; the others are
                new tensors.

        Raises:
            ValueError: ONNX Runtime fails in it; says why.
        """
        inputs, put = operands(self.contract, given, into, self._device)
        binding = self._session.io_binding()
        for bind, tensors in (binding.bind_input, inputs), (binding.bind_output, put):
            for name, tensor in tensors.items():
                where = tensor.device.type, tensor.device.index or 0
                bind(name, *where, _TYPES[tensor.dtype][0], list(tensor.shape), tensor.data_ptr())
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise ValueError(
                f"{self._path}: fails in ONNX Runtime ({error}); export the recipe again, or "
                "install the version of ONNX Runtime that made it"
            ) from error
        return put


def _contract(session: InferenceSession) -> Contract:
    return Contract(
        *(
            {each.name: TensorSpec(tuple(each.shape), _DTYPES[each.type]) for each in described}
            for described in (session.get_inputs(), session.get_outputs())
        )
    )
