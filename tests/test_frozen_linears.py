"""Linears over quantised weights that do not train, and gradients through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lltk.ops.fp8_frozen_linear.op import fp8_frozen_linear
from lltk.ops.fp8_matmul.reference import fp8_matmul
from lltk.ops.implementations import implementations
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_frozen_linear.op import nvfp4_frozen_linear
from lltk.ops.nvfp4_matmul.reference import nvfp4_matmul
from lltk.ops.nvfp4_quantise.reference import BLOCK, nvfp4_quantise
from lltk.ops.row_pipeline.reference import row_pipeline

pytestmark = pytest.mark.cpu

Given = tuple[Callable[..., Tensor], list[Any], Tensor, Tensor]
"""An op and its arguments behind x; what it gives, and the weight that it stands for."""


def given(form: str, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Given:
    if form == "nvfp4":
        parts = [*nvfp4_quantise(x.detach()), *nvfp4_quantise(weight, BLOCK, "none")]
        decoded = nvfp4_dequantise(*parts[3:], torch.float64)[:, : weight.shape[1]]
        return nvfp4_frozen_linear, [*parts, dtype], nvfp4_matmul(*parts, dtype), decoded
    values, scales = row_pipeline(weight[:, None], to="fp8")
    codes = [*row_pipeline(x.detach(), to="fp8"), values[:, 0], scales[:, 0]]
    bias = torch.arange(weight.shape[0], dtype=dtype)
    rest = [*codes, bias, dtype]
    decoded = codes[2].double() * codes[3].double()
    return fp8_frozen_linear, rest, fp8_matmul(*rest), decoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 24])
@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
def test_gradients_are_those_of_the_decoded_weight(
    form: str, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(48, width, generator=generator).to(dtype)
    op, rest, wanted, decoded = given(form, x, weight, dtype)
    y = op(x, *rest)
    assert torch.equal(y, wanted) and y.dtype == dtype
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(grad)
    assert x.grad is not None and x.grad.dtype == dtype
    exact = grad.double() @ decoded
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (x.grad - exact).abs().max() < bound * exact.abs().max()
    assert (x.grad - grad.double() @ weight.double()).abs().max() > 1e-3 * exact.abs().max()
    checks = ("test_autograd_registration", "test_faketensor")  # the others know no 8-bit floats
    opcheck(op, (x, *rest), test_utils=checks)


@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
def test_every_way_to_multiply_can_be_chosen(form: str) -> None:
    """A frozen linear has the implementations of the product."""
    frozen, product = (implementations(f"{form}_{op}") for op in ("frozen_linear", "matmul"))
    simulated = {name for name, each in product.items() if each.declared.simulates}
    assert frozen.keys() == product.keys() - simulated and simulated
    for name in frozen.keys() - {"reference"}:
        assert frozen[name].declared.parts[f"{form}_matmul"] == name
