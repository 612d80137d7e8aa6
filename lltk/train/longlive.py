"""Samples of a folder as LongLive-2.0 takes them: each folder in it is one.

::

    video/<sample>/<number>.mp4       the shots of one sample, in the order of their numbers
    caption/<sample>/<number>.json    {"caption": "…"}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch

from lltk.train.assembly import Assembly, Rules, Shot, Unfilled, assemble, first_usable, starts
from lltk.train.clip_files import ClipFiles, Take
from lltk.train.data import generator_at, in_epochs
from lltk.train.folder import Sample
from lltk.train.frames import Unusable, shown_frames
from lltk.train.progress import Note, silent

_log = logging.getLogger(__name__)


class LongLiveClips:
    """Samples of a folder's folders, each put together by `assemble`.

    In each epoch every folder is asked for once, in a new random order. Instead of a folder that
    fills no sample, or of which a clip is damaged, the next by name is taken. A sample begins at
    any of the `starts` in its folder, all equally likely. If there are none and padding is allowed,
    it begins with the first clip that holds a chunk.

    Samples of another seed than the training's are held out. They are the folders by name, and each
    begins at the first place from which it can be filled.

    A clip's frames are counted at the rate that its file states. They are resized and cropped as
    those of `lltk.train.folder.FolderClips`.

    Args:
        folder: holds ``video`` and ``caption``.
        rules: how clips are put together.
        height, width: of the samples' frames.
        seed: of the samples that train.
        note: told how many samples' files have been looked at.

    Raises:
        ValueError: there is no such folder, or no sample can be filled; says what was skipped.
    """

    def __init__(
        self, folder: Path, rules: Rules, height: int, width: int, seed: int, note: Note = silent
    ) -> None:
        self._files = ClipFiles(folder)
        self._folder = folder
        self._rules = rules
        self._size = (height, width)
        self._seed = seed
        samples = self._files.read(self._inside(), note)
        self._samples = [_Clips(takes, rules) for takes in samples.values()]
        self._usable = [clips.first is not None for clips in self._samples]
        for name, clips in zip(samples, self._samples, strict=True):
            if clips.first is None:
                self._files.skip(folder / "video" / name, str(clips.refusal))
        if not any(self._usable):
            padding = "" if rules.allow_padding else ", or train.data.longlive.allow_padding=true"
            raise ValueError(
                f"{folder}: no sample of {rules.chunks} chunks of {rules.chunk} latent frames at "
                f"{float(rules.fps):g} fps can be filled; add longer clips, or set a smaller "
                f"geometry.frames or train.data.frames{padding}{self._files.listed()}"
            )
        self._files.count_skipped()

    @property
    def skipped(self) -> Mapping[Path, str]:
        """The files and the samples that were left out, and why."""
        return self._files.skipped

    def sample(self, seed: int, index: int) -> Sample:
        """The sample of a number. It follows from the arguments and the files alone.

        Raises:
            ValueError: no folder can be used.
        """
        usable = list(self._usable)
        asked = self._shuffled(index) if seed == self._seed else index % len(usable)
        while (number := first_usable(asked, usable)) is not None:
            clips = self._samples[number]
            try:
                return self._read(clips, clips.assembly(self._start(clips, seed, index)))
            except Unusable as error:
                _log.info("sample %d: %s; the next folder is taken", index, error)
                usable[number] = False
        raise ValueError(
            f"{self._folder}: every folder has a damaged clip; replace them{self._files.listed()}"
        )

    def _inside(self) -> dict[str, list[Path]]:
        """The files of each folder; what lies beside the folders is left out."""
        files = self._files.files()
        for name, paths in list(files.items()):
            if [path.parent for path in paths] == [self._folder / "video"]:
                self._files.skip(paths[0], "is in no folder; put it into video/<sample>/")
                del files[name]
        return files

    def _shuffled(self, index: int) -> int:
        """The number of the folder that is asked for."""
        (number,) = in_epochs(self._seed, len(self._samples), range(index, index + 1))
        return number

    def _start(self, clips: _Clips, seed: int, index: int) -> tuple[int, int]:
        """The place at which a sample begins."""
        if seed == self._seed and clips.starts:
            generator = generator_at(seed, "start", index)
            return clips.starts[int(torch.randint(len(clips.starts), (), generator=generator))]
        assert clips.first is not None
        return clips.first

    def _read(self, clips: _Clips, found: Assembly) -> Sample:
        parts = []
        for clip, run in groupby(found.chunks, key=lambda chunk: chunk.clip):
            footage = clips.takes[clip].footage
            times = [Fraction(frame) / footage.rate for chunk in run for frame in chunk.frames]
            try:
                parts.append(shown_frames(footage, times, *self._size))
            except Unusable as error:
                self._files.skip(footage.path, str(error))
                raise
        return Sample(
            torch.cat(parts),
            tuple(chunk.prompt for chunk in found.chunks),
            tuple(chunk.opens for chunk in found.chunks),
            found.valid if self._rules.allow_padding else None,
        )


class _Clips:
    """The clips of one folder.

    Args:
        takes: with their captions, in order.
        rules: how they are put together.
    """

    def __init__(self, takes: Sequence[Take], rules: Rules) -> None:
        self.takes = takes
        self._rules = rules
        self._shots = [
            Shot(take.footage.rate, take.footage.frames(take.footage.rate), take.caption)
            for take in takes
        ]

    @cached_property
    def starts(self) -> list[tuple[int, int]]:
        """Where a sample without padding may begin."""
        return starts(self._shots, self._rules)

    @cached_property
    def refusal(self) -> str | None:
        """Why a sample cannot begin with the first clip that holds a chunk; None if it can."""
        try:
            self.assembly((0, 0))
        except Unfilled as error:
            return str(error)
        return None

    @cached_property
    def first(self) -> tuple[int, int] | None:
        """The first place at which a sample may begin; None if there is none.

        If not with the first clip that holds a chunk, only a sample of one clip can begin later.
        """
        if self.refusal is None:
            return (0, 0)
        return self.starts[0] if self._rules.single_clip and self.starts else None

    def assembly(self, start: tuple[int, int]) -> Assembly:
        """The sample that begins at a place."""
        return assemble(self._shots, self._rules, start)
