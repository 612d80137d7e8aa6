"""Files written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, for a file or a folder, that takes its place on success.

    What is there before is replaced. Missing parent folders are made.

    Raises:
        OSError: it cannot be written; safetensors' own error for that is turned into one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (_beside(path, kind) for kind in ("tmp", "old"))
    try:
        yield temporary
        if path.is_dir():
            os.replace(path, aside)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error}); make room, or name another") from error
    finally:
        for left in (temporary, aside):
            _remove(left)


def remove_whole(path: Path) -> None:
    """Remove a file or a folder at once: killed on the way, nothing is left under its name."""
    _remove(path.rename(_beside(path, "old")))


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of `written_whole` and `remove_whole` in a folder.

    Nothing may be writing there.
    """
    for left in folder.glob(f".*.{'[0-9a-f]' * 32}.*"):
        _remove(left)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{kind}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
