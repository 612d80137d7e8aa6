"""Checkpoints of a training run: all that a run killed at any moment needs to go on.

A checkpoint is a folder ``step_00000100``, written whole or not at all::

    weights.safetensors    what trains, float32, by parameter name
    ema.safetensors        its moving average, once there is one
    optimiser.safetensors  AdamW's state as "exp_avg.<name>", …; "rng.cpu", "rng.cuda.0", …
    checkpoint.json        step, data position, and what the run says about itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lltk.graph.files import remove_whole, written_whole

FORMAT = 1
_MANIFEST = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` steps.

    Attributes:
        step: steps done.
        position: samples seen.
        about: the resolved recipe, the pass log and versions, as plain data.
        weights: what trains, float32, by parameter name.
        ema: its moving average; empty before there is one.
        optimiser: the optimiser's and the random generators' state.
    """

    step: int
    position: int
    about: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest.

    Args:
        folder: of the run's checkpoints.
        checkpoint: what to write.
        keep: how many to keep, this one counted.

    Returns:
        The checkpoint's own folder.

    Raises:
        OSError: it cannot be written; those before it are as they were.
    """
    path = folder / f"step_{checkpoint.step:08d}"
    with written_whole(path) as temporary:
        temporary.mkdir()
        for name in ("weights", "ema", "optimiser"):
            tensors = {n: t.detach().contiguous() for n, t in getattr(checkpoint, name).items()}
            if tensors:
                save_file(tensors, temporary / f"{name}.safetensors", {"format": "pt"})
        manifest = {
            "format": FORMAT,
            "step": checkpoint.step,
            "position": checkpoint.position,
            **checkpoint.about,
        }
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        remove_whole(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest last."""
    return sorted(folder.glob("step_*"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's folder; tensors are on the CPU.

    Raises:
        ValueError: a file is missing or damaged, or the format is another.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        tensors = {
            name: load_file(file) if (file := path / f"{name}.safetensors").exists() else {}
            for name in ("weights", "ema", "optimiser")
        }
        made_format, step, position = (manifest.pop(key) for key in ("format", "step", "position"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{path}: is no whole checkpoint ({error}); remove it to resume from the one before"
        ) from error
    if made_format != FORMAT:
        raise ValueError(
            f"{path}: is of format {made_format}, this lltk reads {FORMAT}; resume with the lltk "
            f"that wrote it ({manifest.get('versions', {}).get('lltk', 'unknown')})"
        )
    return Checkpoint(step, position, manifest, **tensors)
