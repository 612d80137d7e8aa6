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
    """Gives a temporary path beside ``path``, which takes the place of ``path`` on success.

    It works for a file and for a folder. What was at ``path`` before is replaced. Missing parent
    folders are made.

    Raises:
        OSError: it cannot be written. safetensors raises an error of its own for that, which is
            turned into this one.
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
    """Remove a file or a folder. Even if the process is killed meanwhile, its name is free."""
    _remove(path.rename(_beside(path, "old")))


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed process left of the two functions above.

    Nothing may be writing to the folder.
    """
    for left in folder.glob(f".*.{'[0-9a-f]' * 32}.*"):
        _remove(left)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{kind}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
