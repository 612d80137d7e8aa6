"""Clips that were encoded once into shards train as the videos do, and are checked when read."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import Run, refused
from hypothesis import given
from hypothesis import strategies as st
from prepared_sets import CLIPS, changes, contents, prepared, recipe, save_clips
from safetensors.torch import load
from test_train_cli import sets

from lltk.tasks.clips import TinyLatents, encoded_clips
from lltk.tasks.encoder import encoder_for
from lltk.tasks.preparing import plan_preparing, prepare, prepared_clips
from lltk.train.clip_shards import Shard, packed, unpacked
from lltk.train.data import ReadsAhead, in_epochs
from lltk.train.prepared import Prepared
from lltk.training import open_training, plan_training

pytestmark = pytest.mark.cpu

NAMES = ["held-out-000000.tar", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and what was prepared from them."""
    made = tmp_path_factory.mktemp("clips")
    save_clips(made)
    prepared(made, made / "set")
    return made


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the set."""
    return Path(shutil.copytree(folder / "set", tmp_path / "set"))


def dataset(folder: Path, made: Path, *more: str) -> Prepared:
    plan = plan_preparing(recipe(folder, f"train.data.prepared={made}", *more))
    return prepared_clips(plan.recipe, plan.section)


def losses(
    run_folder: Path, folder: Path, *more: str
) -> list[tuple[float, float, dict[str, float]]]:
    plan = plan_training(recipe(folder, *more))
    with open_training(plan, run_folder, resume=True) as run:
        return [(m.loss, m.grad_norm, dict(m.validation)) for m in run]


def test_a_set_trains_as_its_videos_do(folder: Path, tmp_path: Path) -> None:
    """Four steps of three clips are more than two epochs of five; the videos are gone.

    So does a run that began with the videos and goes on with the set.
    """
    raw = losses(tmp_path / "raw", folder)
    assert len({loss for loss, *_ in raw}) == 4 and raw[1][2] and not raw[0][2]
    named = f"train.data.prepared={folder / 'set'}"
    shutil.move(folder / "video", tmp_path / "video")
    try:
        assert losses(tmp_path / "prepared", folder, named) == raw
        for step in (3, 4):
            shutil.rmtree(tmp_path / "raw" / "checkpoints" / f"step_{step:08d}")
        assert losses(tmp_path / "raw", folder, named) == raw[2:]
    finally:
        shutil.move(tmp_path / "video", folder / "video")
    assert (tmp_path / "prepared" / "samples" / "step_00000004" / "samples.mp4").stat().st_size


def test_clips_of_the_world_are_prepared_too(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two shards; the last block has fewer clips, as in a run without the set."""
    monkeypatch.setattr(TinyLatents, "block", 2)
    monkeypatch.setattr("lltk.tasks.preparing._WORLD_SHARD", 2)
    world = ["train.data.folder=null", "train.data.clips=3", "geometry.height=128"]
    world += ["geometry.width=128", "train.data.frames=4", "geometry.batch=1", "train.batch=1"]
    plan = plan_preparing(recipe(folder, *world))
    section, geometry, device = plan.section, plan.recipe.geometry, plan.device
    encoder = encoder_for(section.data, geometry, device, torch.float32)
    monkeypatch.setattr("lltk.tasks.preparing.encoder_for", lambda *given: encoder)
    made = tmp_path / "set"
    assert sorted(prepare(plan, made).files) == NAMES[:3]
    raw = encoded_clips(section, geometry, encoder, device)
    own = dataset(folder, made, *world)
    for seed, indices in ((0, range(10, 18)), (~0, range(3, 4))):
        wanted, found = raw.batch(seed, indices), own.batch(seed, indices)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_shard_is_a_plain_tar_file(folder: Path) -> None:
    """Python's tarfile and safetensors read it; names are keys and suffixes, as for WebDataset."""
    assert sorted(contents(folder / "set")) == [*NAMES[:1], "prepared.json", *NAMES[1:]]
    for number, clips in enumerate([[0, 1], [2, 3], [4]]):
        with tarfile.open(folder / "set" / f"shard-{number:06d}.tar") as tar:
            members = {member.name: member for member in tar}
            wanted = [
                f"{clip:08d}{suffix}" for clip in clips for suffix in (".safetensors", ".json")
            ]
            assert list(members) == wanted
            assert all(member.isreg() and member.mtime == 0 for member in members.values())
            tensors = load(tar.extractfile(wanted[0]).read())  # type: ignore[union-attr]
            said = json.load(tar.extractfile(wanted[1]))  # type: ignore[arg-type]
    assert tensors["latents"].shape == (4, 6, 2, 2) and tensors["latents"].dtype == torch.float32
    assert said["opens"] == tensors["opens"].tolist() and len(said["prompts"]) == 3
    assert set(said["prompts"]) <= {
        "a red square", "a blue star pulsing", "The scene transitions. a blue star pulsing",
    }  # fmt: skip


def test_only_the_clips_that_are_asked_for_are_read(folder: Path, copied: Path) -> None:
    own = dataset(folder, copied)
    for name in NAMES[:1] + NAMES[2:]:
        (copied / name).write_bytes(b"nothing")
    first = next(i for i in range(99) if in_epochs(0, CLIPS, range(i, i + 1))[0] < 2)
    own.batch(0, range(first, first + 1))
    assert "shard-00000" in refused(own.batch, 0, range(CLIPS))


def test_the_next_clips_are_read_meanwhile(folder: Path, copied: Path) -> None:
    own = dataset(folder, copied)
    assert isinstance(own, ReadsAhead)
    for seed in (0, ~0):
        wanted = own.batch(seed, range(2, 4))
        own.ahead(seed, range(2, 4))
        own.batch(seed, range(1))  # is read after them
        for name in NAMES:
            (copied / name).rename(copied / f"away-{name}")
        found = own.batch(seed, range(2, 4))
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert "No such file" in refused(own.batch, seed, range(2, 4))  # none was begun
        for name in NAMES:
            (copied / f"away-{name}").rename(copied / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_shard_is_refused_by_name(folder: Path, copied: Path, name: str) -> None:
    shard = copied / name
    whole = shard.read_bytes()
    own = dataset(folder, copied)
    asked = (~0, range(16)) if name[0] == "h" else (0, range(CLIPS))
    for at in (whole.index(b'"dtype"'), whole.index(b"\0" * 16, 2000) - 40, 700):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert refused(own.batch, *asked).startswith(f"{shard}: 0000000")
        message = refused(prepared, folder, copied, resume=True)
        assert message.startswith(f"{shard}: was changed after it was written, or is damaged")
        assert message.endswith("remove it and make it again by lltk prepare … --resume")
    shard.write_bytes(whole[:900])
    assert str(shard) in refused(dataset(folder, copied).batch, *asked)
    shard.unlink()
    assert refused(dataset, folder, copied).startswith(f"{shard}: is missing; remove it and make")
    prepared(folder, copied, resume=True)
    assert contents(copied) == contents(folder / "set")


def test_a_set_that_is_not_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves the shards before; they are checked clip by clip, and the rest is made."""
    made, write = tmp_path / "set", os.write
    written = 0

    def save(descriptor: int, data: memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > 20000:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr("lltk.files.writing.os.write", save)
        prepared(folder, made)
    there = sorted(contents(made))
    assert there[0] == "prepared.json" and 1 < len(there) < 5
    assert str(made / NAMES[len(there)]) in str(caught.value)
    assert "is not finished; go on with lltk prepare" in refused(dataset, folder, made)
    assert refused(prepared, folder, made).endswith("resume it, or name another folder")
    whole = (made / NAMES[1]).read_bytes()
    (made / NAMES[1]).write_bytes(whole.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    assert refused(prepared, folder, made, resume=True).startswith(f"{made / NAMES[1]}: 00000000.")
    (made / NAMES[1]).write_bytes(whole)
    prepared(folder, made, resume=True)
    assert contents(made) == contents(folder / "set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("geometry.height=64", "geometry.height was 32 and is 64"),
        ("geometry.text_tokens=9", "geometry.text_tokens was 16 and is 9"),
        ("train.data.frames=null", "geometry.frames was 6 and is 4"),
        ("train.data.fps=8.0", "train.data.fps was 16.0 and is 8.0"),
        ("train.data.clips=4", "train.data.clips was 5 and is 4"),
        ("train.data.longlive={}", "train.data.longlive was None and is {"),
        ("model.dtype=bfloat16", "model.dtype was float32 and is bfloat16"),
    ],
)
def test_another_recipe_is_refused(folder: Path, copied: Path, change: str, message: str) -> None:
    more = [change, *(["train.data.shots=1"] if "longlive" in change else [])]
    assert message in refused(dataset, folder, copied, *more)
    plan = plan_preparing(recipe(folder, *more))
    assert message in refused(prepare, plan, copied, resume=True)
    assert contents(copied) == contents(folder / "set")


def test_other_encoders_are_refused_and_other_seeds_reorder(
    folder: Path, copied: Path, tmp_path: Path
) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    own = f"train.data.pipeline={tmp_path}"
    orders = [
        dataset(folder, copied, own, f"train.seed={seed}").batch(seed, range(CLIPS))["latents"]
        for seed in (0, 1)
    ]
    assert not torch.equal(*orders)
    assert torch.equal(*(order.flatten(1).sum(1).sort().values for order in orders))
    for part in ("vae", "text_encoder"):
        config = tmp_path / part / "config.json"
        config.write_text(config.read_text() + "\n")
    message = refused(dataset, folder, copied, own)
    assert "; vae was " in message and " text_encoder was " in message
    plan = plan_preparing(recipe(folder, "train.seed=1"))
    assert "train.seed was 0 and is 1" in refused(prepare, plan, copied, resume=True)


def test_the_manifest_and_the_folder_are_checked(
    folder: Path, copied: Path, tmp_path: Path
) -> None:
    manifest = copied / "prepared.json"
    manifest.write_text(manifest.read_text().replace('"clips": 5,', '"clips": 4,', 1))
    assert "was changed after it was written" in refused(dataset, folder, copied)
    manifest.unlink()
    assert "has no prepared.json" in refused(dataset, folder, copied)
    assert "has shards without prepared.json" in refused(prepared, folder, copied, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    assert "holds what is no part of a prepared set" in refused(prepared, folder, tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["notes"]


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 30), st.integers(1, 30))
def test_each_epoch_asks_for_each_clip_once(seed: int, count: int, start: int, size: int) -> None:
    whole = in_epochs(seed, count, range(0, 8 * count))
    for epoch in range(8):
        assert sorted(whole[epoch * count : (epoch + 1) * count]) == list(range(count))
    asked = range(start, min(start + size, len(whole)))
    assert in_epochs(seed, count, asked) == [whole[index] for index in asked]
    if count > 4:
        assert len({tuple(whole[e * count : (e + 1) * count]) for e in range(8)}) > 1
        assert whole != in_epochs(seed + 1, count, range(0, 8 * count))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 4), st.booleans())
def test_embeddings_are_packed_without_loss(chosen: list[int], tokens: int, padded: bool) -> None:
    words = torch.randn(3, tokens, 2, generator=torch.Generator().manual_seed(1))
    words[1, tokens // 2 :] = 0
    text = torch.nn.functional.pad(words, (0, 0, 0, 3 if padded else 0))[chosen]
    given_ = {"text": text, "latents": torch.ones(1), "opens": torch.tensor(chosen) > 0}
    made = packed(given_)
    assert len(made["prompts"]) == len(set(chosen)) and made["prompts"].shape[1] <= tokens
    back = unpacked(made, text.shape[1])
    assert back.keys() == given_.keys() and torch.equal(back["text"], text)


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    from lltk.files.tensors import tensor_bytes

    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("00000000.safetensors", tensor_bytes({"x": torch.ones(1)}, {})),
            ("00000001.safetensors", b"{}"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shard = Shard(path)
    assert "00000000.safetensors: is no encoded clip" in refused(shard.clip, 0)
    assert "00000001.safetensors: differs from its checksum, or has none" in refused(shard.clip, 1)
    assert "holds no 00000002.safetensors" in refused(shard.clip, 2)


def test_the_command(run: Run, folder: Path, tmp_path: Path) -> None:
    options = ["tiny_train", *sets(changes(folder)), "--device", "cpu"]
    made = tmp_path / "set"
    code, out, err = run("prepare", *options, "-o", made, "--dry-run", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert (plan["clips"], plan["held_out"], plan["latent_bytes"]) == (
        5,
        18,
        23 * 4 * 6 * 2 * 2 * 4,
    )
    assert plan["shards"] == ["shard-000000.tar", "held-out-000000.tar"] and not made.exists()
    code, out, err = run("prepare", *options, "-o", made, "--json")
    assert code == 0, err
    assert json.loads(out)["files"].keys() == {"shard-000000.tar", "held-out-000000.tar"}
    before = contents(made)
    assert run("prepare", *options, "-o", made)[0] == 2
    code, out, err = run("prepare", *options, "-o", made, "--resume")
    assert code == 0 and "train.data.prepared=" in out and contents(made) == before, err
    named = ["--set", f"train.data.prepared={made}"]
    code, out, err = run("train", *options, *named, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["memory"].keys() >= {"vae", "text encoder"}, err
    unsampled = ["--set", "train.sample_every=null"]
    code, out, err = run("train", *options, *named, *unsampled, "--dry-run", "--json")
    assert code == 0 and not json.loads(out)["memory"].keys() & {"vae", "text encoder"}, err
    code, _, err = run("train", *options, *named, "--dry-run", "--set", "train.data.fps=8")
    assert code == 2 and "train.data.fps was 16.0 and is 8.0" in " ".join(err.split())
    code, out, err = run("train", *options, *named, "-o", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["steps"] == 4, err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "train.data.clips=null"], "train.data.clips: does not say how many"),
        (["--set", "train.data.pipeline=null"], "train.data.pipeline: names no folder"),
        (["--dry-run", "--set", "train.data.folder=nowhere"], "nowhere: has no video/"),
        (["--dry-run", "--set", "train.data.frames=5"], "train.data.frames: 5 latent frames, but"),
        (["--set", "train.data.prepared=elsewhere"], "is not elsewhere, which train.data.prepared"),
    ],
)
def test_bad_input_is_refused(
    run: Run, folder: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    code, _, err = run(
        "prepare", "tiny_train", *sets(changes(folder)), *more, "-o", tmp_path / "set"
    )
    assert code == 2 and message in " ".join(err.split())
    assert not (tmp_path / "set").exists()


def test_what_has_no_clips_to_encode_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("prepare", "tiny_vae", "-o", tmp_path / "set")
    assert code == 2 and "trains an autoencoder" in " ".join(err.split())
