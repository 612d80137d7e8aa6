"""Text into embeddings, by the encoder in ONNX that a bundle holds; without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lltk.files.reading import read_text
from lltk.graph.contract import Contract, Role
from lltk.stream.runtimes.onnx_graph import OnnxGraph
from lltk.stream.text import KeepingEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class BundleTextEncoder(KeepingEncoder):
    """A bundle's text encoder and tokenizer, loaded when a text first needs them.

    It gives what `lltk.stream.text.TextEncoder` does: texts are cleaned, longer ones are cut with a
    warning, and an embedding is zero after its text's last token. It runs on the CPU, and one
    thread at a time uses it.

    Args:
        folder: a bundle's ``text``.
        contract: of the graph ``encode``.
        vocabulary: how many tokens it knows.
        digest: of the files in the folder.
        cache: see `KeepingEncoder`.
    """

    def __init__(
        self,
        folder: Path,
        contract: Contract,
        vocabulary: int,
        digest: str,
        cache: Path | None = None,
    ) -> None:
        (made,) = contract.outputs.values()
        super().__init__(made.shape[1], made.dtype, torch.device("cpu"), cache)
        self._folder, self._contract, self._digest = folder, contract, digest
        self._vocabulary = vocabulary
        self._loaded: tuple[Tokenizer, OnnxGraph] | None = None

    @property
    def digest(self) -> str:
        return self._digest

    def to(self, device: torch.device | str) -> None:
        """Stay on the CPU, which is where it is put."""
        assert torch.device(device).type == "cpu", "it runs on the CPU"

    def free(self) -> None:
        """Drop the encoder from memory; it is loaded again when a text needs it."""
        self._loaded = None

    def _run(self, texts: list[str]) -> list[Tensor]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Tensor:
        tokenizer, graph = self._load()
        encoded = tokenizer.encode(text)
        self._warn(text, len(encoded.ids) + sum(len(part.ids) - 1 for part in encoded.overflowing))
        tokens = torch.zeros(1, self._text_tokens, dtype=torch.int64)
        mask = torch.zeros(1, self._text_tokens, dtype=torch.bool)
        count = len(encoded.ids)
        tokens[0, :count], mask[0, :count] = torch.tensor(encoded.ids), True
        named = self._contract.named({Role.TOKENS: tokens, Role.TOKEN_MASK: mask})
        (embedding,) = graph(named).values()
        return embedding[0, :count]

    def _load(self) -> tuple[Tokenizer, OnnxGraph]:
        if self._loaded is None:
            tokenizer = read_tokenizer(self._folder / "tokenizer.json", self._vocabulary)
            tokenizer.enable_truncation(self._text_tokens)
            graph = OnnxGraph(self._folder / "encode.onnx", self._contract)
            self._loaded = tokenizer, graph
        return self._loaded


def read_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """A tokenizer whose tokens an encoder knows.

    Args:
        path: of its JSON.
        vocabulary: how many tokens the encoder knows.

    Raises:
        ValueError: it is no tokenizer, or has others.
    """
    from tokenizers import Tokenizer

    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # of no narrower class
        raise ValueError(f"{path}: is no tokenizer ({error}); export the recipe again") from error
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= vocabulary:
        raise ValueError(
            f"{path}: has a token {last}, and the text encoder beside it knows {vocabulary}; "
            "export the recipe again"
        )
    return tokenizer
