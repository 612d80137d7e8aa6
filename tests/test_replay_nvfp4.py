"""Other NVFP4 implementations, recorded: our codec agrees, or each difference has its reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replay_nvfp4
import torch
from torch import Tensor

from lltk.ops.nvfp4_quantise.reference import Quantised, nvfp4_quantise
from lltk.ops.scale_layout import swizzle

pytestmark = pytest.mark.cpu

FOLDER = Path(__file__).parent / "data" / "nvfp4"


def test_every_difference_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert replay_nvfp4.main([str(FOLDER)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(" 0 unexplained")


def test_bits_agree_where_the_arithmetic_is_ours() -> None:
    rows = replay_nvfp4.replay(FOLDER)
    for (name, mode), row in rows.items():
        undefined = {"nan_f32", "hugemax_bf16", "tiny1e-38_f32"}
        if name == "te":
            kept = {reason: set(cases) - undefined for reason, cases in row.explained.items()}
            assert all("raises there" in reason or not cases for reason, cases in kept.items()), (
                mode
            )
    assert sum(row.exact for row in rows.values()) > 70


def test_usage_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert replay_nvfp4.main([]) == replay_nvfp4.main([str(tmp_path)]) == 2
    assert "inputs.npz" in capsys.readouterr().out


def scale_up(quantised: Quantised) -> Quantised:
    scales = quantised.scales.view(torch.uint8).clone()
    scales[0, 0] += 2
    return quantised._replace(scales=scales.view(torch.float8_e4m3fn))


def swap_nibbles(quantised: Quantised) -> Quantised:
    codes = quantised.codes
    return quantised._replace(codes=(codes << 4) | (codes >> 4))


def no_flag(quantised: Quantised) -> Quantised:
    return quantised._replace(decode_scale=quantised.decode_scale.nan_to_num(1.0))


def spoiled(change: Callable[[Quantised], Quantised], *given: Any, **options: Any) -> Quantised:
    return change(nvfp4_quantise(*given, **options))


@pytest.mark.parametrize("change", [scale_up, swap_nibbles, no_flag])
def test_a_changed_codec_is_noticed(
    change: Callable[[Quantised], Quantised], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_nvfp4, "nvfp4_quantise", partial(spoiled, change))
    assert replay_nvfp4.main([str(FOLDER)]) == 1


def other_signs(x: Tensor, signs: list[int]) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hadamard", other_signs),
        ("swizzle", lambda scales: swizzle(scales.flip(0))),
        ("round_e2m1_randomly", lambda values, random: replay_nvfp4.round_e2m1(values)),
    ],
)
def test_a_changed_part_is_noticed(
    name: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_nvfp4, name, wrong)
    assert replay_nvfp4.main([str(FOLDER)]) == 1


def test_what_is_not_known_is_unexplained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(FOLDER / "inputs.npz") as file:
        np.savez(tmp_path / "inputs.npz", **{key: file[key] for key in file.files})
    with np.load(FOLDER / "modelopt.npz") as file:
        np.savez(tmp_path / "another.npz", **{key: file[key] for key in file.files})
    assert replay_nvfp4.main([str(tmp_path)]) == 1
    assert "no such mode" in capsys.readouterr().out.replace("\n", " ")
