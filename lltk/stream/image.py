"""Images that a video begins with."""

from __future__ import annotations

from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from lltk.files.reading import opened

_MOST_PIXELS = 1 << 26


def read_image(path: Path, height: int, width: int) -> tuple[Tensor, str | None]:
    """An image at a video's size: cropped about its centre to the aspect, then resized.

    Args:
        path: any format that Pillow reads.
        height, width: pixels of the video.

    Returns:
        float32 [1, 3, height, width] in [-1, 1], and what was cropped away, if anything.

    Raises:
        ValueError: not an image, damaged, or too large.
        OSError: the file cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    with opened(path) as data:
        try:
            with catch_warnings():
                simplefilter("ignore", Image.DecompressionBombWarning)  # this limit is lower
                image = Image.open(data)
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(
                    f"{path}: has {image.width}×{image.height} pixels, more than "
                    f"{_MOST_PIXELS >> 20} Mi; make it smaller"
                )
            picture = ImageOps.exif_transpose(image).convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"{path}: is not an image; name a PNG or JPEG") from error
        except (SyntaxError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{path}: is not an image that can be read ({error}); name a PNG or JPEG"
            ) from error
    across, down = picture.size
    wide, high = min(across, down * width / height), min(down, across * height / width)
    left, top = (across - wide) / 2, (down - high) / 2
    box = (left, top, left + wide, top + high)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS, box)
    levels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
    pixels = levels.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1
    note = None
    if round(across - wide) or round(down - high):
        note = (
            f"{path}: {across}×{down} pixels is another aspect than the video's {width}×{height}: "
            f"cropped about the centre to {round(wide)}×{round(high)}"
        )
    return pixels[None], note
