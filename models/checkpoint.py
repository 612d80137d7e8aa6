"""Reading and writing weights of transformers, and writing LoRA adapters, in the layouts in use."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lltk.files.manifest import Manifest
from lltk.files.outputs import Kind, Output, check_outputs
from lltk.files.reading import check_regular, read_text
from lltk.files.tensors import check_seal, is_sealed, save_tensors, write_tensors
from lltk.files.writing import standing, whole_file, whole_folder
from lltk.graph.packed import is_packed, plain_name
from lltk.models.configs import config_from_wan, validate_config
from lltk.models.layouts import LORA_LAYOUTS, WEIGHT_LAYOUTS, Layout, detect, few
from lltk.models.nvfp4_conventions import CONVENTIONS, HEADER_ENTRIES, Description, parse_object
from lltk.models.nvfp4_layouts import read_packed, write_packed

_STEM = "diffusion_pytorch_model"
_INDEX = f"{_STEM}.safetensors.index.json"
_MODEL = "WanTransformer3DModel"
_PICKLES = (".pt", ".pth")
_MANIFEST = Manifest(
    "lltk.json", "a model", format=1, remedy="restore it, or delete lltk.json to use it as it is"
)
MODEL_FOLDER = Kind("a model's folder", _MANIFEST.recognises, folder=True)
WEIGHTS_FILE = Kind("weights", is_sealed)
_LORA_CONFIG = "lora_adapter_metadata"


@dataclass(frozen=True)
class Checkpoint:
    """Weights as a file holds them.

    Attributes:
        weights: tensors under lltk's names, which are diffusers'. They are on the CPU, mapped from
            the file, and have its shapes, dtypes and values. NVFP4 weights are in lltk's form; see
            `nvfp4_layouts`.
        config: the checked diffusers configuration; None where the file has none.
        layout: the file's layout, a name in `WEIGHT_LAYOUTS` or `CONVENTIONS`.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    layout: str


def load_checkpoint(path: str | Path, ema: bool = False) -> Checkpoint:
    """Read a transformer. Its layout is found out from the names of its tensors.

    Args:
        path: a diffusers folder, a pipeline's folder with ``transformer/``, an original Wan folder,
            a ``.safetensors`` file, or a ``.pt`` or ``.pth`` file with a state dict or a LongLive
            checkpoint. NVFP4 weights have diffusers' names and one of `CONVENTIONS`, and are in a
            folder, or in a file whose header says what it holds.
        ema: take a LongLive checkpoint's ``generator_ema`` instead of its ``generator``.

    Raises:
        ValueError: the path does not exist, its content is damaged or is no Wan transformer, or it
            is a pickle of anything but tensors and plain values, which is not read. Or as
            `read_packed`.
    """
    path, config, quantisation = standing(Path(path)), None, None
    checked = path.is_dir()
    if checked:
        path = _checked_folder(path, "transformer")
        config, quantisation = _read_config(path)
        path = _weight_file(path)
    content = read_content(path, checked)
    key = "generator_ema" if ema else "generator"
    if key not in content and (ema or "generator_ema" in content or "generator_lora" in content):
        raise ValueError(
            f"{path}: has no {key}, only {few(map(str, content))}; load it with ema={not ema}, or "
            "name an adapter as model.lora"
        )
    state = named_tensors(content.get(key, content), str(path))
    packed = read_packed(state, Description(quantisation, read_header(path)), str(path))
    if packed is None:
        weights, layout = _rename(state, WEIGHT_LAYOUTS, str(path))
        return Checkpoint(weights, config, layout)
    entries, layout = packed
    plain = {key: plain_name(key) for key in entries}
    names = WEIGHT_LAYOUTS["diffusers"].read(set(plain.values()), str(path))
    weights = {
        names[plain[key]] + key.removeprefix(plain[key]): value for key, value in entries.items()
    }
    return Checkpoint(weights, config, layout)


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

    Args:
        path: the model's folder, or a pipeline's folder that has it as the folder ``part``.
        part: such as ``vae``.

    Raises:
        ValueError: there is no such folder, or a file in it is missing or damaged.
    """
    folder = _checked_folder(Path(path), part)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json; name a diffusers folder of a {part}")
    return _read_json(folder / "config.json"), read_content(_weight_file(folder), checked=True)


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
        state, filename_pattern=_STEM + "{suffix}.safetensors", max_shard_size=max_shard_size
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
) -> None:
    """Write an adapter.

    Args:
        path: a ``.pt`` file for the layout ``longlive``, else a ``.safetensors`` file.
        weights: A [rank, in] as ``<module>.lora_A.weight`` and B [out, rank] as
            ``<module>.lora_B.weight``.
        layout: a name in `LORA_LAYOUTS`.
        config: the PEFT configuration. It goes into the file's metadata, as diffusers writes it.
            Files of ``longlive`` have no place for it: their scale is always 1.

    Raises:
        ValueError: names, layout and path do not go together, or the scale is not 1 for
            ``longlive``.
    """
    path = Path(path)
    state = _state(weights, LORA_LAYOUTS, layout, path)
    if layout != "longlive":
        prefix = "transformer." if layout == "diffusers" else ""
        notes = json.dumps({prefix + k: v for k, v in (config or {}).items()}, default=list)
        _save_safetensors(state, path, {_LORA_CONFIG: notes} if config else {})
    elif config and config.get("lora_alpha") != config.get("r"):
        raise ValueError(
            f"{path}: lora_alpha {config.get('lora_alpha')} is not r {config.get('r')}, but this "
            "layout means a scale of 1; multiply lora_B by lora_alpha / r, or use another layout"
        )
    else:
        _save_pickle({"generator_lora": state}, path)


def check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Check that weights are exactly those that are expected, and finite.

    Args:
        weights: by name.
        expected: the shape of each weight by its name.
        where: the file or model that the error names.

    Raises:
        ValueError: a weight is missing, unexpected, of another shape, or not finite.
    """
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    misshapen = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    _compare(found, expected, misshapen, where, "use the weights or the configuration of one model")
    broken = [name for name, weight in weights.items() if not _finite(weight)]
    if broken:
        raise ValueError(
            f"{where}: {broken[0]} holds NaN or infinity ({len(broken)} of {len(weights)} tensors "
            "do); use a checkpoint from before the run diverged"
        )


def _finite(weight: Tensor) -> bool:
    # aminmax of values with a NaN is NaN. It takes neither one-byte floats nor empty tensors.
    wide = weight.float() if weight.dtype.itemsize == 1 else weight
    return not wide.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(wide))


def _compare(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    misshapen: list[str],
    where: str,
    remedy: str,
) -> None:
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": misshapen,
    }
    problems = [f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(f"{where}: weights {', '.join(problems)}; {remedy}")


def read_content(path: Path, checked: bool = False) -> dict[str, Any]:
    """The content of one file, or of the shards of one index.

    Args:
        path: of the file.
        checked: whether it needs no look at the seals of files that lltk wrote.
    """
    if not path.exists():
        raise ValueError(f"{path}: does not exist; check the path")
    check_regular(path)
    if path.suffix == ".json":
        return _read_shards(path, checked)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, checked)
    if path.suffix in (*_PICKLES, ".bin"):
        return _read_pickle(path)
    raise ValueError(
        f"{path}: not a .safetensors, .pt, .pth or .bin file; convert it to safetensors"
    )


def _read_safetensors(path: Path, checked: bool) -> dict[str, Any]:
    if not checked:
        check_seal(path)
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); download it again") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    remedy = "download it again, or convert it to safetensors where you trust it"
    try:
        with zipfile.ZipFile(path) as archive:
            # Reading checks the checksum, so that the unpickler never sees a damaged pickle.
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused unread: a pickle of more than plain tensors; {remedy}"
        ) from error
    except (zipfile.BadZipFile, OSError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: refused unread: damaged, or not written by torch.save ({error}); {remedy}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()"
        )
    return content


def _weight_map(index: Path) -> dict[str, str]:
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: no weight_map of names to files; download it again")
    if away := [file for file in files.values() if Path(file).name != file]:
        raise ValueError(f"{index}: shard {away[0]!r} is no file beside it; download it again")
    return files


def _read_shards(index: Path, checked: bool) -> dict[str, Any]:
    files = _weight_map(index)
    weights: dict[str, Any] = {}
    for shard in sorted(set(files.values())):
        file = index.parent / shard
        if not file.is_file():
            raise ValueError(f"{index}: shard {shard} is missing; download it beside the index")
        listed = {name: shard for name in files if files[name] == shard}
        part = _read_safetensors(file, checked)
        _compare(part, listed, [], f"{file}: against {index.name}", "download both again")
        weights.update(part)
    return weights


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of all shards of an index."""
    if path.suffix == ".json":
        files = [path.parent / shard for shard in sorted(set(_weight_map(path).values()))]
    else:
        files = [path] if path.suffix == ".safetensors" else []
    metadata: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found = opened.metadata() or {}
        other = [key for key in metadata.keys() & found.keys() if metadata[key] != found[key]]
        if other and HEADER_ENTRIES & (metadata.keys() | found.keys()):
            raise ValueError(
                f"{file}: its header differs from other shards' in {few(sorted(other))}; "
                "download all of them again"
            )
        metadata |= found
    return metadata


def _read_json(path: Path) -> dict[str, Any]:
    return parse_object(read_text(path), path)


def _read_config(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The configurations of the model and of its quantisation; None for one that is not there."""
    path, quantisation = folder / "config.json", _read_quantisation(folder)
    if not path.exists():
        return None, quantisation
    config = _read_json(path)
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
    content = _read_json(path).get("quantization")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: has no object 'quantization'; download it again")
    return {"quant_method": "modelopt", **content}


def _full_config(config: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    if config is None:
        raise ValueError(f"{path}: a diffusers folder needs a configuration; pass config")
    return validate_config(config, str(path))


def _weight_file(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        usual = folder / pattern.replace("*", _STEM)
        if usual in found or len(found) == 1:
            return usual if usual in found else found[0]
        if found:
            raise ValueError(
                f"{folder}: {len(found)} files ({few(file.name for file in found)}) and none is "
                f"{usual.name}; name one of them, or restore the missing index"
            )
    raise ValueError(f"{folder}: no .safetensors file; name a folder or file that holds weights")


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
            "dict alone"
        )
    return state


def _rename(
    state: Mapping[str, Tensor], layouts: Mapping[str, Layout], where: str
) -> tuple[dict[str, Tensor], str]:
    layout = detect(state, layouts, where)
    names = layout.read(state, where)
    return {names[key]: value.detach() for key, value in state.items()}, layout.name


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
