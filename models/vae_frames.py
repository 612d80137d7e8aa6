"""Encoding some frames of a video, so that the parts are exactly the latents of the whole.

The encoder looks back from convolution to convolution. There are two ways to give it what it sees
there. One is to encode earlier frames as well (`encode_part`). The other is that ranks encode the
parts at the same time and hand it on (`lltk.models.vae_ranks`), so that no frame is encoded twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from lltk.models.wan_vae import check_video, encode

Part = tuple[int, int]
"""The first latent, and how many."""
LONGEST = 2
"""Latents that are encoded at a time. More take more memory: 1.4 GiB each at 1280×704."""


def lookback(config: Mapping[str, Any]) -> int:
    """How many latents of a video that begins later are not those of the whole.

    They are its first ones, if its first frame is the last one of a latent of the whole.

    Args:
        config: of AutoencoderKLWan.
    """
    resnet = 2 * 2  # two convolutions, each of which sees two frames before its own
    reached = 2  # frames that differ behind the first convolution
    for halves in (*config["temperal_downsample"], False):
        reached += config["num_res_blocks"] * resnet
        if halves:  # of the frames 2j - 2 to 2j it makes frame j
            reached = -(-reached // 2) + 1
    return reached + 2 * resnet + 2  # the middle's resnets, and the last convolution


def window(config: Mapping[str, Any], part: Part) -> tuple[range, int]:
    """The frames of a video to encode for some of its latents.

    Args:
        config: of AutoencoderKLWan.
        part: the latents.

    Returns:
        The frames, and how many latents to drop in front. Where that is not all that come before
        the part, the first frame is the last one of a latent, and stands for a video's first.
    """
    first, count = part
    dropped = min(first, lookback(config))
    stride: int = config["scale_factor_temporal"]
    return range((first - dropped) * stride, (first + count - 1) * stride + 1), dropped


def encode_part(vae: Any, video: Tensor, part: Part) -> Tensor:
    """Some latents of a video. Only the frames of `window` are read.

    Args:
        vae: as for `encode`.
        video: the whole video, as for `encode`.
        part: the latents.

    Returns:
        Normalised latents, as `encode` gives them.

    Raises:
        ValueError: as `encode`.
    """
    check_video(vae.config, video)
    frames, dropped = window(vae.config, part)
    return encode(vae, video[:, :, frames.start : frames.stop])[:, :, dropped:]


def shares(latents: int, size: int) -> list[Part]:
    """Consecutive parts of a video for the ranks that share it, as even as can be.

    Args:
        latents: of the video.
        size: how many ranks.

    Raises:
        ValueError: they are more than the latents.
    """
    if size > latents:
        raise ValueError(
            f"video: {size} ranks cannot share {latents} latents; take a longer one or fewer ranks"
        )
    begins = [latents * rank // size for rank in range(size + 1)]
    return [(first, end - first) for first, end in pairwise(begins)]


def turns(latents: int, size: int) -> list[Part]:
    """Consecutive parts of a video that ranks take in turn, to encode as many at a time.

    All ranks have as many parts. Each part is so short that a rank needs little memory for it.

    Args:
        latents: of the video.
        size: how many ranks.

    Raises:
        ValueError: they are more than the latents.
    """
    return shares(latents, size * -(-latents // (size * LONGEST)))


def own_frames(config: Mapping[str, Any], part: Part) -> range:
    """The frames of a video that make some of its latents, and no others."""
    (first, count), stride = part, config["scale_factor_temporal"]
    return range(max(0, (first - 1) * stride + 1), (first + count - 1) * stride + 1)


Way = Literal["whole", "lookback", "shared"]


def encoded_frames(config: Mapping[str, Any], latents: int, size: int, way: Way) -> list[int]:
    """How many frames of a video each rank encodes.

    Args:
        config: of AutoencoderKLWan.
        latents: of the video.
        size: how many ranks share it.
        way: ``whole`` if each encodes all, ``lookback`` if each encodes its part by itself,
            ``shared`` if they take `turns` and hand on what they look back to.
    """
    if way == "whole":
        return [len(window(config, (0, latents))[0])] * size
    if way == "lookback":
        return [len(window(config, part)[0]) for part in shares(latents, size)]
    frames = [len(own_frames(config, part)) for part in turns(latents, size)]
    return [sum(frames[rank::size]) for rank in range(size)]
