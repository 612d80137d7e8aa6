"""Pipelines: folders in diffusers' layout that hold all parts of a model."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from lltk.files.outputs import Kind
from lltk.files.reading import read_text
from lltk.files.writing import whole_folder, write_text
from lltk.graph.loading import LOADING
from lltk.models.hub import cached, remedy

_SHIPPED = {"tiny": "tiny/pipeline"}
_INDEX, _SCHEDULER = "model_index.json", "scheduler"
_PARTS = ("vae", "text_encoder", "tokenizer", _SCHEDULER, _INDEX)
PIPELINE = Kind(
    "a pipeline of links", lambda folder: (folder / "transformer").is_symlink(), folder=True
)


def find_pipeline(name: str, needed: bool = True) -> Path:
    """The folder of a pipeline given by path or, if shipped, by name.

    Args:
        name: a path, the name of a shipped pipeline, or OWNER/NAME of the Hugging Face hub, whose
            cache is looked into.
        needed: whether the folder must exist.

    Raises:
        ValueError: the folder does not exist, and it is needed or is a shipped one.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if name not in _SHIPPED:
        if found := cached(name):
            return found
        if not needed:
            return path
        or_on_the_hub = f"; {remedy(name)}" if remedy(name) else ""
        raise ValueError(
            f"{name}: no such pipeline folder; name one in diffusers' layout, as with "
            f"--set stream.pipeline=FOLDER, or a shipped one: {', '.join(_SHIPPED)}{or_on_the_hub}"
        )
    shipped = Path(str(files("lltk.models"))) / _SHIPPED[name]
    if not shipped.is_dir():
        raise ValueError(f"{name}: {shipped} is not in this installation; install lltk again")
    return shipped


def link_pipeline(folder: Path, transformer: Path, source: Path) -> None:
    """Make a pipeline of links: a transformer beside the other parts of another pipeline.

    It is one for lltk and for ``diffusers.DiffusionPipeline.from_pretrained``.

    Args:
        folder: of the new pipeline. Links in it are renewed, and all else stays.
        transformer: the folder of its weights.
        source: a pipeline's folder with ``vae/``, ``text_encoder/`` and ``tokenizer/``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: source / name for name in _PARTS} | {"transformer": transformer}
    for name, found in parts.items():
        link, part = folder / name, found.resolve()
        if link.is_symlink():
            link.unlink()
        if part.exists() and not link.exists():
            link.symlink_to(part, target_is_directory=part.is_dir())
    save_index(folder)


def save_index(folder: Path) -> None:
    """Write what diffusers opens a pipeline's folder by, where that is missing.

    It is ``model_index.json``, for WanPipeline, and ``scheduler/``: UniPC as Wan2.2-TI2V-5B has it.

    Args:
        folder: has the other parts.
    """
    with LOADING:
        from diffusers import UniPCMultistepScheduler, __version__

    if not (folder / _SCHEDULER).exists():
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        with whole_folder(folder / _SCHEDULER) as made:
            scheduler.save_pretrained(made.path)
    if (folder / _INDEX).exists():
        return
    encoder = json.loads(read_text(folder / "text_encoder" / "config.json"))["architectures"][0]
    words = json.loads(read_text(folder / "tokenizer" / "tokenizer_config.json"))
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": __version__,
        "boundary_ratio": None,
        "expand_timesteps": True,
        _SCHEDULER: ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", encoder],
        "tokenizer": ["transformers", words["tokenizer_class"]],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_text(folder / _INDEX, json.dumps(index, indent=2) + "\n")
