"""A video for each prompt of a file and each seed, in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lltk.cli.stopping import stopping
from lltk.files.locks import held, lock_output
from lltk.files.outputs import Output, marked
from lltk.files.reading import read_json, read_text
from lltk.files.writing import sync_folder, write_text
from lltk.parallel.ranks import Ranks
from lltk.stream.prompts import Embed
from lltk.stream.script import single_shot
from lltk.streaming import Plan, check_plan, load_models
from lltk.streaming.to_video import stream_to
from lltk.train.recipe import changes, in_words

LONGEST_NAME = 240
"""Bytes; file systems take 255."""
_UNFINISHED = ".unfinished.mp4"
_WHAT = "videos that lltk stream makes"
_NOTE = marked("a note on videos", f'"what": "{_WHAT}"')


@dataclass(frozen=True)
class Job:
    """One video.

    Attributes:
        prompt: what it shows.
        index: which of the prompt's videos it is, from 0.
        path: its file.
    """

    prompt: str
    index: int
    path: Path


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; the same prompt counts once.

    Raises:
        ValueError: it cannot be read, or holds no prompt.
    """
    lines = read_text(path).splitlines()
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one a line")
    return prompts


def jobs(prompts: Iterable[str], seeds: int, folder: Path) -> list[Job]:
    """The videos, named as VBench and VBench-Long look for them: ``PROMPT-INDEX.mp4``.

    Raises:
        ValueError: a prompt is no file's name.
    """
    made = []
    for prompt in prompts:
        for index in range(seeds):
            name = f"{prompt}-{index}.mp4"
            if "/" in prompt or "\0" in prompt or len(name.encode()) > LONGEST_NAME:
                raise ValueError(
                    f"--prompts: {prompt[:60]!r} names a video, and no file can have that name; "
                    f"write prompts without a slash, of at most {LONGEST_NAME - 6} bytes"
                )
            made.append(Job(prompt, index, folder / name))
    return made


def check_videos(folder: Path) -> list[Output]:
    """What is written beside a folder of videos.

    Raises:
        ValueError: the folder holds anything, and lltk made no videos there.
    """
    note = _note(folder)
    known = note.is_file() and _NOTE.recognises(note)
    if folder.is_dir() and any(folder.iterdir()) and not known:
        raise ValueError(f"{folder}: is not empty, and no videos of lltk; name another folder")
    return [Output(note, _NOTE), lock_output(folder, _lock(folder))]


def stream_prompts(
    console: Console,
    ranks: Ranks,
    plan: Plan,
    wanted: Sequence[Job],
    seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """Make the videos that are not there yet; returns what was done, as plain data.

    A video is there when it is whole. What all of them were made by is kept beside the folder.

    Args:
        console: for progress.
        ranks: the processes that run the stream; the first one writes.
        plan: of the stream.
        wanted: the videos. Those of one index share a seed: the recipe's, and the index on top.
        seconds: the length of each.
        folder: where they go.

    Raises:
        click.ClickException: it was stopped.
        ValueError: the folder is in use, its videos were made otherwise, or as `load_models` and
            `Models.open`.
    """
    with nullcontext() if ranks.rank else held(folder, _lock(folder)):
        return _stream_missing(console, ranks, plan, wanted, seconds, folder)


def _stream_missing(
    console: Console,
    ranks: Ranks,
    plan: Plan,
    wanted: Sequence[Job],
    seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """What `stream_prompts` does while no other process does it there."""
    missing = [job for job in wanted if not job.path.exists()]
    _note_origin(plan, seconds, folder, ranks.rank == 0)
    done = {"folder": str(folder), "videos": len(wanted), "made": len(missing)}
    if not missing:
        return done
    check_plan(plan)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        TemporaryDirectory() as cache,
        stopping() as stop,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        prompts = list(dict.fromkeys(job.prompt for job in missing))
        embed = _encoded(plan, prompts, Path(plan.section.text.cache or cache), progress)
        bar = progress.add_task("videos", total=len(wanted), completed=len(wanted) - len(missing))
        models = load_models(plan, prompts=embed, sessions=1)
        for job in missing:
            unfinished = job.path.with_name(_UNFINISHED)
            seed = plan.section.seed + job.index
            for _ in stream_to(models, single_shot(job.prompt, seconds), unfinished, seed):
                if ranks.any(stop.asked):
                    raise click.ClickException(
                        f"stopped; whole videos are in {folder}, the same command makes the rest"
                    )
            if ranks.rank == 0:
                os.replace(unfinished, job.path)
                sync_folder(folder)
            progress.advance(bar)
    return done


def _encoded(plan: Plan, prompts: list[str], cache: Path, progress: Progress) -> Embed:
    """The prompts' embeddings, made before the models are loaded and kept in a folder."""
    encoder = plan.text_encoder(cache)
    if plan.guided:
        prompts = [*prompts, plan.section.negative_prompt]
    for prompt in progress.track(prompts, description="encoding prompts"):
        encoder.encode([prompt])
    encoder.free()
    return lambda prompt: encoder.encode([prompt]).to(plan.device)


def _note_origin(plan: Plan, seconds: float, folder: Path, writes: bool) -> None:
    """Keep beside the folder what its videos are made by, or compare with what is kept.

    Raises:
        ValueError: they were made by something else.
    """
    recipe = plan.recipe.resolved() | {"stream": plan.section.model_dump(mode="json")}
    own: dict[str, Any] = {"what": _WHAT, "recipe": recipe, "seconds": seconds}
    note = _note(folder)
    if note.exists() and _NOTE.recognises(note):
        kept = read_json(note)
        changed = in_words(changes(kept, own)) if isinstance(kept, dict) else "all differs"
        if changed:
            raise ValueError(
                f"{folder}: its videos were made otherwise: {changed} (see {note}); name another "
                "folder"
            )
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(own, indent=2))


def _note(folder: Path) -> Path:
    """Where it is kept what a folder's videos are made by."""
    return folder.with_name(f"{folder.name}.json")


def _lock(folder: Path) -> Path:
    """What is locked while videos are made. It is beside them: a scorer takes all in a folder."""
    return folder.with_name(f"{folder.name}.lock")
