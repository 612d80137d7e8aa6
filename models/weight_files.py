"""Tensors and notes in safetensors and torch files, in shards, and in folders that hold them."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lltk.files.reading import check_regular, read_text
from lltk.files.tensors import SEAL, check_seal
from lltk.graph.weights import check_names, few
from lltk.models.hub import remedy
from lltk.models.nvfp4_conventions import HEADER_ENTRIES, parse_object

STEM = "diffusion_pytorch_model"
TORCH = (".pt", ".pth", ".bin", ".ckpt")
"""Suffixes of files that torch.save writes."""
_SAFETENSORS = (".safetensors", ".sft")
_USUAL = [
    f"{STEM}{suffix}{index}" for suffix in (".safetensors", ".bin") for index in (".index.json", "")
]
# Indices may name a variant: model.safetensors.index.fp16.json.
_WEIGHTS = [
    re.compile(rf"\.({suffixes}){index}$", re.IGNORECASE)
    for suffixes in ("safetensors|sft", "bin|pt|pth|ckpt", "gguf")
    for index in (r"\.index(\.[^.]+)?\.json", "")
]
# What files begin with: torch's, torch's before 1.6 (a pickled number), pointers of Git LFS.
_ZIP = b"PK\x03\x04"
_OLD = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_POINTER = b"version https://git-lfs"
# What reading damaged bytes raises: of an archive, and of a pickle that has no checksum.
_BROKEN = (
    *(zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, struct.error),
    *(AssertionError, AttributeError, LookupError, MemoryError, OverflowError, TypeError),
)
_REMEDY = "download it again, or convert it to safetensors where you trust it"


def read_weights(path: Path, checked: bool = False) -> dict[str, Any]:
    """The content of one file, or of the shards of one index; tensors are on the CPU.

    Torch files are read with ``weights_only``. The content of other files is tensors by name.

    Args:
        path: of the file.
        checked: whether it needs no look at the seals of files that lltk wrote.

    Raises:
        ValueError: it does not exist, is damaged, or is of another kind.
    """
    if not path.exists():
        raise ValueError(f"{path}: does not exist; {remedy(str(path)) or 'check the path'}")
    check_regular(path)
    if path.suffix.lower() == ".json":
        return _read_shards(path, checked)
    kind = _kind(path)
    if kind == "safetensors":
        return _read_safetensors(path, checked)
    if kind and path.suffix.lower() in _SAFETENSORS:
        raise ValueError(f"{path}: is a file of torch.save; rename it to {path.stem}.pt")
    if kind:
        return _read_torch(path, old=kind == "old")
    raise ValueError(
        f"{path}: not a {', '.join(_SAFETENSORS + TORCH)} file or index; convert it to safetensors"
    )


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of all shards of an index; none for other files.

    Raises:
        ValueError: shards describe quantised weights in different ways.
    """
    files = _shards(path) if path.suffix.lower() == ".json" else [path]
    metadata: dict[str, str] = {}
    for file in files:
        if _kind(file) != "safetensors":
            continue
        with safe_open(file, "pt") as opened:
            found = dict(opened.metadata() or {})
        found.pop(SEAL, None)  # Each shard has its own.
        other = [key for key in metadata.keys() & found.keys() if metadata[key] != found[key]]
        if other and HEADER_ENTRIES & (metadata.keys() | found.keys()):
            raise ValueError(
                f"{file}: its header differs from other shards' in {few(sorted(other))}; "
                "download all of them again"
            )
        metadata |= found
    return metadata


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError if there is none."""
    return parse_object(read_text(path), path)


def weight_file(folder: Path) -> Path:
    """The file or index that holds a folder's weights.

    The usual name goes before others, such as those of variants, safetensors before torch files,
    and an index before single files.

    Raises:
        ValueError: there is none, or several of which none has the usual name.
    """
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    for name in _USUAL:
        if name in files:
            return files[name]
    for pattern in _WEIGHTS:
        found = [path for name, path in files.items() if pattern.search(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{folder}: {len(found)} files ({few(file.name for file in found)}) and none is "
                f"{_USUAL[0]} or {_USUAL[1]}; name one of them, or restore the missing index"
            )
    raise ValueError(f"{folder}: no weights; name a folder or file that holds them")


def _kind(path: Path) -> str:
    """What a file's first bytes, or else its suffix, say that it is; nothing if neither does.

    Raises:
        ValueError: it is a GGUF file, or stands for one that is elsewhere.
    """
    with path.open("rb") as file:
        head = file.read(64)
    suffix = path.suffix.lower()
    if head.startswith(b"GGUF") or suffix == ".gguf":
        raise ValueError(
            f"{path}: is a GGUF file, which lltk does not read; use the safetensors that it was "
            "made from, or convert it: diffusers' from_single_file with GGUFQuantizationConfig, "
            "dequantize() and save_pretrained"
        )
    if head.startswith(_POINTER):
        raise ValueError(f"{path}: is a pointer of Git LFS; get the file itself by git lfs pull")
    if head.startswith(_OLD):
        return "old"
    if head.startswith(_ZIP):
        return "torch"
    if head[8:9] == b"{" or suffix in _SAFETENSORS:
        return "safetensors"
    return "torch" if suffix in TORCH else ""


def _shards(index: Path) -> list[Path]:
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: no weight_map of names to files; download it again")
    if away := [file for file in files.values() if Path(file).name != file]:
        raise ValueError(f"{index}: shard {away[0]!r} is no file beside it; download it again")
    return files


def _read_shards(index: Path, checked: bool) -> dict[str, Any]:
    files = _weight_map(index)
    weights: dict[str, Any] = {}
    for file in _shards(index):
        if not file.is_file():
            raise ValueError(f"{index}: shard {file.name} is missing; download it beside the index")
        listed = [name for name in files if files[name] == file.name]
        part = read_weights(file, checked)
        check_names(part, listed, [], f"{file}: against {index.name}", "download both again")
        weights.update(part)
    return weights


def _read_safetensors(path: Path, checked: bool) -> dict[str, Any]:
    if not checked:
        check_seal(path)
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); download it again") from error


def _read_torch(path: Path, old: bool) -> dict[str, Any]:
    """The state dict, or what else is in a dict, of a torch file.

    Args:
        path: of the file.
        old: whether it is of the format before torch 1.6, which has no checksums.
    """
    try:
        if not old:
            with zipfile.ZipFile(path) as archive:
                # Reading checks the checksum, so that the unpickler never sees a damaged pickle.
                for name in archive.namelist():
                    if name.endswith("/data.pkl"):
                        archive.read(name)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not old)
    except pickle.UnpicklingError as error:
        damaged = "damaged, or " if old else ""
        raise ValueError(
            f"{path}: refused unread: {damaged}a pickle of more than plain tensors; {_REMEDY}"
        ) from error
    except _BROKEN as error:
        raise ValueError(
            f"{path}: refused unread: damaged, or not written by torch.save ({error!r}); {_REMEDY}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()"
        )
    return content
