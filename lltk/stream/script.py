"""Shot scripts: what a video shows, shot after shot, and the chunks it is made in.

A script is a YAML list::

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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lltk.graph.geometry import Geometry
from lltk.graph.recipe import explain, read_yaml

SCENE_CUT = "The scene transitions. "
"""LongLive's marker: precedes the caption in the first chunk of every shot but the first."""
LONGEST_SHOT = 3600.0
"""Seconds; a longer shot is taken for a slip."""


class Shot(BaseModel):
    """One shot: consecutive chunks of one caption."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    caption: str = Field(description="what it shows")
    seconds: float = Field(strict=True, description="its length, in seconds of video")
    cut: bool = Field(
        True, strict=True, description="whether a scene cut opens it; if not, it goes on"
    )

    @field_validator("caption")
    @classmethod
    def _says_something(cls, caption: str) -> str:
        words = " ".join(caption.split())
        if not words:
            raise ValueError("caption: is empty; say what the shot shows")
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


@dataclass(frozen=True)
class ShotLength:
    """What a shot's length became.

    Attributes:
        asked: seconds in the script.
        chunks: whole chunks it was rounded to.
        frames: video frames of these.
    """

    asked: float
    chunks: int
    frames: int


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk of a planned video.

    Attributes:
        chunk: its index in the video.
        shot: its shot's index in the script.
        prompt: the text to encode, the scene-cut prefix included.
        opens_shot: whether it is its shot's first, after a cut.
        frames: its video frames.
        switches: whether it is its shot's first, without a cut.
    """

    chunk: int
    shot: int
    prompt: str
    opens_shot: bool
    frames: range
    switches: bool = False


def load_script(path: Path) -> tuple[Shot, ...]:
    """Read a shot script.

    Raises:
        ValueError: unreadable, or a shot that does not fit; names the shot and the nearest key.
    """
    return parse_script(read_yaml(path), str(path))


def parse_script(data: Any, where: str) -> tuple[Shot, ...]:
    """Check plain data as a shot script; ``where`` is named in errors."""
    if not (isinstance(data, list) and data and all(isinstance(shot, dict) for shot in data)):
        raise ValueError(f"{where}: is not a list of shots; write a caption and seconds for each")
    return tuple(_shot(shot, f"{where}: shot {i}") for i, shot in enumerate(data, 1))


def single_shot(caption: str, seconds: float) -> tuple[Shot, ...]:
    """The script of a plain prompt.

    Raises:
        ValueError: an empty caption or a length that does not fit.
    """
    return (_shot({"caption": caption, "seconds": seconds}, "prompt"),)


def _shot(data: dict[str, Any], where: str) -> Shot:
    try:
        return Shot.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error, Shot)}") from error


def chunk_frames(chunk: int, geometry: Geometry, stride: int = 4) -> range:
    """Video frames of a chunk: stride·C, but stride·C - (stride - 1) of the video's first.

    Args:
        chunk: its index in the video.
        geometry: has C, latent frames a chunk.
        stride: video frames a latent frame (``ModelSpec.stride[0]``); the first latent frame of a
            video is one video frame.
    """
    length = stride * geometry.chunk
    start, stop = (max(i * length - (stride - 1), 0) for i in (chunk, chunk + 1))
    return range(start, stop)


def lengths(
    script: Sequence[Shot], geometry: Geometry, fps: float, stride: int = 4
) -> list[ShotLength]:
    """Round each shot to the nearest number of whole chunks, at least one.

    Args:
        script: the shots.
        geometry: has C, latent frames a chunk.
        fps: video frames a second.
        stride: see `chunk_frames`.

    Raises:
        ValueError: ``fps`` is not positive.
    """
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps: {fps:g} is not a frame rate; write a positive number")
    result: list[ShotLength] = []
    later = stride * geometry.chunk
    start = 0
    for shot in script:
        first = len(chunk_frames(start, geometry, stride))
        further = max(int((shot.seconds * fps - first) / later + 0.5), 0)
        result.append(ShotLength(shot.seconds, 1 + further, first + further * later))
        start += 1 + further
    return result


def statement(script: Sequence[Shot], geometry: Geometry, fps: float, stride: int = 4) -> str:
    """What was asked and what it became: a line on the rule, then a line a shot.

    Arguments and errors as `lengths`'.
    """
    first, later = (len(chunk_frames(i, geometry, stride)) for i in (0, 1))
    lines = [
        f"a shot is whole chunks, at least one: {later} frames each, {first} for the video's "
        f"first, at {fps:g} fps"
    ]
    for number, shot in enumerate(lengths(script, geometry, fps, stride), 1):
        lines.append(
            f"shot {number}: {shot.asked:g} s asked, {shot.frames / fps:.2f} s made "
            f"({shot.frames} frames, chunks: {shot.chunks})"
        )
    return "\n".join(lines)


def plan(
    script: Sequence[Shot],
    geometry: Geometry,
    fps: float,
    stride: int = 4,
    scene_cut: str = SCENE_CUT,
) -> list[ChunkPlan]:
    """Every chunk of the video, in order.

    Args:
        script, geometry, fps, stride: see `lengths`; errors as there.
        scene_cut: what precedes the caption in the first chunk of every shot but the first.
    """
    chunks: list[ChunkPlan] = []
    for index, length in enumerate(lengths(script, geometry, fps, stride)):
        for k in range(length.chunks):
            opens = k == 0 and (script[index].cut or not chunks)
            prefix = scene_cut if opens and index else ""
            frames = chunk_frames(len(chunks), geometry, stride)
            prompt = prefix + script[index].caption
            switches = k == 0 and not opens
            chunks.append(ChunkPlan(len(chunks), index, prompt, opens, frames, switches))
    return chunks
