"""Ops on rows: what they compute, and their kernels against their references."""

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
from compiling import compiling_for
from torch import Tensor

from lltk.bench.record import Record
from lltk.ops.floats import round_e4m3
from lltk.ops.fp8_dequantise.op import fp8_dequantise
from lltk.ops.fp8_quantise_centred.op import fp8_quantise_centred
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import check_device, find_implementation
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise
from lltk.ops.rms_norm_rope.op import rms_norm_rope
from lltk.ops.row_pipeline.op import row_pipeline

cpu, gpu = pytest.mark.cpu, pytest.mark.gpu
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

Arguments = dict[str, Any]
Case = tuple[str, Arguments]
"""An op and its arguments."""
OPS = ("row_pipeline", "rms_norm_rope")
CENTRED = "fp8_quantise_centred"
EPS = 1e-6
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows, of sizes from 1/16 to 16."""
    generator = torch.Generator().manual_seed(seed)
    size = 16 ** (2 * torch.rand(*shape[:-1], 1, generator=generator) - 1)
    return (torch.randn(*shape, generator=generator) * size).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values as part of longer rows, as a slice of merged queries, keys and values is."""
    return torch.cat([x + 1, x, x - 1], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def turned(x: Tensor) -> Tensor:
    """The same values in memory where the tokens of a channel are adjacent."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def modulation(frames: int, width: int) -> list[Tensor]:
    """Scale, shift and gate of each frame. As chunks of one tensor they are not contiguous."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(1, frames, 3, width, generator=generator)
    return [part.squeeze(2).unsqueeze(2) for part in table.chunk(3, 2)]


def tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each number twice."""
    angles = torch.arange(length)[:, None] * 10.0 ** -torch.arange(width // 2)
    both = angles.repeat_interleave(2, 1)[None, :, None]
    return both.cos(), both.sin()


def norm_by(scale: Tensor, shift: Tensor) -> Arguments:
    """The arguments of a norm."""
    return {"scale": scale, "shift": shift, "eps": EPS}


Sizes = tuple[tuple[int, int, int, int], ...]
SMALL: Sizes = ((6, 3, 3, 16), (4, 1, 2, 8))
LARGE: Sizes = ((880, 8, 24, 128), (64, 2, 3, 64))
"""Tokens, frames, heads and their width; rows that fill a power of two and others."""


def cases(dtype: torch.dtype, sizes: Sizes = SMALL) -> Iterator[Case]:
    """Cases of every op."""
    for length, frames, heads, width in sizes:
        columns = heads * width
        x, y = (normal(1, length, columns, seed=s, dtype=dtype) for s in (1, 2))
        scale, shift, gate = modulation(frames, columns)
        modulated, affine = norm_by(scale, shift), norm_by(scale[0, 0, 0], shift[0, 0, 0])
        for given in (
            {"x": x},
            {"x": strided(x)},
            {"x": turned(x)},
            {"x": normal(3, 2, 5 * columns, seed=3, dtype=dtype), "activation": "gelu"},
            {"x": turned(x), "activation": "gelu"},
            {"x": x, **modulated},
            {"x": strided(x), **affine},
            {"x": x, "y": strided(y), "gate": gate, **modulated, "keep_sum": True},
            {"x": x, "y": y, "gate": gate, **affine, "keep_sum": True},
            {"x": turned(x), "y": y, **modulated, "keep_sum": True},
            {"x": strided(x), "scale": scale, "eps": EPS},
        ):
            yield "row_pipeline", {**given, "to": "fp8"}
        yield "row_pipeline", {"x": x, "scale": gate[0, 0, 0].to(dtype), "eps": EPS}
        yield "row_pipeline", {"x": strided(x), "to": "e4m3"}
        yield "row_pipeline", {"x": 60 * x, "y": 60 * y, "to": "e4m3"}
        yield "row_pipeline", {"x": x, "y": y, "gate": gate}
        yield "row_pipeline", {"x": strided(x), "y": y}
        yield "row_pipeline", {"x": turned(x), "y": turned(y), "gate": gate}
        yield from new_combinations(x, y, gate, modulated)
        weight, (cos, sin) = scale[0, 0, 0].to(dtype), tables(length, width)
        rotated = {"weight": weight, "cos": cos, "sin": sin, "eps": EPS}
        yield "rms_norm_rope", {"x": torch.cat([x, y]), **rotated}
        yield "rms_norm_rope", {"x": strided(x), **rotated}
        yield "rms_norm_rope", {"x": strided(x), **rotated, "to": "e4m3"}


def new_combinations(x: Tensor, y: Tensor, gate: Tensor, norm: Arguments) -> Iterator[Case]:
    """Pipelines that no recipe has."""
    gelu = {"activation": "gelu"}
    for given in (
        {"x": strided(x), "y": y, "gate": gate, **gelu, "to": "nvfp4", "keep_sum": True},
        {"x": x, "y": turned(y), **norm, **gelu, "to": "nvfp4", "rule": "mse"},
        {"x": turned(x), **gelu, "to": "nvfp4"},
        {"x": x, "y": y, "gate": gate, **norm, **gelu, "to": "fp8"},
        {"x": x, "y": y, **gelu, "keep_sum": True},
        {"x": strided(x), **norm},
        {"x": strided(x), "y": y, "scale": gate, "eps": EPS, "to": "nvfp4"},
    ):
        yield "row_pipeline", given


def ran(op: str, name: str, given: Arguments, device: str = "cpu") -> tuple[Tensor, ...]:
    placed = {n: on(device, a) if isinstance(a, Tensor) else a for n, a in given.items()}
    return as_tuple(loaded(op, name)(**placed))


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def on(device: str, x: Tensor) -> Tensor:
    """The same values and strides on a device; `Tensor.to` would make a slice dense."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def loaded(op: str, name: str) -> Callable[..., Any]:
    """An implementation, also of the op that leaves no choice."""
    if op != CENTRED:
        return find_implementation(op, name).load()
    module = importlib.import_module(f"lltk.ops.{op}.{'triton' if name == 'triton' else 'op'}")
    found: Callable[..., Any] = getattr(module, op)
    return found


def disagreement(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """How far results are apart whose sums are rounded otherwise.

    For NVFP4 it is the largest share of codes or of scales that differ. For other forms it is the
    largest relative distance of decoded results. It is about 1e-3 where one E4M3 code in a thousand
    is a neighbour of the right one, and less for bfloat16, whose neighbours are nearer.
    """
    for a, b in zip(ours, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    shares = []
    if ours[0].dtype == torch.uint8:
        shares = [
            float((a.cpu().view(torch.uint8) != b.cpu().view(torch.uint8)).double().mean())
            for a, b in zip(ours[:2], wanted[:2], strict=True)
        ]
        ours, wanted = ours[2:], wanted[2:]
    distances = [
        float((a - b).norm() / b.norm())
        for a, b in zip(decoded(ours), decoded(wanted), strict=True)
    ]
    return max(shares + distances)


def decoded(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Results in float64. FP8 values are multiplied by their scales, which follow them."""
    first, *others = (t.cpu().double() for t in results)
    if results[0].dtype == torch.float8_e4m3fn and others:
        return [first * others[0], *others]
    return [first, *others]


def changed(given: Arguments) -> Iterator[Arguments]:
    """Arguments that differ in one place that a kernel may get wrong."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            yield {**given, name: value.roll(2, -1)}
    if "eps" in given:
        yield {**given, "eps": 1.0}
    if "activation" in given and "to" in given:
        yield {**given, "activation": None}


def failures(dtype: torch.dtype, device: str, bound: float) -> Iterator[str]:
    """Where kernels and references differ, or do not where they must."""
    for op, given in cases(dtype, SMALL if device == "cpu" else LARGE):
        ours, wanted = ran(op, "triton", given, device), ran(op, "reference", given)
        shape = tuple(given["x"].shape)
        if (found := disagreement(ours, wanted)) > bound:
            yield f"{op} of {', '.join(given)}: {shape}: {found}"
        for number, others in enumerate(changed(given)):
            if (found := disagreement(ours, ran(op, "reference", others))) < 4 * bound:
                yield f"{op} of {', '.join(given)}: {shape}: unseen: {number}: {found}"
    yield from edges(dtype, device)
    yield from centred_failures(dtype, device, bound)
    yield from read_back_failures(dtype, device)


def read_back_failures(dtype: torch.dtype, device: str) -> Iterator[str]:
    """As `failures`, of the op that reads FP8 rows back: every code, bit for bit.

    With a centre and one scale for all, what is rounded once instead of twice may differ.
    """
    codes = torch.arange(256, dtype=torch.uint8).repeat(90).view(2, 64, 3, 60)
    scales, centre = normal(2, 64, 3, 1, seed=1).abs(), normal(2, 1, 3, 60, seed=2)
    given: Arguments = {"codes": codes.view(torch.float8_e4m3fn), "dtype": dtype}
    for bound, operands in (
        (0.0, {"scales": scales, "centre": None}),
        (
            0.02 if dtype == torch.bfloat16 else 1e-3,
            {"scales": torch.tensor(0.3), "centre": centre},
        ),
    ):
        (ours,) = ran("fp8_dequantise", "triton", {**given, **operands}, device)
        for changes in (
            {},
            *({n: 1.5 * v.flip(0, 1)} for n, v in operands.items() if v is not None and v.dim()),
        ):
            (wanted,) = ran("fp8_dequantise", "reference", {**given, **operands, **changes})
            alike = torch.allclose(ours.cpu(), wanted, rtol=bound, atol=bound, equal_nan=True)
            if alike == bool(changes):
                yield f"fp8_dequantise: changed {list(changes)}, alike {alike}"


def centred(length: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's result in FP8, with its scale and its centre, of two videos."""
    x = round_e4m3(20 * normal(2, length, heads, width, seed=1))
    return x, torch.tensor(7.0), normal(2, 1, heads, width, seed=2)


def centred_failures(dtype: torch.dtype, device: str, bound: float) -> Iterator[str]:
    """As `failures`, for the op that adds a centre to the result of attention in FP8."""
    for sizes in ((6, 3, 16), (4, 2, 8)):
        x, scale, centre = centred(*sizes)
        given = {"x": x, "scale": scale, "centre": centre, "dtype": dtype}
        ours = ran(CENTRED, "triton", given, device)
        if (found := disagreement(ours, ran(CENTRED, "reference", given))) > bound:
            yield f"{CENTRED}: {sizes}: {found}"
        for name, other in {
            "x": x.view(torch.uint8).flip(1).view(x.dtype),
            "scale": 1.5 * scale,
            "centre": centre.flip(0),
        }.items():
            if disagreement(ours, ran(CENTRED, "reference", {**given, name: other})) < 4 * bound:
                yield f"{CENTRED}: {sizes}: unseen: {name}"


def edges(dtype: torch.dtype, device: str) -> Iterator[str]:
    """Rows of zeros, of infinities and NaN, of tiny values, and of ties."""
    x = normal(7, 64, seed=4, dtype=dtype)
    x[1], x[2, 5], x[3, 5], x[4, 5] = 0, torch.inf, -torch.inf, torch.nan
    x[5] *= 1e-30
    x[6] = torch.tensor([448.0, 17, 19, -17, -19, 2**-10, 3 * 2**-10, -0.0] * 8)
    given = {"x": x, "to": "fp8"}
    ours, scales = (t.cpu() for t in ran("row_pipeline", "triton", given, device))
    values, wanted = ran("row_pipeline", "reference", given)
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
    """Formulas are in float64.

    Between steps values are rounded to the dtype, at the end to E4M3.
    """
    step = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    x, y = (normal(1, 6, 48, seed=s, dtype=dtype) for s in (1, 2))
    scale, shift, gate = modulation(3, 48)
    each = (1, 3, 2, 48)

    def norm(v: Tensor) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        v = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        return (v.view(each) * scale.double() + shift.double()).view(v.shape)

    def near(values: Tensor, scales: Tensor, wanted: Tensor) -> None:
        found = values.double() * scales.double()
        assert float((found - wanted).norm() / wanted.norm()) < 0.05 + step
        assert float((found.roll(1, 1) - wanted).norm() / wanted.norm()) > 0.5

    wide, added = x.double(), (y.double().view(each) * gate.double()).view(x.shape)
    norm_arguments = norm_by(scale, shift)
    near(*row_pipeline(x, **norm_arguments, to="fp8"), norm(wide))
    for gated, total in (
        ({"y": y, "gate": gate}, wide + added),
        ({"y": y}, wide + y.double()),
    ):
        values, scales, kept = row_pipeline(x, **gated, **norm_arguments, to="fp8", keep_sum=True)
        assert torch.allclose(kept.double(), total, rtol=step, atol=step)
        near(values, scales, norm(kept.double()))
        assert torch.equal(row_pipeline(x, **gated)[0], kept)
    near(*row_pipeline(x, activation="gelu", to="fp8"), F.gelu(wide, approximate="tanh"))
    values, factor, centre = centred(6, 3, 16)
    near(
        *fp8_quantise_centred(values, factor, centre, dtype),
        (values.double() / 7 + centre.double()).flatten(2),
    )
    read = fp8_dequantise(*(t.unsqueeze(1) for t in fp8_quantise(x)), dtype)
    near(read.squeeze(1), torch.ones(()), wide)
    moved = fp8_dequantise(values, 1 / factor, dtype, centre)
    near(moved.flatten(2), torch.ones(()), (values.double() / 7 + centre.double()).flatten(2))
    weight, (cos, sin) = normal(48, seed=3).to(dtype), tables(6, 16)
    unit = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    (normed,) = row_pipeline(x, scale=weight, eps=EPS)
    assert torch.equal(normed, F.rms_norm(x, (48,), weight, EPS))
    assert torch.allclose(normed.double(), unit, rtol=step, atol=4 * step)
    in_groups = (unit / weight.double()).view(each) * scale.double()
    near(*row_pipeline(x, scale=scale, eps=EPS, to="fp8"), in_groups.view(x.shape))
    pairs = torch.view_as_complex(unit.view(1, 6, 3, 8, 2).contiguous())
    turned = pairs * torch.complex(cos[..., ::2], sin[..., ::2])
    wanted = torch.view_as_real(turned).flatten(-2)
    ours = rms_norm_rope(x, weight, cos, sin, EPS)
    assert ours.shape == (1, 6, 3, 16) and ours.dtype == dtype
    assert torch.allclose(ours.double(), wanted, rtol=step, atol=4 * step)
    assert not torch.allclose(ours.double(), wanted.roll(1, 1), rtol=step, atol=4 * step)


@cpu
def test_a_new_combination_needs_no_code_of_its_own() -> None:
    """Each step gives what it gives alone, rounded in between, in the order that the op states."""
    x, y = (normal(1, 6, 48, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    scale, shift, gate = modulation(3, 48)
    (total,) = row_pipeline(x, y=y, gate=gate)
    (normed,) = row_pipeline(total, **norm_by(scale, shift))
    for given, before in (({}, total), (norm_by(scale, shift), normed)):
        *written, kept = row_pipeline(
            x, y=y, gate=gate, **given, activation="gelu", to="nvfp4", rule="mse", keep_sum=True
        )
        assert torch.equal(kept, total)
        wanted = nvfp4_quantise(F.gelu(before, approximate="tanh"), 1, "mse")
        others = nvfp4_quantise(before, 1, "mse")
        assert disagreement(tuple(written), tuple(wanted)) == 0
        assert disagreement(tuple(written), tuple(others)) > 0.1


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_are_their_references(dtype: torch.dtype) -> None:
    for op, given in cases(dtype):
        ours, wanted = ran(op, "reference", given), ran(op, "torch", given)
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


@cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    ops: dict[str, Any] = {"row_pipeline": row_pipeline, "rms_norm_rope": rms_norm_rope}
    for op, given in cases(dtype, SMALL[:1]):
        torch.library.opcheck(ops[op], (), given)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fp8_quantise_centred, (*centred(6, 3, 16), dtype), test_utils=checks)
    rows, factor, middle = centred(6, 3, 16)
    for given in ((*fp8_quantise(normal(1, 6, 3, 16)), dtype), (rows, factor, dtype, middle)):
        torch.library.opcheck(fp8_dequantise, given, test_utils=checks)


@cpu
def test_what_does_not_fit_is_refused() -> None:
    x, y = normal(1, 6, 48), normal(1, 6, 32)
    scale, shift, gate = modulation(3, 48)
    norm = norm_by(scale, shift)
    cos, sin = tables(6, 16)
    pipelines: list[Arguments] = [
        {"x": y, **norm, "to": "fp8"},
        {"x": x, **norm, "shift": shift[..., :32], "to": "fp8"},
        {"x": x, **norm, "shift": shift[:, :1], "to": "fp8"},
        {"x": x, "scale": scale, "shift": shift, "to": "fp8"},
        {"x": x, "eps": EPS, "to": "fp8"},
        {"x": x, "scale": scale, "to": "fp8"},
        {"x": x, "shift": shift, "to": "fp8"},
        {"x": x, "y": y},
        {"x": y, "y": y, "gate": gate},
        {"x": x[:, :5], "y": x[:, :5], "gate": gate},
        {"x": x, "y": y, **norm, "to": "fp8"},
        {"x": x, "gate": gate, "to": "fp8"},
        {"x": x, "to": "fp8", "keep_sum": True},
        {"x": x, "y": x, "keep_sum": True},
        {"x": x},
        {"x": x, "to": "int8"},
        {"x": x, "activation": "silu", "to": "fp8"},
        {"x": x, "to": "fp8", "rule": "mse"},
        {"x": x[..., :40], "to": "nvfp4"},
    ]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        for given in pipelines:
            with pytest.raises(RuntimeError):
                row_pipeline(**given)
        for arguments in (
            (x, scale[0, 0, 0], cos[:, :5], sin[:, :5], EPS),
            (x, scale, cos, sin, EPS),
            (y, scale[0, 0, 0, :32], *tables(6, 20), EPS),
        ):
            with pytest.raises(RuntimeError):
                rms_norm_rope(*arguments)


# The kernels


@cpu
@needs_triton
def test_kernels_interpreted() -> None:
    """It runs in a process of its own, because a kernel is interpreted or compiled once defined."""
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
    rotated = {"weight": scale[0, 0, 0].bfloat16(), "cos": cos, "sin": sin, "eps": EPS}
    for op, given in (
        *(("row_pipeline", each) for each in used(x, y, wide, scale, shift, gate)),
        ("rms_norm_rope", {"x": x, **rotated}),
    ):
        ours, wanted = (
            as_tuple(find_implementation(op, name).load()(**given)) for name in ("triton", "torch")
        )
        assert disagreement(ours, wanted) < 2e-3, list(given)
        assert disagreement(tuple(next_rows(t) for t in ours), wanted) > 0.1, list(given)


def used(x: Tensor, y: Tensor, wide: Tensor, *parts: Tensor) -> list[Arguments]:
    """The pipelines of the FP8 recipes. The parts are scale, shift and gate."""
    scale, shift, gate = parts
    norm = norm_by(scale, shift)
    return [
        {"x": x, "to": "fp8"},
        {"x": x, **norm, "to": "fp8"},
        {"x": x, "y": y, "gate": gate, **norm, "to": "fp8", "keep_sum": True},
        {"x": x, "y": y, **norm, "to": "fp8", "keep_sum": True},
        {"x": x, "y": y, "gate": gate},
        {"x": wide, "activation": "gelu", "to": "fp8"},
        {"x": x, "y": y, "gate": gate, **norm},
        {"x": x, "scale": scale[0, 0, 0].bfloat16(), "eps": EPS},
    ]


def next_rows(x: Tensor) -> Tensor:
    """Each token's row in the place of the next one's; torch cannot roll FP8."""
    return x.view(torch.uint8).roll(1, 1).view(x.dtype)


@gpu
@needs_triton
def test_kernels_replay_in_cuda_graphs() -> None:
    operands = [
        (op, {n: a.cuda() if isinstance(a, Tensor) else a for n, a in given.items()})
        for op, given in cases(torch.bfloat16)
    ]

    def step() -> list[Tensor]:
        results = (find_implementation(op, "triton").load()(**given) for op, given in operands)
        return [t for result in results for t in as_tuple(result)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    before = [t.clone() for t in recorded]
    for _, given in operands:
        given["x"] *= 1.5
        given["x"][..., 0] += 1
    graph.replay()
    for ours, old, wanted in zip(recorded, before, step(), strict=True):
        assert torch.equal(as_bytes(ours), as_bytes(wanted))
        assert not torch.equal(as_bytes(ours), as_bytes(old))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str, Arguments], str]:
    """PTX of the kernel that an op launches, for an architecture that need not be there."""

    def compile_for(architecture: int, op: str, arguments: Arguments) -> str:
        with monkeypatch.context() as patched, compiling_for(architecture) as found:
            where = f"lltk.ops.{op}.triton.converts_e4m3"
            patched.setattr(where, lambda device: True)
            ran(op, "triton", arguments)
        ((kernel,),) = found.values()
        ptx: str = kernel.asm["ptx"]
        return ptx

    return compile_for


@cpu
@needs_triton
@pytest.mark.parametrize("architecture", [90, 120])
def test_kernels_compile(architecture: int, compiled: Any) -> None:
    """They read rows by wide reads, and convert and round by the instructions for two numbers."""
    x, y = (normal(1, 16, 3072, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    scale, shift, gate = modulation(2, 3072)
    wide = normal(1, 2, 14336, dtype=torch.bfloat16)
    values, factor, centre = centred(8, 24, 128)
    cos, sin = tables(16, 128)
    rotated = {"weight": gate[0, 0, 0].bfloat16(), "cos": cos, "sin": sin, "eps": EPS}
    after_attention = {"x": values, "scale": factor, "centre": centre, "dtype": torch.bfloat16}
    for op, given in (
        *(("row_pipeline", each) for each in used(x, y, wide, scale, shift, gate)),
        ("rms_norm_rope", {"x": strided(x), **rotated}),
        ("rms_norm_rope", {"x": strided(x), **rotated, "to": "e4m3"}),
        (CENTRED, after_attention),
    ):
        ptx = compiled(architecture, op, given)
        in_fp8 = op == CENTRED or given.get("to", "plain") != "plain"
        rounds = op != "row_pipeline" or len(given) > 2
        assert ("cvt.rn.bf16x2.f32 both" in ptx) == rounds, list(given)
        assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == in_fp8, list(given)
        assert "ld.global.v2.b32" in ptx or "ld.global.v4.b32" in ptx, list(given)
        assert "ld.global.b16" not in ptx, list(given)
        assert "ld.local" not in ptx and "st.local" not in ptx, list(given)


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
        cos, sin = tables(6, 24)
        given = {"x": x, "weight": weight, "cos": cos, "sin": sin, "eps": EPS}
        ran("rms_norm_rope", "triton", given)


# The benchmark


@cpu
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = BENCHMARKS / "fusions.py"
    options = {"device": "cpu", "implementation": "torch", "frames": 2, "tokens": 8, "heads": 1}
    options |= {"ffn": 256, "layers": 3, "runs": 2, "output": tmp_path / "fusions"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    runpy.run_path(str(script), run_name="__main__")
    record = Record.model_validate_json((tmp_path / "fusions.json").read_text())
    rows = {row["op"]: row for row in record.results}
    assert rows["quantise"]["bytes"] == 8 * 128 * 3 + 8 * 4
    assert rows["RMS norm"]["bytes"] == 8 * 128 * 4 + 128 * 2
    kernels = [row for row in rows.values() if "compiled_ms" in row]
    assert len(kernels) == 6
    assert rows["all"]["pass_ms"] == pytest.approx(sum(row["pass_ms"] for row in kernels))
    norms = rows["norm of heads, rotation"]
    assert norms["pass_ms"] == pytest.approx(3 * 2 * norms["median_ms"])


@cpu
def test_old_and_new_are_compared_in_turns() -> None:
    compared = runpy.run_path(str(BENCHMARKS / "row_kernels.py"))["compared"]
    order: list[str] = []

    def side(name: str, medians: list[float]) -> Callable[[str], dict[str, Any]]:
        left = iter(medians)

        def ask(label: str) -> dict[str, Any]:
            order.append(name)
            median = next(left)
            times = {"median_ms": median, "p90_ms": 10 * median, "host_us": 100 * median}
            return {**times, "digests": [label]}

        return ask

    row = compared("norm", side("old", [3.0, 1.0, 2.0]), side("new", [5.0, 4.0, 9.0]), 3)
    assert order == ["old", "new", "new", "old", "old", "new"]
    assert row == {
        "steps": "norm",
        "old_median_ms": 2.0,
        "old_p90_ms": 20.0,
        "old_host_us": 200.0,
        "old_range_ms": [1.0, 3.0],
        "new_median_ms": 5.0,
        "new_p90_ms": 50.0,
        "new_host_us": 500.0,
        "new_range_ms": [4.0, 9.0],
        "against_old": 2.5,
        "same": True,
    }
