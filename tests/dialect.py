"""Graphs in TensorRT's dialect, run by the reference of ONNX; engines need a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from lltk.export.emitter import Dialect, Emitter
from lltk.export.weights import WeightPool
from lltk.files.writing import whole_folder
from lltk.graph.contract import Contract
from lltk.graph.program import Program
from lltk.ops.floats import decode_e2m1, pack, round_e2m1, unpack
from lltk.ops.tensorrt_blocks import quantised_blocks

Array = np.ndarray[Any, Any]
_NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}


class TRT_FP4DynamicQuantize(OpRun):
    """TensorRT's own op, as its documentation says."""

    op_domain = "trt"

    def _run(self, x: Array, scale: Array, **attributes: Any) -> tuple[Array, Array]:
        assert x.ndim in (2, 3) and scale.shape == ()
        assert (attributes["axis"], attributes["block_size"]) == (-1, 16)
        codes, scales = quantised_blocks(torch.from_numpy(np.ascontiguousarray(x / scale)))
        return _numbers(codes), scales.float().numpy().astype(ml_dtypes.float8_e4m3fn)


class MatMul(OpRun):
    """Sums in float32, as tensor cores do."""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        assert a.dtype == b.dtype
        return ((a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype),)


class Gelu(OpRun):
    """In float32, as kernels do."""

    def _run(self, x: Array, approximate: str) -> tuple[Array]:
        wide = torch.from_numpy(x.astype(np.float32))
        return (torch.nn.functional.gelu(wide, approximate=approximate).numpy().astype(x.dtype),)


def _numbers(codes: Tensor) -> Array:
    return decode_e2m1(unpack(codes)).numpy().astype(ml_dtypes.float4_e2m1fn)


class Reference:
    """A graph that is loaded; takes and gives what its contract says.

    Args:
        path: of the model.
        contract: the graph's.
    """

    def __init__(self, path: Path, contract: Contract) -> None:
        self._run = ReferenceEvaluator(str(path), new_ops=[TRT_FP4DynamicQuantize, MatMul, Gelu])
        self.contract, self.device = contract, torch.device("cpu")

    def __call__(
        self, given: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        arrays = {name: _array(given[name]) for name in self.contract.inputs}
        values = self._run.run(list(self.contract.outputs), arrays)
        put = dict(into or {})
        for (name, spec), value in zip(self.contract.outputs.items(), values, strict=True):
            made = _tensor(value, spec.dtype)
            put[name] = put[name].copy_(made) if name in put else made
        return put


def _array(value: Tensor) -> Array:
    if value.dtype is torch.uint8:
        return _numbers(value)
    if value.dtype in _NUMPY:
        wide: Array = value.float().numpy()
        return wide.astype(_NUMPY[value.dtype])
    return value.numpy()


def _tensor(value: Array, dtype: torch.dtype) -> Tensor:
    if dtype is torch.uint8:
        return pack(round_e2m1(torch.from_numpy(value.astype(np.float32))))
    if dtype in _NUMPY:
        return torch.from_numpy(value.astype(np.float32)).to(dtype)
    return torch.from_numpy(value)


def written(program: Program, folder: Path) -> Path:
    """The program's models in TensorRT's dialect, in a new folder in ``folder``."""
    pool = WeightPool()
    models = {name: Emitter(program, pool, Dialect.TENSORRT).emit(name) for name in program.graphs}
    place = folder / str(len(list(folder.iterdir())))
    with whole_folder(place) as new:
        pool.write(new, "models", models)
    return place / "models"
