"""One rule for what a command writes: nothing is destroyed that lltk did not write.

Before any work a command names its outputs, each with its kind, and its inputs. An output that is
there already is replaced if lltk wrote it as that kind of output; anything else only with
``--overwrite``. A folder never makes room for a file, or a file for a folder. No output is an input
or another output.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from lltk.files.reading import opened
from lltk.files.writing import beside, standing

_HEAD, _TAIL = 1 << 16, 1 << 8


@dataclass(frozen=True)
class Kind:
    """A kind of output.

    Attributes:
        name: such as ``video``.
        recognises: whether lltk wrote the file or folder at a path as this kind of output.
        folder: whether it is a folder.
    """

    name: str
    recognises: Callable[[Path], bool]
    folder: bool = False


def marked(name: str, mark: str) -> Kind:
    """A kind of file that has a mark among its first bytes, or at its end."""

    def recognises(path: Path) -> bool:
        with opened(path) as file:
            head = file.read(_HEAD)
            file.seek(-min(_TAIL, path.stat().st_size), os.SEEK_END)
            return mark.encode() in head + b"\0" + file.read()

    return Kind(name, recognises)


@dataclass(frozen=True)
class Output:
    """What a command writes.

    Attributes:
        path: where.
        kind: what.
    """

    path: Path
    kind: Kind


def check_outputs(
    outputs: Sequence[Output], inputs: Iterable[Path], overwrite: bool = False
) -> None:
    """Refuse outputs that may not or cannot be written. Leaves all as it was.

    Args:
        outputs: what will be written.
        inputs: files and folders that are read.
        overwrite: whether what lltk did not write may be replaced.

    Raises:
        ValueError: an output is there and may not be replaced, is an input or another output, or is
            a folder that holds the current one.
        OSError: it cannot be written; says why.
    """
    for output in outputs:
        for given in inputs:
            if _meet(output.path, given) or _within(given, output):
                raise ValueError(
                    f"{output.path}: would be written over {given}, which is read; name another"
                )
    for one, other in combinations(outputs, 2):
        if _meet(one.path, other.path) or _within(one.path, other) or _within(other.path, one):
            raise ValueError(
                f"{one.path}: {one.kind.name} and {other.kind.name} ({other.path}) would be one; "
                "name another"
            )
    here = Path.cwd()
    for output in outputs:
        if output.kind.folder and (_meet(output.path, here) or _within(here, output)):
            raise ValueError(f"{output.path}: is the folder you are in, or holds it; name another")
        _check_place(output.path)
        _check_replaced(output, overwrite)


def _check_replaced(output: Output, overwrite: bool) -> None:
    """Refuse to replace what may not be."""
    path, kind = standing(output.path), output.kind
    if not path.exists():
        return
    mode = path.stat().st_mode
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        wanted = "folder" if kind.folder else "file"
        raise ValueError(f"{path}: is a device or a pipe; name a {wanted}")
    if kind.folder != stat.S_ISDIR(mode):
        found, wanted = ("file", "folder") if kind.folder else ("folder", "file")
        raise ValueError(f"{path}: cannot be written (it is a {found}); name a {wanted}")
    if not os.access(path, os.W_OK):
        raise OSError(f"{path}: cannot be written (it is read-only); name another path")
    empty = not any(path.iterdir()) if kind.folder else not path.stat().st_size
    if not (overwrite or empty or kind.recognises(path)):
        raise ValueError(
            f"{path}: exists, and lltk did not write it as {kind.name}; name another, or replace "
            "it with --overwrite"
        )


def _check_place(path: Path) -> None:
    """Refuse a path whose folder cannot be written to, or made."""
    place = Path(os.path.realpath(path))
    folder = next((parent for parent in place.parents if parent.exists()), place)
    try:
        if folder == place:
            raise OSError(16, "it is the root of all folders")
        if place.is_symlink():
            raise OSError(40, "its links lead in a circle")
        if not folder.is_dir():
            raise NotADirectoryError(20, f"{folder} is a file")
        longest = max(len(os.fsencode(part)) for part in place.parts)
        probe = beside(folder / "probe")
        if folder == place.parent:
            probe = beside(place)
        elif longest > os.pathconf(folder, "PC_NAME_MAX"):
            raise OSError(36, "a name in it is too long")
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); name another path") from error


def _meet(one: Path, other: Path) -> bool:
    """Whether two paths are one file or folder, or would be."""
    if one.exists() and other.exists():
        return os.path.samefile(one, other)
    ours, theirs = (Path(os.path.realpath(path)) for path in (one, other))
    if ours == theirs:
        return True
    alike = str(ours).casefold() == str(theirs).casefold()
    return alike and _ignores_case(next(each for each in ours.parents if each.exists()))


def _within(path: Path, output: Output) -> bool:
    """Whether a path lies in a folder that will be replaced."""
    whole = Path(os.path.realpath(output.path))
    return output.kind.folder and whole in Path(os.path.realpath(path)).parents


def _ignores_case(folder: Path) -> bool:
    """Whether names in a folder that differ in case are one."""
    probe = beside(folder / "probe")
    try:
        probe.touch(exist_ok=False)
        return probe.with_name(probe.name.swapcase()).exists()
    finally:
        probe.unlink(missing_ok=True)
