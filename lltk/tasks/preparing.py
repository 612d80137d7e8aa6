"""Encoding the clips that a recipe trains on, once and for all runs, as a prepared set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lltk.artefact import versions
from lltk.files.locks import held
from lltk.files.outputs import Output, check_outputs
from lltk.files.reading import read_json
from lltk.files.tensors import checksum, is_unchanged
from lltk.files.writing import remove_unfinished
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.models.configs import without_notes
from lltk.models.wan_vae import validate_config
from lltk.parallel.mesh import ALONE, Mesh, meshed
from lltk.parallel.ranks import Ranks
from lltk.stream.text import encoder_digest, files_digest
from lltk.tasks.clips import Clips, clip_geometry, clips_by_ranks
from lltk.tasks.encoder import encoder_for, pipeline_of
from lltk.train.clip_files import check_clip_folder
from lltk.train.clip_shards import REMEDY, Clip, Shard, write_shard
from lltk.train.data import held_out
from lltk.train.prepared import (
    MANIFEST,
    SET,
    Facts,
    Part,
    Prepared,
    check_origin,
    read_facts,
    write_facts,
)
from lltk.train.progress import Note, silent
from lltk.train.recipe import TrainSection, train_section

_SHARD, _WORLD_SHARD = 16, 64
"""Clips in a shard: of a folder, which are large; and of the tiny world, encoded at once."""
_ELSEWHERE = {"prepared", "pipeline", "frames", "encoding"}
"""Keys of ``train.data`` that do not decide the bits of clips, or do so by another fact."""
_WORK = "encoding clips"


@dataclass(frozen=True)
class PreparingPlan:
    """What will be encoded, before anything is loaded.

    Attributes:
        recipe: of the run that will train on the set.
        section: its ``train`` section.
        device: where the encoders run.
    """

    recipe: Recipe
    section: TrainSection
    device: torch.device

    def facts(self, origin: Mapping[str, Any]) -> Facts:
        """What the set's manifest will say, without checksums; ``origin`` as `origin_of` has it."""
        data = self.section.data
        assert data.clips is not None
        return Facts(
            origin=dict(origin),
            seed=self.section.seed,
            clips=data.clips,
            shard=_WORLD_SHARD if data.folder is None else _SHARD,
            held_out=held_out(self.recipe.geometry.batch),
            versions=versions(),
            files={},
        )

    @property
    def latent_bytes(self) -> int:
        """The size of a clip's latents. Reads the autoencoder's configuration."""
        file = pipeline_of(self.section.data) / "vae" / "config.json"
        vae = validate_config(without_notes(read_json(file)), str(file))
        sizes, space = _geometry(self.recipe, self.section), vae["scale_factor_spatial"]
        area = sizes["height"] // space * (sizes["width"] // space)
        return int(vae["z_dim"]) * sizes["frames"] * area * torch.float32.itemsize

    def clips(self, note: Note = silent) -> Clips:
        """Load what makes the clips."""
        geometry, dtype = self.recipe.geometry, getattr(torch, self.recipe.model.dtype)
        encoder = encoder_for(self.section.data, geometry, self.device, dtype)
        return clips_by_ranks(self.section, geometry, encoder, self.device, note)(1)


def plan_preparing(
    data: Mapping[str, Any], device: torch.device | str = "cpu", where: str = "recipe"
) -> PreparingPlan:
    """The plan of a recipe's plain data.

    Args:
        data: as `lltk.graph.recipe.read_recipe` gives it.
        device: where the encoders will run.
        where: what errors call the recipe.

    Raises:
        ValueError: the recipe does not fit, or does not say how many clips to encode.
    """
    if "vae" in data:
        raise ValueError(
            f"{where}: trains an autoencoder, which takes videos; name a recipe of a transformer"
        )
    recipe = parse_recipe(data, where)
    section = train_section(recipe.train, where)
    if section.data.clips is None:
        raise ValueError(
            f"{where}: train.data.clips: does not say how many clips to encode; set it to a number"
        )
    pipeline_of(section.data)
    clip_geometry(section, recipe.geometry)
    if section.data.folder is not None:
        check_clip_folder(Path(section.data.folder))
    return PreparingPlan(recipe, section, torch.device(device))


def prepare(
    plan: PreparingPlan,
    folder: Path,
    *,
    resume: bool = False,
    note: Note = silent,
    ranks: Ranks | None = None,
) -> Facts:
    """Encode the clips into shards, whole or not at all each, and then write the manifest.

    What is written does not depend on the number of ranks, nor on kills before.

    Args:
        plan: of the set.
        folder: of the set.
        resume: go on with what is there; shards that are there are checked.
        note: told how many clips are encoded or checked.
        ranks: those that take shards in turn, all of which call this; by default this process
            alone.

    Returns:
        What the manifest says.

    Raises:
        ValueError: the folder is in use, holds a set that is not to be resumed, or one of another
            recipe, or anything else; a shard in it was changed; or the clips cannot be read.
        OSError: a file cannot be written.
    """
    ranks = ranks or Ranks(0, 1, plan.device)
    with ExitStack() as opened:
        mesh = opened.enter_context(meshed(ranks, 1, 1))
        first = begun(plan, folder, resume) if mesh.rank == 0 else None
        clips = plan.clips(note)
        if first is not None:  # the folder is made once all that the recipe names was found
            opened.enter_context(held(folder))
            remove_unfinished(folder)
            write_facts(folder, first)
        facts = mesh.every(first)[0]
        assert facts is not None
        own = {}
        for part in list(facts.parts)[mesh.rank :: mesh.size]:
            path = folder / part.name
            if path.exists():
                own[part.name] = _checked(path, part, facts.files.get(part.name))
            else:
                own[part.name] = write_shard(path, _encoded(clips, part, plan, facts, note))
        files = {name: made for each in mesh.every(own) for name, made in each.items()}
        facts = facts.model_copy(update={"files": files})
        if mesh.rank == 0:
            write_facts(folder, facts)
        note(_WORK, 1, 1)
    return facts


def stored_facts(folder: Path, resume: bool) -> Facts | None:
    """What the manifest says of a set that is to go on; None where it begins.

    Raises:
        ValueError: there is one, and it should not be resumed; or the folder holds anything else.
    """
    check_outputs([Output(folder, SET)], [], overwrite=True)
    if folder.is_dir() and not SET.recognises(folder):
        raise ValueError(f"{folder}: holds what is no part of a prepared set; name another folder")
    if (folder / MANIFEST.name).exists():
        if not resume:
            raise ValueError(f"{folder}: holds a prepared set; resume it, or name another folder")
        return read_facts(folder)
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder}: has shards without {MANIFEST.name}; name another folder")
    return None


def begun(plan: PreparingPlan, folder: Path, resume: bool) -> Facts:
    """The facts of a set that begins or goes on. Reads the encoders' files, and writes nothing.

    Raises:
        ValueError: as `stored_facts`, or the set in the folder is another one.
    """
    stored = stored_facts(folder, resume)
    wanted = plan.facts(origin_of(plan.recipe, plan.section))
    if stored is None:
        return wanted
    theirs, ours = (
        facts.origin | {"train.seed": facts.seed, "held_out": facts.held_out}
        for facts in (stored, wanted)
    )
    check_origin(folder, theirs, ours)
    return stored


def prepared_clips(recipe: Recipe, section: TrainSection, mesh: Mesh = ALONE) -> Prepared:
    """The clips of the set that ``train.data.prepared`` names.

    Args:
        recipe: that trains on them.
        section: its ``train`` section.
        mesh: the ranks that train, all of which call this.

    Raises:
        ValueError: as `Prepared`, or there is no pipeline.
    """
    origin = origin_of(recipe, section) if mesh.rank == 0 else {}
    return Prepared(Path(section.data.prepared or ""), mesh.every(origin)[0], section.seed)


def origin_of(recipe: Recipe, section: TrainSection) -> dict[str, Any]:
    """What decides the bits of a recipe's clips; see `Facts`. Reads the encoders' files."""
    pipeline = pipeline_of(section.data)
    return {
        "geometry": _geometry(recipe, section),
        "train": {"data": section.data.model_dump(mode="json", exclude=_ELSEWHERE)},
        "model": {"dtype": recipe.model.dtype},
        "vae": files_digest([pipeline / "vae"]),
        "text_encoder": encoder_digest(pipeline),
    }


def _encoded(
    clips: Clips, part: Part, plan: PreparingPlan, facts: Facts, note: Note
) -> Iterator[Clip]:
    """A shard's clips, encoded in the blocks in which a run without the set encodes them."""
    trains = part.seed == facts.seed
    size = clips.block if trains else plan.recipe.geometry.batch
    before = 0 if trains else facts.clips
    for start in range(part.samples.start, part.samples.stop, size):
        note(_WORK, before + start, facts.clips + facts.held_out)
        block = range(start, min(start + size, part.samples.stop))
        tensors, prompts = clips.described(part.seed, block)
        for row, number in enumerate(block):
            yield number, {name: tensor[row] for name, tensor in tensors.items()}, prompts[row]


def _checked(path: Path, part: Part, wanted: str | None) -> str:
    """The checksum of a shard that is there, once it, or each clip in it, has been checked."""
    if wanted is None:
        shard = Shard(path)
        for number in part.samples:
            shard.clip(number)
        return checksum(path)
    if not is_unchanged(path, wanted):
        raise ValueError(f"{path}: was changed after it was written, or is damaged; {REMEDY}")
    return wanted


def _geometry(recipe: Recipe, section: TrainSection) -> dict[str, int]:
    """The sizes of a clip."""
    geometry = clip_geometry(section, recipe.geometry)
    return geometry.model_dump(include={"height", "width", "chunk", "text_tokens", "frames"})
