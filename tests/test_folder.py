"""Samples of a folder of captioned clips: whole chunks, marked cuts, bad clips said and skipped."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from footage import FPS, damage, numbered, numbers, write_clip
from helpers import refused

from lltk.graph.geometry import Geometry
from lltk.models import wan_vae
from lltk.models.tiny.text import save_text_encoder
from lltk.models.wan_vae import encode, make_vae, save_vae
from lltk.parallel.mesh import ALONE, Mesh
from lltk.stream.script import SCENE_CUT
from lltk.tasks.clips import encoded_clips
from lltk.tasks.encoder import PipelineEncoder, encoder_for
from lltk.train.data import Dataset
from lltk.train.folder import FolderClips
from lltk.train.frames import covering
from lltk.train.recipe import TrainSection

pytestmark = pytest.mark.cpu

GEOMETRY = Geometry(height=32, width=32, chunk=2, frames=6)
FIRST, LATER = 5, 8
"""Video frames of a chunk of two latents."""
WHOLE = FIRST + 2 * LATER
VAE = wan_vae.validate_config(
    {
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "base_dim": 4,
        "decoder_base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [0.5, 1.5, 0.8, 1.1],
    }
)


def clips(folder: Path, shots: int = 3, fps: float = FPS) -> FolderClips:
    return FolderClips(folder, GEOMETRY, fps, shots)


def test_chunks_follow_clips_and_cuts_are_marked(tmp_path: Path) -> None:
    """Clips are ordered by the numbers in their names: 10 comes after 2."""
    write_clip(tmp_path, "a", 2, numbered(0, FIRST + LATER + 3), "one")
    write_clip(tmp_path, "a", 10, numbered(30, LATER + 5), "two")
    found = clips(tmp_path)
    seen = set()
    for index in range(12):
        sample = found.sample(0, index)
        assert sample.video.shape == (WHOLE, 32, 32, 3) and sample.video.dtype == torch.uint8
        start, *_ = said = numbers(sample.video)
        seen.add(start)
        assert said == [*range(start, start + FIRST + LATER), *range(30, 30 + LATER)]
        assert sample.prompts == ("one", "one", f"{SCENE_CUT}two")
    assert seen == {0, 1, 2, 3}
    assert not found.skipped


def test_a_sample_follows_from_its_number(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path, name, 0, numbered(0, WHOLE + 20), name)
    one, other = clips(tmp_path), clips(tmp_path)
    ahead = [one.sample(5, index) for index in range(6)]
    for index in reversed(range(6)):
        again = other.sample(5, index)
        assert torch.equal(again.video, ahead[index].video)
        assert again.prompts == ahead[index].prompts
    assert len({numbers(sample.video)[0] for sample in ahead}) > 2
    assert numbers(one.sample(6, 0).video) != numbers(ahead[0].video)


def test_fewer_shots_keep_to_fewer_clips(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", 0, numbered(0, FIRST + LATER), "one")
    write_clip(tmp_path, "a", 1, numbered(30, WHOLE), "two")
    assert clips(tmp_path, shots=1).sample(0, 0).prompts == ("two",) * 3
    prompts = {clips(tmp_path, shots=2).sample(0, index).prompts for index in range(20)}
    cut = f"{SCENE_CUT}two"
    assert prompts == {("two",) * 3, ("one", "one", cut), ("one", cut, "two")}


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(8.0, [i // 2 for i in range(WHOLE)]), (32.0, [2 * i for i in range(WHOLE)])],
)
def test_frames_are_the_nearest_in_time(tmp_path: Path, fps: float, expected: list[int]) -> None:
    """Slower clips repeat frames, faster ones lose some."""
    write_clip(tmp_path, "a", 0, numbered(0, expected[-1] + 1), "one", fps)
    said = numbers(clips(tmp_path).sample(0, 0).video)
    assert all(abs(a - b) <= 1 for a, b in zip(said, expected, strict=True))
    assert said[0] == 0 and abs(said[-1] - expected[-1]) <= 1
    assert len(set(said)) == len(set(expected))


def test_a_place_far_into_a_long_clip_is_found(tmp_path: Path) -> None:
    """Reading begins at a keyframe before it."""
    write_clip(tmp_path, "a", 0, numbered(0, 63), "one")
    found = clips(tmp_path)
    for index in range(10):
        start, *_ = said = numbers(found.sample(1, index).video)
        assert said == list(range(start, start + WHOLE))


def test_bad_clips_are_skipped_counted_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = numbered(0, WHOLE)
    write_clip(tmp_path, "a", 0, good, "good")
    reasons = {
        write_clip(tmp_path, "a", 1, good[: FIRST - 1], "short"): "too short: 4 frames at 16 fps",
        write_clip(tmp_path, "a", 2, good, "  "): "its caption is empty",
        write_clip(tmp_path, "a", 3, good, None): "has no caption",
        write_clip(tmp_path, "b", 0, good, "cut off"): "holds no video",
        write_clip(tmp_path, "b", 1, good, "broken"): "its caption cannot be read (",
        write_clip(tmp_path, "b", 2, good, "cut short"): "too short",
        tmp_path / "video" / "a" / "notes.mp4": "its name is not a number",
    }
    (tmp_path / "caption" / "b" / "1.json").write_text("{")
    whole = (tmp_path / "video" / "b" / "0.mp4").read_bytes()
    (tmp_path / "video" / "b" / "0.mp4").write_bytes(whole[:200])
    (tmp_path / "video" / "b" / "2.mp4").write_bytes(whole[: whole.index(b"mdat") + 40])
    (tmp_path / "video" / "a" / "notes.mp4").write_bytes(b"not a clip")
    with caplog.at_level(logging.WARNING):
        found = clips(tmp_path)
    assert found.skipped.keys() == reasons.keys()
    for path, reason in reasons.items():
        assert found.skipped[path].startswith(reason), found.skipped[path]
        assert f"skipped {path}: {reason}" in caplog.text
    assert f"{tmp_path}: 7 files skipped" in caplog.text
    assert found.sample(0, 0).prompts == ("good",) * 3


def test_a_clip_that_turns_out_damaged_costs_another_place(tmp_path: Path) -> None:
    """Its packets are there, but no picture is in them; what is drawn instead is always the same"""
    write_clip(tmp_path, "a", 0, numbered(0, WHOLE + 4), "good")
    path = write_clip(tmp_path, "b", 0, numbered(0, WHOLE + 4), "damaged")
    damage(path)
    found, again = clips(tmp_path), clips(tmp_path)
    assert not found.skipped
    samples = [found.sample(0, index) for index in range(6)]
    assert {sample.prompts for sample in samples} == {("good",) * 3}
    assert list(found.skipped) == [path] and "damaged" in found.skipped[path]
    assert torch.equal(again.sample(0, 5).video, samples[5].video)


def rename(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


def test_every_name_is_used_or_listed(tmp_path: Path) -> None:
    """Suffixes of any case; a clip beside the folders is a sample of one shot."""
    whole, folder = numbered(0, WHOLE), tmp_path / "video"
    rename(write_clip(tmp_path, "a", 1, whole, "upper"), "1.MP4")
    rename(write_clip(tmp_path, "b", 1, whole, "mov"), "1.mov")
    rename(write_clip(tmp_path, "c", 1, whole, "none"), "1")
    write_clip(tmp_path, "d", 1, whole, "first")
    rename(write_clip(tmp_path, "d", 1, whole, "first"), "1.mkv")
    write_clip(tmp_path, "d", 1, whole, "first")
    write_clip(tmp_path, "", 7, whole, "top").rename(folder / "top.mp4")
    (tmp_path / "caption/7.json").rename(tmp_path / "caption/top.json")
    write_clip(tmp_path, "e/deep", 1, whole, "deep")
    (folder / "d/2.txt").write_text("a caption of some words\n" * 300)
    (folder / "d/3.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nhello\n")
    (folder / ".DS_Store").write_bytes(bytes(99))
    (tmp_path / "caption/d/9.json").write_text('"no clip"')
    (tmp_path / "caption/a/1.txt").write_text("another")
    found = clips(tmp_path, shots=1)
    used = {found.sample(0, index).prompts[0] for index in range(60)}
    assert used == {"upper", "mov", "none", "first", "top"}
    listed = {str(path.relative_to(tmp_path)): why for path, why in found.skipped.items()}
    reasons = {
        "video/d/1.mp4": "has the number of 1.mkv",
        "video/e/deep/1.mp4": "is too deep",
        "video/d/2.txt": "is text, not video",
        "video/d/3.srt": "holds no video",
        "video/.DS_Store": "cannot be read",
        "caption/d/9.json": "has no clip",
        "caption/e/deep/1.json": "has no clip",
        "caption/a/1.txt": "is beside 1.json, which goes before it",
    }
    assert listed.keys() == reasons.keys()
    assert all(listed[path].startswith(why) for path, why in reasons.items()), listed


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("1.json", '{"caption": "a cät", "score": 1}'),
        ("1.json", '[{"caption": "a cät"}]'),
        ("1.json", '["a cät"]'),
        ("1.JSON", '"a cät"'),
        ("1.txt", "a cät\n"),
        ("1.TXT", "a cät"),
    ],
)
def test_captions(name: str, text: str, encoding: str, tmp_path: Path) -> None:
    write_clip(tmp_path, "a", 1, numbered(0, WHOLE), None)
    (tmp_path / "caption/a").mkdir(parents=True)
    (tmp_path / "caption/a" / name).write_bytes(text.encode(encoding))
    found = clips(tmp_path)
    assert found.sample(0, 0).prompts == ("a cät",) * 3
    assert not found.skipped


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("1.json", b'{"text": "a", "id": 3}', "its caption 1.json has text, id, but not 'caption'"),
        ("1.json", b'["a", "b"]', "its caption 1.json is a list of 2, not of one"),
        ("1.json", b'{"caption": 3}', "its caption 1.json holds 3, not a text"),
        ("1.json", b'""', "its caption is empty"),
        ("1.txt", b" \n", "its caption is empty"),
        ("1.txt", b"\xe4", "its caption cannot be read (1.txt: "),
        ("1.txt", b"\0a", "its caption 1.txt is no plain text; save it in UTF-8"),
        ("1.json", b"{", "its caption cannot be read (1.json: damaged JSON"),
        ("1.srt", b"a", "has no caption, only 1.srt: write "),
    ],
)
def test_captions_that_do_not_fit(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path, "a", 1, numbered(0, WHOLE), None)
    (tmp_path / "caption/a").mkdir(parents=True)
    (tmp_path / "caption/a" / name).write_bytes(content)
    assert f"skipped {path}: {reason}" in refused(clips, tmp_path)


def settings_of(message: str) -> list[dict[str, int]]:
    """The settings that an error offers."""
    offered = re.search(r"; set (.*), or add longer clips", message)
    assert offered, message
    ways = [re.findall(r"([a-z.]+)=([0-9]+)", way) for way in offered[1].split(" or ")]
    return [{key: int(value) for key, value in way} for way in ways]


@pytest.mark.parametrize(
    ("lengths", "shots", "said", "settings"),
    [
        ([WHOLE - 1], 1, "shots of 1.25 s (1) fill 2 of 3 chunks", [{"geometry.frames": 4}]),
        (
            [FIRST + LATER, LATER],
            1,
            "shots of 0.81 + 0.50 s (2) fill 2 of 3 chunks",
            [{"train.data.shots": 2}, {"geometry.frames": 4}],
        ),
        (
            [4],
            1,
            "shots of 0.25 s (1) fill 0 of 3 chunks",
            [{"geometry.chunk": 1, "geometry.frames": 1}],
        ),
    ],
)
def test_what_is_missing_is_said_with_a_setting_that_works(
    lengths: list[int], shots: int, said: str, settings: list[dict[str, int]], tmp_path: Path
) -> None:
    for number, length in enumerate(lengths):
        write_clip(tmp_path, "a", number, numbered(0, length), "one")
    message = refused(clips, tmp_path, shots)
    assert "(21 frames, 1.31 s) and at most 1 shots" in message
    assert f"a: {said}" in message
    assert settings_of(message) == settings
    for way in settings:
        sizes = {key.removeprefix("geometry."): size for key, size in way.items()}
        shots = sizes.pop("train.data.shots", shots)
        geometry = Geometry.model_validate(GEOMETRY.model_dump() | sizes)
        video = FolderClips(tmp_path, geometry, FPS, shots).sample(0, 0).video
        assert len(video) == 4 * (geometry.frames - 1) + 1


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    assert "has no video/; lay it out as" in refused(clips, tmp_path)
    path = write_clip(tmp_path, "a", 0, numbered(0, WHOLE - 1), "short")
    message = refused(clips, tmp_path)
    assert "no sample of 3 chunks of 2 latent frames at 16 fps" in message
    path.write_bytes(b"nothing")
    assert f"skipped {path}: cannot be read" in refused(clips, tmp_path)


def dataset_of(data: dict[str, Any], geometry: Geometry, mesh: Mesh = ALONE) -> Dataset:
    section = TrainSection.model_validate({"data": data, "steps": 1, "lr": 1.0, "seed": 3})
    device = torch.device("cpu")
    encoder = encoder_for(section.data, geometry, device, torch.float32)
    return encoded_clips(section, geometry, encoder, device, mesh=mesh)


@pytest.mark.parametrize("world", [True, False])
def test_few_clips_are_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: bool
) -> None:
    """Clips that are kept are those that would be encoded. Held-out clips are none of them."""
    torch.manual_seed(0)
    save_vae(tmp_path / "vae", wan_vae.build(VAE).state_dict(), VAE)
    save_text_encoder(tmp_path)
    data: dict[str, Any] = {"pipeline": str(tmp_path), "shots": 2}
    geometry = GEOMETRY.model_copy(update={"height": 128, "width": 128})
    if not world:
        write_clip(tmp_path, "a", 0, numbered(0, WHOLE + 8), "a red square")
        data |= {"folder": str(tmp_path), "fps": FPS}
        geometry = GEOMETRY
    every = dataset_of(data, geometry)
    kept = dataset_of(data | {"clips": 3}, geometry)
    wanted, found, held_out = every.batch(3, range(3)), kept.batch(3, range(12)), range(2)
    rows = [
        [torch.equal(mine, own) for own in wanted["latents"]].index(True)
        for mine in found["latents"]
    ]
    assert set(rows) == {0, 1, 2}
    assert torch.equal(found["text"], wanted["text"][rows])
    new, same = (each.batch(~3, held_out) for each in (kept, every))
    assert all(torch.equal(new[name], same[name]) for name in same)
    if world:
        assert not any(torch.equal(a, b) for a in new["latents"] for b in wanted["latents"])
    monkeypatch.setattr(PipelineEncoder, "latents", None)
    kept.batch(3, range(12, 24))


def test_clips_may_be_longer_than_what_trains(tmp_path: Path) -> None:
    """Clips of the tiny world are. Their shots open where their captions change."""
    torch.manual_seed(0)
    save_vae(tmp_path / "vae", wan_vae.build(VAE).state_dict(), VAE)
    save_text_encoder(tmp_path)
    geometry = GEOMETRY.model_copy(update={"height": 128, "width": 128})
    data = {"pipeline": str(tmp_path), "shots": 3, "frames": 10}
    batch = dataset_of(data, geometry).batch(3, range(6))
    assert batch["latents"].shape[2] == 10
    text, opens = batch["text"], batch["opens"]
    assert text.shape[:2] == opens.shape == (6, 5)
    assert opens[:, 0].all() and opens[:, 1:].any() and not opens.all()
    changes = (text[:, 1:] != text[:, :-1]).flatten(2).any(2)
    assert changes[opens[:, 1:]].all()
    assert not changes[~opens[:, 1:] & ~opens[:, :-1]].any()


def test_latents_and_text_are_the_pipelines(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = wan_vae.build(VAE)
    save_vae(tmp_path / "vae", made.state_dict(), VAE)
    save_text_encoder(tmp_path)
    write_clip(tmp_path, "a", 0, numbered(0, FIRST + LATER), "a red square")
    write_clip(tmp_path, "a", 1, numbered(0, LATER), "a blue circle")
    data = {"folder": str(tmp_path), "pipeline": str(tmp_path), "fps": FPS, "shots": 2}
    dataset = dataset_of(data, GEOMETRY)
    batch = dataset.batch(0, range(2))
    assert batch["latents"].shape == (2, 4, 6, 2, 2)
    video = clips(tmp_path, shots=2).sample(0, 1).video
    expected = encode(make_vae(VAE, made.state_dict()), video.permute(3, 0, 1, 2)[None] / 127.5 - 1)
    assert torch.allclose(batch["latents"][1:], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(batch["latents"][1:].flip(2), expected, rtol=0, atol=1e-3)
    one, again, other = batch["text"][0]
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert batch["opens"].tolist()[0] == [True, False, True]
    alone = dataset.batch(0, range(1, 2))
    assert torch.equal(alone["latents"], batch["latents"][1:])
    assert torch.equal(alone["text"], batch["text"][1:])


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (48, 48), (20, 20)])
def test_pictures_keep_their_aspect(height: int, width: int) -> None:
    """A centred square stays one. What a side has too much is cut off evenly."""
    frame = torch.zeros(height, width, 3, dtype=torch.uint8)
    side = min(height, width)
    top, left = (height - side // 2) // 2, (width - side // 2) // 2
    frame[top : top + side // 2, left : left + side // 2] = 255
    shown = covering(frame, 32, 32)
    assert shown.shape == (32, 32, 3)
    lit = (shown[..., 0] > 127).nonzero()
    assert lit.min(0).values.tolist() == [8, 8] and lit.max(0).values.tolist() == [23, 23]
