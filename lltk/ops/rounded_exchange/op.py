"""``lltk::rounded_exchange``: tokens for heads, or heads for tokens, sent in FP8 or NVFP4.

Its gradient is the inverse exchange of the results' gradients, which are sent in the same form: as
if nothing were rounded, but rounded on its own way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lltk.ops.declaration import Declaration, Exactness
from lltk.ops.implementations import overload
from lltk.parallel.exchange import all_max, heads_to_tokens, tokens_to_heads

DECLARATION = Declaration(Exactness.REFERENCE, "the references of its four ops")


def compose(name: str, parts: Iterable[Callable[..., Any]]) -> torch._ops.OpOverload:
    """An implementation, as an operator of torch's with a gradient.

    Args:
        name: of the operator, in ``lltk::``.
        parts: implementations of `row_pipeline`, `fp8_dequantise`, `nvfp4_quantise` and
            `nvfp4_dequantise`.
    """
    row_pipeline, fp8_dequantise, nvfp4_quantise, nvfp4_dequantise = parts

    @torch.library.custom_op(f"lltk::{name}", mutates_args=())
    def rounded_exchange(
        values: Sequence[Tensor], to_heads: bool, form: str, size: int, group: str
    ) -> list[Tensor]:
        """What `tokens_to_heads` or `heads_to_tokens` makes of rounded values.

        How a value is rounded does not depend on the number of ranks.

        Args:
            values: [B, L/n, H, D] each, or [B, L, H/n, D]; any floating dtype.
            to_heads: whether ranks receive heads for tokens, or tokens for heads.
            form: ``"fp8"``, E4M3 with a scale for each head of a token, or ``"nvfp4"``, with one
                decode scale for a value of all ranks; D is a multiple of 16.
            size, group: of the n ranks, as of `lltk.parallel.exchange`.

        Returns:
            [B, L, H/n, D] each, or [B, L/n, H, D], in the values' dtypes.
        """
        exchange = tokens_to_heads if to_heads else heads_to_tokens
        values = [x.contiguous() for x in values]
        if form == "fp8":
            sent = [part for x in values for part in row_pipeline(x, to=form)]
            arrived = exchange(sent, size, group)
            pairs = zip(arrived[::2], arrived[1::2], values, strict=True)
            return [fp8_dequantise(codes, scales, x.dtype) for codes, scales, x in pairs]
        own = torch.stack([vector_norm(x, torch.inf).float() for x in values])
        largest = all_max(own, size, group).unbind()
        made = [
            nvfp4_quantise(x, 1, "none", None, 0, each)
            for x, each in zip(values, largest, strict=True)
        ]
        arrived = exchange([part for x in made for part in x[:2]], size, group)
        return [
            nvfp4_dequantise(*arrived[2 * index : 2 * index + 2], made[index][2], x.dtype)
            for index, x in enumerate(values)
        ]

    @rounded_exchange.register_fake
    def _(
        values: Sequence[Tensor], to_heads: bool, form: str, size: int, group: str
    ) -> list[Tensor]:
        torch._check(form in ("fp8", "nvfp4"))
        made: list[Tensor] = (tokens_to_heads if to_heads else heads_to_tokens)(values, size, group)
        return made

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rest = inputs[1:]

    def backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        to_heads, *rest = ctx.rest
        return (rounded_exchange(grads, not to_heads, *rest), None, None, None, None)

    rounded_exchange.register_autograd(backward, setup_context=keep)
    found: torch._ops.OpOverload = getattr(torch.ops.lltk, name).default
    return found


_PARTS = ("row_pipeline", "fp8_dequantise", "nvfp4_quantise", "nvfp4_dequantise")
rounded_exchange = compose("rounded_exchange", map(overload, _PARTS))
