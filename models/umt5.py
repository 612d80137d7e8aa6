"""UMT5, Wan's text encoder as transformers ships it, as a Program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lltk.graph.capture import capture
from lltk.graph.contract import Role, TensorSpec
from lltk.graph.geometry import Geometry
from lltk.graph.loading import LOADING
from lltk.graph.program import Program
from lltk.graph.spec import TextSpec
from lltk.graph.verify import verify


def captured(folder: Path, geometry: Geometry) -> Program:
    """Capture the encoder in a folder, without its weights.

    The graph ``encode`` takes the numbers of a text's tokens, int64 [1, S], and a bool for each
    that says whether it is the text's. Its result, the ``embedding``, is float32 [1, S, E], and
    zero after the text's last token.

    Args:
        folder: with the model's ``config.json``.
        geometry: gives S.

    Returns:
        A captured Program of kind ``text`` in float32; its weights are meta tensors under
        transformers' names.
    """
    with LOADING:
        from transformers import UMT5Config

        config = UMT5Config.from_pretrained(folder, local_files_only=True)
    spec = TextSpec(config.d_model, (1, 1, 1), (1, 1, 1), "embedding", (), config.vocab_size)
    program = Program("text", spec, geometry, torch.float32, graphs={}, weights={})
    size = (1, geometry.text_tokens)
    inputs = {
        "tokens": TensorSpec(size, torch.int64, Role.TOKENS),
        "token_mask": TensorSpec(size, torch.bool, Role.TOKEN_MASK),
    }
    program.graphs["encode"], program.weights, _ = capture(
        lambda: _Encoder(config), inputs, (spec.output,), lambda _name, _parameter: torch.float32
    )
    verify(program)
    return program


def loaded(program: Program, encoder: nn.Module) -> Program:
    """The Program with the weights of transformers' model."""
    parameters = encoder.get_submodule("encoder").named_parameters(prefix="encoder")
    weights = {name: parameter.detach() for name, parameter in parameters}
    assert weights.keys() == program.weights.keys()
    return replace(program, weights=weights)


class _Encoder(nn.Module):
    """The part of the model that encodes; parameters have its names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        with LOADING:
            from transformers import UMT5EncoderModel

            self.encoder = UMT5EncoderModel(config).encoder

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        length = tokens.shape[1]
        seen = token_mask[:, None, None].expand(-1, 1, length, length)
        hidden: Tensor = self.encoder(tokens, attention_mask=seen).last_hidden_state
        return hidden * token_mask.unsqueeze(-1).to(hidden.dtype)
