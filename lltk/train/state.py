"""Training states: all that a run needs to go on, wherever it was killed.

A state is a folder ``step_00000100``. It is written whole or not at all; see `lltk.train.saving`::

    weights.safetensors    the weights that train, float32, by parameter name
    ema.safetensors        their moving average, once there is one
    optimiser.safetensors  the optimiser's moments as "exp_avg.<name>", …, and the state of torch's
                           random generators as "rng.cpu", "rng.cuda.0", …
    memory.safetensors     what the objective keeps from step to step, such as errors, if it does
    critic_weights.safetensors, critic_optimiser.safetensors
                           the same of a critic, if one learns beside it
    checkpoint.json        the step, the number of samples seen, the recipe, passes and versions,
                           and the checksums of all files

Where weights are divided among ranks, each rank writes its own pieces (`lltk.train.pieces`), to
``weights.shard0of4.safetensors`` and so on. What is not divided is in the first rank's files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind
from lltk.files.writing import NewFolder, remove_whole
from lltk.graph.recipe import validated
from lltk.parallel.mesh import ALONE, Mesh, local_part
from lltk.train.pieces import opened_pieces
from lltk.train.recipe import changes, in_words

_MANIFEST = Manifest(
    "checkpoint.json",
    "a training state",
    format=2,
    remedy="remove this state's folder to resume from the one before",
)
_NAME = re.compile(r"step_\d{8,}")
_OF_NETWORK = ("weights", "ema", "optimiser")
_CRITICS = "critic_"
PARTS = (*_OF_NETWORK, "memory", *(f"{_CRITICS}{part}" for part in _OF_NETWORK))
CONSTANT = ("memory",)
"""Parts whose tensors no step changes: it takes others in their place."""
STATES = Kind(
    "training states",
    lambda folder: all(
        _NAME.fullmatch(path.name) or path.name[0] == "." for path in folder.iterdir()
    ),
    folder=True,
)


_MOMENTS = ("exp_avg", "exp_avg_sq")
Shape = tuple[int, ...]


class _Facts(BaseModel):
    """What the manifest says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = Field(ge=0)
    position: int = Field(ge=0)
    recipe: dict[str, Any] = Field({})
    log: list[dict[str, Any]] = Field([])
    versions: dict[str, str] = Field({})
    files: dict[str, str]


@dataclass(frozen=True)
class NetworkState:
    """A network that trains.

    Attributes:
        weights: the weights that train, float32, by parameter name.
        ema: their moving average; empty before there is one.
        optimiser: the state of the optimiser.
    """

    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainingState(NetworkState):
    """A run after ``step`` steps.

    The optimiser's state has that of torch's random generators, too.

    Attributes:
        step: how many steps are done.
        position: how many samples the run has seen.
        about: the resolved ``recipe``, the pass ``log`` and the ``versions``, as plain data.
        memory: what the objective keeps from step to step.
        critic: that learns beside the network; its parts are empty where there is none.
    """

    step: int
    position: int
    about: Mapping[str, Any]
    memory: Mapping[str, Tensor]
    critic: NetworkState = field(default_factory=lambda: NetworkState({}, {}, {}))

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """All tensors, by the names of their parts."""
        parts = {part: getattr(self, part) for part in (*_OF_NETWORK, "memory")}
        return parts | {f"{_CRITICS}{part}": getattr(self.critic, part) for part in _OF_NETWORK}


def state_path(folder: Path, step: int) -> Path:
    """The folder of a state, in the folder of a run's states."""
    return folder / f"step_{step:08d}"


def part_file(part: str, mesh: Mesh = ALONE) -> str:
    """The name of the file to which a rank writes its pieces of a part's tensors."""
    shard = "" if mesh.shards == 1 else f".shard{mesh.rank % mesh.shards}of{mesh.shards}"
    return f"{part}{shard}.safetensors"


def write_manifest(made: NewFolder, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a state, which has all its other files.

    Args:
        made: the state's folder.
        facts: its ``step`` and ``position``, and what `TrainingState.about` holds.
    """
    _MANIFEST.write(made, facts)


def remove_old_states(folder: Path, keep: int) -> None:
    """Remove all but the newest of a run's states."""
    for old in training_states(folder)[:-keep]:
        if _MANIFEST.recognises(old):
            remove_whole(old)


def training_states(folder: Path) -> list[Path]:
    """The folders of a run's states, the newest last."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def check_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse to go on from a state with another recipe. Reads the manifest alone.

    Args:
        path: the state's folder.
        recipe: the run's, resolved, as plain data.

    Raises:
        ValueError: the recipes differ in what a resumed run may not change, or the manifest is
            damaged.
    """
    if changed := changes(_facts(path).recipe, recipe):
        raise ValueError(
            f"{path}: was made by another recipe: {in_words(changed)}; resume with that recipe, or "
            "train in another folder"
        )


def load_training_state(
    path: Path,
    like: Mapping[str, Tensor] | None = None,
    mesh: Mesh = ALONE,
    critic: Mapping[str, Tensor] | None = None,
) -> TrainingState:
    """Read a state's folder, written by however many ranks. All ranks must call it.

    Args:
        path: the folder.
        like: the weights that train, by name. Where one is divided among ranks, so are its value,
            its average and its moments; each rank reads its own parts alone. All else is read
            whole, to the CPU.
        mesh: the ranks, which divide the work of checking the files.
        critic: the critic's weights that train, likewise.

    Raises:
        ValueError: a file is missing or was changed, or has a format that this lltk does not read.
    """
    facts = _facts(path)
    if path.name != state_path(path, facts.step).name:
        raise ValueError(f"{path}: holds step {facts.step}; give it its name back")
    names = sorted(facts.files)
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in facts.files:
            raise ValueError(f"{path}: {_MANIFEST.name} lists no {file.name}; {_MANIFEST.remedy}")
    _agree(mesh, _damage(path, {name: facts.files[name] for name in names[mesh.rank :: mesh.size]}))
    tensors: dict[str, dict[str, Tensor]] = {}
    for part in PARTS:
        files = [path / name for name in names if name.partition(".")[0] == part]
        of_network = (critic if part.startswith(_CRITICS) else like) or {}
        try:
            with opened_pieces(files) as pieces:
                tensors[part] = {
                    name: pieces.read(name, of_network.get(_weight(part, name)))
                    for name in pieces.shapes
                }
        except ValueError as error:
            raise ValueError(f"{path}: {part}: {error}; {_MANIFEST.remedy}") from error
    about = {"recipe": facts.recipe, "log": facts.log, "versions": facts.versions}
    weights, ema, optimiser, memory = (tensors[part] for part in (*_OF_NETWORK, "memory"))
    rival = NetworkState(**{part: tensors[f"{_CRITICS}{part}"] for part in _OF_NETWORK})
    return TrainingState(weights, ema, optimiser, facts.step, facts.position, about, memory, rival)


def _facts(path: Path) -> _Facts:
    """What the manifest of a state says; the files that it lists are not checked."""
    return validated(_Facts, _MANIFEST.read(path, check_files=False), str(path / _MANIFEST.name))


def _damage(path: Path, files: Mapping[str, str]) -> str | None:
    """What is wrong with the first of a state's files that are not as they were written."""
    for name, wanted in files.items():
        try:
            _MANIFEST.check_file(path / name, wanted)
        except ValueError as error:
            return str(error)
    return None


def _agree(mesh: Mesh, problem: str | None) -> None:
    """Raise on all ranks what any of them found. All must call it."""
    found = next((each for each in mesh.every(problem) if each is not None), None)
    if found is not None:
        raise ValueError(found)


def _weight(part: str, name: str) -> str:
    """The parameter that a tensor belongs to."""
    return name.partition(".")[2] if part.endswith("optimiser") else name


def check_training_state(
    state: TrainingState,
    path: Path,
    shapes: Mapping[str, Shape],
    mesh: Mesh = ALONE,
    critic: Mapping[str, Shape] = MappingProxyType({}),
    critic_updates: int = 0,
) -> None:
    """Check a state before any of it is used. All ranks must call it.

    Args:
        state: as it was read.
        path: what errors call it.
        shapes: of the weights that train, by parameter name.
        mesh: the ranks, each of which checks the values that it has.
        critic: the shapes of the critic's weights that train.
        critic_updates: how often it was updated.

    Raises:
        ValueError: a tensor is missing, is one too many, or has another shape, dtype or value than
            a run of these weights can have.
    """
    own = _problem(state, "", path, shapes, state.step)
    others = _problem(state.critic, _CRITICS, path, critic, critic_updates)
    _agree(mesh, own or others or _bad_generator(state, path))


def _problem(
    state: NetworkState, prefix: str, path: Path, shapes: Mapping[str, Shape], done: int
) -> str | None:
    """What is wrong with a network after so many updates, as far as this rank has it."""
    moments = {f"{key}.{name}": shape for name, shape in shapes.items() for key in _MOMENTS}
    counters = dict.fromkeys((f"step.{name}" for name in shapes), ())
    optimiser = {n: t for n, t in state.optimiser.items() if not n.startswith("rng.")}
    for part, found, wanted in (
        (f"{prefix}weights", state.weights, shapes),
        (f"{prefix}ema", state.ema, shapes if state.ema else {}),
        (f"{prefix}optimiser", optimiser, {**moments, **counters} if done else {}),
    ):
        other = sorted(found.keys() ^ wanted.keys())
        if other:
            where = "is missing" if other[0] in wanted else "is one too many"
            return f"{path}: {part}: {other[0]} {where}; {_MANIFEST.remedy}"
        for name, tensor in found.items():
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != tuple(wanted[name]):
                return (
                    f"{path}: {part}: {name} is {tensor.dtype} {list(tensor.shape)}, not float32 "
                    f"{list(wanted[name])}; {_MANIFEST.remedy}"
                )
            own = local_part(tensor)
            if not own.isfinite().all() or (
                (name.startswith("exp_avg_sq.") and bool((own < 0).any()))
                or (name.startswith("step.") and not 1 <= float(own) <= done)
            ):
                return f"{path}: {part}: {name} has values that no run gives; {_MANIFEST.remedy}"
    return None


def _bad_generator(state: TrainingState, path: Path) -> str | None:
    """What is wrong with the states of torch's generators."""
    generators = {n: t for n, t in state.optimiser.items() if n.startswith("rng.")}
    for name in sorted({"rng.cpu", *generators}):
        if not _is_generator(name, generators.get(name)):
            return f"{path}: optimiser: {name} is no generator; {_MANIFEST.remedy}"
    return None


def _is_generator(name: str, state: Tensor | None) -> bool:
    """Whether a tensor is the state of a generator. One of a GPU that is not here may be any."""
    if state is None or state.dtype != torch.uint8 or state.dim() != 1:
        return False
    found = re.fullmatch(r"rng\.(cpu|cuda\.(\d+))", name)
    if found is None:
        return False
    if found[2] and int(found[2]) >= torch.cuda.device_count():
        return True
    try:
        torch.Generator(found[1].replace(".", ":")).set_state(state)
    except RuntimeError:
        return False
    return True


def random_state() -> dict[str, Tensor]:
    """The state of torch's own generators, by name.

    Dropout draws from them. Clips and noise do not: their numbers follow from the seed and the
    sample's number.
    """
    states = {"rng.cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"rng.cuda.{index}"] = torch.cuda.get_rng_state(index)
    return states


def restore_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Set torch's generators as `random_state` found them; other names are left alone."""
    torch.set_rng_state(tensors["rng.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
