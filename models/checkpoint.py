"""Reading and writing weights of transformers, and writing LoRA adapters, in the layouts in use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind, Output, check_outputs, marked
from lltk.files.tensors import is_sealed, save_tensors, write_tensors
from lltk.files.writing import standing, whole_file, whole_folder
from lltk.graph.packed import is_packed, plain_name
from lltk.graph.weights import few
from lltk.models.configs import config_from_wan, validate_config, without_notes
from lltk.models.float8 import widened
from lltk.models.hub import local
from lltk.models.layouts import LORA_LAYOUTS, WEIGHT_LAYOUTS, Layout, weight_layout
from lltk.models.nvfp4_conventions import CONVENTIONS, Description
from lltk.models.nvfp4_layouts import read_packed, write_packed
from lltk.models.weight_files import STEM, read_header, read_json, read_weights, weight_file

_INDEX = f"{STEM}.safetensors.index.json"
_MODEL = "WanTransformer3DModel"
_PICKLES = (".pt", ".pth")
_MANIFEST = Manifest(
    "lltk.json", "a model", format=1, remedy="restore it, or delete lltk.json to use it as it is"
)
MODEL_FOLDER = Kind("a model's folder", _MANIFEST.recognises, folder=True)
WEIGHTS_FILE = Kind("weights", is_sealed)
_GENERATOR_LORA = "generator_lora"
LONGLIVE_LORA = marked("LongLive's adapters", _GENERATOR_LORA)
_HOLDERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts save a state dict, beside an optimiser's and the like."""
_TRANSFORMER = "model.diffusion_model."
_OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.")
"""What a transformer's names begin with in a file of a whole pipeline, and those of other parts."""
_LORA_CONFIG = "lora_adapter_metadata"


@dataclass(frozen=True)
class Checkpoint:
    """Weights as a file holds them.

    Attributes:
        weights: tensors under lltk's names, which are diffusers'. They are on the CPU, mapped from
            the file, and have its shapes, dtypes and values, but float8 is widened; see `float8`.
            NVFP4 weights are in lltk's form; see `nvfp4_layouts`.
        config: the checked diffusers configuration; None where the file has none.
        layout: the file's layout, a name in `WEIGHT_LAYOUTS` or `CONVENTIONS`.
        input_scales: calibrated scales of what quantised linears read, by module; for
            ``input_scales`` of the pass nvfp4_infer.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    layout: str
    input_scales: dict[str, float] = field(default_factory=dict)


def load_checkpoint(path: str | Path, ema: bool = False) -> Checkpoint:
    """Read a transformer. Its layout is found out from the names of its tensors.

    Args:
        path: a diffusers folder, a pipeline's folder with ``transformer/``, an original Wan folder,
            a safetensors file, an index of shards, or a file of torch.save with a state dict, alone
            or in what a training script saved, or a LongLive checkpoint. Names may all have a
            prefix, such as ``model.diffusion_model.``. NVFP4 weights have diffusers' names and one
            of `CONVENTIONS`, and are in a folder, or in a file whose header says what it holds.
        ema: take a LongLive checkpoint's ``generator_ema`` instead of its ``generator``.

    Raises:
        ValueError: the path does not exist, its content is damaged or is no Wan transformer, or it
            is a pickle of anything but tensors and plain values, which is not read. Or as
            `widened` and `read_packed`.
    """
    path, config, quantisation = standing(local(path)), None, None
    checked = path.is_dir()
    if checked:
        path = _checked_folder(path, "transformer")
        config, quantisation = _read_config(path)
        path = weight_file(path)
    content = read_weights(path, checked)
    key = "generator_ema" if ema else "generator"
    if key not in content and (ema or "generator_ema" in content or "generator_lora" in content):
        raise ValueError(
            f"{path}: has no {key}, only {few(map(str, content))}; load it with ema={not ema}, or "
            "name an adapter as model.lora"
        )
    state = _alone_in_file(named_tensors(unwrapped(content.get(key, content), path), str(path)))
    state, description = widened(
        state, Description(quantisation, read_header(path)), where=str(path)
    )
    packed = read_packed(state, description, str(path))
    if packed is None:
        found = weight_layout(state, str(path))
        return Checkpoint(_renamed(state, found, str(path)), config, found.name)
    entries, layout, inputs = packed
    plain = {key: plain_name(key) for key in entries}
    names = WEIGHT_LAYOUTS["diffusers"].read(set(plain.values()), str(path))
    weights = {
        names[plain[key]] + key.removeprefix(plain[key]): value for key, value in entries.items()
    }
    scales = {
        names[f"{module}.weight"].removesuffix(".weight"): scale for module, scale in inputs.items()
    }
    return Checkpoint(weights, config, layout, scales)


def save_checkpoint(
    path: str | Path,
    weights: Mapping[str, Tensor],
    layout: str,
    config: Mapping[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write a transformer, whole or not at all. Tensors keep their dtypes and values.

    Args:
        path: a folder as `save_folder` takes it for ``diffusers`` and for `CONVENTIONS`, a
            ``.safetensors`` file for ``wan``, a ``.pt`` file for ``longlive``. An existing file is
            replaced.
        weights: tensors under diffusers' names; NVFP4 weights are in lltk's form.
        layout: a name in `WEIGHT_LAYOUTS`, or in `CONVENTIONS` for NVFP4 weights.
        config: the diffusers configuration. Only folders need it and hold it.
        max_shard_size: a folder's weights are sharded above so many bytes.
        overwrite: whether a folder that holds anything else may be replaced.

    Raises:
        ValueError: names, layout and path do not go together, or the configuration is missing. Or
            as `write_packed`.
    """
    path = Path(path)
    if layout in CONVENTIONS:
        WEIGHT_LAYOUTS["diffusers"].write(set(map(plain_name, weights)), str(path))
        state, described = write_packed(weights, layout, str(path))
        full = _full_config(config, path) | {"quantization_config": described.config}
        save_folder(path, state, full, _MODEL, max_shard_size, described.header, overwrite)
        return
    if is_packed(weights):
        raise ValueError(
            f"{path}: the layout {layout!r} cannot say how NVFP4 weights lie; use one of "
            f"{', '.join(CONVENTIONS)}"
        )
    state = _state(weights, WEIGHT_LAYOUTS, layout, path)
    if layout == "longlive":
        _save_pickle({"generator": state}, path)
    elif layout == "wan":
        _save_safetensors(state, path)
    else:
        save_folder(
            path, state, _full_config(config, path), _MODEL, max_shard_size, overwrite=overwrite
        )


def load_folder(path: str | Path, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model in diffusers' layout: its ``config.json``, unchecked, and its weights.

    Weights in float8 are widened, as by `load_checkpoint`.

    Args:
        path: the model's folder, or a pipeline's folder that has it as the folder ``part``.
        part: such as ``vae``.

    Raises:
        ValueError: there is no such folder, or a file in it is missing or damaged.
    """
    folder = _checked_folder(Path(path), part)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json; name a diffusers folder of a {part}")
    config, file = without_notes(read_json(folder / "config.json")), weight_file(folder)
    state = named_tensors(unwrapped(read_weights(file, checked=True), file), str(file))
    return config, widened(state, Description(None, read_header(file)), str(file))[0]


def save_folder(
    path: str | Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    model: str,
    max_shard_size: int = 5 * 10**9,
    header: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in diffusers' layout, whole or not at all. Tensors keep dtypes and values.

    Args:
        path: a new or empty folder, or one that this function wrote, which is replaced.
        weights: tensors under diffusers' names.
        config: the checked configuration.
        model: name of diffusers' class.
        max_shard_size: the weights are sharded above so many bytes.
        header: metadata for every safetensors file.
        overwrite: whether a folder that holds anything else may be replaced.

    Raises:
        ValueError: there is a file, or a folder that holds anything else.
    """
    from diffusers import __version__
    from huggingface_hub import split_torch_state_dict_into_shards

    path = Path(path)
    check_outputs([Output(path, MODEL_FOLDER)], [], overwrite)
    state = {name: _alone(weight) for name, weight in weights.items()}
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=STEM + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    notes = {"_class_name": model, "_diffusers_version": __version__}
    with whole_folder(path) as folder:
        for name, keys in split.filename_to_tensors.items():
            with folder.file(name) as file:
                shard = {key: state[key] for key in keys}
                write_tensors(file, shard, {"format": "pt", **(header or {})})
        if split.is_sharded:
            folder.write_text(_INDEX, _json(index))
        folder.write_text("config.json", _json(dict(config) | notes))
        _MANIFEST.write(folder, {"model": model})


def part_folder(path: Path, part: str) -> Path:
    """The folder of a part in a pipeline's folder; the path itself if it has no such folder."""
    return path / part if (path / part).is_dir() else path


def _checked_folder(path: Path, part: str) -> Path:
    """A part's folder; one that lltk wrote is checked against its manifest."""
    folder = standing(part_folder(path, part))
    if (folder / _MANIFEST.name).exists():
        _MANIFEST.read(folder)
    return folder


def save_lora(
    path: str | Path,
    weights: Mapping[str, Tensor],
    layout: str,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter.

    Args:
        path: a ``.safetensors`` file for the layout ``diffusers``, a folder for ``peft``, and a
            ``.pt`` file for ``longlive``.
        weights: A [rank, in] as ``<module>.lora_A.weight`` and B [out, rank] as
            ``<module>.lora_B.weight``.
        layout: a name in `LORA_LAYOUTS`.
        config: the PEFT configuration. It goes into the file's metadata, as diffusers writes it,
            or into the folder. Files of ``longlive`` have no place for it: their scale is always 1.
        overwrite: whether a folder that lltk did not write may be replaced.

    Raises:
        ValueError: names, layout and path do not go together, or the scale is not 1 for
            ``longlive``.
    """
    path = Path(path)
    state = _state(weights, LORA_LAYOUTS, layout, path)
    if layout == "diffusers":
        notes = json.dumps({f"transformer.{k}": v for k, v in (config or {}).items()}, default=list)
        _save_safetensors(state, path, {_LORA_CONFIG: notes} if config else {})
    elif layout == "peft":
        check_outputs([Output(path, MODEL_FOLDER)], [], overwrite)
        with whole_folder(path) as folder:
            with folder.file("adapter_model.safetensors") as file:
                write_tensors(file, state, {"format": "pt"})
            about = {"peft_type": "LORA", **(config or {})}
            folder.write_text("adapter_config.json", json.dumps(about, indent=2, default=list))
            _MANIFEST.write(folder, {"model": "LORA"})
    elif config and config.get("lora_alpha") != config.get("r"):
        raise ValueError(
            f"{path}: lora_alpha {config.get('lora_alpha')} is not r {config.get('r')}, but this "
            "layout means a scale of 1; multiply lora_B by lora_alpha / r, or use another layout"
        )
    else:
        _save_pickle({_GENERATOR_LORA: state}, path)


def _read_config(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The configurations of the model and of its quantisation; None for one that is not there."""
    path, quantisation = folder / "config.json", _read_quantisation(folder)
    if not path.exists():
        return None, quantisation
    config = without_notes(read_json(path))
    stated = config.pop("quantization_config", quantisation)
    if stated is not None and not isinstance(stated, dict):
        raise ValueError(f"{path}: quantization_config is not an object; download it again")
    if stated and quantisation and stated.get("quant_algo") != quantisation.get("quant_algo"):
        raise ValueError(
            f"{path}: quant_algo is {stated.get('quant_algo')!r}, but hf_quant_config.json has "
            f"{quantisation.get('quant_algo')!r}; use the files of one export"
        )
    read = config_from_wan if config.get("_class_name") == "WanModel" else validate_config
    return read(config, str(path)), stated


def _read_quantisation(folder: Path) -> dict[str, Any] | None:
    """modelopt's ``hf_quant_config.json``, which some exports have instead of an entry."""
    path = folder / "hf_quant_config.json"
    if not path.exists():
        return None
    content = read_json(path).get("quantization")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: has no object 'quantization'; download it again")
    return {"quant_method": "modelopt", **content}


def _full_config(config: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    if config is None:
        raise ValueError(f"{path}: a diffusers folder needs a configuration; pass config")
    return validate_config(config, str(path))


def unwrapped(content: Any, path: Path) -> Any:
    """The state dict in what a training script saved; anything else as it is."""
    while isinstance(content, dict):
        inside = [key for key in _HOLDERS if isinstance(content.get(key), dict)]
        if not inside:
            break
        if len(inside) > 1:
            raise ValueError(
                f"{path}: holds a state dict under each of {', '.join(inside)}; save one alone"
            )
        content = content[inside[0]]
    return content


def _alone_in_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries without those of other parts, if it is the file of a whole pipeline."""
    whole = any(key.startswith(_TRANSFORMER) for key in state)
    return {
        key: value for key, value in state.items() if not (whole and key.startswith(_OTHER_PARTS))
    }


def named_tensors(state: Any, where: str) -> dict[str, Tensor]:
    """The state dict that this is; raises ValueError if it is none. Errors begin with ``where``."""
    if not isinstance(state, dict):
        raise ValueError(f"{where}: its weights are a {type(state).__name__}, not a state dict")
    other = [
        f"{key} ({type(value).__name__})"
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if other:
        raise ValueError(
            f"{where}: {len(other)} entries are not named tensors: {few(other)}; save the state "
            "dict of one model, alone or under 'model'"
        )
    return state


def _renamed(state: Mapping[str, Tensor], layout: Layout, where: str) -> dict[str, Tensor]:
    names = layout.read(state, where)
    return {names[key]: value.detach() for key, value in state.items()}


def _state(
    weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], layout: str, path: Path
) -> dict[str, Tensor]:
    if layout not in layouts:
        raise ValueError(f"{path}: layout {layout!r} is not known; use one of {', '.join(layouts)}")
    names = layouts[layout].write(weights, str(path))
    return {names[key]: _alone(value) for key, value in weights.items()}


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in a storage that holds nothing else."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _suffixed(path: Path, *suffixes: str) -> Path:
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: this layout is a {' or '.join(suffixes)} file; rename it")
    return path


def _save_pickle(content: dict[str, dict[str, Tensor]], path: Path) -> None:
    # Given a path, torch.save would write the temporary name into the archive.
    with whole_file(_suffixed(path, *_PICKLES)) as file:
        torch.save(content, cast(IO[bytes], file))


def _save_safetensors(
    state: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    save_tensors(_suffixed(path, ".safetensors"), state, {"format": "pt", **(metadata or {})})


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
