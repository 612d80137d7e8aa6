"""Decoding some columns of a video, so that parts side by side are exactly the whole video.

Up to the attention in the middle of the decoder, which sees whole frames, every part computes all
columns. From there on it computes its own columns, and some beyond them: a convolution needs a
column beyond each border of its result. How many depends on the convolutions to come, so that they
are fewer after each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Columns = tuple[int, int]
"""The first column, and the one after the last."""


def regions(config: Mapping[str, Any], own: Columns, width: int) -> list[Columns]:
    """The columns to compute after the middle, after each block, and of the result.

    Each is counted in pixels of its own resolution.

    Args:
        config: of AutoencoderKLWan.
        own: columns of the latents whose pixels are wanted.
        width: how many columns the latents have.
    """
    blocks, convolutions = len(config["dim_mult"]), 2 * (config["num_res_blocks"] + 1)
    scales = [2 ** min(i, blocks - 1) for i in range(blocks + 1)]
    beyond = [1]  # of the block before the last convolution
    for block in reversed(range(blocks)):
        upsamples = scales[block + 1] > scales[block]
        # An upsampling's own convolution takes one more, twice as fine.
        before = (beyond[0] + 2) // 2 if upsamples else beyond[0]
        beyond.insert(0, before + convolutions)
    beyond.append(0)
    scales.append(scales[-1])
    return [
        (max(own[0] * scale - more, 0), min(own[1] * scale + more, width * scale))
        for scale, more in zip(scales, beyond, strict=True)
    ]


def cut(decoder: Any, config: Mapping[str, Any], own: Columns, width: int) -> None:
    """Let diffusers' decoder compute some columns only.

    Args:
        decoder: a WanDecoder3d; from now on the results of its parts are cropped.
        config, own, width: as for `regions`.
    """
    parts = [decoder.mid_block, *decoder.up_blocks, decoder.conv_out]
    held = (0, width)
    for part, wanted in zip(parts, regions(config, own, width), strict=True):
        if part in list(decoder.up_blocks[:-1]):
            held = (2 * held[0], 2 * held[1])
        first = wanted[0] - held[0]
        part.register_forward_hook(_Crop(first, first + wanted[1] - wanted[0]))
        held = wanted


class _Crop:
    """A hook that keeps some columns of a module's result."""

    def __init__(self, first: int, end: int) -> None:
        self._columns = slice(first, end)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output[..., self._columns]
