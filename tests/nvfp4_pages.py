"""Pages in NVFP4 for tests, and the kernels against the reference; a script for the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from lltk.ops.fp8_decode_page.op import fp8_decode_page
from lltk.ops.fp8_write_own.op import fp8_write_own
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_gather_fp8.reference import nvfp4_gather_fp8
from lltk.ops.nvfp4_paged_attention.fp8 import centre
from lltk.ops.nvfp4_paged_attention.op import nvfp4_paged_attention, nvfp4_paged_attention_backward
from lltk.ops.nvfp4_paged_attention.reference import Pages, decode, empty_pages
from lltk.ops.nvfp4_quantise.reference import nvfp4_quantise
from lltk.ops.nvfp4_write_page.op import nvfp4_write_page

PAGES, HEADS, WIDTH = 4, 3, 32
KERNEL_BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference allowed."""
KERNEL_CASES = [
    (20, 16, True, False, [2, 0]),
    (40, 16, False, True, [1]),
    (8, 32, True, True, [3, 1, 0]),
    (4, 32, False, False, []),
]
"""Tokens, head dim, smoothing of keys and of values, table."""


def _random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def written(values: Tensor, smooth: bool, rule: str = "mse") -> Pages:
    """An arena that holds `values`, [B, P, T, H, D], written page by page."""
    pages = empty_pages(values.shape, smooth)
    for slot in range(values.shape[1]):
        nvfp4_write_page(*pages, values[:, slot], torch.tensor([slot]), rule)
    return pages


def by_hand(values: Tensor, smooth: bool, rule: str = "mse") -> Tensor:
    """What the pages should decode to, float32: every head of every page is quantised by itself."""
    result = torch.empty(values.shape)
    batch, pages, _, heads, width = values.shape
    for place in product(range(batch), range(pages), range(heads)):
        item, page, head = place
        x = values[item, page, :, head].float()
        mean = torch.zeros(width)
        if smooth:
            mean = (x.double().sum(0) / len(x)).bfloat16().float()
        result[item, page, :, head] = nvfp4_dequantise(*nvfp4_quantise(x - mean, rule=rule)) + mean
    return result


def operands(
    dtype: torch.dtype, tokens: int = 4, width: int = WIDTH, pages: int = PAGES
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, gradient; the values of the keys' and the values' arena, biased by channel."""
    own = [2 * _random((2, tokens, HEADS, width), dtype, seed) for seed in range(4)]
    shape = (2, pages, tokens, HEADS, width)
    bias = _random((1, 1, 1, HEADS, width), dtype, 9)
    return own, [_random(shape, dtype, seed) + bias for seed in (4, 5)]


def compare_kernels(device: str, dtype: torch.dtype) -> None:
    """Compare both kernels with the reference, and see that changed operands show."""
    from lltk.ops.nvfp4_paged_attention import decode_triton, triton

    for tokens, width, smooth_keys, smooth_values, listed in KERNEL_CASES:
        own, arenas = operands(dtype, tokens, width)
        pages = [*written(arenas[0], smooth_keys), *written(arenas[1], smooth_values)]
        table = torch.tensor(listed, dtype=torch.int64)
        wanted = nvfp4_paged_attention(*own[:3], *pages, table)
        given = [None if t is None else t.to(device) for t in (*own[:3], *pages)]
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in given[:3])
        bound = KERNEL_BOUND[dtype]
        for run in (triton.nvfp4_paged_attention, decode_triton.nvfp4_paged_attention):
            ours = run(q, k, v, *given[3:], table.to(device)).cpu()
            assert float((ours - wanted).abs().max()) <= bound, (tokens, run)
        other = run(q, k, v, *given[3:], torch.tensor([3], device=device)).cpu()
        assert float((other - wanted).abs().max()) > 10 * bound
        decoded = decode_triton.gather(k, *given[3:7], table.to(device)).cpu()
        trained = [t.detach().requires_grad_() for t in (q, k, v)]
        result = decode_triton.nvfp4_paged_attention(*trained, *given[3:], table.to(device))
        found = torch.autograd.grad(result, trained, own[3].to(device))
        exact = nvfp4_paged_attention_backward(own[3], *own[:3], *pages, table)
        other = nvfp4_paged_attention_backward(own[3], own[0] * 1.25, *own[1:3], *pages, table)
        for index, (grad, theirs) in enumerate(zip(found, exact, strict=True)):
            allowed = bound * float(theirs.abs().max())
            assert float((grad.cpu() - theirs).abs().max()) <= allowed
            assert float((grad.cpu() - other[index]).abs().max()) > 2 * allowed
        rounded = decode(Pages(*pages[:4]), table).to(dtype)
        assert torch.equal(decoded, torch.cat([rounded, own[1]], dim=1))


def compare_fp8(device: str, dtype: torch.dtype) -> None:
    """Decoding to E4M3, but for one step where the last bit of a sum decides, and the largest.

    Triton's interpreter halves what rounds up to a power of two, so there those are not compared.
    """
    from lltk.ops.nvfp4_gather_fp8 import triton

    for tokens, width, _, smooth, listed in KERNEL_CASES:
        own, arenas = operands(dtype, tokens, width)
        pages = written(arenas[1], smooth)
        table = torch.tensor(listed, dtype=torch.int64)
        middle = centre(own[2], pages.means, table)
        wanted, largest = nvfp4_gather_fp8(own[2], middle, *pages, table)
        given = [None if t is None else t.to(device) for t in pages]
        rest = (*given, table.to(device))
        merged = torch.cat([own[2] + 1, own[2]], 2).to(device)  # as one product's parts lie
        part = merged[:, :, own[2].shape[2] :]
        ours, most = triton.nvfp4_gather_fp8(part, middle.to(device), *rest)
        assert abs(float(most.cpu() / largest) - 1) < 1e-5
        compared = wanted.float().frexp().mantissa.abs() != 0.5 if device == "cpu" else ...
        off = (ours.cpu().float() - wanted.float()).abs()[compared]
        assert bool((off <= wanted.float().abs()[compared] / 8 + 2**-9).all())
        assert float((off > 0).float().mean()) < 0.02
        other, _ = triton.nvfp4_gather_fp8(own[2].to(device), (middle + 0.5).to(device), *rest)
        assert float((other.cpu().float() != wanted.float()).float().mean()) > 0.5


def kept(pages: Pages, op: Callable[..., None] = fp8_decode_page) -> tuple[Tensor, Tensor]:
    """An arena's pages, all kept decoded, with their largest magnitudes."""
    batch, count, tokens, heads, half = pages.codes.shape
    decoded = torch.zeros(
        batch, count, tokens, heads, 2 * half, dtype=torch.float8_e4m3fn, device=pages.codes.device
    )
    largest = torch.zeros(batch, count, device=decoded.device)
    for slot in range(count):
        op(decoded, largest, *pages, torch.tensor([slot], device=decoded.device))
    return decoded, largest


def compare_kept(device: str, dtype: torch.dtype) -> None:
    """Own keys and values in the free page, and the scale, to the bit; and pages kept decoded."""
    from lltk.ops.fp8_decode_page import triton as decoding
    from lltk.ops.fp8_write_own import triton

    for tokens, width, listed, size in (
        (20, 16, [2, 0, 3], 0.5),  # the largest is a page's
        (40, 64, [0, 1, 2], 3.0),  # … is the chunk's own
        (3, 32, [3, 2, 1], 0.5),
    ):
        own, arenas = operands(dtype, tokens, width)
        mean = arenas[1][:, 0].mean(1, keepdim=True)
        own[2] = mean + size * (arenas[1][:, 0] - mean)
        k_pages, v_pages = (written(arena, True) for arena in arenas)
        keys, (values, largest) = kept(k_pages)[0], kept(v_pages)
        merged = torch.cat([own[1], own[2] + 1, own[2]], 2)  # as one product's parts lie
        v = merged[:, :, 2 * own[2].shape[2] :]
        given = [keys, values, largest, own[1], v, k_pages.means, v_pages.means]
        placed = [t.to(device, copy=True) for t in given if t is not None]
        placed[4] = merged.to(device)[:, :, 2 * own[2].shape[2] :]
        table = torch.tensor(listed)
        scale = fp8_write_own(*given, table)
        ours = triton.fp8_write_own(*placed, table.to(device))
        assert torch.equal(ours.cpu(), scale)
        (free,) = set(range(PAGES)) - set(listed)
        for found, wanted in zip(placed[:2], given[:2], strict=True):
            assert wanted is not None
            assert torch.equal(found.cpu().view(torch.uint8), wanted.view(torch.uint8))
            others = found.cpu().float()[:, listed[0]]
            assert not torch.equal(others, wanted.float()[:, free])
        arena = Pages(*(None if part is None else part.to(device) for part in v_pages))
        found, most = kept(arena, decoding.fp8_decode_page)
        others, wanted = kept(v_pages)
        compared = others.float().frexp().mantissa.abs() != 0.5 if device == "cpu" else ...
        off = (found.cpu().float() - others.float()).abs()[compared]
        assert float((off > 0).float().mean()) < 0.02
        assert float((most.cpu() / wanted - 1).abs().max()) < 1e-5


def compare_writing(device: str) -> None:
    """Pages that the kernels write, to the byte."""
    from lltk.ops.nvfp4_write_page import triton

    for rule, smooth, width, bad in (
        ("none", True, 32, 0.0),
        ("mse", True, 48, 0.0),
        ("mse", False, 16, torch.nan),
        ("abs_max", True, 16, torch.inf),
    ):
        _, (values, _) = operands(torch.bfloat16, tokens=20, width=width, pages=2)
        if bad:
            values[1, 1, 3, 0, 7] = bad
        wanted = written(values, smooth, rule)
        ours = empty_pages(values.shape, smooth, device)
        merged = torch.cat([values + 1, values], 3).to(device)  # as one product's parts lie
        for slot in (1, 0):
            where = torch.tensor([slot], device=device)
            part = merged[:, slot, :, values.shape[3] :]
            triton.nvfp4_write_page(*ours, part, where, rule)
        for found, page in zip(ours, wanted, strict=True):
            if found is not None and page is not None:
                assert torch.equal(found.cpu().view(torch.uint8), page.view(torch.uint8)), rule


if __name__ == "__main__":
    compare_kernels("cpu", torch.float32)
    compare_fp8("cpu", torch.float32)
    compare_writing("cpu")
    compare_kept("cpu", torch.float32)
