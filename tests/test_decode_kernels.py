"""The decoder's fused ops: references against the formulas, kernels against references."""

from __future__ import annotations

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
from torch import Tensor
from torch.library import opcheck

from lltk.ops.cached_norm_silu.op import cached_norm_silu
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
    """The largest difference, in units of 1 + the value wanted."""
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


# References


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_norm_is_the_models(dtype: torch.dtype) -> None:
    """diffusers' norm, then SiLU, behind the cache; and not behind another."""
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
def test_opcheck() -> None:
    for arguments in list(norm_cases(torch.float32))[1:3]:
        opcheck(cached_norm_silu, arguments)
    opcheck(upsample_residual, next(upsample_cases(torch.float32)))


# Kernels


def differences(device: str, dtype: torch.dtype) -> Iterator[float]:
    """Of the kernels from the references, which compute on the CPU in float32."""
    cases = {"cached_norm_silu": norm_cases, "upsample_residual": upsample_cases}
    for op, cases_of in cases.items():
        run = find_implementation(op, "triton").load()
        reference = find_implementation(op, "reference").load()
        for arguments in cases_of(dtype):
            placed = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
            ours, wanted = run(*placed), reference(*arguments)
            pairs = [(ours, wanted)] if isinstance(ours, Tensor) else zip(ours, wanted, strict=True)
            for one, other in pairs:
                assert one.shape == other.shape and one.dtype == other.dtype
                assert one.stride() == other.stride()
                yield far(one, other)


def interpret() -> None:
    """Print the worst difference under Triton's interpreter."""
    print(max(differences("cpu", torch.float32)))  # noqa: T201


@cpu
@needs_triton
def test_kernels_interpreted() -> None:
    """In a process of its own: a kernel is interpreted or compiled from its definition on."""
    code = "import test_decode_kernels as t; t.interpret()"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    result = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 4e-6


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
def test_kernels_reach_past_32_bits() -> None:
    """More elements than 32 bits count, their last against a small tensor's."""
    run = find_implementation("cached_norm_silu", "triton").load()
    x = torch.empty(1, 1024, 5, 512, 1024, dtype=torch.bfloat16, device="cuda", memory_format=LAST)
    x.normal_()
    gamma = torch.ones(1024, 1, 1, 1, dtype=torch.bfloat16, device="cuda")
    small = run(x[:, :, -1:], gamma, None, None, None, False)[0][:, :, -1]
    large = run(x, gamma, None, None, None, False)[0]
    assert large.numel() > 2**31
    assert torch.equal(large[:, :, -1], small) and not torch.equal(large[:, :, -2], small)


@cpu
@needs_triton
@pytest.mark.parametrize("architecture", [89, 90, 100])
def test_kernels_compile(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that need not be there; values are read and written sixteen bytes at a time."""
    ptx = compiled(architecture, monkeypatch)
    assert ptx.keys() == {"_cached_norm_silu", "_upsample_residual"}
    for code in ptx.values():
        assert "st.global.v4" in code and not re.search(r"ld\.global\.b16", code)


def compiled(architecture: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The kernels' code, as the 5B model's decoder calls them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run, found = JITFunction.run, {}

    class Absent:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return architecture

        def get_current_stream(self, device: int) -> int:
            return 0

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> Any:
        result = run(kernel, *arguments, **{**options, "warmup": True})
        found[kernel.fn.__name__] = found.get(kernel.fn.__name__, "") + result.asm["ptx"]
        return result

    norm = find_implementation("cached_norm_silu", "triton").load()
    upsample = find_implementation("upsample_residual", "triton").load()
    kind = torch.bfloat16
    x, gamma = random(1, 256, 2, 4, 16, dtype=kind), random(256, 1, 1, 1, dtype=kind)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", Absent())
        patch.setattr(JITFunction, "run", compile_only)
        norm(x, gamma, gamma.flatten(), x, x, True)
        for width in (256, 512):
            shortcut = random(1, width, 2, 4, 16, dtype=kind)
            upsample(random(2, 1024, 5, 17, dtype=kind), gamma.flatten(), shortcut, 1)
    return found
