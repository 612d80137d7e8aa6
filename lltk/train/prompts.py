"""Prompts of videos that no clip shows, for distillation.

::

    prompts.txt                       each line the prompt of a video of one shot

    caption/<sample>/<number>.json    the shots of one video, in the order of their numbers
    caption/<sample>/shot_durations.txt    how many chunks each lasts; may be left out
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from lltk.files.reading import read_text
from lltk.stream.script import SCENE_CUT
from lltk.train.assembly import place_of
from lltk.train.captions import SUFFIXES, read_caption
from lltk.train.frames import Unusable

_DURATIONS, _GLOBAL = "shot_durations.txt", "global"


class PromptFiles:
    """The prompts of some videos, one for each chunk.

    Where a video's shots have no durations they share its chunks evenly, and the first have what is
    over. Shots that do not fit are left out; the last lasts to the end.

    Args:
        path: a text file, or a folder that has ``caption``.
        chunks: of a video.

    Raises:
        ValueError: there are no prompts, or one cannot be read; names the file.
    """

    def __init__(self, path: Path, chunks: int) -> None:
        if path.is_dir():
            found = [_shots(sample, chunks) for sample in _samples(path)]
        elif path.is_file():
            lines = (line.strip() for line in read_text(path).splitlines())
            found = [[(line, chunks)] for line in lines if line]
        else:
            raise ValueError(
                f"{path}: there are no prompts; write a text file of a line a prompt, or a folder "
                "with caption/<sample>/<number>.json"
            )
        if not found:
            raise ValueError(f"{path}: holds no prompts; write one a line")
        self._videos = [_by_chunk(shots, chunks) for shots in found]

    def __len__(self) -> int:
        return len(self._videos)

    def video(self, number: int) -> tuple[tuple[str, ...], tuple[bool, ...]]:
        """A video's prompts, one a chunk, and whether each chunk opens a shot."""
        return self._videos[number]


def _samples(folder: Path) -> list[Path]:
    """The folders of captions."""
    captions = folder / "caption"
    found = (
        sorted(path for path in captions.iterdir() if path.is_dir()) if captions.is_dir() else []
    )
    if not found:
        raise ValueError(
            f"{folder}: has no prompts; lay them out as caption/<sample>/<number>.json"
        )
    return found


def _shots(sample: Path, chunks: int) -> list[tuple[str, int]]:
    """Each shot's caption and how many chunks it lasts."""
    files = [
        file
        for file in sample.iterdir()
        if file.suffix.lower() in SUFFIXES and file.stem != _GLOBAL and file.name != _DURATIONS
    ]
    if not files:
        raise ValueError(f"{sample}: has no prompts; write one as {sample / '0.json'}")
    captions = []
    for file in sorted(files, key=lambda file: place_of(file.stem)):
        try:
            captions.append(read_caption(file))
        except Unusable as error:
            raise ValueError(f"{file}: {error}; repair it, or remove it") from error
    durations = sample / _DURATIONS
    if not durations.is_file():
        each, over = divmod(chunks, len(captions))
        return [(text, each + (place < over)) for place, text in enumerate(captions)]
    lengths = read_text(durations).split()
    if len(lengths) != len(captions) or not all(n.isdecimal() and int(n) for n in lengths):
        raise ValueError(
            f"{durations}: holds {' '.join(lengths)!r}; write a whole number of chunks for each of "
            f"the {len(captions)} shots"
        )
    return list(zip(captions, map(int, lengths), strict=True))


def _by_chunk(
    shots: Sequence[tuple[str, int]], chunks: int
) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    every = [
        (f"{SCENE_CUT}{text}" if opens and place else text, opens)
        for place, (text, length) in enumerate(shots)
        for opens in (chunk == 0 for chunk in range(length))
    ]
    every += [(shots[-1][0], False)] * (chunks - len(every))
    prompts, opens = zip(*islice(every, chunks), strict=True)
    return prompts, opens
