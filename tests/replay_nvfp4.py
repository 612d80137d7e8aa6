"""Replay what other NVFP4 implementations make of recorded inputs through our codec.

    python tests/replay_nvfp4.py DIR

DIR holds ``inputs.npz`` (``case|x_bits``, ``case|dtype``) and a file for each implementation
(``case|mode|field``). Prints a table by implementation and mode: cases that agree bit by bit, cases
that differ as their arithmetic makes them, and why; exits 0 only if nothing is unexplained.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lltk.ops.floats import (
    E2M1,
    decode_e2m1,
    round_e2m1,
    round_e2m1_randomly,
    round_e4m3,
    unpack,
)
from lltk.ops.hadamard.reference import SIGNS, hadamard
from lltk.ops.nvfp4_dequantise.reference import nvfp4_dequantise
from lltk.ops.nvfp4_matmul.reference import nvfp4_matmul
from lltk.ops.nvfp4_quantise.reference import Quantised, amax, nvfp4_quantise, scales_of
from lltk.ops.nvfp4_transpose.reference import nvfp4_transpose
from lltk.ops.scale_layout import swizzle, unswizzle

EXACT = "exact"
WRONG = "UNEXPLAINED: "
E4M3_ZERO_SCALE = 2.0**-10
"""What rounds to an E4M3 scale of 0, and less."""
OVERFLOWED = {"amax", "amax_col"}
Fields = Mapping[str, Tensor]


class Mode(NamedTuple):
    """How to ask our codec for what a mode holds.

    Attributes:
        tile, rule, top: of `nvfp4_quantise`.
        turned: whether the transpose is quantised.
        transformed: whether it goes through the Hadamard transform.
        one_level: whether there is no scale of the tensor.
        same_order: whether operations come in our order, so that bits must agree.
        floor: least block scale the other allows.
    """

    tile: int = 1
    rule: str = "none"
    top: float | None = None
    turned: bool = False
    transformed: bool = False
    one_level: bool = False
    same_order: bool = False
    floor: float = 0.0


MODES: dict[str, dict[str, Mode]] = {
    "te": {
        "1x16": Mode(same_order=True),
        "16x16": Mode(16, same_order=True),
        "1x16_rht_col": Mode(transformed=True, same_order=True),
        **{
            f"{tile}x16_46_{rule}_{top}": Mode(tile, rule.lower(), top, same_order=True)
            for tile in (1, 16)
            for rule in ("MAE", "MSE")
            for top in (256, 448)
        },
    },
    "torchao": {
        "1lvl": Mode(one_level=True, floor=2.0**-6),
        "2lvl": Mode(floor=2.0**-6),
        "teport_1x16": Mode(same_order=True),
        "teport_16x16": Mode(16, same_order=True),
        "teport_rht": Mode(transformed=True, turned=True, same_order=True),
    },
    "fouroversix": {
        f"{name}_{tile}x16{turn}": Mode(tile, rule, turned="T" in turn, transformed="rht" in turn)
        for name, rule in (
            ("static_6", "none"),
            ("mse", "mse"),
            ("mae", "mae"),
            ("abs_max", "abs_max"),
        )
        for tile in (1, 16)
        for turn in ("", "_T", "_T_rht")
    },
    "modelopt": {"dyn": Mode(floor=2.0**-9)},
}
NOT_OURS = {"static_4_1x16": "maps every maximum to 4, which NVFP4 here does not; decoding checked"}


@dataclass
class Case:
    """One input and what an implementation made of it in one mode."""

    x: Tensor
    mode: Mode
    fields: Fields

    @cached_property
    def finite(self) -> bool:
        return bool(self.x.isfinite().all())

    def source(self, turned: bool) -> Tensor:
        """The tensor that is quantised: the input, or its transpose."""
        if not turned:
            return self.x
        x = self.x.t().contiguous()
        return hadamard(self._whole(x), list(SIGNS)) if self.mode.transformed else x

    @staticmethod
    def _whole(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16))

    def ours(self, turned: bool) -> Quantised:
        """Our codec's result."""
        mode, x = self.mode, self.source(turned)
        largest = torch.tensor(2688.0) if mode.one_level else None
        return nvfp4_quantise(x, mode.tile, mode.rule, largest=largest, top=mode.top)


def same_codes(a: Tensor, b: Tensor) -> Tensor:
    """Where codes agree; the sign of zero does not count."""
    return (a == b) | (((a | b) & 7) == 0)


def judge(case: Case, turned: bool) -> str:
    """`EXACT`, or why a case differs; `WRONG` and what, if nothing explains it."""
    suffix = "_t" if turned and "codes_t" in case.fields else ""
    scales, codes = case.fields[f"scales{suffix}"], unpack(case.fields[f"codes{suffix}"])
    ours = case.ours(turned)
    if (ours.scales.view(torch.uint8) & 0x7F == 0x7F).any():
        return WRONG + "a NaN scale of ours"
    if not case.finite:
        flagged = bool(ours.decode_scale.isnan())
        return "not finite: undefined there, flagged here" if flagged else WRONG + "not flagged"
    x = case.source(turned)
    rows, width = x.shape[0], min(x.shape[1], codes.shape[1])
    blocks = -(-width // 16)
    mine, theirs = unpack(ours.codes)[:, :width], codes[:rows, :width]
    own, other = ours.scales.view(torch.uint8)[:, :blocks], scales[:rows, :blocks]
    if torch.equal(own, other) and bool(same_codes(mine, theirs).all()):
        return EXACT
    padded = torch.nn.functional.pad(same_codes(mine, theirs), (0, -width % 16), value=True)
    differ = (own != other) | ~padded.unflatten(1, (-1, 16)).all(-1)
    return explain(Compared(case, x, mine, theirs, own, other, differ, ours))


class Compared(NamedTuple):
    """A case that differs: values, codes and scale bytes of both, and which blocks differ."""

    case: Case
    x: Tensor
    mine: Tensor
    theirs: Tensor
    own: Tensor
    other: Tensor
    differ: Tensor
    ours: Quantised


def explain(seen: Compared) -> str:
    """Why every differing block differs, or `WRONG`."""
    mode, largest = seen.case.mode, float(amax(seen.x))
    left = seen.differ.clone()
    reasons = []

    def take(reason: str, blocks: Tensor) -> None:
        nonlocal left
        if (left & blocks).any():
            reasons.append(reason)
            left = left & ~blocks

    decoded = seen.other.view(torch.float8_e4m3fn).float()
    peak = blocks_of(seen.x).abs().amax(-1)
    scaled = peak.double() / 6 * (1.0 if mode.one_level else 6 * 448 / largest if largest else 0)
    if largest == 0:
        take("zeros: NaN or 1 there, 0 here", decoded.isnan() | (decoded == 1))
    if mode.floor:
        take(f"scale floor of {mode.floor}", (scaled < 1.1 * mode.floor) & (decoded <= mode.floor))
        take("zero blocks have scale 1 there", (peak == 0) & (decoded == 1))
    sound = fits(seen, seen.mine, seen.own)
    if largest and 2688 / largest > torch.finfo(torch.float32).max:
        take("amax below 1e-35: their scale is subnormal, ours clamped", sound)
    if any(bool(seen.case.fields[k].isinf().any()) for k in OVERFLOWED & seen.case.fields.keys()):
        take("the transform overflows there, saturates here", sound)
    if mode.rule != "none" and not 1e-18 < largest < 1e18:
        take("their 4/6 error leaves float32's range", candidate(seen))
    if not mode.same_order:
        take("(b/6)·S rounds otherwise: ties of e4m3 flip", consistent(seen))
        if mode.rule != "none":
            take("errors of 4 and 6 are equal to rounding", near_tie(seen))
        take("maxima wrap there", scaled < 2.0**-6)
    if left.any():
        where = left.nonzero()[0].tolist()
        return WRONG + f"{int(left.sum())} blocks, first {where}"
    return "; ".join(reasons)


def blocks_of(x: Tensor) -> Tensor:
    """[R, K] → float32 [R, K / 16, 16], padded with zeros."""
    return torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 16)).unflatten(1, (-1, 16))


def consistent(seen: Compared) -> Tensor:
    """Blocks whose scales are within one E4M3 step and whose codes fit their own scale."""
    near = (seen.own.int() - seen.other.int()).abs() <= 1
    return near & fits(seen, seen.theirs, seen.other) & fits(seen, seen.mine, seen.own)


def fits(seen: Compared, codes: Tensor, scales: Tensor) -> Tensor:
    """Blocks whose codes are the nearest to x / (scale · g), up to rounding of the quotient."""
    decode = float(seen.ours.decode_scale)
    step = scales.view(torch.float8_e4m3fn).double()[..., None] * decode
    factor = (1 / step).clamp(max=torch.finfo(torch.float32).max)
    values = (blocks_of(seen.x).double() * factor).clamp(-6, 6)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 16))
    found = decode_e2m1(padded).unflatten(1, (-1, 16))
    grid = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    best = (values[..., None] - grid).abs().amin(-1)
    coarse = 2.0**-149 / step  # a subnormal product has few digits
    slack = 1e-5 + 8 * values.abs() * coarse
    return (((values - found).abs() <= best + slack) | (step == 0)).all(-1)


def candidate(seen: Compared) -> Tensor:
    """Blocks with a scale that maps their maximum to 6 or to 4, between which the rule chooses."""
    mode, x = seen.case.mode, blocks_of(seen.x)
    peak = x.abs().amax(-1)
    if mode.tile == 16:
        peak = tiles(peak, torch.amax)
    encode, _ = scales_of(amax(seen.x), mode.top or 256.0)
    six = peak / torch.tensor(6.0) * encode
    listed = [round_e4m3(scale).view(torch.uint8) == seen.other for scale in (six, six * 1.5)]
    return (listed[0] | listed[1]) & fits(seen, seen.theirs, seen.other)


def near_tie(seen: Compared) -> Tensor:
    """Blocks where both choices lose the same, in float64, up to float32's rounding."""
    lost = [
        error(seen, codes, s) for codes, s in ((seen.mine, seen.own), (seen.theirs, seen.other))
    ]
    if seen.case.mode.tile == 16:
        lost = [tiles(e, torch.sum) for e in lost]
    return (lost[0] - lost[1]).abs() <= 1e-4 * lost[0]


def tiles(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """The result of reducing each 16 rows, repeated for each of them."""
    rows = values.shape[0]
    padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % 16)).unflatten(0, (-1, 16))
    return reduce(padded, dim=1, keepdim=True).expand_as(padded).flatten(0, 1)[:rows]


def error(seen: Compared, codes: Tensor, scales: Tensor) -> Tensor:
    """What a block loses by its mode's rule, float64."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 16))
    values = decode_e2m1(padded).double().unflatten(1, (-1, 16))
    step = scales.view(torch.float8_e4m3fn).double()[..., None] * float(seen.ours.decode_scale)
    lost = (values * step - blocks_of(seen.x).double()).abs()
    match seen.case.mode.rule:
        case "mse":
            return lost.square().sum(-1)
        case "mae":
            return lost.sum(-1)
    return lost.amax(-1)


def judge_decoding(case: Case) -> str | None:
    """Whether we decode their codes as they do, if they say how."""
    fields = case.fields
    if "deq" not in fields or not case.finite:
        return None
    rows, width = fields["deq"].shape
    codes, scales = fields["codes"][:rows], fields["scales"][:rows].view(torch.float8_e4m3fn)
    if "g" in fields:
        decode = fields["g"]
    elif "amax" in fields:
        decode = fields["amax"].squeeze() / (6 * float(fields.get("e4m3_max", torch.tensor(448.0))))
    else:
        decode = torch.tensor(1.0)
    if decode.isnan() or scales.float().isnan().any():
        return None  # zeros, judged by their scales
    ours = nvfp4_dequantise(codes, scales, decode)[:, :width]
    close = (ours.double() - fields["deq"].double()).abs() <= 2e-6 * fields["deq"].double().abs()
    tiny = fields["deq"].abs() < 1e-30
    return None if bool((close | tiny).all()) else WRONG + "decoding"


@dataclass
class Row:
    """A line of the table."""

    cases: int = 0
    exact: int = 0
    explained: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    wrong: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, verdict: str) -> None:
        self.cases += 1
        if verdict == EXACT:
            self.exact += 1
        elif verdict.startswith(WRONG):
            self.wrong[name] = verdict
        else:
            self.explained[verdict].append(name)


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor; text has none."""
    return torch.from_numpy(np.array(array))


def read_inputs(data: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Inputs by case, in their dtypes, from raw bits."""
    made = {}
    for key in data:
        name, _, part = key.partition("|")
        if part == "x_bits":
            dtype = getattr(torch, str(data[f"{name}|dtype"]).removeprefix("torch."))
            made[name] = tensor(data[key]).view(dtype)
    return made


def replay_file(name: str, path: Path, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Row]]:
    """A row for each mode of one implementation's file."""
    grouped: dict[str, dict[str, dict[str, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    rows: dict[str, Row] = defaultdict(Row)
    data = load(path)
    for key, value in data.items():
        case, _, rest = key.partition("|")
        mode, _, part = rest.partition("|")
        if case in SPECIAL:
            continue
        grouped[mode][case][part] = value
    for mode, cases in grouped.items():
        for case, arrays in cases.items():
            rows[mode].add(case, replay_case(name, mode, inputs.get(case), arrays))
    for special, judged in SPECIAL.items():
        own = {
            k.partition("|")[2]: tensor(v) for k, v in data.items() if k.startswith(f"{special}|")
        }
        if own:
            rows[special].add(special, judged(own))
    yield from rows.items()


def replay_case(name: str, mode: str, x: Tensor | None, arrays: Mapping[str, np.ndarray]) -> str:
    if "ERROR" in arrays:
        return f"raises there: {str(arrays['ERROR']).splitlines()[0][:60]}"
    if x is None:
        return WRONG + "no such input"
    fields = {key: tensor(value) for key, value in arrays.items()}
    if mode in NOT_OURS:
        case = Case(x, Mode(), fields)
        return judge_decoding(case) or NOT_OURS[mode]
    known = MODES.get(name, {}).get(mode.removesuffix("_deq"))
    if known is None:
        return WRONG + "no such mode"
    case = Case(x, known, fields)
    if "codes" in fields or "codes_t" in fields:
        verdicts = [judge(case, turned) for turned in directions(known, fields)]
        if not known.turned:
            verdicts.append(judge_decoding(case) or EXACT)
        if "swizzled" in fields:
            verdicts.append(judge_layout(fields))
        if "rht" in fields:
            made, recorded = case.source(True), fields["rht"].view(case.x.dtype)
            same = (made == recorded) | recorded.isinf()  # judged with the codes
            verdicts.append(EXACT if bool(same.all()) else WRONG + "transform")
        return worst(verdicts)
    return WRONG + f"nothing to compare among {', '.join(fields)}"


def directions(mode: Mode, fields: Fields) -> list[bool]:
    """Which of the rows and the columns a case holds."""
    if mode.turned:
        return [True]
    rows = [] if mode.transformed else [False]
    return rows + ([True] if "codes_t" in fields else [])


def judge_layout(fields: Fields) -> str:
    scales = fields["scales"]
    moved = swizzle(scales)
    back = torch.equal(unswizzle(moved, *scales.shape), scales)
    return EXACT if back and torch.equal(moved, fields["swizzled"]) else WRONG + "scale layout"


def worst(verdicts: list[str]) -> str:
    """The unexplained case if there is one, else an explanation, else `EXACT`."""
    wrong = [v for v in verdicts if v.startswith(WRONG)]
    other = [v for v in dict.fromkeys(verdicts) if v != EXACT]
    return wrong[0] if wrong else "; ".join(other) or EXACT


def judge_e2m1(fields: Fields) -> str:
    """Every implementation's E2M1 table is ours."""
    number = ~fields["x"].isnan()
    x, ours = fields["x"][number], round_e2m1(fields["x"][number])
    wrong = {
        k for k, codes in fields.items() if k != "x" and not exact_below(x, ours, codes[number])
    }
    if not wrong:
        return EXACT
    if all(exact_below(x, ours, fields[key][number], 7) for key in wrong):
        return f"from 7 on wraps there: {', '.join(sorted(wrong))}"
    return WRONG + f"an element of {', '.join(sorted(wrong))}"


def exact_below(x: Tensor, ours: Tensor, theirs: Tensor, bound: float = torch.inf) -> bool:
    """Whether codes agree for magnitudes below a bound, or for all of them without one."""
    inside = (x.abs() < bound) | torch.tensor(bound).isinf()
    return bool(same_codes(ours, theirs)[inside].all())


def judge_e4m3(fields: Fields) -> str:
    """Every implementation's E4M3 table is ours within ±448; casts beyond it differ."""
    inside = fields["x"].abs() <= 448
    ours = round_e4m3(fields["x"]).float()[inside]
    agree = [torch.equal(ours, fields[key][inside]) for key in fields if key != "x"]
    return EXACT if all(agree) else WRONG + "an element"


def judge_rounding(fields: Fields) -> str:
    """Our stochastic rounding takes the values of theirs, as often."""
    number = ~fields["x"].isnan()
    x = fields["x"][number].clamp(-6, 6)
    for key in fields.keys() - {"x"}:
        table = fields[key][number]
        draws = table.shape[1]
        random = (torch.arange(draws) / draws).expand_as(table)
        ours = decode_e2m1(round_e2m1_randomly(x[:, None].expand_as(table), random))
        gap = table.amax(1) - table.amin(1)
        if ((ours.mean(1) - table.mean(1)).abs() > 1.01 * gap / draws).any():
            return WRONG + "how often it rounds up"
    return EXACT


def judge_products(fields: Fields) -> str:
    """A layer's output and gradients, from the operands alone."""
    if "te|x" in fields:
        x, w, dy = (fields[f"te|{key}"].view(torch.bfloat16) for key in ("x", "w", "dy"))
        weight = nvfp4_quantise(w, 16)
        turned = (*nvfp4_transpose(weight.codes, weight.scales), weight.decode_scale)
        xt, dyt = (hadamard(t.t().contiguous(), list(SIGNS)) for t in (x, dy))
        pairs = {
            "y": (nvfp4_quantise(x), weight),
            "dx": (nvfp4_quantise(dy), turned),
            "dw": (nvfp4_quantise(dyt), nvfp4_quantise(xt)),
        }
        made = {f"te|{k}": nvfp4_matmul(*a, *b, torch.float32) for k, (a, b) in pairs.items()}
        agree = all(torch.allclose(v, fields[k], rtol=1e-5, atol=1e-5) for k, v in made.items())
        return EXACT if agree else WRONG + "a product"
    a, b, y = (fields[f"mse|{key}"].view(torch.bfloat16) for key in ("A", "B", "y"))
    ours = nvfp4_matmul(*nvfp4_quantise(a, rule="mse"), *nvfp4_quantise(b, rule="mse"), y.dtype)
    off = (ours != y).float().mean()
    if off == 0:
        return EXACT
    step = 1e-6 * float(y.float().abs().max())  # of sums that nearly cancel
    close = torch.allclose(ours.float(), y.float(), rtol=2.0**-7, atol=step)
    return "sums in another order" if close and off < 0.01 else WRONG + "a product"


def judge_matrix(fields: Fields) -> str:
    same = torch.equal(fields["matrix"], hadamard(torch.eye(len(SIGNS)), list(SIGNS)))
    return EXACT if same else WRONG + "the matrix"


SPECIAL: dict[str, Callable[[Fields], str]] = {
    "e2m1": judge_e2m1,
    "e4m3": judge_e4m3,
    "sr": judge_rounding,
    "gemm": judge_products,
    "rht": judge_matrix,
}


def show(console: Console, results: Mapping[tuple[str, str], Row]) -> None:
    table = Table("implementation", "mode", "cases", "exact", "explained", "unexplained", "why")
    for (name, mode), row in results.items():
        why = [f"{reason} ({', '.join(cases)})" for reason, cases in row.explained.items()]
        why += [f"{case}: {verdict}" for case, verdict in row.wrong.items()]
        explained = sum(map(len, row.explained.values()))
        counts = (row.cases, row.exact, explained, len(row.wrong))
        table.add_row(name, mode, *map(str, counts), "\n".join(why))
    console.print(table)


def replay(folder: Path) -> dict[tuple[str, str], Row]:
    """Rows by implementation and mode of every file of a directory."""
    inputs = read_inputs(load(folder / "inputs.npz"))
    return {
        (path.stem, mode): row
        for path in sorted(folder.glob("*.npz"))
        if path.stem != "inputs"
        for mode, row in replay_file(path.stem, path, inputs)
    }


def main(arguments: list[str]) -> int:
    """Replay a directory and say what differs."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "inputs.npz").is_file():
        print(__doc__)
        return 2
    results = replay(Path(arguments[0]))
    show(Console(width=160), results)
    wrong = sum(len(row.wrong) for row in results.values())
    print(f"{sum(row.cases for row in results.values())} cases, {wrong} unexplained")
    return 1 if wrong or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
