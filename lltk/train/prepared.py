"""Prepared sets: a folder of clips that were encoded once, to train on without their videos.

::

    prepared.json           what they were made from, how many there are, each shard's checksum
    shard-000000.tar, …     the clips that train; see `lltk.train.clip_shards`
    held-out-000000.tar     clips of another seed, for validation and samples

The manifest is there from the beginning; it lists the shards once all are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind
from lltk.files.writing import write_text
from lltk.graph.recipe import validated
from lltk.train.clip_shards import REMEDY, Shard, unpacked
from lltk.train.data import in_epochs
from lltk.train.read_ahead import ReadAhead
from lltk.train.recipe import differences, in_words

MANIFEST = Manifest(
    "prepared.json", "a prepared set", format=1, remedy="make it again by lltk prepare"
)
_NAME = re.compile(r"(shard|held-out)-\d{6,}\.tar|prepared\.json|run\.lock|\..*\.lltk-new")
SET = Kind(
    "a prepared set",
    lambda folder: all(_NAME.fullmatch(path.name) for path in folder.iterdir()),
    folder=True,
)


class Facts(BaseModel):
    """What the manifest says.

    Attributes:
        origin: what decides the bits of the clips, under the recipe's keys; and the SHA-256 of the
            encoders' files as ``vae`` and ``text_encoder``.
        seed: of the clips that train.
        clips: how many of them there are.
        shard: how many of them a shard has.
        held_out: how many clips there are of the seed ~s.
        versions: of lltk and what it uses.
        files: the shards' SHA-256.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: dict[str, Any]
    seed: int = Field(ge=0)
    clips: int = Field(ge=1)
    shard: int = Field(ge=1)
    held_out: int = Field(ge=1)
    versions: dict[str, str]
    files: dict[str, str]

    @property
    def parts(self) -> Iterator[Part]:
        """The shards that there should be."""
        for number, start in enumerate(range(0, self.clips, self.shard)):
            end = min(start + self.shard, self.clips)
            yield Part(f"shard-{number:06d}.tar", self.seed, range(start, end))
        yield Part("held-out-000000.tar", ~self.seed, range(self.held_out))


@dataclass(frozen=True)
class Part:
    """What a shard holds.

    Attributes:
        name: of the file.
        seed: of its samples.
        samples: their numbers.
    """

    name: str
    seed: int
    samples: range


class Prepared:
    """A prepared set as a dataset. A sample is read from its shard while the one before trains.

    Each epoch asks for each clip once; see `in_epochs`. Sample i of another seed is held-out clip
    i, and they begin again after the last.

    Args:
        folder: the set's.
        origin: what its clips must be made from; see `Facts`.
        seed: of the run that trains on it.

    Raises:
        ValueError: it is no prepared set, is not finished, was made from anything else, or lacks a
            shard.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any], seed: int) -> None:
        self._facts = read_facts(folder)
        check_origin(folder, self._facts.origin, origin)
        parts = list(self._facts.parts)
        if self._facts.files.keys() != {part.name for part in parts}:
            raise ValueError(f"{folder}: is not finished; go on with lltk prepare … --resume")
        for part in parts:
            if not (folder / part.name).is_file():
                raise ValueError(f"{folder / part.name}: is missing; {REMEDY}")
        shards = [Shard(folder / part.name) for part in parts]
        self._clips = ReadAhead(_Clips(self._facts, shards, seed))

    def ahead(self, seed: int, indices: range) -> None:
        self._clips.ahead(seed, indices)

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        clips = [self._clips.sample(seed, index) for index in indices]
        return {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}


class _Clips:
    """The samples of a set, of which the last shard holds those of other seeds than the run's."""

    def __init__(self, facts: Facts, shards: list[Shard], seed: int) -> None:
        self._facts = facts
        self._shards = shards
        self._seed = seed

    def sample(self, seed: int, index: int) -> dict[str, Tensor]:
        facts = self._facts
        if seed == self._seed:
            (number,) = in_epochs(seed, facts.clips, range(index, index + 1))
            clip = self._shards[number // facts.shard].clip(number)
        else:
            clip = self._shards[-1].clip(index % facts.held_out)
        return unpacked(clip, facts.origin["geometry"]["text_tokens"])


def read_facts(folder: Path) -> Facts:
    """What the manifest of a set says, finished or not.

    Raises:
        ValueError: it is no prepared set, or its manifest was changed.
    """
    content = MANIFEST.read(folder, check_files=False)
    return validated(Facts, content, str(folder / MANIFEST.name))


def write_facts(folder: Path, facts: Facts) -> None:
    """Write the manifest of a set; errors as `write_text`'s."""
    content = facts.model_dump(mode="json")
    write_text(folder / MANIFEST.name, MANIFEST.text(content, content.pop("files")))


def check_origin(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a set whose clips were made from anything else.

    Args:
        folder: of the set.
        theirs: what its clips were made from; see `Facts`.
        ours: what they must be made from.

    Raises:
        ValueError: something differs; names it.
    """
    if found := in_words(differences(theirs, ours)):
        raise ValueError(
            f"{folder}: was prepared from something else: {found}; change the recipe, or prepare "
            "its clips in another folder"
        )
