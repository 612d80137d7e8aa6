"""First images: greys of every depth are scaled by their range, and clear pixels are white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refused
from PIL import Image
from torch import Tensor

from lltk.stream.image import read_image

pytestmark = pytest.mark.cpu

RAMP = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8), (64, 64))


def levels(path: Path) -> np.ndarray[Any, Any]:
    """The levels that are read, uint8 [64, 64, 3]."""
    image: Tensor = read_image(path, 64, 64)[0]
    return ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("8.png", RAMP),
        ("16.png", RAMP.astype(np.uint16) * 257),
        ("16.tiff", RAMP.astype(np.uint16) * 257),
        ("16.pgm", RAMP.astype(np.uint16) * 257),
        ("32.tiff", RAMP.astype(np.int32) * 257),
        ("float.tiff", (RAMP / 255).astype(np.float32)),
        ("float_255.tiff", RAMP.astype(np.float32)),
        ("float_65535.tiff", RAMP.astype(np.float32) * 257),
    ],
)
def test_greys_are_scaled_by_their_range(
    name: str, stored: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name)
    assert np.array_equal(levels(tmp_path / name), np.stack([RAMP] * 3, -1))


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (np.full((64, 64), -1.0, np.float32), "greys are from -1 to -1"),
        (np.full((64, 64), 1e6, np.float32), "greys are from 1e+06 to 1e+06"),
        (np.full((64, 64), np.nan, np.float32), "holds NaN"),
        (np.full((64, 64), 70_000, np.int32), "greys are from 70000 to 70000"),
    ],
)
def test_other_greys_are_refused(stored: np.ndarray[Any, Any], found: str, tmp_path: Path) -> None:
    Image.fromarray(stored).save(tmp_path / "a.tiff")
    message = refused(read_image, tmp_path / "a.tiff", 64, 64)
    assert message.startswith(f"{tmp_path}/a.tiff: ") and found in message


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_clear_pixels_are_white(mode: str, tmp_path: Path) -> None:
    """What lies under them does not show, and half-clear ones are a mixture."""
    alpha = np.broadcast_to(np.array([0, 128, 255] + [255] * 61, np.uint8), (64, 64))
    colours = np.full((64, 64, 3), 100, np.uint8)
    picture = Image.fromarray(np.dstack([colours, alpha]))
    path = tmp_path / "a.png"
    if mode == "PA":
        picture = picture.quantize(8)
    elif mode != "RGBA":
        picture = picture.convert("LA")
    picture.save(path)
    found = levels(path)[5, :3, 0].astype(int)
    assert found == pytest.approx([255, 177, 100], abs=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_level_that_stands_for_clear(dtype: type, tmp_path: Path) -> None:
    stored = np.full((64, 64), 50, dtype)
    stored[:, :32] = 7
    Image.fromarray(stored).save(tmp_path / "a.png", transparency=7)
    found = levels(tmp_path / "a.png")
    assert (found[:, :30] == 255).all() and (found[:, 34:] < 60).all()
