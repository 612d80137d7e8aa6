"""Replay LongLive-2.0's recorded assembly of clips to samples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from lltk.stream.script import SCENE_CUT
from lltk.train.assembly import Assembly, Rules, Shot, Unfilled, assemble, first_usable, place_of

REASONS = {
    "no videos with captions": "no clip has a caption",
    "no video can provide the first chunk": "every clip is too short for the first chunk",
    "first video is too short for the first chunk": "the first clip is too short for the first",
    "remaining videos are too short for the next chunk": "the clips fill [0-9]+ of",
    "ran out of videos before all chunks were filled": "the clips fill [0-9]+ of",
    "single-video sample is too short": "the clip ends with chunk",
    "single-video sample ends after first chunk": "the clip ends with chunk 1 of",
    r"only (\d+) valid latent frames, below min_latent_frames=(\d+)": (
        r"the clips fill \1 latent frames, fewer than the \2 of"
    ),
}
"""What LongLive says of a sample that it refuses, and what ours says."""


def replay_data(path: Path) -> float:
    """The share of what was recorded that is otherwise here."""
    record = json.loads(path.read_text(encoding="utf-8"))
    agreed = list(agreements(record))
    return 1 - sum(agreed) / len(agreed)


def agreements(record: Mapping[str, Any]) -> Iterator[bool]:
    """Whether each recorded thing holds."""
    folders = {folder["name"]: clips(folder) for folder in record["folders"]}
    for settings, result in zip(record["settings"], record["results"], strict=True):
        rules = rules_of(record["meta"], settings)
        usable = {}
        for name, (stems, shots) in folders.items():
            wanted = result["folders"][name]
            try:
                found: Assembly | Unfilled = assemble(shots, rules)
            except Unfilled as error:
                found = error
            usable[name] = isinstance(found, Assembly)
            yield usable[name] == wanted["ok"]
            if isinstance(found, Assembly) and wanted["ok"]:
                yield from same_sample(found, stems, rules, wanted)
            elif not wanted["ok"]:
                yield same_reason(wanted["reason"], str(found))
        names = sorted(folders)
        for asked, wanted in result["first_usable"].items():
            place = first_usable(names.index(asked), [usable[name] for name in names])
            yield wanted == (None if place is None else names[place])


def clips(folder: Mapping[str, Any]) -> tuple[list[str], list[Shot]]:
    """A recorded folder's clips with captions, in order, and the names of their files."""
    ordered = sorted(folder["clips"], key=lambda clip: place_of(Path(clip["file"]).stem))
    used = [clip for clip in ordered if clip["caption"]]
    shots = [Shot(Fraction(clip["fps"]), clip["frames"], clip["caption"]) for clip in used]
    return [clip["file"] for clip in used], shots


def rules_of(meta: Mapping[str, Any], settings: Mapping[str, Any]) -> Rules:
    """The rules of a recorded setting."""
    assert meta["marker"] == SCENE_CUT
    chunk = meta["frames_per_chunk_latent"]
    given = {key: value for key, value in settings.items() if key not in ("name", "latent_frames")}
    rules = Rules(
        chunk,
        settings["latent_frames"] // chunk,
        Fraction(meta["target_fps"]),
        meta["chunk_raw"] // chunk,
        **given,
    )
    assert (rules.frames(0), rules.frames(1)) == (meta["first_chunk_raw"], meta["chunk_raw"])
    return rules


def same_sample(
    found: Assembly, files: list[str], rules: Rules, wanted: Mapping[str, Any]
) -> Iterator[bool]:
    yield len(found.chunks) == len(wanted["chunks"])
    yield found.valid == wanted.get("num_valid_latent_frames", rules.chunk * rules.chunks)
    for ours, theirs in zip(found.chunks, wanted["chunks"], strict=False):
        yield files[ours.clip] == theirs["clip"]
        yield ours.prompt == theirs["prompt"]
        yield len(ours.frames) == len(theirs["frames"])
        loose = theirs.get("inexact_ties", ())
        for k, (mine, recorded) in enumerate(zip(ours.frames, theirs["frames"], strict=False)):
            yield abs(mine - recorded) <= (k in loose)


def same_reason(theirs: str, ours: str) -> bool:
    for pattern, wanted in REASONS.items():
        if said := re.fullmatch(pattern, theirs):
            return re.match(said.expand(wanted), ours) is not None
    return False
