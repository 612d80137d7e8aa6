"""Ops of a row a program: what they compute, and their kernels against their references."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lltk.bench.record import Record
from lltk.ops.floats import round_e4m3
from lltk.ops.fp8_quantise.op import fp8_quantise
from lltk.ops.fp8_quantise_add_norm.op import fp8_quantise_add_norm
from lltk.ops.fp8_quantise_centred.op import fp8_quantise_centred
from lltk.ops.fp8_quantise_gelu.op import fp8_quantise_gelu
from lltk.ops.fp8_quantise_norm.op import fp8_quantise_norm
from lltk.ops.gated_add.op import gated_add
from lltk.ops.implementations import check_device, find_implementation
from lltk.ops.rms_norm_rope.op import rms_norm_rope

cpu, gpu = pytest.mark.cpu, pytest.mark.gpu
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

Case = tuple[str, tuple[Any, ...]]
"""An op and its arguments."""
FP8_OPS = ("fp8_quantise", "fp8_quantise_norm", "fp8_quantise_add_norm", "fp8_quantise_gelu")
OPS = (*FP8_OPS, "gated_add", "rms_norm_rope")
CENTRED = "fp8_quantise_centred"
EPS = 1e-6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of sizes from 1/16 to 16."""
    generator = torch.Generator().manual_seed(seed)
    size = 16 ** (2 * torch.rand(*shape[:-1], 1, generator=generator) - 1)
    return (torch.randn(*shape, generator=generator) * size).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values as part of longer rows, as a slice of merged queries, keys and values is."""
    return torch.cat([x + 1, x, x - 1], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def turned(x: Tensor) -> Tensor:
    """The same values, tokens of a channel adjacent."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def modulation(frames: int, width: int) -> list[Tensor]:
    """Scale, shift and gate of each frame, as chunks of one tensor are: not contiguous."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(1, frames, 3, width, generator=generator)
    return [part.squeeze(2).unsqueeze(2) for part in table.chunk(3, 2)]


def tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each twice."""
    angles = torch.arange(length)[:, None] * 10.0 ** -torch.arange(width // 2)
    both = angles.repeat_interleave(2, 1)[None, :, None]
    return both.cos(), both.sin()


def cases(dtype: torch.dtype, large: bool = False) -> Iterator[Case]:
    """Of every op; shapes that fill a power of two and others."""
    for length, frames, heads, width in (
        ((880, 8, 24, 128), (64, 2, 3, 64)) if large else ((6, 3, 3, 16), (4, 1, 2, 8))
    ):
        columns = heads * width
        x, y = (normal(1, length, columns, seed=s, dtype=dtype) for s in (1, 2))
        scale, shift, gate = modulation(frames, columns)
        yield "fp8_quantise", (x,)
        yield "fp8_quantise", (strided(x),)
        yield "fp8_quantise", (turned(x),)
        yield "fp8_quantise_gelu", (normal(3, 2, 5 * columns, seed=3, dtype=dtype),)
        yield "fp8_quantise_gelu", (turned(x),)
        yield "fp8_quantise_norm", (x, scale, shift, EPS)
        yield "fp8_quantise_norm", (strided(x), scale[0, 0, 0], shift[0, 0, 0], EPS)
        yield "fp8_quantise_add_norm", (x, strided(y), gate, scale, shift, EPS)
        yield "fp8_quantise_add_norm", (x, y, gate, scale[0, 0, 0], shift[0, 0, 0], EPS)
        yield "fp8_quantise_add_norm", (turned(x), y, None, scale, shift, EPS)
        yield "gated_add", (x, y, gate)
        yield "gated_add", (strided(x), y, None)
        yield "gated_add", (turned(x), turned(y), gate)
        both = torch.cat([x, y]), scale[0, 0, 0].to(dtype)
        yield "rms_norm_rope", (*both, *tables(length, width), EPS)
        yield "rms_norm_rope", (strided(x), both[1], *tables(length, width), EPS)


def ran(op: str, name: str, arguments: tuple[Any, ...], device: str = "cpu") -> tuple[Tensor, ...]:
    placed = [on(device, a) if isinstance(a, Tensor) else a for a in arguments]
    result = loaded(op, name)(*placed)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def on(device: str, x: Tensor) -> Tensor:
    """The same values and strides; `Tensor.to` gives a slice dense ones."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def loaded(op: str, name: str) -> Callable[..., Any]:
    """An implementation; of the op that leaves no choice too."""
    if op != CENTRED:
        return find_implementation(op, name).load()
    module = importlib.import_module(f"lltk.ops.{op}.{'triton' if name == 'triton' else 'op'}")
    found: Callable[..., Any] = getattr(module, op)
    return found


def disagreement(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest relative distance of results' decoded rows, whose sums are rounded otherwise.

    The distance is that of all rows together: a code beside the right one in every thousand of
    E4M3's is 1e-3, a value that rounds to a neighbour in bfloat16 less.
    """
    for a, b in zip(ours, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return max(
        float((a - b).norm() / b.norm())
        for a, b in zip(decoded(ours), decoded(wanted), strict=True)
    )


def decoded(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Results in float64, FP8 values times their scales, which follow them."""
    tensors = [t.cpu().double() for t in results]
    if len(tensors) > 1:
        *others, values, scales = tensors
        return [*others, values * scales, scales]
    return tensors


def changed(op: str, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Arguments that differ in one place that a kernel may get wrong."""
    for index, given in enumerate(arguments):
        if isinstance(given, Tensor):
            yield (*arguments[:index], given.roll(2, -1), *arguments[index + 1 :])
    if op in ("fp8_quantise_norm", "fp8_quantise_add_norm", "rms_norm_rope"):
        yield (*arguments[:-1], 1.0)


def failures(dtype: torch.dtype, device: str, bound: float) -> Iterator[str]:
    """Where kernels and references differ, or do not where they must."""
    for op, arguments in cases(dtype, large=device != "cpu"):
        ours = ran(op, "triton", arguments, device)
        wanted = ran(op, "reference", arguments)
        shapes = [tuple(a.shape) for a in arguments if isinstance(a, Tensor)]
        if (found := disagreement(ours, wanted)) > bound:
            yield f"{op}: {shapes}: {found}"
        for number, others in enumerate(changed(op, arguments)):
            if (found := disagreement(ours, ran(op, "reference", others))) < 4 * bound:
                yield f"{op}: {shapes}: unseen: {number}: {found}"
    yield from edges(dtype, device)
    yield from centred_failures(dtype, device, bound)


def centred(length: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's result in FP8, its scale and its centre, of two videos."""
    x = round_e4m3(20 * normal(2, length, heads, width, seed=1))
    return x, torch.tensor(7.0), normal(2, 1, heads, width, seed=2)


def centred_failures(dtype: torch.dtype, device: str, bound: float) -> Iterator[str]:
    """As `failures`, of the op that adds a centre to what attention in FP8 gave."""
    for sizes in ((6, 3, 16), (4, 2, 8)):
        x, scale, centre = centred(*sizes)
        ours = ran(CENTRED, "triton", (x, scale, centre, dtype), device)
        found = disagreement(ours, ran(CENTRED, "reference", (x, scale, centre, dtype)))
        if found > bound:
            yield f"{CENTRED}: {sizes}: {found}"
        turned = x.view(torch.uint8).flip(1).view(x.dtype)
        for number, others in enumerate(
            ((turned, scale, centre), (x, 1.5 * scale, centre), (x, scale, centre.flip(0)))
        ):
            if disagreement(ours, ran(CENTRED, "reference", (*others, dtype))) < 4 * bound:
                yield f"{CENTRED}: {sizes}: unseen: {number}"


def edges(dtype: torch.dtype, device: str) -> Iterator[str]:
    """Rows of zeros, of what is not finite, of what is tiny, and of ties."""
    x = normal(7, 64, seed=4, dtype=dtype)
    x[1], x[2, 5], x[3, 5], x[4, 5] = 0, torch.inf, -torch.inf, torch.nan
    x[5] *= 1e-30
    x[6] = torch.tensor([448.0, 17, 19, -17, -19, 2**-10, 3 * 2**-10, -0.0] * 8)
    ours, scales = (t.cpu() for t in ran("fp8_quantise", "triton", (x,), device))
    values, wanted = ran("fp8_quantise", "reference", (x,))
    finite = [0, 1, 5, 6]
    if not torch.equal(scales[finite], wanted[finite]):
        yield f"scales of {dtype}"
    if not torch.equal(ours[finite].view(torch.uint8), values[finite].view(torch.uint8)):
        yield f"values of {dtype}"
    if not bool((ours.float() * scales)[[2, 3, 4]].isnan().all()):
        yield f"what is not finite of {dtype}"


def interpret() -> None:
    """Print what fails under Triton's interpreter, which cannot round to bfloat16."""
    for failure in failures(torch.float32, "cpu", 2e-3):
        print(failure)  # noqa: T201


# What the references compute


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_references_are_the_formulas(dtype: torch.dtype) -> None:
    """In float64; between the steps values are rounded to the dtype, in E4M3 at the end."""
    step = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    x, y = (normal(1, 6, 48, seed=s, dtype=dtype) for s in (1, 2))
    scale, shift, gate = modulation(3, 48)
    each = (1, 3, 2, 48)

    def norm(v: Tensor) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        v = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        return (v.view(each) * scale.double() + shift.double()).view(v.shape)

    def near(ours: tuple[Tensor, ...], wanted: Tensor) -> None:
        found = ours[-2].double() * ours[-1].double()
        assert float((found - wanted).norm() / wanted.norm()) < 0.05 + step
        assert float((found.roll(1, 1) - wanted).norm() / wanted.norm()) > 0.5

    wide, added = x.double(), (y.double().view(each) * gate.double()).view(x.shape)
    near(fp8_quantise_norm(x, scale, shift, EPS), norm(wide))
    for result, total in (
        (fp8_quantise_add_norm(x, y, gate, scale, shift, EPS), wide + added),
        (fp8_quantise_add_norm(x, y, None, scale, shift, EPS), wide + y.double()),
    ):
        assert torch.allclose(result[0].double(), total, rtol=step, atol=step)
        near(result[1:], norm(result[0].double()))
    assert torch.equal(gated_add(x, y, gate), fp8_quantise_add_norm(x, y, gate, scale, shift, 1)[0])
    near(fp8_quantise_gelu(x), F.gelu(wide, approximate="tanh"))
    values, factor, centre = centred(6, 3, 16)
    near(
        fp8_quantise_centred(values, factor, centre, dtype),
        (values.double() / 7 + centre.double()).flatten(2),
    )
    weight, (cos, sin) = normal(48, seed=3).to(dtype), tables(6, 16)
    unit = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    pairs = torch.view_as_complex(unit.view(1, 6, 3, 8, 2).contiguous())
    turned = pairs * torch.complex(cos[..., ::2], sin[..., ::2])
    wanted = torch.view_as_real(turned).flatten(-2)
    ours = rms_norm_rope(x, weight, cos, sin, EPS)
    assert ours.shape == (1, 6, 3, 16) and ours.dtype == dtype
    assert torch.allclose(ours.double(), wanted, rtol=step, atol=4 * step)
    assert not torch.allclose(ours.double(), wanted.roll(1, 1), rtol=step, atol=4 * step)


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_are_their_references(dtype: torch.dtype) -> None:
    for op, arguments in cases(dtype):
        ours, wanted = ran(op, "reference", arguments), ran(op, "torch", arguments)
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    ops: dict[str, Any] = {
        "fp8_quantise": fp8_quantise,
        "fp8_quantise_norm": fp8_quantise_norm,
        "fp8_quantise_add_norm": fp8_quantise_add_norm,
        "fp8_quantise_gelu": fp8_quantise_gelu,
        "gated_add": gated_add,
        "rms_norm_rope": rms_norm_rope,
    }
    for op, arguments in cases(dtype):
        torch.library.opcheck(ops[op], arguments)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fp8_quantise_centred, (*centred(6, 3, 16), dtype), test_utils=checks)


@cpu
def test_what_does_not_fit_is_refused() -> None:
    x, y = normal(1, 6, 48), normal(1, 6, 32)
    scale, shift, gate = modulation(3, 48)
    cos, sin = tables(6, 16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        for call, arguments in (
            (fp8_quantise_norm, (y, scale, shift, EPS)),
            (fp8_quantise_norm, (x, scale, shift[..., :32], EPS)),
            (gated_add, (x, y, None)),
            (gated_add, (y, y, gate)),
            (fp8_quantise_add_norm, (x, y, None, scale, shift, EPS)),
            (rms_norm_rope, (x, scale[0, 0, 0], cos[:, :5], sin[:, :5], EPS)),
            (rms_norm_rope, (x, scale, cos, sin, EPS)),
            (rms_norm_rope, (y, scale[0, 0, 0, :32], *tables(6, 20), EPS)),
        ):
            with pytest.raises(RuntimeError):
                call(*arguments)


# The kernels


@cpu
@needs_triton
def test_kernels_interpreted() -> None:
    """In a process of its own: a kernel is interpreted or compiled from its definition on."""
    result = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", "import test_row_kernels as t; t.interpret()"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


@gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_agree_with_their_references(dtype: torch.dtype) -> None:
    assert not list(failures(dtype, "cuda", 2e-3))


@gpu
@needs_triton
def test_kernels_at_the_5b_models_sizes() -> None:
    """The references on the GPU too; modulations of eight frames."""
    x, y = (torch.randn(1, 7040, 3072, device="cuda").bfloat16() for _ in range(2))
    scale, shift, gate = (t.cuda() for t in modulation(8, 3072))
    cos, sin = (t.cuda() for t in tables(7040, 128))
    wide = torch.randn(1, 7040, 14336, device="cuda").bfloat16()
    given: dict[str, tuple[Any, ...]] = {
        "fp8_quantise": (x,),
        "fp8_quantise_norm": (x, scale, shift, EPS),
        "fp8_quantise_add_norm": (x, y, gate, scale, shift, EPS),
        "fp8_quantise_gelu": (wide,),
        "gated_add": (x, y, gate),
        "rms_norm_rope": (x, scale[0, 0, 0].bfloat16(), cos, sin, EPS),
    }
    for op, arguments in given.items():
        ours, wanted = (
            find_implementation(op, name).load()(*arguments) for name in ("triton", "torch")
        )
        if isinstance(ours, Tensor):
            ours, wanted = (ours,), (wanted,)
        assert disagreement(ours, wanted) < 2e-3, op
        assert disagreement(tuple(next_rows(t) for t in ours), wanted) > 0.1, op


def next_rows(x: Tensor) -> Tensor:
    """Each token's row in the place of the next one's; torch cannot roll FP8."""
    return x.view(torch.uint8).roll(1, 1).view(x.dtype)


@gpu
@needs_triton
def test_kernels_replay_in_cuda_graphs() -> None:
    operands = {
        op: [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
        for op, arguments in cases(torch.bfloat16)
    }

    def step() -> list[Tensor]:
        results = (
            find_implementation(op, "triton").load()(*arguments)
            for op, arguments in operands.items()
        )
        return [t for r in results for t in ((r,) if isinstance(r, Tensor) else r)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    before = [t.clone() for t in recorded]
    for arguments in operands.values():
        arguments[0] *= 1.5
        arguments[0][..., 0] += 1
    graph.replay()
    for ours, old, wanted in zip(recorded, before, step(), strict=True):
        assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))
        assert not torch.equal(ours.view(torch.uint8), old.view(torch.uint8))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str, tuple[Any, ...]], str]:
    """PTX of the kernel that an op launches, for an architecture that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_for(architecture: int, op: str, arguments: tuple[Any, ...]) -> str:
        class Absent:
            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", architecture, 32)

            def get_current_device(self) -> int:
                return architecture

            def get_current_stream(self, device: int) -> int:
                return 0

        found: list[str] = []

        def compile_only(kernel: Any, *given: Any, **options: Any) -> Any:
            result = run(kernel, *given, **{**options, "warmup": True})
            found.append(result.asm["ptx"])
            return result

        with monkeypatch.context() as patched:
            patched.setattr(driver, "_active", Absent())
            patched.setattr(JITFunction, "run", compile_only)
            if op in (*FP8_OPS, CENTRED):
                where = f"lltk.ops.{op}.triton.converts_e4m3"
                patched.setattr(where, lambda device: True)
            ran(op, "triton", arguments)
        (ptx,) = found
        return ptx

    return compile_for


@cpu
@needs_triton
@pytest.mark.parametrize("architecture", [90, 120])
def test_kernels_compile(architecture: int, compiled: Any) -> None:
    """To one wide read of each operand's row, and to the instruction that converts."""
    x, y = (normal(1, 16, 3072, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    scale, shift, gate = modulation(2, 3072)
    given: dict[str, tuple[Any, ...]] = {
        "fp8_quantise": (x,),
        "fp8_quantise_norm": (x, scale, shift, EPS),
        "fp8_quantise_add_norm": (x, y, gate, scale, shift, EPS),
        "fp8_quantise_gelu": (normal(1, 2, 14336, dtype=torch.bfloat16),),
        "gated_add": (x, y, gate),
        "rms_norm_rope": (strided(x), gate[0, 0, 0].bfloat16(), *tables(16, 128), EPS),
        CENTRED: (*centred(8, 24, 128), torch.bfloat16),
    }
    for op, arguments in given.items():
        ptx = compiled(architecture, op, arguments)
        assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (op in (*FP8_OPS, CENTRED)), op
        assert "ld.global.v4.b32" in ptx and "ld.global.b16" not in ptx, op
        assert "ld.local" not in ptx and "st.local" not in ptx, op


# Choosing


@cpu
def test_kernels_are_chosen_by_name() -> None:
    for op in OPS:
        names = [find_implementation(op, name).name for name in ("reference", "torch", "triton")]
        assert len(set(names)) == 3
        with pytest.raises(ValueError, match=f"{op}: triton runs on cuda, not on cpu; cpu has"):
            check_device({op: "triton"}, torch.device("cpu"))


@cpu
@needs_triton
def test_heads_that_the_kernel_cannot_hold_are_refused() -> None:
    x, weight = normal(1, 6, 48), normal(48)
    with pytest.raises(ValueError, match="heads of 16, 32, 64, …, not of 24; set rms_norm_rope"):
        ran("rms_norm_rope", "triton", (x, weight, *tables(6, 24), EPS))


# The benchmark


@cpu
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "fusions.py"
    options = {"device": "cpu", "implementation": "torch", "frames": 2, "tokens": 8, "heads": 1}
    options |= {"ffn": 256, "layers": 3, "runs": 2, "output": tmp_path / "fusions"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    runpy.run_path(str(script), run_name="__main__")
    record = Record.model_validate_json((tmp_path / "fusions.json").read_text())
    rows = {row["op"]: row for row in record.results}
    assert rows["fp8_quantise"]["bytes"] == 8 * 128 * 3 + 8 * 4
    assert rows["gated_add"]["bytes"] == 8 * 128 * 6 + 2 * 128 * 4
    kernels = [row for row in rows.values() if "compiled_ms" in row]
    assert rows["all"]["pass_ms"] == pytest.approx(sum(row["pass_ms"] for row in kernels))
    norms = rows["rms_norm_rope"]
    assert norms["pass_ms"] == pytest.approx(3 * 2 * norms["median_ms"])
    assert {row["op"].partition(",")[0] for row in kernels} == set(OPS)
