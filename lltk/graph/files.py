"""Files written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, for a file or a folder, that takes its place on success.

    What is there before is replaced. Missing parent folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (
        path.with_name(f".{path.name}.{uuid.uuid4().hex}.{kind}") for kind in ("tmp", "old")
    )
    try:
        yield temporary
        if path.is_dir():
            os.replace(path, aside)
        os.replace(temporary, path)
    finally:
        for left in (temporary, aside):
            if left.is_dir():
                shutil.rmtree(left)
            left.unlink(missing_ok=True)
