"""The text encoder against diffusers' own, its cache, and the tiny encoder's embeddings."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from helpers import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from lltk.models.configs import named_config
from lltk.models.tiny import world
from lltk.models.tiny.text import save_text_encoder
from lltk.stream.text import TextEncoder, weight_bytes

pytestmark = pytest.mark.cpu

TOKENS = 16
RED = "a red circle moving left on a dark background"
BLUE = RED.replace("red", "blue")
PREFIX = "The scene transitions. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    save_text_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder(folder, TOKENS)


def captions(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [world.draw_shot(generator).caption for _ in range(count)]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_embeddings_are_diffusers_own(folder: Path, encoder: TextEncoder) -> None:
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=None,
        scheduler=None,
    )
    texts = [RED, f"  {PREFIX}A green  star, rising &amp; up ", "", "purple " * 9]
    with torch.no_grad():
        wanted = pipeline._get_t5_prompt_embeds(texts, max_sequence_length=TOKENS)
    made = encoder.encode(texts)
    assert made.shape == (4, TOKENS, named_config("tiny")["text_dim"])
    assert torch.equal(made, wanted)
    assert not torch.equal(encoder.encode([BLUE]), wanted[:1])


def test_rows_after_the_last_token_are_zero(encoder: TextEncoder) -> None:
    (made,) = encoder.encode([RED])
    used = len(RED.split()) + 1
    assert float(made[:used].norm(dim=1).min()) > 1
    assert not made[used:].any()


def test_captions_lie_far_apart(encoder: TextEncoder) -> None:
    texts = list(dict.fromkeys(captions(600)))
    made = encoder.encode(texts).flatten(1)
    distance = torch.cdist(made, made)
    distance.fill_diagonal_(torch.inf)
    assert float(distance.min() / made.norm(dim=1).mean()) > 0.3
    one, same, order = encoder.encode([RED, f" {RED.upper()}\n", "dark a " + RED[2:]]).flatten(1)
    assert torch.equal(one, same), "white space and case tell nothing"
    assert difference(one, order) > 0.3


def test_a_word_shows_where_it_stands(encoder: TextEncoder) -> None:
    red, blue, later = encoder.encode([RED, BLUE, PREFIX + RED])
    far = (red - blue).norm(dim=1)
    assert int(far.argmax()) == 1, "the second word differs"
    words = torch.cdist(later[4:14], red[:10])
    assert words.argmin(1).tolist()[1:8] == list(range(1, 8)), "a prefix leaves words themselves"


def test_every_caption_fits_with_its_prefix(
    encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        encoder.encode([PREFIX + caption for caption in captions(600)])
        assert not caplog.records
        encoder.encode([f"{PREFIX} with {RED}, slowly"])
    assert "cut to 16" in caplog.text


def test_unknown_words_differ(encoder: TextEncoder) -> None:
    one, other = encoder.encode(["a purple circle", "a violet circle"])
    assert difference(one, other) > 0.3


def test_neighbours_do_not_matter(encoder: TextEncoder) -> None:
    texts = [RED, PREFIX + BLUE, RED, *captions(40)]
    together = encoder.encode(texts)
    assert torch.equal(together[0], together[2])
    for text, made in zip(texts, together, strict=True):
        assert difference(encoder.encode([text])[0], made) < 1e-6


def test_a_freed_encoder_loads_again(folder: Path) -> None:
    encoder = TextEncoder(folder, TOKENS)
    first = encoder.encode([RED])
    assert encoder._loaded is not None
    encoder.free()
    assert encoder._loaded is None
    encoder.to("cpu")
    assert torch.equal(encoder.encode([RED]), first)


@pytest.mark.parametrize("bars", [True, False])
def test_loading_draws_nothing(
    bars: bool, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The settings of transformers are afterwards as they were, after an error too."""
    from transformers.utils import logging as reports

    before = reports.is_progress_bar_enabled()
    (reports.enable_progress_bar if bars else reports.disable_progress_bar)()
    settings = reports.get_verbosity(), bars
    try:
        TextEncoder(folder, TOKENS).encode([RED])
        assert capfd.readouterr() == ("", "")
        assert (reports.get_verbosity(), reports.is_progress_bar_enabled()) == settings
        shutil.copytree(folder, tmp_path / "damaged")
        (tmp_path / "damaged" / "text_encoder" / "model.safetensors").write_bytes(b"")
        assert "cannot be read" in refused(TextEncoder(tmp_path / "damaged", TOKENS).encode, [RED])
        assert (reports.get_verbosity(), reports.is_progress_bar_enabled()) == settings
    finally:
        (reports.enable_progress_bar if before else reports.disable_progress_bar)()


def test_threads_load_at_once(folder: Path, encoder: TextEncoder) -> None:
    """transformers changes the process while it loads: unserialised, no later load would work."""
    wanted, start = encoder.encode([RED]), Barrier(4)

    def loaded(_: int) -> Tensor:
        start.wait()
        return TextEncoder(folder, TOKENS).encode([RED])

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(loaded, range(4)))
    assert all(torch.equal(each, wanted) for each in made)


Q = "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({Q: None}, f"text_encoder: weights 1 missing ({Q});"),
        ({"lm_head.weight": torch.ones(1)}, "text_encoder: weights 1 unexpected (lm_head.weight);"),
        ({Q: torch.ones(3, 5)}, f"text_encoder: weights 1 misshapen ({Q} (3, 5) instead of "),
        ({Q: torch.nan}, f"text_encoder: {Q} holds NaN"),
    ],
)
def test_weights_of_another_model_are_refused(
    change: dict[str, Any], found: str, folder: Path, tmp_path: Path
) -> None:
    """transformers would draw random numbers for what is missing, and leave out what is not."""
    shutil.copytree(folder, tmp_path / "p")
    file = tmp_path / "p/text_encoder/model.safetensors"
    state = load_file(file)
    for name, value in change.items():
        state[name] = torch.full_like(state[name], value) if value is torch.nan else value
    save_file({k: v for k, v in state.items() if v is not None}, file, {"format": "pt"})
    assert found in refused(TextEncoder(tmp_path / "p", TOKENS).encode, [RED])


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({"variant": "fp16"}, "model.fp16.safetensors"),
        ({"variant": "fp16", "max_shard_size": "20KB"}, "model.safetensors.index.fp16.json"),
        ({"max_shard_size": "20KB"}, "model.safetensors.index.json"),
    ],
)
def test_variants_and_shards(
    options: dict[str, Any], file: str, folder: Path, encoder: TextEncoder, tmp_path: Path
) -> None:
    from transformers import UMT5EncoderModel

    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    model.save_pretrained(tmp_path / "text_encoder", **options)
    assert (tmp_path / "text_encoder" / file).exists()
    assert torch.equal(TextEncoder(tmp_path, TOKENS).encode([RED]), encoder.encode([RED]))


def test_a_torch_file_of_weights(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "p")
    file = tmp_path / "p/text_encoder/model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    size = weight_bytes(file.parent, torch.float32)
    file.unlink()
    assert torch.equal(TextEncoder(tmp_path / "p", TOKENS).encode([RED]), encoder.encode([RED]))
    assert weight_bytes(file.parent, torch.float32) == pytest.approx(size, rel=0.1)
    torch.save({"x": Path("/")}, file.with_name("pytorch_model.bin"))
    assert "cannot be read" in refused(TextEncoder(tmp_path / "p", TOKENS).encode, [RED])


def test_one_of_several_variants_is_not_chosen(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "p")
    file = tmp_path / "p/text_encoder/model.safetensors"
    for variant in ("fp16", "bf16"):
        shutil.copy(file, file.with_name(f"model.{variant}.safetensors"))
    TextEncoder(tmp_path / "p", TOKENS).encode([RED])
    file.unlink()
    message = refused(TextEncoder(tmp_path / "p", TOKENS).encode, [RED])
    assert "holds the variants bf16, fp16; keep one" in message


# Cache


def unloadable(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> TextEncoder:
    encoder = TextEncoder(folder, TOKENS, cache=cache)

    def load() -> None:
        raise AssertionError("the encoder is loaded")

    monkeypatch.setattr(encoder, "_load", load)
    return encoder


def test_cached_embeddings_need_no_encoder(
    folder: Path, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = encoder.encode([RED, BLUE, RED])
    cached = TextEncoder(folder, TOKENS, cache=tmp_path)
    assert torch.equal(cached.encode([RED, BLUE, RED]), wanted)
    again = unloadable(folder, tmp_path, monkeypatch)
    assert torch.equal(again.encode([f"{RED} ", BLUE, RED]), wanted)
    with pytest.raises(AssertionError, match="is loaded"):
        again.encode([PREFIX + RED])


@pytest.mark.parametrize("change", ["weights", "tokens", "dtype"])
def test_another_encoder_has_other_entries(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "pipeline", tmp_path / "cache"
    save_text_encoder(folder)
    TextEncoder(folder, TOKENS, cache=cache).encode([RED])
    unloadable(folder, cache, monkeypatch).encode([RED])
    other = unloadable(folder, cache, monkeypatch)
    if change == "weights":
        save_text_encoder(folder, seed=1)
    elif change == "tokens":
        other._text_tokens = TOKENS + 1
    else:
        other._dtype = torch.bfloat16
    with pytest.raises(AssertionError, match="is loaded"):
        other.encode([RED])


def test_bfloat16_is_cached_as_such(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        encoder = TextEncoder(folder, TOKENS, torch.bfloat16, cache=tmp_path)
        assert encoder.encode([RED]).dtype == torch.bfloat16


def test_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(folder, TOKENS, cache=tmp_path)
    encoder.encode([RED])
    (entry,) = tmp_path.glob("*.safetensors")
    entry.write_bytes(b"cut short")
    assert "delete it" in refused(encoder.encode, [RED])

    broken = tmp_path / "pipeline"
    save_text_encoder(broken)
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"cut short")
    assert "cannot be read" in refused(TextEncoder(broken, TOKENS).encode, [RED])
    (broken / "text_encoder" / "model.safetensors").unlink()
    assert "cannot be read" in refused(TextEncoder(broken, TOKENS).encode, [RED])
    assert refused(TextEncoder, tmp_path, TOKENS).endswith(
        "has no text_encoder/; name a pipeline's folder, as diffusers saves it"
    )
