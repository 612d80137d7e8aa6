"""Captions of clips, in the forms that people keep them in."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from lltk.files.reading import opened, parse_json
from lltk.train.frames import Unusable

SUFFIXES = (".json", ".txt")
"""In the order in which they are looked for; case does not matter."""
_BYTES = 1 << 20
"""How much of a caption is read at most."""
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_caption(path: Path) -> str:
    """The caption in a file.

    Args:
        path: a ``.txt`` file, or a ``.json`` file with an object whose ``caption`` it is, a list of
            one such object, or a string. In UTF-8, or in UTF-16 with a byte-order mark.

    Raises:
        Unusable: it is none of these, or empty; says what was found.
    """
    try:
        with opened(path) as file:
            data = file.read(_BYTES + 1)
        if len(data) > _BYTES:
            raise ValueError(f"is larger than {_BYTES >> 20} MiB")
        text = data.decode(_MARKS.get(data[:2], "utf-8-sig"))
        found = text if path.suffix.lower() == ".txt" else parse_json(text, path.name)
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path.name}: ")
        raise Unusable(f"its caption cannot be read ({path.name}: {reason})") from error
    caption = _of_data(found, path.name)
    if "\0" in caption:
        raise Unusable(f"its caption {path.name} is no plain text; save it in UTF-8")
    if not caption.strip():
        raise Unusable("its caption is empty")
    return caption.strip()


def _of_data(found: Any, name: str) -> str:
    if isinstance(found, list):
        if len(found) != 1:
            raise Unusable(f"its caption {name} is a list of {len(found)}, not of one")
        (found,) = found
    if isinstance(found, dict):
        if "caption" not in found:
            keys = ", ".join(map(str, found)) or "no keys"
            raise Unusable(f"its caption {name} has {keys}, but not 'caption'")
        found = found["caption"]
    if not isinstance(found, str):
        raise Unusable(f"its caption {name} holds {json.dumps(found)[:40]}, not a text")
    return found
