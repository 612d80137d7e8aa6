"""Training states: all that a run needs to go on, wherever it was killed.

A state is a folder ``step_00000100``. It is written whole or not at all::

    weights.safetensors    the weights that train, float32, by parameter name
    ema.safetensors        their moving average, once there is one
    optimiser.safetensors  the optimiser's moments as "exp_avg.<name>", …, and the state of torch's
                           random generators as "rng.cpu", "rng.cuda.0", …
    memory.safetensors     what the objective keeps from step to step, such as errors, if it does
    checkpoint.json        the step, the number of samples seen, the recipe, passes and versions,
                           and the checksums of all files
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind
from lltk.files.tensors import read_tensors, write_tensors
from lltk.files.writing import remove_whole, whole_folder
from lltk.graph.recipe import validated

_MANIFEST = Manifest(
    "checkpoint.json",
    "a training state",
    format=2,
    remedy="remove it to resume from the one before",
)
_NAME = re.compile(r"step_\d{8,}")
_PARTS = ("weights", "ema", "optimiser", "memory")
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
class TrainingState:
    """A run after ``step`` steps.

    Attributes:
        step: how many steps are done.
        position: how many samples the run has seen.
        about: the resolved ``recipe``, the pass ``log`` and the ``versions``, as plain data.
        weights: the weights that train, float32, by parameter name.
        ema: their moving average; empty before there is one.
        optimiser: the state of the optimiser and of torch's random generators.
        memory: what the objective keeps from step to step.
    """

    step: int
    position: int
    about: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    memory: Mapping[str, Tensor]


def save_training_state(folder: Path, state: TrainingState, keep: int) -> Path:
    """Write a state, then remove all but the newest.

    Args:
        folder: holds the run's states.
        state: what to write.
        keep: how many states to keep, this one included.

    Returns:
        The folder of this state.

    Raises:
        OSError: it cannot be written. The states before it are left as they were.
    """
    path = folder / f"step_{state.step:08d}"
    with whole_folder(path) as made:
        for name in _PARTS:
            if tensors := getattr(state, name):
                with made.file(f"{name}.safetensors") as file:
                    write_tensors(file, tensors, {"format": "pt"})
        _MANIFEST.write(made, {"step": state.step, "position": state.position, **state.about})
    for old in training_states(folder)[:-keep]:
        if _MANIFEST.recognises(old):
            remove_whole(old)
    return path


def training_states(folder: Path) -> list[Path]:
    """The folders of a run's states, the newest last."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def load_training_state(path: Path) -> TrainingState:
    """Read a state's folder. The tensors are on the CPU.

    Raises:
        ValueError: a file is missing or was changed, or has a format that this lltk does not read.
    """
    facts = validated(_Facts, _MANIFEST.read(path), str(path / _MANIFEST.name))
    if path.name != f"step_{facts.step:08d}":
        raise ValueError(f"{path}: holds step {facts.step}; give it its name back")
    tensors = {}
    for name in _PARTS:
        file = path / f"{name}.safetensors"
        if file.exists() and file.name not in facts.files:
            raise ValueError(f"{path}: {_MANIFEST.name} lists no {file.name}; {_MANIFEST.remedy}")
        tensors[name] = read_tensors(file)[0] if file.exists() else {}
    about = {"recipe": facts.recipe, "log": facts.log, "versions": facts.versions}
    return TrainingState(facts.step, facts.position, about, **tensors)


def check_training_state(state: TrainingState, path: Path, shapes: Mapping[str, Shape]) -> None:
    """Check a state before any of it is used.

    Args:
        state: as it was read.
        path: what errors call it.
        shapes: of the weights that train, by parameter name.

    Raises:
        ValueError: a tensor is missing, is one too many, or has another shape, dtype or value than
            a run of these weights can have.
    """
    moments = {f"{key}.{name}": shape for name, shape in shapes.items() for key in _MOMENTS}
    counters = dict.fromkeys((f"step.{name}" for name in shapes), ())
    optimiser = {n: t for n, t in state.optimiser.items() if not n.startswith("rng.")}
    for part, found, wanted in (
        ("weights", state.weights, shapes),
        ("ema", state.ema, shapes if state.ema else {}),
        ("optimiser", optimiser, {**moments, **counters} if state.step else {}),
    ):
        other = sorted(found.keys() ^ wanted.keys())
        if other:
            where = "is missing" if other[0] in wanted else "is one too many"
            raise ValueError(f"{path}: {part}: {other[0]} {where}; {_MANIFEST.remedy}")
        for name, tensor in found.items():
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != tuple(wanted[name]):
                raise ValueError(
                    f"{path}: {part}: {name} is {tensor.dtype} {list(tensor.shape)}, not float32 "
                    f"{list(wanted[name])}; {_MANIFEST.remedy}"
                )
            if not tensor.isfinite().all() or (
                (name.startswith("exp_avg_sq.") and bool((tensor < 0).any()))
                or (name.startswith("step.") and not 1 <= float(tensor) <= state.step)
            ):
                raise ValueError(
                    f"{path}: {part}: {name} has values that no run gives; {_MANIFEST.remedy}"
                )
    generators = {n: t for n, t in state.optimiser.items() if n.startswith("rng.")}
    for name in sorted({"rng.cpu", *generators}):
        if not _is_generator(name, generators.get(name)):
            raise ValueError(f"{path}: optimiser: {name} is no generator; {_MANIFEST.remedy}")


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
