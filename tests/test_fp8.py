"""FP8 rows: the codec, and the product of every implementation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from lltk.ops import hardware
from lltk.ops.fp8_matmul import scaled_mm
from lltk.ops.fp8_matmul.op import fp8_matmul as matmul_op
from lltk.ops.fp8_matmul.reference import fp8_matmul
from lltk.ops.fp8_rows import fp8_quantise, new_fp8
from lltk.ops.implementations import check_device, find_implementation, overload
from lltk.ops.row_pipeline.op import row_pipeline
from lltk.ops.row_pipeline.reference import row_pipeline as row_formula

cpu = pytest.mark.cpu
gpu = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPONENT, MANTISSA = np.divmod(np.arange(127), 8)
E4M3 = np.where(EXPONENT, 8 + MANTISSA, MANTISSA) * 2.0 ** (np.maximum(EXPONENT, 1) - 10)
"""The values that are not negative, by code."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of sizes from 1/16 to 16."""
    generator = torch.Generator().manual_seed(seed)
    size = 16 ** (2 * torch.rand(*shape[:-1], 1, generator=generator) - 1)
    return (torch.randn(*shape, generator=generator) * size).to(dtype)


def decoded(x: Tensor) -> Tensor:
    values, scales = fp8_quantise(x)
    return values.double() * scales.double()


def relative(ours: Tensor, wanted: Tensor) -> float:
    """The standard error of the worst row, relative to the values that are wanted."""
    error = (ours.double() - wanted.double()).norm(dim=-1)
    return float((error / wanted.double().norm(dim=-1)).max())


# Quantising


def stated(x: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Values and scales by the definition: the nearer neighbour, or the even code at a tie."""
    wide = x.float().numpy()
    scales = np.abs(wide).max(-1, keepdims=True) / np.float32(448)
    scales[scales == 0] = 1
    ratio = (wide / scales).astype(np.float64)
    size = np.abs(ratio)
    above = np.searchsorted(E4M3, size).clip(1, 126)
    low, high = size - E4M3[above - 1], E4M3[above] - size
    code = above - ((low < high) | ((low == high) & (above % 2 == 1)))
    return np.copysign(E4M3[code], ratio), scales


@cpu
@given(
    st.integers(1, 6),
    st.integers(1, 70),
    st.integers(-30, 30),
    st.sampled_from(DTYPES),
    st.integers(0, 100),
)
def test_rows_are_rounded_to_nearest(
    rows: int, width: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    top = min(1e38, torch.finfo(dtype).max)
    x = (normal(rows, width, seed=seed).double() * 10.0**exponent).clamp(-top, top).to(dtype)
    values, scales = fp8_quantise(x)
    wanted = stated(x)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == (rows, 1)
    assert np.array_equal(values.double().numpy(), wanted[0])
    assert np.array_equal(scales.numpy(), wanted[1])
    largest = values.float().abs().amax(-1, keepdim=True)
    assert torch.equal(largest, 448.0 * x.any(-1, keepdim=True))
    error, wide = (decoded(x) - x.double()).abs(), x.double().abs()
    subnormal = wide < 2.0**-6 * scales
    assert bool((error <= torch.where(subnormal, 2.0**-10 * scales, 2.0**-4 * wide)).all())


@cpu
def test_a_coarser_rounding_is_seen() -> None:
    x = normal(64, 64)
    values, scales = fp8_quantise(x)
    assert not np.array_equal((x / scales).to(torch.float8_e5m2).double().numpy(), stated(x)[0])
    assert np.array_equal(values.double().numpy(), stated(x)[0])
    worst = ((decoded(x) - x).abs() / x.abs())[x.abs() >= 2.0**-6 * scales].max()
    assert 2.0**-4.2 < float(worst) <= 2.0**-4


@cpu
def test_ties_go_to_even() -> None:
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, -19.0, 2.0**-10, 3 * 2.0**-10, -0.0]])
    assert fp8_quantise(x)[0].tolist() == [[448, 16, 20, -16, -20, 0, 2.0**-8, 0]]


@cpu
def test_signs_and_leading_axes() -> None:
    x = normal(2, 3, 5, 40)
    values, scales = fp8_quantise(x)
    assert scales.shape == (2, 3, 5, 1)
    at = x.abs().argmax(-1, keepdim=True)
    assert torch.equal(values.float().gather(-1, at), 448 * x.gather(-1, at).sign())
    alone = fp8_quantise(x[1, 2])
    assert torch.equal(values[1, 2].float(), alone[0].float())
    assert torch.equal(scales[1, 2], alone[1])


@cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros(dtype: torch.dtype) -> None:
    x = normal(3, 16, dtype=dtype)
    x[1] = 0
    values, scales = fp8_quantise(x)
    assert scales[1].item() == 1 and not values[1].float().any()
    assert bool((scales[[0, 2]] != 1).all())


@cpu
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spoils_its_row_only(bad: float, dtype: torch.dtype) -> None:
    x = normal(4, 16, dtype=dtype)
    whole = decoded(x)
    x[2, 5] = bad
    found = decoded(x)
    assert bool(found[2].isnan().all())
    assert torch.equal(found[[0, 1, 3]], whole[[0, 1, 3]])
    y = fp8_matmul(*fp8_quantise(x), *fp8_quantise(normal(8, 16)), None, torch.float32)
    assert y.isnan().all(-1).tolist() == [False, False, True, False] == y.isnan().any(-1).tolist()


# Multiplying

SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((5,), 48, 64),
    ((2, 7), 17, 40),
    ((2, 7), 20, 48),
    ((1, 9), 32, 41),
    ((3, 2, 4), 16, 16),
    ((1,), 2, 1),
]
"""Leading axes of x, N and K."""
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def operands(leading: Sequence[int], n: int, k: int, biased: bool, device: str = "cpu") -> Operands:
    a, b = fp8_quantise(normal(*leading, k)), fp8_quantise(normal(n, k, seed=1))
    bias = normal(1, n, seed=2)[0].to(device) if biased else None
    return (*(t.to(device) for t in (*a, *b)), bias)  # type: ignore[return-value]


def product(given: Operands) -> Tensor:
    """The product of the decoded operands, in float64."""
    a, a_scales, b, b_scales, bias = (None if t is None else t.cpu().double() for t in given)
    assert a is not None and a_scales is not None and b is not None and b_scales is not None
    y = (a * a_scales) @ (b * b_scales).t()
    return y if bias is None else y + bias


def other(given: Operands) -> Operands:
    """The operands with the scales of b's rows exchanged."""
    return (*given[:3], given[3].flip(0), given[4])


@cpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("leading", "n", "k"), SHAPES)
def test_the_product_is_of_the_decoded_operands(
    leading: tuple[int, ...], n: int, k: int, biased: bool
) -> None:
    args = operands(leading, n, k, biased)
    y = fp8_matmul(*args, torch.float32)
    assert y.dtype == torch.float32 and y.shape == (*leading, n)
    assert relative(y, product(args)) < 1e-6
    assert relative(y, product(other(args))) > 0.01
    if biased:
        assert relative(y, product((*args[:4], None))) > 0.01
    assert torch.equal(matmul_op(*args, torch.float32), y)
    assert torch.equal(fp8_matmul(*args, torch.bfloat16), y.bfloat16())


@cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("leading", "n", "k"), SHAPES)
def test_scaled_mm(
    leading: tuple[int, ...], n: int, k: int, biased: bool, dtype: torch.dtype
) -> None:
    """It differs from the reference by three roundings to bfloat16: of product, bias and sum."""
    args = operands(leading, n, k, biased)
    y = scaled_mm.fp8_matmul(*args, dtype)
    assert y.dtype == dtype and y.shape == (*leading, n)
    wanted, plain = (fp8_matmul(*args[:4], bias, torch.float32) for bias in (args[4], None))
    rounded = wanted.abs()
    if biased:
        rounded = rounded + plain.abs() + (wanted - plain).abs()
    limit = 2.0**-8 * rounded + 1e-6 * rounded.max()
    assert bool(((y.float() - wanted).abs() <= limit).all())
    far = fp8_matmul(*other(args), torch.float32)
    assert bool(((y.float() - far).abs() > 2 * limit).any())


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


@cpu
@pytest.mark.parametrize(("m", "n", "k"), [(7040, 3072, 14336), (5, 17, 40), (1, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_shapes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """The meta device checks every argument of torch's product."""
    a, b = (row_pipeline(empty(*shape), to="fp8") for shape in ((2, m, k), (n, k)))
    assert a[0].dtype == torch.float8_e4m3fn and a[0].shape == (2, m, k)
    assert a[1].dtype == torch.float32 and a[1].shape == (2, m, 1)
    for bias in (None, torch.empty(n, device="meta")):
        for run in (matmul_op, scaled_mm.fp8_matmul):
            y = run(*a, *b, bias, dtype)
            assert y.shape == (2, m, n) and y.dtype == dtype and y.is_meta


@cpu
def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (row_pipeline(empty(*shape), to="fp8") for shape in ((2, 5, 40), (17, 40)))
    for wrong in (
        (a[0][..., :32], a[1], *b),
        (a[0], a[1][:, :4], *b),
        (*a, b[0], b[1][:16]),
        (*a, b[0], b[1].t()),
    ):
        with pytest.raises(RuntimeError):
            matmul_op(*wrong, None, torch.bfloat16)
    monkeypatch.setattr(scaled_mm, "_MULTIPLE", 1)
    with pytest.raises((ValueError, RuntimeError)):
        scaled_mm.fp8_matmul(*a, *b, None, torch.bfloat16)


@cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_quantising(dtype: torch.dtype) -> None:
    x = normal(2, 3, 40, dtype=dtype)
    torch.library.opcheck(row_pipeline, (x,), {"to": "fp8"})
    for made, empty in zip(fp8_quantise(x), new_fp8(x), strict=True):
        assert made.shape == empty.shape and made.dtype == empty.dtype


@cpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_multiplying(biased: bool, dtype: torch.dtype) -> None:
    # Its schema test multiplies inputs, which float8 cannot do.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (*operands((2, 3), 24, 40, biased), dtype)
    torch.library.opcheck(matmul_op, args, test_utils=checks)


@cpu
def test_a_compiler_keeps_the_bits() -> None:
    def linear(x: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor) -> Tensor:
        return scaled_mm.fp8_matmul(*fp8_quantise(x), b, b_scales, bias, x.dtype)

    torch._dynamo.reset()
    x, rest = normal(2, 5, 40, dtype=torch.bfloat16), operands((1,), 24, 40, True)[2:]
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *rest), linear(x, *rest))
    assert not torch.equal(compiled(x * 1.5, *rest), linear(x, *rest))


# Choosing an implementation


@cpu
def test_absent_hardware_is_an_error_that_lists_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fp8 = {"row_pipeline": "torch", "fp8_matmul": "scaled_mm"}
    check_device({"row_pipeline": "torch", "fp8_matmul": "reference"}, torch.device("cpu"))
    message = "fp8_matmul: scaled_mm runs on cuda, not on cpu; cpu has reference: set fp8_matmul of"
    with pytest.raises(ValueError, match=message):
        check_device(fp8, torch.device("cpu"))

    def has(*capability: int) -> torch.device:
        monkeypatch.setattr(hardware, "find_spec", lambda module: module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda")

    for able in ((8, 9), (9, 0), (10, 0), (12, 0)):
        check_device(fp8, has(*able))
    for unable in ((8, 0), (8, 6), (15, 0)):
        name = "sm_{}{}".format(*unable)
        with pytest.raises(ValueError, match=rf"sm_89, .*not on {name}; cuda has reference: set"):
            check_device(fp8, has(*unable))


@cpu
def test_implementations_are_found_by_name() -> None:
    assert find_implementation("row_pipeline", "reference").load() is overload("row_pipeline")
    assert find_implementation("row_pipeline", "torch").load() is row_formula
    assert find_implementation("fp8_matmul", "reference").load() is overload("fp8_matmul")
    assert find_implementation("fp8_matmul", "scaled_mm").load() is scaled_mm.fp8_matmul
    with pytest.raises(
        ValueError, match=r"scaled_mm, tensorrt_arithmetic\); did you mean 'scaled_mm'"
    ):
        find_implementation("fp8_matmul", "scaled_m")


@gpu
@pytest.mark.parametrize("biased", [False, True])
def test_scaled_mm_on_cuda(biased: bool) -> None:
    """Tensor cores sum in fewer bits than float32 has."""
    args = operands((256,), 512, 768, biased, "cuda")
    wanted = fp8_matmul(*args, torch.float32).double()
    y = scaled_mm.fp8_matmul(*args, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and y.is_cuda
    assert float((y.double() - wanted).std() / wanted.std()) < 5e-3
    far = fp8_matmul(*other(args), torch.float32).double()
    assert float((y.double() - far).std() / far.std()) > 1e-2
