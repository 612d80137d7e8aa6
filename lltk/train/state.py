"""Training states: all that a run needs to go on, wherever it was killed.

A state is a folder ``step_00000100``. It is written whole or not at all::

    weights.safetensors    the weights that train, float32, by parameter name
    ema.safetensors        their moving average, once there is one
    optimiser.safetensors  the optimiser's moments as "exp_avg.<name>", …, and the state of torch's
                           random generators as "rng.cpu", "rng.cuda.0", …
    checkpoint.json        the step, the number of samples seen, the recipe, passes and versions
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lltk.graph.files import remove_whole, written_whole

FORMAT = 1
_MANIFEST = "checkpoint.json"
_PARTS = ("weights", "ema", "optimiser")


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
    """

    step: int
    position: int
    about: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]


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
    with written_whole(path) as temporary:
        temporary.mkdir()
        for name in _PARTS:
            tensors = {n: t.detach().contiguous() for n, t in getattr(state, name).items()}
            if tensors:
                save_file(tensors, temporary / f"{name}.safetensors", {"format": "pt"})
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "position": state.position,
            **state.about,
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for old in training_states(folder)[:-keep]:
        remove_whole(old)
    return path


def training_states(folder: Path) -> list[Path]:
    """The folders of a run's states, the newest last."""
    return sorted(folder.glob("step_*"))


def load_training_state(path: Path) -> TrainingState:
    """Read a state's folder. The tensors are on the CPU.

    Raises:
        ValueError: a file is missing or damaged, or has a format that this lltk does not read.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        tensors = {
            name: load_file(file) if (file := path / f"{name}.safetensors").exists() else {}
            for name in _PARTS
        }
        made_format, step, position = (manifest.pop(key) for key in ("format", "step", "position"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{path}: is not a whole training state ({error}); remove it to resume from the one "
            "before"
        ) from error
    if made_format != FORMAT:
        raise ValueError(
            f"{path}: has format {made_format}, but this lltk reads format {FORMAT}; resume with "
            f"the lltk that wrote it ({manifest.get('versions', {}).get('lltk', 'unknown')})"
        )
    return TrainingState(step, position, manifest, **tensors)


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
