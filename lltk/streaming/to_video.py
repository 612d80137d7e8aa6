"""From a recipe and captions to a video file, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor

from lltk.graph.recipe import open_recipe
from lltk.parallel.devices import find_device
from lltk.stream.frame_folder import Writer, open_writer
from lltk.stream.report import ChunkReport
from lltk.stream.script import Shot, prompted
from lltk.stream.video import pixels
from lltk.streaming.checks import check_plan
from lltk.streaming.models import Models
from lltk.streaming.plan import plan_stream


def stream_video(
    recipe: str,
    shots: str | Sequence[str | Shot],
    path: Path | str,
    *,
    seconds: float = 5.0,
    changes: Iterable[str] = (),
    device: str | None = None,
) -> None:
    """Stream a video to a file, by a recipe.

    ::

        lltk.stream_video("tiny_stream", ["a red circle", "a blue square"], "video.mp4")

    Args:
        recipe: of a stream: a file, or a shipped one's name.
        shots: what it shows: captions of ``seconds`` each, or shots, as `load_script` reads them.
        path: the video; its suffix decides the form, see `lltk.stream.forms`.
        seconds: length of each caption's shot.
        changes: keys of the recipe to change, each ``key.path=value``.
        device: where it runs; None for a GPU if there is one.

    Raises:
        ValueError: something does not fit, or there is too little memory; says what to change.
        OSError: the file cannot be written.
    """
    script: list[Shot] = []
    for shot in [shots] if isinstance(shots, str) else shots:
        script += prompted([shot], seconds) if isinstance(shot, str) else [shot]
    plan = plan_stream(open_recipe(recipe, changes), find_device(device))
    check_plan(plan)
    for _ in stream_to(Models(plan), script, Path(path)):
        pass


def stream_to(
    models: Models, script: Sequence[Shot], path: Path, seed: int | None = None
) -> Iterator[ChunkReport]:
    """Stream a script to a video; gives a report after each chunk.

    Of several ranks the first writes.

    Args:
        models: of the stream.
        script: what it shows.
        path: the video; its suffix decides the form, see `lltk.stream.forms`.
        seed: of the noise; None for the recipe's.

    Raises:
        ValueError, OSError: as `open_writer` and `Models.open`.
    """
    plan, writer = models.plan, None
    if plan.rank == 0:
        writer = open_writer(path, *plan.size, plan.section.fps, plan.writer_threads)
    with nullcontext() if writer is None else writer:
        sink = None if writer is None else partial(_append, writer)
        with models.open(sink, script, seed=seed) as stream:
            yield from stream


def _append(writer: Writer, video: Tensor) -> None:
    writer.write(pixels(video))
