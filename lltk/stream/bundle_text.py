"""Text into embeddings, by the encoder in ONNX that a bundle holds; without transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lltk.stream.text import clean

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)


class BundleTextEncoder:
    """A bundle's text encoder and tokenizer, loaded when a text first needs them.

    It gives what `lltk.stream.text.TextEncoder` does: texts are cleaned, longer ones are cut with a
    warning, and an embedding is zero after its text's last token. One thread at a time uses it.

    Args:
        folder: a bundle's ``text``.
        device: where the embeddings are. The encoder runs on the CPU.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self._folder = folder
        self._device = torch.device(device)
        self._loaded: tuple[Tokenizer, InferenceSession] | None = None

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self._device

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, at least one: float32 [n, text_tokens, text_dim]."""
        made = np.concatenate([self._encode(clean(text)) for text in texts])
        return torch.from_numpy(made).to(self._device)

    def to(self, device: torch.device | str) -> None:
        """Give embeddings on another device from now on."""
        self._device = torch.device(device)

    def free(self) -> None:
        """Drop the encoder from memory; it is loaded again when a text needs it."""
        self._loaded = None

    def _encode(self, text: str) -> np.ndarray:
        tokenizer, session = self._load()
        _, most = session.get_inputs()[0].shape
        tokenizer.enable_truncation(most)
        encoded = tokenizer.encode(text)
        if encoded.overflowing:
            count = len(encoded.ids) + sum(len(part.ids) - 1 for part in encoded.overflowing)
            _log.warning("text of %d tokens cut to %d: %r", count, most, text)
        tokens, mask = np.zeros((1, most), np.int64), np.zeros((1, most), bool)
        tokens[0, : len(encoded.ids)], mask[0, : len(encoded.ids)] = encoded.ids, True
        made: np.ndarray = session.run(None, {"tokens": tokens, "token_mask": mask})[0]
        return made

    def _load(self) -> tuple[Tokenizer, InferenceSession]:
        if self._loaded is None:
            from onnxruntime import InferenceSession
            from tokenizers import Tokenizer

            self._loaded = (
                Tokenizer.from_file(str(self._folder / "tokenizer.json")),
                InferenceSession(self._folder / "encode.onnx", providers=["CPUExecutionProvider"]),
            )
        return self._loaded
