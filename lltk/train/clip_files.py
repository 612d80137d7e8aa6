"""The clips of a folder and their captions, and what is among them but is of no use."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lltk.train.assembly import place_of
from lltk.train.captions import SUFFIXES, read_caption
from lltk.train.frames import Footage, Unusable, read_footage
from lltk.train.progress import Note, noted
from lltk.train.shortfall import few_lines

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Take:
    """A video with a caption that can be read."""

    footage: Footage
    caption: str


def check_clip_folder(folder: Path) -> None:
    """Refuse a folder without ``video``, by a ValueError that says how clips are laid out."""
    if not (folder / "video").is_dir():
        raise ValueError(
            f"{folder}: has no video/; lay it out as video/<sample>/<number>.mp4 with "
            "caption/<sample>/<number>.json"
        )


class ClipFiles:
    """Files under ``video`` and ``caption``.

    Args:
        folder: holds both.

    Raises:
        ValueError: there is no ``video`` in it.
    """

    def __init__(self, folder: Path) -> None:
        check_clip_folder(folder)
        self._folder = folder
        self._captions = self._written()
        self.skipped: dict[Path, str] = {}
        """What was left out, wholly or in part, and why."""

    def files(self) -> dict[str, list[Path]]:
        """The files of each sample, in their order; one in ``video`` itself is a sample."""
        found: dict[str, list[Path]] = {}
        for path in sorted((self._folder / "video").iterdir()):
            if not path.is_dir():
                found[path.name] = [path]
                continue
            inside = []
            for inner in sorted(path.iterdir()):
                if inner.is_dir():
                    for file in sorted(file for file in inner.rglob("*") if file.is_file()):
                        self.skip(file, "is too deep; put it into video/<sample>/")
                else:
                    inside.append(inner)
            found[path.name] = sorted(inside, key=lambda file: place_of(file.stem))
        return found

    def read(self, files: Mapping[str, Sequence[Path]], note: Note) -> dict[str, list[Take]]:
        """The clips of each sample that can be read. What cannot, and other captions, are skipped.

        Args:
            files: of each sample, in their order.
            note: told how many samples' files have been looked at.
        """
        looked_at = noted(files, "looking at clips", len(files), note)
        samples = {name: self._takes(files[name]) for name in looked_at}
        self._list_captions(files)
        return samples

    def skip(self, path: Path, reason: str) -> None:
        """Leave a file or a sample out, and say so once."""
        if path not in self.skipped:
            self.skipped[path] = reason
            _log.warning("skipped %s: %s", path, reason)

    def listed(self) -> str:
        """What was left out, a line each."""
        return few_lines([f"\n  skipped {path}: {reason}" for path, reason in self.skipped.items()])

    def count_skipped(self) -> None:
        """Say how many were left out."""
        if self.skipped:
            _log.warning("%s: %d files skipped", self._folder, len(self.skipped))

    def _takes(self, files: Sequence[Path]) -> list[Take]:
        takes: dict[str, Take] = {}
        for path in files:
            number = path.stem.lstrip("0")
            try:
                if number in takes:
                    raise Unusable(f"has the number of {takes[number].footage.path.name}")
                takes[number] = Take(read_footage(path), self._caption(path))
            except Unusable as error:
                self.skip(path, str(error))
        return list(takes.values())

    def _caption(self, path: Path) -> str:
        place = self._caption_place(path)
        found = self._captions.get(place, [])
        if not found or found[0].suffix.lower() not in SUFFIXES:
            only = ", ".join(file.name for file in found)
            raise Unusable(f"has no caption{only and f', only {only}'}: write {place}.json")
        return read_caption(found[0])

    def _written(self) -> dict[Path, list[Path]]:
        """The files of captions by their paths without suffix, those first that are read first."""
        found: dict[Path, list[Path]] = {}
        order = {suffix: number for number, suffix in enumerate(SUFFIXES)}
        files = [path for path in (self._folder / "caption").rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (order.get(file.suffix.lower(), 9), file)):
            found.setdefault(file.with_suffix(""), []).append(file)
        return found

    def _caption_place(self, path: Path) -> Path:
        """The path of a clip's caption, without its suffix."""
        inner = path.relative_to(self._folder / "video")
        return self._folder / "caption" / inner.with_suffix("")

    def _list_captions(self, files: Mapping[str, Sequence[Path]]) -> None:
        """List what is among the captions, but is none of a clip."""
        places = {self._caption_place(path) for paths in files.values() for path in paths}
        for place, (first, *others) in sorted(self._captions.items()):
            if place not in places:
                self.skip(first, "has no clip")
            for file in others:
                self.skip(file, f"is beside {first.name}, which goes before it")
