"""The decoder's fused ops: references against the formulas, kernels against references."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import compiling_for
from torch import Tensor
from torch.library import opcheck

from lltk.ops.cached_norm_silu.op import cached_norm_silu
from lltk.ops.fp8_cached_norm_silu.op import fp8_cached_norm_silu
from lltk.ops.fp8_conv3d.op import fp8_conv3d
from lltk.ops.fp8_conv3d.reference import fold_taps, unfold_taps
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import find_implementation
from lltk.ops.upsample_residual.op import upsample_residual
from lltk.ops.upsample_residual.reference import fold, unfold

cpu, gpu = pytest.mark.cpu, pytest.mark.gpu
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
LAST = torch.channels_last_3d


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made.contiguous(memory_format=LAST) if made.dim() == 5 else made


def far(ours: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of 1 + the magnitude that is wanted."""
    ours, wanted = ours.cpu().double(), wanted.double()
    return float(((ours - wanted).abs() / (1 + wanted.abs())).max())


def norm_cases(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Widths and areas that fill no block, one frame and several, each operand there or not."""
    for width, frames, sides in ((20, 1, (3, 5)), (128, 3, (5, 7))):
        x, residual = (random(2, width, frames, *sides, dtype=dtype, seed=s) for s in (0, 1))
        cache = random(2, width, 2, *sides, dtype=dtype, seed=2)
        gamma, bias = (random(width, 1, 1, 1, dtype=dtype, seed=s) for s in (3, 4))
        bias = bias.flatten()
        yield x, gamma, None, None, None, False
        yield x, gamma, bias, None, cache, False
        yield x, gamma, bias, residual, cache, True
        yield x, gamma, bias, None, None, True
        yield x.contiguous(), gamma, None, residual, cache.contiguous(), False
    yield x * 0, gamma, None, None, cache, False


def upsample_cases(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """(channels, the shortcut's, its frames, stride, frames left out)."""
    for channels, width, frames, stride, left in (
        (16, 16, 2, 2, 0),
        (16, 16, 1, 2, 1),
        (20, 40, 3, 1, 0),
        (48, 24, 2, 2, 1),
        (8, 8, 2, 1, 0),
    ):
        images = 2 * (frames * stride - left)
        phases = random(images, 4 * channels, 6, 4, dtype=dtype)
        shortcut = random(2, width, frames, 5, 3, dtype=dtype, seed=1)
        yield phases, random(channels, dtype=dtype, seed=2), shortcut, stride


def fp8_norm_cases(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """The cases of `norm_cases`, with caches in FP8."""
    for x, gamma, bias, residual, cache, keep in norm_cases(dtype):
        if cache is not None:
            cache = fp8_cached_norm_silu(cache.contiguous(memory_format=LAST), gamma)[1]
        yield x, gamma, bias, residual, cache, keep


def fp8_conv_cases(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Widths that fill no tile and more than one, and clips of several frames and videos."""
    for width, wide, frames, sides in (
        (32, 48, 1, (3, 5)),
        (144, 272, 1, (3, 30)),
        (64, 16, 2, (1, 1)),
    ):
        clip = random(2, width, frames, *sides, dtype=dtype)
        made, _, scale = fp8_cached_norm_silu(clip, random(width, dtype=dtype, seed=1))
        rows = fold_taps(random(wide, width, 3, 3, 3, dtype=torch.float32, seed=2))
        rows *= rows.shape[1] ** -0.5
        for bias in (None, random(wide, dtype=dtype, seed=3)):
            yield made, scale, *fp8_quantise(rows), bias, dtype


# References


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_norm_is_the_models(dtype: torch.dtype) -> None:
    """The result is diffusers' norm and SiLU behind the cache, and another cache shows."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    bound = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    for x, gamma, bias, residual, cache, keep in norm_cases(dtype):
        norm = WanRMS_norm(x.shape[1], images=False).to(dtype).requires_grad_(False)
        norm.gamma.copy_(gamma)
        total = x if bias is None else x + bias.view(-1, 1, 1, 1)
        total = total if residual is None else total + residual
        before = torch.zeros_like(x[:, :, :1]).repeat(1, 1, 2, 1, 1) if cache is None else cache
        wanted = torch.cat([before, F.silu(norm(total))], dim=2)
        frames, kept, *sums = cached_norm_silu(x, gamma, bias, residual, cache, keep)
        assert far(frames, wanted) <= bound
        assert torch.equal(kept, frames[:, :, -2:]) and torch.equal(frames[:, :, :2], before)
        assert len(sums) == keep and all(far(s, total) <= bound for s in sums)
        if float(x.abs().max()):
            assert far(frames.roll(1, 1), wanted) > 0.1


@cpu
def test_folded_weights_are_the_convolution_of_an_enlargement() -> None:
    weight, x = (random(*s, dtype=torch.float64) for s in ((6, 4, 3, 3), (3, 4, 5, 7)))
    bias, nothing = random(6, dtype=torch.float64), torch.zeros(3, 6, 1, 5, 7).double()
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), weight, bias, 1, 1)
    phases = F.conv2d(x, fold(weight), padding=1)
    ours = upsample_residual(phases, bias, nothing, 1)[:, :, 0]
    assert far(ours, wanted) < 1e-13
    turned = F.conv2d(x, fold(weight.flip(-1)), padding=1)
    assert far(upsample_residual(turned, bias, nothing, 1)[:, :, 0], wanted) > 0.1
    assert far(unfold(fold(weight)), weight) < 1e-15


@cpu
def test_shortcut_is_the_models() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D

    for phases, bias, shortcut, stride in upsample_cases(torch.float32):
        batch, channels = shortcut.shape[0], bias.numel()
        left = shortcut.shape[2] * stride - phases.shape[0] // batch
        wanted = DupUp3D(shortcut.shape[1], channels, stride, 2)(shortcut, first_chunk=left > 0)
        ours = upsample_residual(phases * 0, bias * 0, shortcut, stride)
        assert torch.equal(ours, wanted) and ours.is_contiguous(memory_format=LAST)
        assert not torch.equal(ours.flip(3), wanted)


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fp8_frames_are_the_norms_rounded(dtype: torch.dtype) -> None:
    """They are within E4M3's step of the norm, behind the cache's very codes, with zeros around."""
    for x, gamma, bias, residual, cache, keep in fp8_norm_cases(dtype):
        frames, kept, scale, *sums = fp8_cached_norm_silu(x, gamma, bias, residual, cache, keep)
        plain, _, *totals = cached_norm_silu(x, gamma, bias, residual, None, keep)
        inner, wanted = frames[:, :, :, 1:-1, 1:-1].float(), plain.float() / scale
        new = (inner[:, :, 2:] - wanted[:, :, 2:]).abs()
        step = wanted[:, :, 2:].abs().clamp_min(2.0**-6) / 16
        assert bool((new <= step * 1.01).all()) and bool((new > 0).any()) == bool(x.any())
        before = torch.zeros(()) if cache is None else cache.float()
        assert bool((inner[:, :, :2] == before).all()) and torch.equal(
            kept.float(), inner[:, :, -2:]
        )
        assert float(frames.float().abs().sum()) == float(inner.abs().sum())
        assert all(torch.equal(*pair) for pair in zip(sums, totals, strict=True))
        assert frames.dtype is kept.dtype is torch.float8_e4m3fn


@cpu
def test_fp8_frames_fill_their_range_and_no_more() -> None:
    """What one channel has alone is the most that a norm gives; NaN stays; zeros divide nothing."""
    x, gamma = torch.zeros(1, 64, 1, 2, 2), torch.full((64,), 5.0)
    x[0, 3, 0, 0, 0] = 7.0
    x[0, 0, 0, 1, 1] = float("nan")
    frames, _, scale = fp8_cached_norm_silu(x, gamma)
    assert float(frames[0, 3, 2, 1, 1]) == 448 and float(scale) == pytest.approx(5 * 8 / 448)
    assert bool(frames[0, :, 2, 2, 2].float().isnan().all())
    assert int(frames.float().isnan().sum()) == 64
    nothing, _, one = fp8_cached_norm_silu(x[:, :, :, :1], gamma * 0)
    assert not nothing.float().any() and float(one) == 1


@cpu
def test_fp8_convolution_is_the_convolution_of_what_it_decodes_to() -> None:
    for frames, scale, weight, scales, bias, dtype in fp8_conv_cases(torch.float32):
        taps, clip = unfold_taps(weight.double() * scales), frames.double() * scale
        wanted = F.conv3d(clip, taps, None if bias is None else bias.double())
        ours = fp8_conv3d(frames, scale, weight, scales, bias, dtype)
        assert far(ours, wanted) < 1e-5 and ours.is_contiguous(memory_format=LAST)
        if wanted.shape[-1] > 1:
            assert far(ours, wanted.flip(-1)) > 0.1
    weight = random(3, 2, 3, 3, 3, dtype=torch.float32)
    assert torch.equal(unfold_taps(fold_taps(weight)), weight)


@cpu
def test_opcheck() -> None:
    for arguments in list(norm_cases(torch.float32))[1:3]:
        opcheck(cached_norm_silu, arguments)
    opcheck(upsample_residual, next(upsample_cases(torch.float32)))
    checks = ("test_autograd_registration", "test_faketensor")  # torch multiplies no FP8 elements
    for arguments in list(fp8_norm_cases(torch.float32))[1:3]:
        opcheck(fp8_cached_norm_silu, arguments, test_utils=checks)
    for arguments in list(fp8_conv_cases(torch.float32))[:2]:
        opcheck(fp8_conv3d, arguments, test_utils=checks)


# Kernels


def results(
    op: str, device: str, cases: Iterator[tuple[Any, ...]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The results of a kernel and of its reference, which computes on the CPU."""
    run = find_implementation(op, "triton").load()
    reference = find_implementation(op, "reference").load()
    for arguments in cases:
        placed = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        ours, wanted = run(*placed), reference(*arguments)
        pairs = [(ours, wanted)] if isinstance(ours, Tensor) else zip(ours, wanted, strict=True)
        for one, other in pairs:
            assert one.shape == other.shape and one.dtype == other.dtype
            assert one.stride() == other.stride()
            yield one.cpu(), other


def differences(device: str, dtype: torch.dtype) -> Iterator[float]:
    """Of each case of a kernel that rounds nothing to FP8, the largest difference."""
    cases = {"cached_norm_silu": norm_cases, "upsample_residual": upsample_cases}
    for op, cases_of in cases.items():
        for one, other in results(op, device, cases_of(dtype)):
            yield far(one, other)


def other_codes(device: str, dtype: torch.dtype) -> Iterator[float]:
    """The share of FP8 frames' elements that round to another code, at most a step away."""
    for one, other in results("fp8_cached_norm_silu", device, fp8_norm_cases(dtype)):
        if other.dtype is not torch.float8_e4m3fn:
            assert far(one, other) <= (1e-2 if other.dtype is dtype else 1e-6)
            continue
        steps = one.view(torch.uint8).int() - other.view(torch.uint8).int()
        assert int(steps.abs().max()) <= 1
        yield float((steps != 0).float().mean())


def convolution_errors(device: str, dtype: torch.dtype) -> Iterator[float]:
    for one, other in results("fp8_conv3d", device, fp8_conv_cases(dtype)):
        yield float((one.double() - other.double()).norm() / other.double().norm())


def interpret() -> None:
    """Print the worst differences under Triton's interpreter."""
    found = (differences, other_codes, convolution_errors)
    print(json.dumps([max(each("cpu", torch.float32)) for each in found]))  # noqa: T201


@cpu
@needs_triton
def test_kernels_interpreted() -> None:
    """It runs in a process of its own, because a kernel is interpreted or compiled once defined."""
    code = "import test_decode_kernels as t; t.interpret()"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    result = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr
    far, rounded, convolved = json.loads(result.stdout)
    assert far < 4e-6 and rounded < 1e-3 and convolved < 1e-6


@gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_equal_their_references(dtype: torch.dtype) -> None:
    bound = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    found = list(differences("cuda", dtype))
    assert max(found) <= bound
    assert sum(found) / len(found) < bound / 2


@gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_kernels_equal_their_references(dtype: torch.dtype) -> None:
    """Frames may differ at ties, and sums in the bits that tensor cores do not keep."""
    assert max(other_codes("cuda", dtype)) < 1e-2
    assert max(convolution_errors("cuda", dtype)) < 1e-2


@gpu
@needs_triton
@pytest.mark.parametrize("op", ["cached_norm_silu", "fp8_cached_norm_silu"])
def test_a_pixel_that_is_not_finite_is_no_number(op: str) -> None:
    """All its channels become NaN, and those of no other pixel."""
    x, gamma = random(1, 20, 2, 3, 4, dtype=torch.float32), torch.ones(20)
    x[0, 3, 0, 1, 2], x[0, 5, 1, 0, 0] = float("nan"), float("inf")
    for one, other in results(op, "cuda", iter([(x, gamma, None, None, None, True)])):
        assert torch.equal(one.float().isnan(), other.float().isnan())
        assert one.numel() < 2 or 0 < int(other.float().isnan().sum()) <= 80


@gpu
@needs_triton
def test_fp8_convolution_of_a_wide_clip() -> None:
    """It has the 5B model's size, where tiles wait for one another. Ten runs give the same."""
    width, sides = 512, (176, 320)
    clip = torch.randn(1, width, 2, *sides, device="cuda", dtype=torch.bfloat16)
    gamma = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    frames, _, scale = find_implementation("fp8_cached_norm_silu", "triton").load()(clip, gamma)
    rows = torch.randn(width, 27 * width, device="cuda")
    weight, scales = fp8_quantise(rows)
    run = find_implementation("fp8_conv3d", "triton").load()
    ours = [run(frames, scale, weight, scales, None, torch.float32) for _ in range(10)]
    wanted = fp8_conv3d(frames[:, :, :, :40], scale, weight, scales, None, torch.float32)
    assert float((ours[0][:, :, :, :38] - wanted).norm() / wanted.norm()) < 1e-2
    assert all(torch.equal(ours[0], other) for other in ours[1:])


@gpu
@needs_triton
def test_kernels_reach_past_32_bits() -> None:
    """There are more elements than 32 bits count.

    The last ones are compared with a small tensor's.
    """
    run = find_implementation("cached_norm_silu", "triton").load()
    x = torch.empty(1, 1024, 5, 512, 1024, dtype=torch.bfloat16, device="cuda", memory_format=LAST)
    x.normal_()
    gamma = torch.ones(1024, 1, 1, 1, dtype=torch.bfloat16, device="cuda")
    small = run(x[:, :, -1:], gamma, None, None, None, False)[0][:, :, -1]
    large = run(x, gamma, None, None, None, False)[0]
    assert large.numel() > 2**31
    assert torch.equal(large[:, :, -1], small) and not torch.equal(large[:, :, -2], small)


@gpu
@needs_triton
def test_fp8_kernels_reach_past_32_bits() -> None:
    norm, convolve = (
        find_implementation(op, "triton").load() for op in ("fp8_cached_norm_silu", "fp8_conv3d")
    )
    x = torch.empty(1, 1024, 5, 512, 1024, dtype=torch.bfloat16, device="cuda", memory_format=LAST)
    x.normal_()
    gamma = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    frames, _, scale = norm(x, gamma)
    end, _, _ = norm(x[:, :, -1:], gamma)
    codes, wanted = (part.view(torch.uint8) for part in (frames, end))
    assert frames.numel() > 2**31
    assert torch.equal(codes[:, :, -1], wanted[:, :, -1])
    assert not torch.equal(codes[:, :, -2], wanted[:, :, -1])
    weight = fp8_quantise(torch.randn(16, 27 * 1024, device="cuda"))
    made, last = (
        convolve(part, scale, *weight, None, torch.bfloat16) for part in (frames, frames[:, :, -3:])
    )
    assert torch.equal(made[:, :, -1], last[:, :, 0])
    assert not torch.equal(made[:, :, -2], last[:, :, 0])


@cpu
@needs_triton
@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_kernels_compile(architecture: int) -> None:
    """For a GPU that need not be there; values are read and written sixteen bytes at a time.

    A convolution's are multiplied while the next are loaded, each to a buffer of its own.
    """
    kernels = compiled(architecture)
    convolutions = kernels.pop("_fp8_conv3d", [])
    assert kernels.keys() == {"_cached_norm_silu", "_upsample_residual", "_fp8_cached_norm_silu"}
    for made in kernels.values():
        for code in (kernel.asm["ptx"] for kernel in made):
            assert "st.global.v4" in code and not re.search(r"ld\.global\.b16", code)
    assert len(convolutions) == (architecture >= 90)
    for kernel in convolutions:
        code = kernel.asm["ptx"]
        assert "cp.async.bulk.tensor.2d" in code and "st.global.v4" in code
        assert ("wgmma.wait_group.sync.aligned 1" in code) == (architecture == 90)
        assert kernel.metadata.shared >= 4 * (128 + 256) * 128


def compiled(architecture: int) -> dict[str, list[Any]]:
    """The kernels compiled, as the 5B model's decoder calls them."""
    norm, fp8_norm, upsample, convolve = (
        find_implementation(op, "triton").load()
        for op in ("cached_norm_silu", "fp8_cached_norm_silu", "upsample_residual", "fp8_conv3d")
    )
    kind = torch.bfloat16
    x, gamma = random(1, 256, 2, 4, 16, dtype=kind), random(256, 1, 1, 1, dtype=kind)
    with compiling_for(architecture) as found:
        norm(x, gamma, gamma.flatten(), x, x, True)
        cache = x.to(torch.float8_e4m3fn)
        frames, _, scale, _ = fp8_norm(x, gamma, gamma.flatten(), x, cache, True)
        if architecture >= 90:
            weight = torch.zeros(512, 27 * 256).to(torch.float8_e4m3fn)
            convolve(frames, scale, weight, torch.ones(512, 1), None, kind)
        for width in (256, 512):
            shortcut = random(1, width, 2, 4, 16, dtype=kind)
            upsample(random(2, 1024, 5, 17, dtype=kind), gamma.flatten(), shortcut, 1)
    return found
