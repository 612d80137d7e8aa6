"""Which implementations an ``lltk::`` op has, and what each needs."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import torch

import lltk.ops
from lltk.ops.hardware import Capability, architectures, lacking, where_it_runs
from lltk.ops.nvfp4_backends import ARITHMETIC, BACKENDS, E2M1, Backend, check_backend


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        op: the op, as ``paged_attention``.
        name: what recipes call it.
        where: ``module:function`` of the callable with the op's signature.
        devices: device types it runs on.
        modules: Python modules it needs beyond torch.
        architectures: compute capabilities of CUDA devices, or None for any.
    """

    op: str
    name: str
    where: str
    devices: tuple[str, ...]
    modules: tuple[str, ...] = ()
    architectures: tuple[Capability, ...] | None = None

    def load(self) -> Callable[..., Any]:
        """The callable."""
        module, _, function = self.where.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), function)
        return found

    def missing(self, device: torch.device) -> str | None:
        """What the device or installation lacks to run it, or None."""
        return lacking(device, self.devices, self.modules, self.architectures)


E4M3: tuple[Capability, ...] = ((8, 9), (9, 0), *E2M1)
"""CUDA architectures that multiply E4M3."""
_ANY = ("cpu", "cuda")
_CUDNN_FP8 = (("cuda",), ("cudnn", "triton"), ((9, 0), *E2M1))
"""What attention in FP8 needs: devices, modules and architectures."""
_Paged = partial(Implementation, "paged_attention")
_Nvfp4Paged = partial(Implementation, "nvfp4_paged_attention")
_Causal = partial(Implementation, "block_causal_attention")
_Matmul = partial(Implementation, "fp8_matmul")
_Norm = partial(Implementation, "cached_norm_silu")
_Fp8Attention = partial(Implementation, "fp8_quantise_attention")
_Upsample = partial(Implementation, "upsample_residual")
_Fp8Norm = partial(Implementation, "fp8_cached_norm_silu")
_Fp8Conv = partial(Implementation, "fp8_conv3d")
_OPS = "lltk.ops."
_NVFP4_PAGED = _OPS + "nvfp4_paged_attention.triton"
_PagedKernel = partial(
    _Nvfp4Paged, devices=("cuda",), modules=("triton",), architectures=ARITHMETIC + E2M1
)


def _rows(op: str, architectures: tuple[Capability, ...]) -> Iterator[Implementation]:
    """Of an op whose formula compilers can fuse, and which has a kernel of ours."""
    where = f"{_OPS}{op}."
    yield Implementation(op, "reference", f"{where}op:{op}", _ANY)
    yield Implementation(op, "torch", f"{where}reference:{op}", _ANY)
    yield Implementation(
        op, "triton", f"{where}triton:OVERLOAD", ("cuda",), ("triton",), architectures
    )


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    _Paged("reference", _OPS + "paged_attention.op:paged_attention", _ANY),
    _Paged("sdpa", _OPS + "paged_attention.sdpa:sdpa", _ANY),
    _Paged("cudnn", _OPS + "paged_attention.sdpa:cudnn", ("cuda",)),
    _Paged("arena", _OPS + "paged_attention.arena:arena", _ANY),
    _Causal("reference", _OPS + "block_causal_attention.op:block_causal_attention", _ANY),
    _Causal("sdpa", _OPS + "block_causal_attention.sdpa:sdpa", _ANY),
    _Causal("flex", _OPS + "block_causal_attention.flex:flex", ("cuda",), modules=("triton",)),
    _Nvfp4Paged("reference", _OPS + "nvfp4_paged_attention.op:nvfp4_paged_attention", _ANY),
    _Nvfp4Paged("decode", _OPS + "nvfp4_paged_attention.decode:decode", _ANY),
    _PagedKernel("decode_triton", _NVFP4_PAGED + ":decode"),
    _PagedKernel("triton", _NVFP4_PAGED + ":attention"),
    _Nvfp4Paged("fp8_decode", _OPS + "nvfp4_paged_attention.fp8:fp8_decode", *_CUDNN_FP8),
    *_rows("fp8_quantise", E4M3),
    *_rows("fp8_quantise_norm", E4M3),
    *_rows("fp8_quantise_add_norm", E4M3),
    _Fp8Attention("reference", _OPS + "fp8_quantise_attention.op:fp8_quantise_attention", _ANY),
    _Fp8Attention("fp8_decode", _OPS + "fp8_quantise_attention.fp8:fp8_decode", *_CUDNN_FP8),
    *_rows("fp8_quantise_gelu", E4M3),
    *_rows("gated_add", ARITHMETIC + E2M1),
    *_rows("rms_norm_rope", ARITHMETIC + E2M1),
    _Matmul("reference", _OPS + "fp8_matmul.op:fp8_matmul", _ANY),
    _Matmul("scaled_mm", _OPS + "fp8_matmul.scaled_mm:fp8_matmul", ("cuda",), architectures=E4M3),
    _Norm("reference", _OPS + "cached_norm_silu.op:cached_norm_silu", _ANY),
    _Norm("triton", _OPS + "cached_norm_silu.triton:OVERLOAD", ("cuda",), ("triton",)),
    _Upsample("reference", _OPS + "upsample_residual.op:upsample_residual", _ANY),
    _Upsample("triton", _OPS + "upsample_residual.triton:OVERLOAD", ("cuda",), ("triton",)),
    _Fp8Norm("reference", _OPS + "fp8_cached_norm_silu.op:fp8_cached_norm_silu", _ANY),
    _Fp8Norm("triton", _OPS + "fp8_cached_norm_silu.triton:OVERLOAD", ("cuda",), ("triton",), E4M3),
    _Fp8Conv("reference", _OPS + "fp8_conv3d.op:fp8_conv3d", _ANY),
    _Fp8Conv(
        "triton",
        _OPS + "fp8_conv3d.triton:OVERLOAD",
        ("cuda",),
        ("triton",),
        ((9, 0), (10, 0), (10, 3)),
    ),
)


def check_device(
    chosen: Mapping[str, str], device: torch.device, lower: str = "the recipe's lower pass"
) -> None:
    """Check that a device can run the chosen implementations, by op.

    Args:
        chosen: implementations, by op.
        device: to run on.
        lower: what the user calls the pass that chose.

    Raises:
        ValueError: says what is lacking and what the device has.
    """
    for op, name in chosen.items():
        if op == "nvfp4":
            check_backend(name, device)
            continue
        reason = find_implementation(op, name).missing(device)
        if reason is not None:
            able = [c.name for c in IMPLEMENTATIONS if c.op == op and not c.missing(device)]
            slow = f", or leave out the pass that makes {op}" if able == ["reference"] else ""
            raise ValueError(
                f"{op}: {name} {reason}; {device.type} has {' and '.join(able) or 'none'}: set "
                f"{op} of {lower}{slow}"
            )


def capability_table() -> Iterator[dict[str, str]]:
    """How each backend runs each NVFP4 op on which hardware, and what reads the NVFP4 cache."""
    for backend in BACKENDS.values():
        for op, way in backend.ops.items():
            yield _by_hardware(backend, op, "float32 in torch", way.arithmetic, way.native)
    for reader in IMPLEMENTATIONS:
        if reader.op == "nvfp4_paged_attention":
            yield _by_hardware(reader, reader.op, "runs", "runs", "runs")


def _by_hardware(
    runs: Backend | Implementation, op: str, cpu: str, arithmetic: str | None, native: str
) -> dict[str, str]:
    return {
        "op": op,
        "backend": runs.name,
        "cpu": cpu if "cpu" in runs.devices else "–",
        architectures(ARITHMETIC): where_it_runs(arithmetic, runs.architectures, ARITHMETIC),
        architectures(E2M1): where_it_runs(native, runs.architectures, E2M1),
    }


def ops_with_choices() -> Iterator[str]:
    """Ops that `lower` chooses an implementation for."""
    yield from dict.fromkeys(choice.op for choice in IMPLEMENTATIONS)


def register_ops() -> None:
    """Import every op, so that ``torch.ops.lltk`` has it."""
    for module in pkgutil.iter_modules(lltk.ops.__path__, "lltk.ops."):
        if module.ispkg:
            import_module(f"{module.name}.op")


def overload(op: str) -> torch._ops.OpOverload:
    """The op as a graph node's target."""
    found: torch._ops.OpOverload = import_module(f"lltk.ops.{op}.op").OVERLOAD
    return found


def find_implementation(op: str, name: str) -> Implementation:
    """The implementation of ``op`` called ``name``.

    Raises:
        ValueError: there is none; lists those there are.
    """
    choices = {choice.name: choice for choice in IMPLEMENTATIONS if choice.op == op}
    if name not in choices:
        near = get_close_matches(name, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{op} has no implementation {name!r} (it has {', '.join(choices)}){hint}")
    return choices[name]
