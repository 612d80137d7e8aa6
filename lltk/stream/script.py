"""Shot scripts: what a video shows, shot after shot.

A script is a list, in YAML or JSON::

    - caption: A red circle moves to the right.
      seconds: 4
    - caption: A blue square spins.
      seconds: 2.5
    - caption: A blue square pulses.
      seconds: 2
      cut: false

A shot with ``cut: false`` goes on from the one before it: only the prompt is switched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lltk.files.reading import read_plain
from lltk.graph.recipe import validated

SCENE_CUT = "The scene transitions. "
"""LongLive's marker: it precedes the caption in the first chunk after a cut."""
LONGEST_CAPTION = 10_000
"""Characters; more are taken for a slip."""
_SPACE = re.compile(r"[ \t\r\n]+")
"""Between words. Other white space may be a character that was decoded wrongly; see `clean`."""
LONGEST_SHOT = 3600.0
"""Seconds; a longer shot is taken for a slip."""


class Shot(BaseModel):
    """What one caption describes, for some seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    caption: str = Field(description="what it shows")
    seconds: float = Field(strict=True, description="its length, in seconds of video")
    cut: bool = Field(
        True, strict=True, description="whether a scene cut opens it; if not, it goes on"
    )

    @field_validator("caption")
    @classmethod
    def _says_something(cls, caption: str) -> str:
        if not caption.strip():
            raise ValueError("caption: is empty; say what the shot shows")
        words = _SPACE.sub(" ", caption).strip(" ")
        if len(words) > LONGEST_CAPTION:
            raise ValueError(
                f"caption: of {len(words)} characters; write at most {LONGEST_CAPTION}, of which "
                "the encoder takes the first few hundred words"
            )
        return words

    @field_validator("seconds")
    @classmethod
    def _is_a_length(cls, seconds: float) -> float:
        if not 0 < seconds <= LONGEST_SHOT:
            raise ValueError(
                f"seconds: a shot cannot last {seconds:g} s; "
                f"write more than 0 and at most {LONGEST_SHOT:g}"
            )
        return seconds


def load_script(path: Path) -> tuple[Shot, ...]:
    """Read a shot script.

    Raises:
        ValueError: unreadable, or a shot that does not fit; names the shot and the nearest key.
    """
    data = read_plain(path)
    if isinstance(data, dict) and ("passes" in data or "extends" in data):
        raise ValueError(f"{path}: is a recipe, not a shot script; give it before the options")
    return parse_script(data, str(path))


def parse_script(data: Any, where: str) -> tuple[Shot, ...]:
    """Check plain data as a shot script; ``where`` is named in errors."""
    if not (isinstance(data, list) and data and all(isinstance(shot, dict) for shot in data)):
        raise ValueError(f"{where}: is not a list of shots; write a caption and seconds for each")
    return tuple(_shot(shot, f"{where}: shot {i}") for i, shot in enumerate(data, 1))


def single_shot(caption: str, seconds: float, where: str = "prompt") -> tuple[Shot, ...]:
    """The script of a plain prompt; ``where`` is named in errors.

    Raises:
        ValueError: an empty caption or a length that does not fit.
    """
    return (_shot({"caption": caption, "seconds": seconds}, where),)


def prompted(prompts: Sequence[str], seconds: float) -> tuple[Shot, ...]:
    """The script of plain prompts, a shot each of so many seconds; errors as `single_shot`'s."""
    return tuple(shot for prompt in prompts for shot in single_shot(prompt, seconds))


def _shot(data: dict[str, Any], where: str) -> Shot:
    return validated(Shot, data, where)
