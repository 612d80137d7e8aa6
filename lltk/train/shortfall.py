"""Why a folder's clips fill no sample, and with what settings they would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from lltk.graph.geometry import Geometry

_LISTED = 20


def chunk_frames(geometry: Geometry, stride: int) -> tuple[int, int]:
    """The number of video frames in a sample's first chunk, and in each later one."""
    return stride * (geometry.chunk - 1) + 1, stride * geometry.chunk


def shortfall(
    samples: Mapping[str, Sequence[int]], geometry: Geometry, fps: Fraction, shots: int, stride: int
) -> str:
    """What is missing, a remedy that works if there is one, and what each sample's clips have.

    Args:
        samples: by name, the number of frames of each of its clips at ``fps``.
        geometry: has the chunk and the latent frames of a sample.
        fps: video frames a second.
        shots: most clips in a sample.
        stride: video frames in a latent frame.
    """
    first, later = chunk_frames(geometry, stride)
    chunks = geometry.chunks
    frames = first + (chunks - 1) * later
    filled = {name: _filled(lengths, shots, first, later) for name, lengths in samples.items()}
    ways = []
    for count in range(shots + 1, max(map(len, samples.values()), default=0) + 1):
        if any(_filled(lengths, count, first, later) >= chunks for lengths in samples.values()):
            ways.append(f"train.data.shots={count}")
            break
    longest = max((length for lengths in samples.values() for length in lengths), default=0)
    if best := max(filled.values(), default=0):
        ways.append(f"geometry.frames={best * geometry.chunk}")
    elif chunk := _shorter_chunk(longest, geometry, stride):
        ways.append(f"geometry.chunk={chunk} with geometry.frames={chunk}")
    remedy = f"set {' or '.join(ways)}, or add longer clips" if ways else "add longer clips"
    listed = []
    for name, lengths in samples.items():
        seconds = " + ".join(f"{float(length / fps):.2f}" for length in lengths)
        has = f"shots of {seconds} s ({len(lengths)}) fill" if lengths else "no usable shot fills"
        listed.append(f"\n  {name}: {has} {filled[name]} of {chunks} chunks")
    return (
        f"no sample of {chunks} chunks of {geometry.chunk} latent frames at {float(fps):g} fps "
        f"({frames} frames, {float(frames / fps):.2f} s) and at most {shots} shots can be filled; "
        f"{remedy}{few_lines(listed)}"
    )


def few_lines(lines: Sequence[str]) -> str:
    """The first lines, and how many more there are."""
    more = len(lines) - _LISTED
    return "".join(lines[:_LISTED]) + (f"\n  … and {more} more" if more > 0 else "")


def _filled(lengths: Sequence[int], shots: int, first: int, later: int) -> int:
    """The most chunks that a sample of clips of these lengths can have."""
    usable = [length for length in lengths if length >= first]
    counts = [
        1 + (length - first) // later + sum(more // later for more in usable[i + 1 : i + shots])
        for i, length in enumerate(usable)
    ]
    return max(counts, default=0)


def _shorter_chunk(length: int, geometry: Geometry, stride: int) -> int | None:
    """The longest chunk that so many frames fill and the geometry allows; None if none is."""
    for chunk in range(geometry.chunk - 1, 0, -1):
        sizes = geometry.model_dump() | {"chunk": chunk, "frames": chunk}
        try:
            changed = Geometry.model_validate(sizes)
        except ValueError:
            continue
        if chunk_frames(changed, stride)[0] <= length:
            return chunk
    return None
