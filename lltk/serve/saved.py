"""Sessions on disk: what goes on from there, and the newest frames that a client may lack."""

from __future__ import annotations

import base64
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter

from lltk.files.reading import read_text
from lltk.files.writing import write_text
from lltk.serve.live import Live, Progress, Terms
from lltk.serve.messages import ChunkMetadata, VideoStart
from lltk.serve.ring import Beginning, Part

_ID = re.compile(r"[0-9a-f]{32}")
_STATE, _ABOUT = "state.safetensors", "session.json"


@dataclass(frozen=True)
class _Beginning:
    message: VideoStart
    init: str


@dataclass(frozen=True)
class _Part:
    beginning: int
    message: ChunkMetadata
    data: str


@dataclass(frozen=True)
class _About:
    terms: Terms
    progress: Progress
    beginnings: list[_Beginning]
    parts: list[_Part]


_FORM = TypeAdapter(_About)


@dataclass(frozen=True)
class Kept:
    """A session on disk.

    Attributes:
        terms, progress: as `Live` has them.
        parts: its newest, oldest first.
        state: for `Models.open`.
    """

    terms: Terms
    progress: Progress
    parts: list[Part]
    state: Path


class Saved:
    """The sessions in a folder, a folder each, named by ids that the server made.

    Args:
        folder: of the server alone; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, live: Live) -> None:
        """Keep a session that makes no chunk.

        Raises:
            ValueError, OSError: as `Stream.save`.
        """
        place = self._folder / live.terms.id
        live.save(place / _STATE)
        parts = live.ring.parts
        beginnings = list(dict.fromkeys(part.beginning for part in parts))
        about = _About(
            live.terms,
            live.progress,
            [_Beginning(each.message, _text(each.init)) for each in beginnings],
            [_Part(beginnings.index(p.beginning), p.message, _text(p.data)) for p in parts],
        )
        write_text(place / _ABOUT, _FORM.dump_json(about).decode())  # last: it makes it whole

    def state(self, live: Live) -> bytes:
        """The state of a session that makes no chunk; nothing is kept.

        Raises:
            ValueError, OSError: as `Stream.save`.
        """
        with TemporaryDirectory(dir=self._folder) as place:
            live.save(Path(place) / _STATE)
            return (Path(place) / _STATE).read_bytes()

    def read(self, id: str) -> Kept | None:
        """A session that was kept; None if there is none.

        Raises:
            ValueError: its files are damaged.
        """
        if _ID.fullmatch(id) is None or not (self._folder / id / _ABOUT).is_file():
            return None
        place = self._folder / id
        about = _FORM.validate_json(read_text(place / _ABOUT, most=1 << 30))
        beginnings = [Beginning(b.message, base64.b64decode(b.init)) for b in about.beginnings]
        parts = [
            Part(beginnings[p.beginning], p.message, base64.b64decode(p.data)) for p in about.parts
        ]
        return Kept(about.terms, about.progress, parts, place / _STATE)

    def remove(self, id: str) -> None:
        """Forget a session."""
        assert _ID.fullmatch(id)
        shutil.rmtree(self._folder / id, ignore_errors=True)

    def clean(self, seconds: float) -> None:
        """Forget the sessions that were kept for longer than so many seconds."""
        for place in self._folder.iterdir():
            if _ID.fullmatch(place.name) and time.time() - place.stat().st_mtime > seconds:
                self.remove(place.name)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
