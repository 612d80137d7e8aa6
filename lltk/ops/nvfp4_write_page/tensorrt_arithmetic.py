"""A page as an exported engine's commit quantises it."""

from __future__ import annotations

import torch
from torch import Tensor

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.tensorrt_blocks import quantised_blocks, tensor_scale

DECLARATION = Declaration(
    Exactness.ROUNDING,
    "torch, rounded where an exported engine rounds, to judge it beforehand",
    simulates=True,
)


def nvfp4_write_page(
    codes: Tensor,
    scales: Tensor,
    decode_scales: Tensor,
    means: Tensor | None,
    value: Tensor,
    slot: Tensor,
    rule: str = "none",
) -> None:
    """As the op, but rounded as `lltk.ops.tensorrt_blocks` says, and means are summed in float32.

    Raises:
        ValueError: another rounding than the plain one is asked for.
    """
    if rule != "none":
        raise ValueError(
            "nvfp4_write_page: engines round pages plainly; set rule=none, or choose another "
            "implementation than tensorrt_arithmetic"
        )
    wide = value.float()
    if means is not None:
        mean = wide.mean(1).to(torch.bfloat16)
        means.index_copy_(1, slot, mean.unsqueeze(1))
        wide = wide - mean.unsqueeze(1)
    scale = tensor_scale(wide.abs().amax((1, 3)))
    made = quantised_blocks(wide / scale[:, None, :, None])
    decode_scales.index_copy_(1, slot, scale.unsqueeze(1))
    for arena, part in zip((codes, scales), made, strict=True):
        # Bytes, because torch copies no float8 by index on a CPU.
        arena.view(torch.uint8).index_copy_(1, slot, part.view(torch.uint8).unsqueeze(1))
