"""Small clips with captions whose frames say their number."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lltk.stream.video import VideoWriter

FPS = 16.0


def numbered(first: int, count: int, height: int = 32, width: int = 32) -> Tensor:
    """Grey frames that say their number: level 4 × number."""
    levels = 4 * torch.arange(first, first + count)
    return levels[:, None, None, None].expand(count, height, width, 3).to(torch.uint8)


def numbers(video: Tensor) -> list[int]:
    """What frames say."""
    return [round(level / 4) for level in video.float().mean((1, 2, 3)).tolist()]


def write_clip(
    folder: Path, sample: str, number: int, frames: Tensor, caption: str | None, fps: float = FPS
) -> Path:
    path = folder / "video" / sample / f"{number}.mp4"
    with VideoWriter(path, *frames.shape[1:3], fps) as writer:
        writer.write(frames)
    if caption is not None:
        text = folder / "caption" / sample / f"{number}.json"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(json.dumps({"caption": caption}))
    return path


def damage(path: Path) -> None:
    """Empty a clip's pictures; its packets are still there."""
    content = bytearray(path.read_bytes())
    at = 0
    while (at := content.find(b"mdat", at + 4)) >= 0:
        size = int.from_bytes(content[at - 4 : at], "big")
        content[at + 4 : at - 4 + size] = bytes(size - 8)
    path.write_bytes(content)
