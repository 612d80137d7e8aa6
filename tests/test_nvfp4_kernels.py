"""NVFP4 kernels: against their references, what they compile to, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformer_engine_api
from compiling import compiling_for
from torch import Tensor

from lltk.bench.record import Record
from lltk.ops import hardware
from lltk.ops.hadamard.reference import SIGNS, random_signs
from lltk.ops.hardware import ARITHMETIC, E2M1, E2M1_PRODUCTS
from lltk.ops.implementations import check_device, find_implementation, preferred
from lltk.ops.nvfp4_matmul import scaled_mm
from lltk.ops.nvfp4_quantise.reference import RULES, nvfp4_quantise
from lltk.ops.nvfp4_quantise_transposed.op import nvfp4_quantise_transposed as transposed_op
from lltk.ops.scale_layout import swizzle

cpu, gpu = pytest.mark.cpu, pytest.mark.gpu
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def implementation(op: str, name: str) -> Callable[..., Any]:
    return find_implementation(op, name).load()


SEED = torch.tensor([-3, 2**33 + 7])
PART = torch.tensor([-3, 2**33 + 7, 1, 3])
"""A seed of the second of three ranks."""
SHARED = list(SIGNS)


# Kernels against references


def inputs(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of all kinds for which some kernel has been wrong."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        yield f"normal {name}", normal(36, 64).to(dtype)
        yield f"wide {name}", (normal(3, 20, 48) * normal(3, 20, 48).exp() ** 4).to(dtype)
        yield f"maximal {name}", (normal(16, 32).clamp(-1, 1) * torch.finfo(dtype).max).to(dtype)
        yield f"minimal {name}", (normal(16, 32) * 9).round().to(dtype) * torch.finfo(dtype).tiny
        for rows, width in ((5, 40), (3, 17), (1, 16), (33, 1)):
            yield f"{rows}×{width} {name}", normal(rows, width).to(dtype)
    yield "vector", normal(40)
    yield "zeros", torch.zeros(4, 32)
    yield "negative zeros", torch.zeros(4, 32).neg()
    yield "zero blocks", normal(32, 64) * (torch.arange(64) // 16 % 2)
    for size in (1e-30, 1e-38, 1e-42, 1e37):
        yield f"{size}", normal(16, 32) * size
    grid = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, -0.25])
    steps = torch.cat([2.0 ** torch.arange(-10, 9), torch.arange(15, 33) / 16, torch.ones(1) * 448])
    yield "ties", grid * steps[:, None]
    for bad in (float("nan"), float("inf"), -float("inf")):
        yield f"{bad}", normal(20, 32).masked_fill(normal(20, 32) > 1.5, bad)


def same(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    """Whether all shapes, dtypes and bits agree. Any NaN equals any other."""

    def bits(x: Tensor) -> Tensor:
        x = x.cpu().contiguous().flatten()
        if x.dtype in (torch.uint8, torch.float8_e4m3fn):
            return x.view(torch.uint8)
        return x.masked_fill(x.isnan(), 42.0).view(torch.uint8)

    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(ours, wanted, strict=True)
    )


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@dataclass(frozen=True)
class Kernels:
    """Triton's and the references' results on one device."""

    device: str

    def __call__(self, op: str, name: str, *arguments: Any) -> tuple[Tensor, ...]:
        placed = [a.to(self.device) if isinstance(a, Tensor) else a for a in arguments]
        return as_tuple(implementation(op, name)(*placed))

    def agree(self, op: str, *arguments: Any) -> bool:
        """Whether they are the same; the reference computes on the CPU."""
        ours = self(op, "triton", *arguments)
        wanted = as_tuple(implementation(op, "reference")(*arguments))
        return same(ours, wanted)


def failures(device: str, dtypes: tuple[torch.dtype, ...], thorough: bool) -> Iterator[str]:
    """Where kernels and references differ."""
    kernels = Kernels(device)

    def check(name: str, op: str, *arguments: Any) -> Iterator[str]:
        if not kernels.agree(op, *arguments):
            yield f"{op}: {name}"

    every = list(product((1, 16), RULES, (None, SEED)))
    some = [(1, "none", None), (16, "mse", SEED), (1, "abs_max", None)]
    for name, x in inputs(dtypes):
        for tile, rule, seed in every if thorough or name.startswith("normal") else some:
            label = f"{name}, {tile}, {rule}, {'nearest' if seed is None else 'stochastic'}"
            yield from check(label, "nvfp4_quantise", x, tile, rule, seed, 3)
        quantised = nvfp4_quantise(x, 16 if x.dim() == 2 else 1)
        for dtype in dtypes:
            yield from check(f"{name} to {dtype}", "nvfp4_dequantise", *quantised, dtype)
        if x.dim() == 2:
            yield from check(name, "nvfp4_transpose", *quantised[:2])
        if x.dim() > 1:
            for signs in ([], random_signs(32, 1)) if thorough or "normal" in name else ():
                label = f"{name}, {len(signs)} signs"
                yield from check(label, "nvfp4_quantise_transposed", x, signs, "mae", SEED, 1)
            yield from check(name, "nvfp4_quantise_transposed", x, SHARED)
            yield from check(name, "nvfp4_largest", x, SHARED)
            for width in (2, 16, 64):
                if x.shape[-1] % width == 0 and (thorough or width > 2):
                    yield from check(f"{name}, {width}", "hadamard", x, random_signs(width, 2))
    x = torch.randn(2, 48, 40, generator=torch.Generator().manual_seed(4))
    for seed, run in ((None, 0), (PART, 16), (PART, 48)):
        shared = (seed, 3, torch.tensor(7.5), run)
        yield from check(f"runs of {run}", "nvfp4_quantise", x, 1, "mse", *shared)
        yield from check(f"runs of {run}", "nvfp4_quantise_transposed", x, SHARED, "none", *shared)
    each = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 20, 40, generator=torch.Generator().manual_seed(2))
    for tile in (1, 16):
        yield from check(f"several matrices, {tile}", "nvfp4_quantise", x, tile, "mse")
    quantised = nvfp4_quantise(x, largest=each)
    yield from check("own scales", "nvfp4_dequantise", *quantised)
    # Four Over Six often loses the same either way here, and then the order of its sums decides.
    whole = torch.randint(-12, 13, (2048, 16), generator=torch.Generator().manual_seed(3))
    for rule in ("mse", "mae"):
        yield from check(f"whole numbers, {rule}", "nvfp4_quantise", 0.37 * whole, 1, rule)


def controls(device: str) -> Iterator[str]:
    """Small changes of a call that change bits of its result: the comparison must see each."""
    kernels = Kernels(device)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))

    def check(name: str, op: str, ours: tuple[Any, ...], wanted: tuple[Any, ...]) -> Iterator[str]:
        if same(kernels(op, "triton", *ours), as_tuple(implementation(op, "reference")(*wanted))):
            yield f"unseen: {name}"

    op = "nvfp4_quantise"
    yield from check("a stream", op, (x, 1, "none", SEED, 3), (x, 1, "none", SEED, 4))
    part, largest = (x, 1, "none", PART, 3), torch.tensor(7.5)
    yield from check("a run", op, (*part, largest, 8), (*part, largest, 16))
    yield from check("what is largest", op, (*part, largest), (*part, largest + 0.25))
    yield from check("a rule", op, (x, 1, "mse"), (x, 1, "mae"))
    nudged = x.clone()
    nudged[0, 0] = nudged.abs().max() * (1 + 2**-22)
    yield from check("an ulp of the largest", op, (nudged,), (nudged * (1 - 2**-23),))
    flipped = [-SHARED[0], *SHARED[1:]]
    yield from check("a sign", "hadamard", (x, SHARED), (x, flipped))
    yield from check("a sign", "nvfp4_quantise_transposed", (x, SHARED), (x, flipped))


def normed(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, rule: str, name: str = "triton"
) -> list[Tensor]:
    """A norm and its quantisation to NVFP4, by an implementation."""
    run = find_implementation("row_pipeline", name).load()
    made: list[Tensor] = run(x, scale=scale, shift=shift, eps=eps, to="nvfp4", rule=rule)
    return made


def norm_difference(device: str, dtype: torch.dtype, eps: float = 1e-6) -> float:
    """Share of codes and scales by which the norm's kernel and reference differ, at most.

    Sums of a norm are rounded in another order, which seldom moves a value to another code.
    """
    generator = torch.Generator().manual_seed(4)
    shares = []
    for shape, groups, rule in (
        ((2, 6, 48), (2, 3, 1), "none"),
        ((5, 640), (1,), "mse"),
        ((3, 4, 3072), (3, 2, 1), "none"),
    ):
        x = (3 * torch.randn(shape, generator=generator) + 1).to(dtype)
        scale, shift = torch.randn(2, *groups, shape[-1], generator=generator)
        ours = normed(*(t.to(device) for t in (x, scale, shift)), eps, rule, "triton")
        wanted = normed(x, scale, shift, 1e-6, rule, "reference")
        assert [t.shape for t in ours] == [t.shape for t in wanted]
        for a, b in zip(ours[:2], wanted[:2], strict=True):
            differ = a.cpu().view(torch.uint8) != b.view(torch.uint8)
            shares.append(float(differ.float().mean()))
        shares.append(abs(float(ours[2].cpu() / wanted[2]) - 1))
    return max(shares)


def interpret() -> None:
    """Print what fails under Triton's interpreter, which cannot round to bfloat16.

    Its sums begin with 0, numpy's way, and make 0 of −0 and −0; here they begin with −0, as a GPU's
    come out.
    """
    from triton.runtime.interpreter import ReduceOps

    def add(self: Any, x: Any) -> Any:
        data = x.handle.data
        start = data.dtype.type(-0.0)
        total = np.sum(data, axis=self.axis, keepdims=self.keep_dims, initial=start)
        return self.to_tensor(total, x.dtype)

    ReduceOps.sum = add
    for failure in (*failures("cpu", (torch.float32,), thorough=False), *controls("cpu")):
        print(failure)  # noqa: T201
    if norm_difference("cpu", torch.float32) > 1e-3:
        print("norm")  # noqa: T201
    if norm_difference("cpu", torch.float32, eps=0.1) < 1e-2:
        print("unseen: another eps")  # noqa: T201


@cpu
@needs_triton
def test_kernels_interpreted() -> None:
    """It runs in a process of its own, because a kernel is interpreted or compiled once defined."""
    result = subprocess.run(
        [
            sys.executable,
            "-P",
            "-W",
            "ignore",
            "-c",
            "import test_nvfp4_kernels as t; t.interpret()",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


@gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_equal_their_references(dtype: torch.dtype) -> None:
    assert not list(failures("cuda", (dtype,), thorough=True))
    assert not list(controls("cuda"))


@gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_are_quantised(dtype: torch.dtype) -> None:
    assert norm_difference("cuda", dtype) < 5e-3
    assert norm_difference("cuda", dtype, eps=0.1) > 1e-2


@gpu
@needs_triton
def test_large_tensors() -> None:
    """They have the sizes of the step's activations, and more elements than 32 bits count."""
    kernels = Kernels("cuda")
    x = torch.randn(7040, 3072, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert kernels.agree("nvfp4_quantise", x)
    assert kernels.agree("nvfp4_quantise", x, 1, "mse", SEED)
    assert kernels.agree("nvfp4_quantise_transposed", x, SHARED, "none", SEED)
    huge = torch.zeros(2**15 + 1, 2**16, dtype=torch.bfloat16, device="cuda")
    huge[-1] = torch.randn(2**16)
    codes, scales, decode_scale = implementation("nvfp4_quantise", "triton")(huge)
    wanted = nvfp4_quantise(huge[-1].cpu())
    assert same((codes[-1], scales[-1], decode_scale), tuple(wanted))


def product_error(name: str, m: int, n: int, k: int, damage: bool = False) -> float:
    """Largest error in units of the sum of the products' sizes."""
    generator = torch.Generator().manual_seed(0)
    a = nvfp4_quantise(torch.randn(m, k, generator=generator).cuda())
    b = nvfp4_quantise(torch.randn(n, k, generator=generator).cuda(), 16)
    decode = implementation("nvfp4_dequantise", "reference")
    left, right = decode(*a).double(), decode(*b).double()
    if damage:
        b.codes[:, :1] ^= 0x88
    ours = implementation("nvfp4_matmul", name)(*a, *b, torch.float32)
    return float(((ours - left @ right.t()).abs() / (left.abs() @ right.abs().t())).max())


@gpu
@needs_triton
@pytest.mark.parametrize("name", ["triton", "scaled_mm", "te"])
@pytest.mark.parametrize(
    "shape", [(256, 128, 256), (1, 16, 16), (130, 60, 80), (7040, 3072, 3072)], ids=str
)
def test_products(name: str, shape: tuple[int, int, int]) -> None:
    if reason := find_implementation("nvfp4_matmul", name).missing(torch.device("cuda")):
        pytest.skip(reason)
    assert product_error(name, *shape) < 2**-13
    assert product_error(name, *shape, damage=True) > 2**-13


def layer_gradients(name: str, seed: Tensor) -> list[Tensor]:
    """A layer's output and gradients on the GPU, as the training pass writes it."""
    prefer = (name, "triton")
    quantise, quantise_transposed, transpose, linear = (
        preferred(f"nvfp4_{op}", prefer).load()
        for op in ("quantise", "quantise_transposed", "transpose", "linear")
    )
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 160, 256), (192, 256), (2, 160, 192))
    x, weight, grad = (torch.randn(*s, generator=generator).cuda().bfloat16() for s in shapes)
    x.requires_grad_()
    weight.requires_grad_()
    held = x.detach()
    w = quantise(weight.detach(), 16)
    y = linear(
        x,
        weight,
        *quantise(held),
        *quantise_transposed(held, SHARED),
        *w,
        *transpose(w[0], w[1]),
        seed.cuda(),
        0,
        True,
        "mse",
        SHARED,
    )
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


@gpu
@needs_triton
@pytest.mark.parametrize("name", ["triton", "scaled_mm", "te"])
def test_gradients_are_the_references(name: str) -> None:
    """Random numbers are equal. Only sums are taken in another order."""
    if reason := find_implementation("nvfp4_linear", name).missing(torch.device("cuda")):
        pytest.skip(reason)
    ours, wanted = layer_gradients(name, SEED), layer_gradients("reference", SEED)
    other = layer_gradients(name, SEED + 1)
    for index, (a, b, c) in enumerate(zip(ours, wanted, other, strict=True)):
        assert bool(a.any()) and float((a - b).norm() / b.norm()) < 5e-3
        assert bool((c != a).any()) == (index > 0), "gradients alone are random"


@gpu
@needs_triton
def test_kernels_replay_in_cuda_graphs() -> None:
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    seed = SEED.cuda()

    def step() -> tuple[Tensor, ...]:
        run = Kernels("cuda")
        rows = run("nvfp4_quantise", "triton", x, 1, "mse", None, 0)
        turned = run("nvfp4_quantise_transposed", "triton", x, SHARED, "none", seed, 1)
        (values,) = run("nvfp4_dequantise", "triton", *rows, torch.bfloat16)
        square = run("nvfp4_matmul", "triton", *rows, *rows, torch.bfloat16)
        return (*rows, *turned, values, *run("hadamard", "triton", values, SHARED), *square)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    x.copy_(torch.randn(256, 512))
    seed += 1
    graph.replay()
    assert same(recorded, step())


# What kernels compile to


@pytest.fixture
def compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int, Callable[[], object]], dict[str, str]]:
    """Gives the PTX of the kernels that a call launches. No GPU of its architecture is needed."""

    def compile_for(architecture: int, call: Callable[[], object]) -> dict[str, str]:
        with monkeypatch.context() as patch, compiling_for(architecture) as found:
            for op in (*QUANTISING, "nvfp4_matmul"):
                patch.setattr(
                    f"lltk.ops.{op}.triton.has_e2m1",
                    lambda _, among=E2M1: divmod(architecture, 10) in among,
                )
            call()
        return {name: made[-1].asm["ptx"] for name, made in found.items()}

    return compile_for


def run_triton(op: str, *arguments: Any) -> Callable[[], object]:
    return lambda: implementation(op, "triton")(*arguments)


QUANTISING = ("nvfp4_quantise", "row_pipeline", "nvfp4_quantise_transposed")
CONVERT = "cvt.rn.satfinite.e2m1x2.f32"


@cpu
@needs_triton
@pytest.mark.parametrize("architecture", [90, 100, 120])
def test_kernels_compile(architecture: int, compiled: Any) -> None:
    x = torch.ones(64, 256, dtype=torch.bfloat16)
    quantised = nvfp4_quantise(x, 16)
    native, modulation = architecture != 90, (torch.ones(4, 256), torch.ones(4, 256), 1e-6, "none")
    nearest = [
        compiled(architecture, run_triton("nvfp4_quantise", x))["_quantise"],
        compiled(architecture, run_triton("nvfp4_quantise_transposed", x, SHARED))["_quantise"],
        compiled(architecture, lambda: normed(x, *modulation))["_write_nvfp4"],
    ]
    assert [CONVERT in ptx for ptx in nearest] == [native] * 3
    others = [
        compiled(architecture, run_triton("nvfp4_quantise", x, 16, "mse", SEED))["_quantise"],
        compiled(architecture, run_triton("nvfp4_dequantise", *quantised, x.dtype))["_dequantise"],
        compiled(architecture, run_triton("hadamard", x, SHARED))["_hadamard"],
    ]
    for ptx in nearest + others:
        # Rounding once, at full precision and range.
        assert "fma" not in ptx and "ftz" not in ptx and "div.full" not in ptx
    assert compiled(architecture, run_triton("nvfp4_transpose", *quantised[:2]))


@cpu
@needs_triton
@pytest.mark.parametrize(("architecture", "product"), [(100, "tcgen05.mma"), (120, "mma.sync")])
def test_products_multiply_codes(architecture: int, product: str, compiled: Any) -> None:
    quantised = nvfp4_quantise(torch.ones(64, 256), 16)
    multiply = run_triton("nvfp4_matmul", *quantised, *quantised, torch.bfloat16)
    ptx = compiled(architecture, multiply)["_matmul"]
    assert "mxf4nvf4" in ptx and product in ptx


@cpu
@needs_triton
@pytest.mark.parametrize("architecture", [90, 121])
def test_products_are_of_bfloat16_where_triton_cannot_multiply_codes(
    architecture: int, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(E2M1_PRODUCTS) < set(E2M1)
    seen = []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:  # a CPU's has no out_dtype
        seen.append((a.dtype, b.dtype, out_dtype))
        return a.float() @ b.float()

    monkeypatch.setattr(torch, "mm", mm)
    quantised = nvfp4_quantise(torch.ones(64, 256), 16)
    kernels = compiled(
        architecture, run_triton("nvfp4_matmul", *quantised, *quantised, torch.bfloat16)
    )
    assert set(kernels) == {"_dequantise"}
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.float32)]


# torch's product


def on_meta(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(rows, width // 2, dtype=torch.uint8, device="meta"),
        torch.empty(rows, width // 16, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty((), device="meta"),
    )


SHAPES = [(7040, 3072, 14336), (5, 17, 48), (1, 16, 16)]


@cpu
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaled_mm_takes_our_operands(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """The meta device checks every argument."""
    product = scaled_mm.nvfp4_matmul(*on_meta(m, k), *on_meta(n, k), dtype)
    assert product.shape == (m, n) and product.dtype == dtype
    codes, scales, scale = on_meta(m, k)
    batched = scaled_mm.nvfp4_matmul(codes[None], scales[None], scale, *on_meta(n, k), dtype)
    assert batched.shape == (1, m, n)


@cpu
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_COLUMNS", 1),
        ("_BYTES", 1),
        ("swizzle", torch.flatten),
        ("swizzle", lambda scales: swizzle(scales)[None].view(torch.uint8)[:, 1:]),
    ],
)
def test_scaled_mm_refuses_what_it_should(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_mm, name, value)
    with pytest.raises((ValueError, RuntimeError)):
        scaled_mm.nvfp4_matmul(*on_meta(5, 48), *on_meta(17, 48), torch.bfloat16)


# TransformerEngine's product


@cpu
@pytest.mark.parametrize(("m", "n", "k"), [(5, 17, 48), (130, 20, 80), (16, 16, 64)])
def test_transformer_engine_takes_what_we_call(m: int, n: int, k: int) -> None:
    """Under its signatures, and what they mean, the product is ours."""
    with patch.dict(sys.modules, transformer_engine_api.modules()):
        sys.modules.pop("lltk.ops.nvfp4_matmul.te", None)
        te = importlib.import_module("lltk.ops.nvfp4_matmul.te")
    a, b = nvfp4_quantise(torch.randn(1, m, k)), nvfp4_quantise(torch.randn(n, k), 16)
    wanted = implementation("nvfp4_matmul", "reference")(*a, *b, torch.float32)
    torch.testing.assert_close(te.nvfp4_matmul(*a, *b, torch.float32), wanted)
    a.codes[0, 0, 0] ^= 0x77
    assert (te.nvfp4_matmul(*a, *b, torch.float32) - wanted).abs().max() > 0.01


@cpu
def test_transformer_engine_is_what_we_call() -> None:
    """The installed library's signatures are the ones that the test above restates."""
    pytest.importorskip("transformer_engine.pytorch", reason="transformer_engine is not installed")
    for name, module in transformer_engine_api.modules().items():
        theirs = importlib.import_module(name)
        for attribute in ("general_gemm", "NVFP4Tensor.__new__", "NVFP4Quantizer.__init__"):
            if hasattr(module, attribute.partition(".")[0]):
                find = attrgetter(attribute)
                ours, found = (
                    {p.name: p.kind for p in inspect.signature(find(where)).parameters.values()}
                    for where in (module, theirs)
                )
                assert ours.items() <= found.items(), attribute


# Choosing


@cpu
@pytest.mark.parametrize("signs", [[], SHARED, random_signs(32, 1)])
@pytest.mark.parametrize("seed", [None, SEED])
def test_opcheck(signs: list[int], seed: Tensor | None) -> None:
    torch.library.opcheck(transposed_op, (torch.randn(2, 9, 24), signs, "mse", seed, 1))


@cpu
def test_absent_hardware_is_an_error_that_lists_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_device({"nvfp4_matmul": "reference"}, torch.device("cpu"))
    with pytest.raises(ValueError, match="triton runs on cuda, not on cpu; cpu has reference"):
        check_device({"nvfp4_matmul": "triton"}, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "find_spec", lambda module: None)
        with pytest.raises(ValueError, match="triton needs the package triton"):
            check_device({"nvfp4_matmul": "triton"}, torch.device("cuda"))
        with pytest.raises(ValueError, match="fp8_decode needs the package nvidia-cudnn-frontend"):
            patch.setattr(hardware, "find_spec", lambda module: module != "cudnn" or None)
            check_device({"nvfp4_paged_attention": "fp8_decode"}, torch.device("cuda"))
        patch.setattr(hardware, "find_spec", lambda module: module != "triton" or None)
        with pytest.raises(ValueError, match="nvfp4_linear: te needs the package triton"):
            check_device({"nvfp4_linear": "te"}, torch.device("cuda"))

    def has(*capability: int) -> torch.device:
        monkeypatch.setattr(hardware, "find_spec", lambda module: module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda")

    check_device({"nvfp4_matmul": "triton"}, has(9, 0))
    for op in ("nvfp4_matmul", "nvfp4_linear"):
        there = rf"{op}: scaled_mm .*not on sm_90; cuda has reference and triton: set {op}"
        with pytest.raises(ValueError, match=there):
            check_device({op: "scaled_mm"}, has(9, 0))
        check_device({op: "scaled_mm"}, has(12, 0))
    check_device({"nvfp4_paged_attention": "decode_triton"}, has(12, 0))
    with pytest.raises(ValueError, match=r"not on sm_75; cuda has reference and decode and fp8_"):
        check_device({"nvfp4_paged_attention": "decode_triton"}, has(7, 5))
    # A successor is not taken for what came before it.
    with pytest.raises(ValueError, match=r"not on sm_150; cuda has reference: set nvfp4"):
        check_device({"nvfp4_matmul": "triton"}, has(15, 0))


@cpu
def test_hardware_is_of_one_kind() -> None:
    assert not set(ARITHMETIC) & set(E2M1)


# The benchmark


@cpu
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "nvfp4.py"
    options = {"device": "cpu", "backend": "reference", "tokens": 32, "width": 48, "ffn": 64}
    options |= {"runs": 2, "output": tmp_path / "nvfp4"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    runpy.run_path(str(script), run_name="__main__")
    record = Record.model_validate_json((tmp_path / "nvfp4.json").read_text())
    held = script.parent / "records" / "nvfp4.json"
    assert ops(record) == ops(Record.model_validate_json(held.read_text()))
    quantise = record.results[0]
    assert quantise["op"] == "quantise" and quantise["once"] == 32 * 48 * 2 + 32 * 27 + 4
    assert quantise["bytes"] == quantise["once"] + 32 * 48 * 2
    assert (tmp_path / "nvfp4.md").read_text().count("product") >= 3


def ops(record: Record) -> list[str]:
    return [row["op"] for row in record.results]
