"""Activations as an exported engine quantises them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.ops.tensorrt_blocks import quantised_blocks, tensor_scale

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "torch, rounded where an exported engine rounds, to judge it beforehand",
    simulates=True,
)


def nvfp4_quantise(
    x: Tensor,
    tile: int = 1,
    rule: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
    largest: Tensor | None = None,
    run: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op, but rounded as `lltk.ops.tensorrt_blocks` says.

    Raises:
        ValueError: anything but plain rounding of activations is asked for.
    """
    if tile != 1 or rule != "none" or seed is not None or largest is not None:
        raise ValueError(
            "nvfp4_quantise: engines round activations plainly; set activation_rule=none, or "
            "choose another implementation than tensorrt_arithmetic"
        )
    wide = pad(x.float(), (0, -x.shape[-1] % BLOCK))
    scale = tensor_scale(wide.abs().amax())
    return *quantised_blocks(wide / scale), scale
