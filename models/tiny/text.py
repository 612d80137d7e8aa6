"""The tiny text encoder: a UMT5 with frozen random weights over the tiny world's words.

Nothing is learnt: each word has an embedding orthogonal to the other words', and two random layers
add what stands around it and where. Letters stand in for words that captions do not have.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lltk.files.writing import whole_folder
from lltk.graph.loading import LOADING
from lltk.models.configs import named_config
from lltk.models.tiny.world import WORDS

_SPECIAL = ("<pad>", "</s>", "<unk>")
_SCENE_CUT = ("the", "scene", "transitions", ".")
_LETTERS = string.ascii_lowercase + string.digits
_PUNCTUATION = "!?;:'\"()-"


def make_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast`: lower-case words, one token each, and ``</s>``.

    Words that are in no caption and no scene-cut prefix are spelt, a token a letter; what cannot be
    spelt is ``<unk>``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    with LOADING:
        from transformers import PreTrainedTokenizerFast

    pad, end, unknown = _SPECIAL
    vocabulary = {token: index for index, token in enumerate(_tokens())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown
    )


def _tokens() -> tuple[str, ...]:
    spelt = (*_LETTERS, *(f"##{letter}" for letter in _LETTERS), *_PUNCTUATION)
    return tuple(dict.fromkeys((*_SPECIAL, *_SCENE_CUT, *WORDS, *spelt)))


def make_encoder(seed: int = 0) -> nn.Module:
    """A `UMT5EncoderModel` of the tiny transformer's text width, in float32."""
    with LOADING:
        from transformers import UMT5Config, UMT5EncoderModel

    width = named_config("tiny")["text_dim"]
    config = UMT5Config(
        vocab_size=len(_tokens()),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    with LOADING, torch.random.fork_rng(devices=[]):
        model: nn.Module = UMT5EncoderModel(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name:
            nn.init.normal_(parameter, std=_deviation(name, parameter), generator=generator)
    words = len((*_SPECIAL, *_SCENE_CUT, *WORDS))
    table = model.get_parameter("shared.weight").data
    table[:words] = width**0.5 * nn.init.orthogonal_(table[:words].clone(), generator=generator)
    return model.eval().requires_grad_(False)


def _deviation(name: str, parameter: torch.Tensor) -> float:
    """The standard deviation of a weight's random values.

    Activations are about 1 in size and the outputs of branches about half of that, so that the
    words themselves stay the largest part.
    """
    if name.endswith(("shared.weight", "relative_attention_bias.weight")):
        return 1.0
    keep = parameter.shape[1] ** -0.5
    if name.endswith((".o.weight", ".wo.weight")):
        return 0.5 * keep
    # Attention scores are not divided by the root of the head's width.
    return keep / 2 if name.endswith(".q.weight") else keep


def save_text_encoder(folder: Path, seed: int = 0) -> None:
    """Write ``text_encoder/`` and ``tokenizer/`` into a pipeline's folder, each whole."""
    parts: dict[str, Any] = {"text_encoder": make_encoder(seed), "tokenizer": make_tokenizer()}
    for name, part in parts.items():
        with whole_folder(folder / name) as made:
            part.save_pretrained(made.path)
