"""NVFP4 in plain torch: codec, transform, product, and a linear layer's gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.fx import GraphModule

from lltk.ops.floats import E4M3_MAX, decode_e2m1, pack, round_e4m3, round_e4m3_up, unpack
from lltk.ops.hadamard.op import hadamard as hadamard_op
from lltk.ops.hadamard.reference import SIGNS, hadamard, random_signs
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_dequantise.op import nvfp4_dequantise as dequantise_op
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_largest.op import nvfp4_largest as largest_op
from lltk.ops.nvfp4_largest.reference import nvfp4_largest
from lltk.ops.nvfp4_matmul.op import nvfp4_matmul as matmul_op
from lltk.ops.nvfp4_matmul.reference import nvfp4_matmul
from lltk.ops.nvfp4_quantise.op import nvfp4_quantise as quantise_op
from lltk.ops.nvfp4_quantise.reference import RULES, nvfp4_quantise
from lltk.ops.nvfp4_quantise_transposed.op import nvfp4_quantise_transposed as transposed_op
from lltk.ops.nvfp4_quantise_transposed.reference import padded
from lltk.ops.nvfp4_transpose.op import nvfp4_transpose as transpose_op
from lltk.ops.nvfp4_transpose.reference import nvfp4_transpose
from lltk.ops.philox import philox, uniform
from lltk.ops.scale_layout import swizzle, unswizzle

nvfp4_linear = overload("nvfp4_linear")

pytestmark = pytest.mark.cpu

SHARED = list(SIGNS)
SEED = torch.tensor([5, 1])
PART = torch.tensor([5, 1, 1, 2])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoded(x: Tensor, tile: int = 1, rule: str = "none", seed: Tensor | None = None) -> Tensor:
    """The tensor after it was held in NVFP4."""
    return nvfp4_dequantise(*nvfp4_quantise(x, tile, rule, seed))[..., : x.shape[-1]]


def relative(ours: Tensor, wanted: Tensor) -> float:
    wide = wanted.detach().double()
    return float((ours.detach().double() - wide).norm() / wide.norm())


# Element types and random numbers


def test_philox_gives_the_published_words() -> None:
    """The known answers of its authors' library."""

    def words(*values: int) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([value]) for value in values)

    def result(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
        found: list[int] = philox(words(*counter), words(*key))[0].tolist()  # type: ignore[arg-type]
        return found

    top = 0xFFFFFFFF
    assert result((0,) * 4, (0,) * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert result((top,) * 4, (top,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_draws_and_streams_are_independent() -> None:
    size = (40_000,)
    first = uniform(SEED, 0, size)
    assert float(first.min()) >= 0 and float(first.max()) < 1
    assert abs(float(first.mean()) - 0.5) < 0.01
    for other in (uniform(SEED, 1, size), uniform(SEED + torch.tensor([0, 1]), 0, size)):
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.02
    assert torch.equal(first, uniform(SEED, 0, size))
    assert torch.equal(first[:10], uniform(SEED, 0, (10,)))


@given(st.lists(st.floats(0, 448, width=32), min_size=1, max_size=50))
def test_rounding_up_is_the_least_not_below(values: list[float]) -> None:
    x = torch.tensor(values)
    up = round_e4m3_up(x)
    assert bool((up.float() >= x).all())
    below = (up.view(torch.uint8).clamp(min=1) - 1).view(torch.float8_e4m3fn).float()
    assert bool(((below < x) | (up.float() == 0)).all())
    assert float(round_e4m3(torch.tensor(1e6))) == E4M3_MAX


# Codec


@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([1, 16]),
    st.sampled_from(RULES),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e36]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60)
def test_any_shape_and_size(
    rows: int, width: int, tile: int, rule: str, size: float, dtype: torch.dtype
) -> None:
    x = (normal(rows, width, seed=rows * width) * size).to(dtype)
    result = nvfp4_quantise(x, tile, rule)
    blocks = -(-width // 16)
    assert result.codes.shape == (rows, 8 * blocks) and result.scales.shape == (rows, blocks)
    scales = result.scales.float()
    assert bool(scales.isfinite().all()) and bool((scales >= 0).all())
    back = nvfp4_dequantise(*result)
    assert not back[:, width:].any(), "padding decodes to zeros"
    step = scales.repeat_interleave(16, 1)[:, :width] * result.decode_scale
    # The widest gap of E2M1 is 2; a scale of few digits may saturate the block's maximum.
    assert bool(((back[:, :width] - x.float()).abs() <= 1.4 * step + size * 2.0**-8).all())


def test_padding_changes_nothing() -> None:
    x = normal(20, 40)
    whole = nvfp4_quantise(torch.nn.functional.pad(x, (0, 8)))
    for ours, wanted in zip(nvfp4_quantise(x), whole, strict=True):
        assert torch.equal(ours.float(), wanted.float())


@pytest.mark.parametrize("rule", RULES)
def test_tiles_transpose_exactly(rule: str) -> None:
    """The transpose of a weight's codes is the weight's transpose in NVFP4."""
    weight = normal(48, 64)
    made = nvfp4_quantise(weight, 16, rule)
    turned, wanted = nvfp4_transpose(made.codes, made.scales), nvfp4_quantise(weight.t(), 16, rule)
    assert torch.equal(turned[0], wanted.codes)
    assert torch.equal(turned[1].view(torch.uint8), wanted.scales.view(torch.uint8))
    single = nvfp4_quantise(weight, 1, rule)
    apart = nvfp4_quantise(weight.t(), 1, rule)
    assert not torch.equal(nvfp4_dequantise(*single).t(), nvfp4_dequantise(*apart))


def test_transposing_pads_odd_rows() -> None:
    weight = normal(24, 40)
    made = nvfp4_quantise(weight, 16)
    codes, scales = nvfp4_transpose(made.codes, made.scales)
    back = nvfp4_dequantise(codes, scales, made.decode_scale)
    assert torch.equal(back[:40, :24], nvfp4_dequantise(*made)[:, :40].t())
    assert not back[:, 24:].any()


def test_four_over_six_loses_less() -> None:
    x = normal(512, 512, dtype=torch.bfloat16)
    lost = {rule: relative(decoded(x, rule=rule), x) ** 2 for rule in RULES}
    assert lost["none"] == pytest.approx(9.05e-3, rel=0.01)
    assert lost["mae"] == pytest.approx(7.75e-3, rel=0.02)
    assert lost["mse"] == pytest.approx(7.50e-3, rel=0.02)
    assert lost["mse"] < min(lost["none"], lost["mae"], lost["abs_max"])


@pytest.mark.parametrize("size", [1e-34, 1e-30, 1e36])
def test_four_over_six_chooses_alike_at_any_size(size: float) -> None:
    """In units of the input, squares would leave float32's range, and 6 would always be chosen."""
    x, power = normal(32, 64), 2.0 ** round(torch.tensor(size).log2().item())
    small = nvfp4_quantise(x * power, rule="mse")
    assert torch.equal(small.codes, nvfp4_quantise(x, rule="mse").codes)
    assert not torch.equal(small.codes, nvfp4_quantise(x, top=256.0).codes)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_flagged(bad: float) -> None:
    x = normal(4, 32)
    x[2, 5] = bad
    result = nvfp4_quantise(x)
    assert bool(result.decode_scale.isnan()) and bool(result.scales.float().isfinite().all())
    other = nvfp4_quantise(normal(8, 32))
    assert bool(nvfp4_matmul(*result, *other, torch.float32).isnan().all())
    given = nvfp4_quantise(x[:, None], largest=torch.ones(4))
    assert given.decode_scale.isnan().tolist() == [False, False, True, False]


def test_a_scale_for_each_of_the_leading_axes() -> None:
    x = normal(3, 2, 8, 32) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None, None]
    largest = x.abs().amax((-1, -2))
    result = nvfp4_quantise(x, largest=largest)
    for i in range(3):
        for j in range(2):
            alone = nvfp4_quantise(x[i, j])
            assert torch.equal(result.codes[i, j], alone.codes)
            assert torch.equal(result.decode_scale[i, j], alone.decode_scale)
    back = nvfp4_dequantise(*result)
    assert relative(back[0], x[0]) == pytest.approx(relative(back[2], x[2]), rel=0.2)


# Stochastic rounding


def mean_error(x: Tensor, quantise: Callable[[int], Tensor], draws: int = 300) -> float:
    """Squared bias over what chance alone would give: about 1 if there is no bias."""
    total, single = torch.zeros_like(x), 0.0
    for draw in range(draws):
        value = quantise(draw)
        total += value
        single += float((value - x).square().mean()) / draws
    return float((total / draws - x).square().mean()) / (single / draws)


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("rule", RULES)
def test_stochastic_rounding_is_unbiased(rule: str, tile: int) -> None:
    x = normal(32, 64)
    ratio = mean_error(x, lambda draw: decoded(x, tile, rule, torch.tensor([3, draw])))
    assert ratio < 1.25


def test_a_bias_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales rounded to nearest saturate maxima; rounding to nearest is biased throughout."""
    x = normal(32, 64)
    assert mean_error(x, lambda draw: decoded(x)) > 50
    monkeypatch.setattr("lltk.ops.nvfp4_quantise.reference.round_e4m3_up", round_e4m3)
    assert mean_error(x, lambda draw: decoded(x, 1, "none", torch.tensor([3, draw]))) > 1.5


def test_draws_differ_and_repeat() -> None:
    x = normal(16, 64)
    codes = [
        nvfp4_quantise(x, 1, "none", torch.tensor([3, draw]), stream).codes
        for draw, stream in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2]) and not torch.equal(codes[0], codes[3])


# Parts of a tensor that several ranks share


@given(
    st.integers(1, 2), st.integers(2, 4), st.integers(1, 3), st.integers(1, 40), st.booleans(),
    st.sampled_from(RULES), st.sampled_from([[], SHARED, random_signs(32, 1)]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_ranks_quantise_what_one_does(
    runs: int, size: int, blocks: int, width: int, stochastic: bool, rule: str, signs: list[int]
) -> None:
    """Each rank has a part of every run of rows; codes and scales are those of the whole."""
    unit = padded(1, signs)
    whole = normal(runs, size, blocks * unit, width) * normal(runs, size, 1, 1, seed=1).exp()
    largest = nvfp4_largest(whole, signs)
    seed = torch.tensor([5, 1]) if stochastic else None
    rows = quantise_op(whole, 1, rule, seed, 2)
    turned = transposed_op(whole, signs, rule, seed, 2)
    for rank in range(size):
        own = torch.tensor([5, 1, rank, size]) if stochastic else None
        part, run = whole[:, rank].contiguous(), blocks * unit
        shared = (rule, own, 2)
        made = quantise_op(part, 1, *shared, largest[0], run)
        for ours, theirs in zip(made[:2], rows[:2], strict=True):
            assert torch.equal(bits(ours), bits(theirs[:, rank]))
        assert torch.equal(made[2], rows[2])
        made = transposed_op(part, signs, *shared, largest[1], run)
        for ours, theirs in zip(made[:2], turned[:2], strict=True):
            wanted = bits(theirs).view(width, runs, size, -1)[:, :, rank]
            assert torch.equal(bits(ours).view(wanted.shape), wanted)
        assert torch.equal(made[2], turned[2])


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_elsewhere_is_flagged(bad: float) -> None:
    """A rank flags what another rank has."""
    whole = normal(32, 16)
    whole[20, 3] = bad
    largest = nvfp4_largest(whole, SHARED)
    assert not largest.isfinite().any()
    for index, made in enumerate(
        (
            quantise_op(whole[:16], 1, "none", None, 0, largest[0], 16),
            transposed_op(whole[:16], SHARED, "none", None, 0, largest[1], 16),
        )
    ):
        assert bool(made[2].isnan()), index
    assert bool(quantise_op(whole[:16])[2].isfinite())


# Transform, layout, product


@pytest.mark.parametrize("width", [16, 32, 128])
def test_the_transform_is_orthogonal(width: int) -> None:
    signs = SHARED if width == 16 else random_signs(width, 7)
    matrix = hadamard(torch.eye(width), signs)
    # Sylvester's matrix has −1 where its row's and column's indices share an odd number of bits.
    rows = [[s * (-1) ** (i & j).bit_count() for j in range(width)] for i, s in enumerate(signs)]
    assert torch.allclose(matrix, torch.tensor(rows) / width**0.5, atol=1e-6)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(width), atol=1e-6)
    x, y = normal(8, 256), normal(8, 256, seed=1)
    product = hadamard(x, signs) @ hadamard(y, signs).t()
    assert torch.allclose(product, x @ y.t(), atol=1e-4)
    assert not torch.allclose(hadamard(x, signs) @ y.t(), x @ y.t(), atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_transform_saturates(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    x = torch.zeros(3, 16, dtype=dtype)
    x[0] = torch.tensor(SHARED, dtype=dtype) * top
    x[1, 0] = torch.inf
    turned = hadamard(x, SHARED)
    assert float(turned[0, 0]) == top and bool(turned[0].isfinite().all())
    assert not turned[1].isfinite().any() and not turned[2].any()


def test_scale_layout() -> None:
    scales = torch.arange(130 * 6).remainder(251).to(torch.uint8).view(130, 6)
    flat = swizzle(scales)
    assert flat.numel() == 2 * 2 * 512
    for row, column in ((0, 0), (31, 3), (32, 0), (129, 5), (100, 4)):
        offset = ((row // 128) * 2 + column // 4) * 512
        offset += (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
        assert flat[offset] == scales[row, column]
    assert torch.equal(unswizzle(flat, 130, 6), scales)


def test_pack_puts_the_even_element_low() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack(pack(codes)), codes)
    assert decode_e2m1(codes).tolist() == [[0.5, 1.0, -6.0, 0.0]]


def test_the_product_is_of_the_decoded_operands() -> None:
    a, b = nvfp4_quantise(normal(2, 8, 32)), nvfp4_quantise(normal(24, 32, seed=1))
    wanted = nvfp4_dequantise(*a).double() @ nvfp4_dequantise(*b).double().t()
    assert relative(nvfp4_matmul(*a, *b, torch.float32), wanted) < 1e-6
    assert nvfp4_matmul(*a, *b, torch.bfloat16).dtype == torch.bfloat16


# A layer that trains


def layer(
    x: Tensor,
    weight: Tensor,
    stochastic: bool,
    rule: str = "mse",
    signs: list[int] = SHARED,
    seed: Tensor = SEED,
) -> Tensor:
    """x · Wᵀ as the training pass writes it."""
    held = x.detach()
    turned = transposed_op(held, signs)
    w = quantise_op(weight.detach(), 16)
    wt = transpose_op(w[0], w[1])
    operands = (*quantise_op(held), *turned, *w, *wt)
    return nvfp4_linear(x, weight, *operands, seed, 0, stochastic, rule, signs)


def errors(
    x: Tensor, grad: Tensor, stochastic: bool, rule: str, signs: list[int] = SHARED
) -> list[float]:
    """Relative errors of y, dx and dw of a layer with normal weights."""
    x, weight = x.clone().requires_grad_(), normal(*x.shape, seed=1).requires_grad_()
    y = layer(x, weight, stochastic, rule, signs)
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    wanted = (x @ weight.t(), grad @ weight, grad.t() @ x)
    return [relative(a, b) for a, b in zip((y, dx, dw), wanted, strict=True)]


def test_gradients_have_the_reference_errors() -> None:
    """TransformerEngine's recipe was measured on normal operands of 1024³.

    It gave 0.146, 0.146 and 0.134 rounding to nearest. For dx and dw it gave 0.177 and 0.167 where
    it rounds gradients stochastically, as it saturates the largest values: that loses less but is
    biased. Ours is unbiased, so it loses 5 % more, and 2 % more with Four Over Six.
    """
    x, grad = normal(1024, 1024), normal(1024, 1024, seed=2)
    assert errors(x, grad, False, "none") == pytest.approx([0.146, 0.146, 0.134], abs=5e-4)
    with_rule = [0.1461, 1.015 * 0.177, 1.021 * 0.167]
    assert errors(x, grad, True, "mse") == pytest.approx(with_rule, rel=0.002)
    without = [0.1461, 1.047 * 0.177, 1.058 * 0.167]
    assert errors(x, grad, True, "none") == pytest.approx(without, rel=0.002)


def test_the_transform_is_what_lowers_the_weights_error() -> None:
    """Of tokens that have much in common, one in sixteen is 64 times as large.

    Beside it a block rounds the others to 0, and what they have in common is lost. The transform
    spreads the large one, and its error has every sign, so that it averages out.
    """
    x = normal(1, 256) + 0.3 * normal(256, 256, seed=3)
    x[3::16] = 64 * normal(16, 256, seed=4)
    grad = normal(1, 256, seed=5) + 0.3 * normal(256, 256, seed=6)
    turned, plain = (errors(x, grad, False, "none", signs)[2] for signs in (SHARED, []))
    assert turned < 0.6 * plain


def test_weights_gradients_are_quantised_once() -> None:
    """dW is the product of the transformed operands themselves, not of x's forward values."""
    x, weight = (normal(64, 64, seed=s).requires_grad_() for s in (0, 1))
    grad = normal(64, 64, seed=2)
    (dw,) = torch.autograd.grad(layer(x, weight, False, "none"), weight, grad)

    def operand(t: Tensor) -> Tensor:
        return decoded(hadamard(t.t().contiguous(), SHARED))

    once = operand(grad) @ operand(x.detach()).t()
    twice = operand(grad) @ operand(decoded(x.detach())).t()
    assert relative(dw, once) < 1e-6 < relative(dw, twice)


def test_odd_sizes() -> None:
    x, weight = normal(2, 5, 40).requires_grad_(), normal(24, 40, seed=1).requires_grad_()
    y = layer(x, weight, False, "none")
    dx, dw = torch.autograd.grad(y, (x, weight), normal(2, 5, 24, seed=2))
    assert y.shape == (2, 5, 24) and dx.shape == x.shape and dw.shape == weight.shape
    grad = normal(2, 5, 24, seed=2)
    assert relative(dx, grad @ weight) < 0.25
    assert relative(dw, grad.flatten(0, 1).t() @ x.flatten(0, 1)) < 0.25


def test_the_activation_is_saved_in_four_bits() -> None:
    x, weight = normal(64, 128).requires_grad_(), normal(32, 128, seed=1).requires_grad_()
    y = layer(x, weight, True)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert not any(t.data_ptr() in (x.data_ptr(), weight.data_ptr()) for t in saved)
    assert sum(t.nbytes for t in saved) < 0.6 * (x.numel() + weight.numel()) + 64


def test_the_joint_graph_shows_what_each_operand_got() -> None:
    def step(x: Tensor, weight: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        return (layer(x, weight, True, seed=seed),)

    given = [normal(32, 32).requires_grad_(), normal(16, 32, seed=1).requires_grad_(), SEED]
    joint: GraphModule = aot_export_joint_simple(step, given, trace_joint=True)
    calls = [node for node in joint.graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in calls]
    assert names.count("lltk.nvfp4_linear.default") == 1
    assert names.count("lltk.nvfp4_matmul.default") == 2
    rows = [n for n in calls if str(n.target) == "lltk.nvfp4_quantise.default"]
    columns = [n for n in calls if str(n.target) == "lltk.nvfp4_quantise_transposed.default"]
    assert [list(node.args[1]) for node in columns] == [SHARED, SHARED], "dW's operands alone turn"
    stochastic = [n for n in (*rows, *columns) if len(n.args) > 3 and n.args[3] is not None]
    assert len(rows) == 3 and len(stochastic) == 2, "x, W and dy; dy's two copies at random"
    streams = sorted((*node.args, 0)[4] for node in stochastic)
    assert streams == [0, 1], "independent streams for rows and columns"


def operands(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return quantise_op(normal(16, 32, seed=seed))


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (quantise_op, (normal(4, 40), 16, "mse", SEED, 3)),
        (quantise_op, (normal(2, 3, 32),)),
        (quantise_op, (normal(2, 16, 40), 1, "mse", PART, 3, torch.tensor(5.0), 16)),
        (transposed_op, (normal(2, 16, 40), SHARED, "mse", PART, 3, torch.tensor(5.0), 16)),
        (largest_op, (normal(2, 3, 40), SHARED)),
        (dequantise_op, operands()),
        (transpose_op, quantise_op(normal(24, 32), 16)[:2]),
        (hadamard_op, (normal(4, 32), SHARED)),
        (matmul_op, (*operands(), *operands(1), torch.bfloat16)),
    ],
)
def test_opcheck(op: torch.library.CustomOpDef, arguments: tuple[object, ...]) -> None:
    # Its schema test multiplies inputs, which float8 cannot do.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=checks)  # type: ignore[arg-type]
