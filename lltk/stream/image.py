"""Images that a video begins with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor

from lltk.files.reading import opened
from lltk.stream.video import signal

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

GROUND = "white"
"""The colour that shows where an image is transparent."""
_MOST_PIXELS = 1 << 26


def read_image(path: Path, height: int, width: int) -> tuple[Tensor, str | None]:
    """An image at a video's size; see `decode_image`.

    Args:
        path: any format that Pillow reads.
        height, width: pixels of the video.

    Returns:
        float32 [1, 3, height, width] in [-1, 1], and what was cropped away, if anything.

    Raises:
        ValueError: as `decode_image`.
        OSError: the file cannot be read.
    """
    with opened(path) as data:
        return decode_image(data, str(path), height, width)


def decode_image(
    data: BinaryIO,
    name: str,
    height: int,
    width: int,
    formats: tuple[str, ...] | None = None,
    most_pixels: int = _MOST_PIXELS,
) -> tuple[Tensor, str | None]:
    """An image at a video's size: cropped about its centre to the aspect, then resized.

    What is transparent lies over `GROUND`. Greys of 16 bits go from 0 to 65535. Those in floating
    point go from 0 to 1, or to 255 or 65535 if they are above.

    Args:
        data: of the image.
        name: what errors and the note call it.
        height, width: pixels of the video.
        formats: Pillow's names of those that are read; None for all.
        most_pixels: of the image.

    Returns:
        float32 [1, 3, height, width] in [-1, 1], and what was cropped away, if anything.

    Raises:
        ValueError: not an image, damaged, or too large; or its greys are of another range.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    known = "PNG or JPEG" if formats is None else " or ".join(formats)
    try:
        with catch_warnings():
            simplefilter("ignore", Image.DecompressionBombWarning)  # this limit is lower
            image = Image.open(data, formats=formats)
        if image.width * image.height > most_pixels:
            raise ValueError(
                f"{name}: has {image.width}×{image.height} pixels, more than "
                f"{most_pixels >> 20} Mi; make it smaller"
            )
        picture = _as_rgb(ImageOps.exif_transpose(image), name)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: is not an image; name a {known}") from error
    except (SyntaxError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name}: is not an image that can be read ({error}); name a {known}"
        ) from error
    across, down = picture.size
    wide, high = min(across, down * width / height), min(down, across * height / width)
    left, top = (across - wide) / 2, (down - high) / 2
    box = (left, top, left + wide, top + high)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS, box)
    levels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
    pixels = signal(levels.view(height, width, 3).permute(2, 0, 1))
    note = None
    if round(across - wide) or round(down - high):
        note = (
            f"{name}: {across}×{down} pixels is another aspect than the video's {width}×{height}: "
            f"cropped about the centre to {round(wide)}×{round(high)}"
        )
    return pixels[None], note


def _as_rgb(picture: Picture, name: str) -> Picture:
    """The picture in 8 bits of red, green and blue, on `GROUND` where it is transparent."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        clear = np.asarray(picture) == picture.info.get("transparency")
        coloured = Image.fromarray(_grey(picture, name)).convert("RGB")
        coloured.paste(GROUND, mask=Image.fromarray(clear))
        return coloured
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    above = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, GROUND), above).convert("RGB")


def _grey(picture: Picture, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The levels of a grey picture with more than 8 bits, from 0 to 255."""
    levels = np.asarray(picture).astype(np.float64)
    if not np.isfinite(levels).all():
        raise ValueError(f"{name}: holds NaN or infinity; name an image without")
    ranges = (1.0, 255.0, 65535.0) if picture.mode == "F" else (65535.0,)
    low, high = float(levels.min()), float(levels.max())
    full = next((full for full in ranges if high <= full), None)
    if full is None or low < 0:
        raise ValueError(
            f"{name}: its greys are from {low:g} to {high:g}, a range that is not known; save them "
            "with 8 or 16 bits, or as numbers from 0 to 1"
        )
    return (levels * (255 / full)).round().astype(np.uint8)
