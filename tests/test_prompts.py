"""Prompts of videos that no clip shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import refused

from lltk.stream.script import SCENE_CUT
from lltk.train.prompts import PromptFiles

pytestmark = pytest.mark.cpu


def folder(path: Path, captions: list[str], durations: str | None = None) -> Path:
    sample = path / "caption" / "one"
    sample.mkdir(parents=True)
    for place, caption in enumerate(captions):
        (sample / f"{place + 8}.json").write_text(json.dumps({"caption": caption}))
    (sample / "global.json").write_text(json.dumps({"caption": "all of it"}))
    if durations is not None:
        (sample / "shot_durations.txt").write_text(durations)
    return path


@pytest.mark.parametrize(
    ("captions", "durations", "wanted"),
    [
        ("abc", None, "aabbc"),
        ("abcdefg", None, "abcde"),
        ("a", None, "aaaaa"),
        ("abc", "1\n3\n4", "abbbc"),
        ("ab", "1 2", "abbbb"),
    ],
)
def test_shots_share_the_chunks(
    captions: str, durations: str | None, wanted: str, tmp_path: Path
) -> None:
    """In the order of their numbers: 8, 9, 10, …"""
    prompts, opens = PromptFiles(folder(tmp_path, list(captions), durations), 5).video(0)
    assert "".join(prompt[-1] for prompt in prompts) == wanted
    assert opens == tuple(i == 0 or wanted[i] != wanted[i - 1] for i in range(5))
    for place, prompt in enumerate(prompts):
        cut = bool(place) and opens[place]
        assert prompt == (SCENE_CUT if cut else "") + wanted[place]


def test_each_line_is_a_video(tmp_path: Path) -> None:
    (path := tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square \n")
    files = PromptFiles(path, 3)
    assert [files.video(n)[0] for n in range(len(files))] == [
        ("a red circle",) * 3,
        ("a blue square",) * 3,
    ]
    assert files.video(1)[1] == (True, False, False)


def test_missing_prompts_are_refused(tmp_path: Path) -> None:
    (empty := tmp_path / "empty.txt").write_text("\n \n")
    assert refused(PromptFiles, empty, 3) == f"{empty}: holds no prompts; write one a line"
    assert "there are no prompts; write a text file" in refused(PromptFiles, tmp_path / "no", 3)
    assert "lay them out as caption/<sample>" in refused(PromptFiles, tmp_path, 3)
    (sample := tmp_path / "caption" / "x").mkdir(parents=True)
    assert f"{sample}: has no prompts" in refused(PromptFiles, tmp_path, 3)
    (sample / "0.json").write_text("{}")
    assert f"{sample / '0.json'}: its caption 0.json has no keys" in refused(
        PromptFiles, tmp_path, 3
    )
    (sample / "0.json").write_text('{"caption": "a"}')
    (sample / "shot_durations.txt").write_text("1 x")
    message = refused(PromptFiles, tmp_path, 3)
    assert message.endswith("holds '1 x'; write a whole number of chunks for each of the 1 shots")
