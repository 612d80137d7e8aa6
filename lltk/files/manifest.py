"""Manifests: a file of JSON that says what lltk wrote to a folder, with checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lltk.files.reading import parse_json, read_json, read_text
from lltk.files.tensors import is_unchanged
from lltk.files.writing import NewFolder, standing

_CHANGED = "was changed after it was written, or is damaged"
_LONGEST = 255
"""Characters of a file's name in a folder."""


@dataclass(frozen=True)
class Manifest:
    """A kind of folder that lltk writes.

    The file has the ``format``, facts of the kind's own, the SHA-256 of each of the ``files``, and
    its own as ``digest``.

    Attributes:
        name: of the file.
        what: it says that the folder is, such as ``a Program``.
        format: the only one that is read.
        remedy: what to do about a damaged folder.
    """

    name: str
    what: str
    format: int
    remedy: str

    def write(self, folder: NewFolder, facts: Mapping[str, Any]) -> None:
        """Write it to a folder that holds all its other files.

        Args:
            folder: to write to.
            facts: plain data.
        """
        folder.write_text(self.name, self.text(facts, folder.checksums))

    def text(self, facts: Mapping[str, Any], checksums: Mapping[str, str]) -> str:
        """What it says.

        Args:
            facts: plain data.
            checksums: of the folder's other files, by name.
        """
        content = {"what": self.what, "format": self.format, **facts}
        content["files"] = dict(sorted(checksums.items()))
        content = json.loads(json.dumps(content))
        return json.dumps(content | {"digest": _digest(content)}, indent=2) + "\n"

    def read(self, folder: Path, check_files: bool = True) -> dict[str, Any]:
        """The facts of a folder, once every file in it has been checked.

        Args:
            folder: to read.
            check_files: if not, the files' checksums are left to the caller, who has them as the
                fact ``files``.

        Raises:
            ValueError: it is no such folder, has another format, or a file was changed or is
                missing.
        """
        folder = standing(folder)
        path = folder / self.name
        if not path.is_file():
            raise ValueError(f"{folder}: has no {self.name}, so it is not {self.what} of lltk's")
        content = read_json(path)
        if not isinstance(content, dict) or not self._is_ours(content):
            raise ValueError(f"{path}: is damaged; {self.remedy}")
        if content.get("format") != self.format:
            versions = content.get("versions")
            made = versions.get("lltk") if isinstance(versions, dict) else None
            raise ValueError(
                f"{path}: is of format {content.get('format')!r}, this lltk reads {self.format}; "
                f"{self.remedy}, or use lltk {made or 'of its version'}"
            )
        if content.pop("digest", None) != _digest(content):
            raise ValueError(f"{path}: {_CHANGED}; {self.remedy}")
        files = self._files(content, path)
        for name, wanted in files.items() if check_files else ():
            self.check_file(folder / name, wanted)
        del content["what"], content["format"]
        return content

    def check_file(self, file: Path, wanted: str) -> None:
        """Check a file of a folder against its checksum.

        Raises:
            ValueError: it was changed or is missing.
        """
        if not file.is_file():
            raise ValueError(f"{file}: is missing; {self.remedy}")
        if not is_unchanged(file, wanted):
            raise ValueError(f"{file}: {_CHANGED}; {self.remedy}")

    def recognises(self, folder: Path) -> bool:
        """Whether a folder is of this kind, and holds nothing else. No checksums are read."""
        folder = standing(folder)
        try:
            content = parse_json(read_text(folder / self.name), "")
            known = {*self._files(content, folder), self.name} if self._is_ours(content) else set()
        except ValueError:
            return False
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
        return bool(known) and found <= known

    def _is_ours(self, content: Any) -> bool:
        return isinstance(content, dict) and content.get("what") == self.what

    def _files(self, content: Mapping[str, Any], where: Path) -> dict[str, str]:
        files = content.get("files")
        if not isinstance(files, dict):
            raise ValueError(f"{where}: lists no files; {self.remedy}")
        for name, digest in files.items():
            parts = PurePosixPath(name).parts
            odd = not name.isprintable() or len(name) > _LONGEST
            if odd or not (parts and isinstance(digest, str)) or parts[0] == "/" or ".." in parts:
                raise ValueError(
                    f"{where}: lists {name[:_LONGEST]!r}, which is no file in its folder; "
                    f"{self.remedy}"
                )
        return files


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
