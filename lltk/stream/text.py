"""Text into embeddings, by an encoder in diffusers' layout."""

from __future__ import annotations

import hashlib
import html
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import ftfy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lltk.files.reading import check_regular
from lltk.files.tensors import checksum, read_tensors, save_tensors
from lltk.files.writing import write_text
from lltk.graph.loading import LOADING
from lltk.graph.weights import check_finite, check_names
from lltk.stream.runtimes.cuda_graph import empty_cache

_log = logging.getLogger(__name__)
_PARTS = ("text_encoder", "tokenizer")
_CALL = 8192
"""How many tokens one call of the encoder takes at most."""
_WEIGHTS = re.compile(
    r"(pytorch_)?model\.((?P<variant>[^.-]+)\.)?(safetensors|bin)"
    r"|(pytorch_)?model\.(safetensors|bin)\.index\.((?P<of_index>[^.]+)\.)?json"
)
"""What transformers names the file of a model's weights, or the index of their shards."""


def clean(text: str) -> str:
    """The text as Wan's encoder was trained to see it, which is diffusers' ``prompt_clean``.

    Characters that were decoded wrongly are mended, typographic quotes, ligatures and full-width
    letters become plain ones, HTML entities what they stand for, and white space single spaces.
    """
    mended = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", mended).strip()


class Encoder(Protocol):
    """Makes embeddings of texts. One thread at a time uses it.

    A text's embedding is zero after its last token, so that no mask is needed to attend to it.
    """

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, at least one: [n, text_tokens, text_dim].

        Raises:
            ValueError: the encoder's files, or a cached embedding, cannot be read.
        """

    def to(self, device: torch.device | str) -> None:
        """Run on another device from now on."""

    def free(self) -> None:
        """Drop it from memory; it is loaded again when a text needs it."""


class KeepingEncoder(ABC):
    """An encoder that cleans texts, and may keep their embeddings; see `Encoder`.

    Args:
        text_tokens: how many tokens an embedding has. Shorter texts are padded, longer ones are cut
            with a warning.
        dtype: of the embeddings.
        device: where the encoder runs, and where the embeddings are.
        cache: a folder that keeps embeddings, under a digest of the encoder's files and the text.
            None keeps none.
    """

    def __init__(
        self, text_tokens: int, dtype: torch.dtype, device: torch.device, cache: Path | None
    ) -> None:
        self._text_tokens = text_tokens
        self._dtype = dtype
        self._device = device
        self._cache = cache

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    @abstractmethod
    def digest(self) -> str:
        """Of the encoder's files and its tokenizer's."""

    @abstractmethod
    def _run(self, texts: list[str]) -> list[Tensor]:
        """Encode texts; their embeddings without padding, [tokens, text_dim] each."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, at least one: [n, text_tokens, text_dim].

        Raises:
            ValueError: the encoder's files, or a cached embedding, cannot be read.
        """
        cleaned = [clean(text) for text in texts]
        known = {text: self._recall(text) for text in cleaned}
        missing = [text for text, embedding in known.items() if embedding is None]
        some = max(1, _CALL // self._text_tokens)
        for start in range(0, len(missing), some):
            batch = missing[start : start + some]
            for text, embedding in zip(batch, self._run(batch), strict=True):
                known[text] = embedding
                self._keep(text, embedding)
        padded = [self._padded(embedding) for embedding in known.values() if embedding is not None]
        rows = {text: row for row, text in enumerate(known)}
        return torch.stack(padded)[[rows[text] for text in cleaned]]

    def _warn(self, text: str, tokens: int) -> None:
        """Say that a text is cut, if it has more tokens than an embedding."""
        if tokens > self._text_tokens:
            _log.warning("text of %d tokens cut to %d: %r", tokens, self._text_tokens, text)

    def _padded(self, embedding: Tensor) -> Tensor:
        after = self._text_tokens - len(embedding)
        return torch.nn.functional.pad(embedding.to(self._device), (0, 0, 0, after))

    def _recall(self, text: str) -> Tensor | None:
        if self._cache is None:
            return None
        path = self._place(self._cache, text)
        if not path.exists():
            return None
        tensors, _ = read_tensors(path)
        if tensors.keys() != {"embedding"}:
            raise ValueError(f"{path}: holds no embedding; delete it")
        return tensors["embedding"]

    def _keep(self, text: str, embedding: Tensor) -> None:
        if self._cache is not None:
            save_tensors(self._place(self._cache, text), {"embedding": embedding}, {})

    def _place(self, cache: Path, text: str) -> Path:
        key = _hash([self.digest, str(self._dtype), self._text_tokens, text])
        return cache / f"{key}.safetensors"


class TextEncoder(KeepingEncoder):
    """A UMT5 and its tokenizer, loaded when a text first needs them. One thread at a time uses it.

    A text's embedding is zero after its last token, so that no mask is needed to attend to it. The
    other texts of one `encode` change only its last bits, and so does another device.

    Args:
        folder: a pipeline's folder, with ``text_encoder/`` and ``tokenizer/``.
        text_tokens, dtype, device, cache: see `KeepingEncoder`; the encoder runs in the dtype.
        wanted: the `encoder_digest` that the files must have; None takes any.

    Raises:
        ValueError: the folder lacks one of its parts.
    """

    def __init__(
        self,
        folder: Path,
        text_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache: Path | None = None,
        wanted: str | None = None,
    ) -> None:
        for part in _PARTS:
            if not (folder / part).is_dir():
                raise ValueError(
                    f"{folder}: has no {part}/; name a pipeline's folder, as diffusers saves it"
                )
        super().__init__(text_tokens, dtype, torch.device(device), cache)
        self._folder = folder
        self._wanted = wanted
        self._digest: str | None = None
        self._loaded: tuple[Any, Any] | None = None

    @property
    def digest(self) -> str:
        """See `encoder_digest`.

        Raises:
            ValueError: it is not the wanted one.
        """
        if self._digest is None:
            found = encoder_digest(self._folder, self._cache)
            if self._wanted not in (None, found):
                raise ValueError(
                    f"{self._folder}: holds another text encoder than the one that is wanted "
                    f"(digest {found[:16]}, not {str(self._wanted)[:16]}); name its pipeline, as "
                    "with --set stream.pipeline=FOLDER"
                )
            self._digest = found
        return self._digest

    def to(self, device: torch.device | str) -> None:
        """Run on another device from now on; a loaded encoder moves there."""
        self._device = torch.device(device)
        if self._loaded is not None:
            self._loaded[1].to(self._device)

    def free(self) -> None:
        """Drop the encoder from memory; it is loaded again when a text needs it."""
        self._loaded = None
        if self._device.type == "cuda":
            empty_cache()

    @torch.no_grad()
    def _run(self, texts: list[str]) -> list[Tensor]:
        tokenizer, model = self._load()
        for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
            self._warn(text, len(ids))
        tokens = tokenizer(
            texts,
            padding="max_length",
            max_length=self._text_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        hidden = model(tokens.input_ids, tokens.attention_mask).last_hidden_state.to(self._dtype)
        lengths = tokens.attention_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(hidden, lengths, strict=True)]

    def _load(self) -> tuple[Any, Any]:
        """The tokenizer and the model."""
        if self._loaded is None:
            if self._wanted is not None:
                assert self.digest == self._wanted
            encoder, words = (self._folder / part for part in _PARTS)
            try:
                with LOADING:
                    from transformers import AutoTokenizer

                    tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
                    model = read_encoder(encoder, self._dtype)
            except (OSError, SafetensorError, UnpicklingError) as error:
                raise ValueError(
                    f"{self._folder}: its text encoder cannot be read ({error}); download it again"
                ) from error
            self._loaded = tokenizer, model.eval().requires_grad_(False).to(self._device)
        return self._loaded


def read_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """The encoder in a folder; raises ValueError unless its weights are exactly the model's."""
    with LOADING, _silent():
        from transformers import UMT5EncoderModel

        model, found = UMT5EncoderModel.from_pretrained(
            folder,
            dtype=dtype,
            variant=_variant(folder),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    weights = dict(model.named_parameters())
    misshapen = [
        f"{name} {tuple(stored)} instead of {tuple(shape)}"
        for name, stored, shape in sorted(found["mismatched_keys"])
    ]
    present = weights.keys() - found["missing_keys"] | found["unexpected_keys"]
    check_names(sorted(present), sorted(weights), misshapen, str(folder))
    check_finite(weights, str(folder))
    return model


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from drawing a progress bar, and from reporting what we check ourselves.

    Its settings are the process's, so this is for the holder of `LOADING`. They are put back.
    """
    with LOADING:
        from transformers.utils import logging as reports

    verbosity, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    if bars:
        reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        if bars:
            reports.enable_progress_bar()


def _variant(folder: Path) -> str | None:
    """The variant, such as ``fp16``, that the names of a model's files have; None if not all do."""
    matches = [_WEIGHTS.fullmatch(path.name) for path in folder.iterdir()]
    variants = {match["variant"] or match["of_index"] for match in matches if match}
    if len(variants) > 1 and None not in variants:
        raise ValueError(
            f"{folder}: holds the variants {', '.join(sorted(filter(None, variants)))}; keep one"
        )
    return variants.pop() if len(variants) == 1 else None


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in a dtype; 0 where its files are not there.

    Torch files are not opened for it: they count by their size.

    Raises:
        ValueError: a file is damaged.
    """
    count = 0
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        check_regular(file)
        try:
            with safe_open(file, "pt") as weights:
                count += sum(prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged ({error}); download it again") from error
    whole = [] if files else [file.stat().st_size for file in folder.glob("*.bin")]
    return count * dtype.itemsize + sum(whole)


def encoder_digest(folder: Path, cache: Path | None = None) -> str:
    """A digest of a text encoder's files and its tokenizer's.

    Args:
        folder: a pipeline's folder.
        cache: a folder that keeps digests of files; None reads each.
    """
    return files_digest([folder / part for part in _PARTS], cache)


def files_digest(folders: Sequence[Path], cache: Path | None = None) -> str:
    """A digest of the files in folders, of their names and contents; as `encoder_digest`."""
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    return _hash([(file.name, _digest(file, cache)) for file in files if file.is_file()])


def _digest(file: Path, cache: Path | None) -> str:
    """The file's SHA-256, read from the cache while its size and time stay: weights are large."""
    if cache is None:
        return checksum(file)
    state = file.stat()
    note = cache / f"{_hash([str(file.resolve()), state.st_size, state.st_mtime_ns])}.sha256"
    if not note.exists():
        write_text(note, checksum(file))
    return note.read_text("utf-8")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
