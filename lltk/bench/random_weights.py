"""Random weights of the true shapes, to time a model without its checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lltk.compiler import with_weights
from lltk.graph.program import Program
from lltk.streaming import Placed, Plan, StreamPlan


def with_random_weights(program: Program, device: torch.device | str = "cpu") -> Program:
    """The Program with normally distributed weights, on the CPU.

    A weight follows from its name, so all Programs of one model get the same weights. Those of
    norms lie about 1, and other vectors are small. Matrices and kernels keep the scale of their
    input.

    Args:
        program: a Program at any stage; it need not have weights.
        device: where the weights are made, and quantised if the Program's are.
    """
    captured = replace(program, weights=program.unmap_state(program.weights))
    made = {}
    for name, like in captured.weights.items():
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        value = torch.randn(like.shape, generator=generator, device=device)
        if name.endswith("weight") and like.dim() > 1:
            value *= like[0].numel() ** -0.5
        elif "norm" in name and name.endswith(("weight", "gamma")):
            value = 1 + 0.1 * value
        else:
            value *= 0.1
        made[name] = value.to(captured.run_dtype(name))
    full = with_weights(program, made)
    return replace(full, weights={name: value.cpu() for name, value in full.weights.items()})


def with_random_models(plan: StreamPlan) -> StreamPlan:
    """The plan with random weights for its transformer and its decoder."""
    return replace(
        plan,
        transformer=with_random_weights(plan.transformer, plan.device),
        decoders=tuple(
            Placed(with_random_weights(decoder.program, decoder.device), decoder.device)
            for decoder in plan.decoders
        ),
    )


def random_prompts(plan: Plan) -> Callable[[str], Tensor]:
    """A text encoder's stand-in: random embeddings that follow from the text.

    They are [1, S, E], on the transformer's device.
    """
    shape = (1, plan.geometry.text_tokens, plan.spec.text_dim)

    def embed(prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        return torch.randn(shape, generator=generator).to(plan.device, plan.dtype)

    return embed
