"""Repositories of the Hugging Face hub, named where a folder or a file is wanted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(.+))?")
"""OWNER/NAME, or OWNER/NAME/FILE."""
_PATHS = (
    ("model", "checkpoint"),
    ("model", "lora"),
    ("stream", "pipeline"),
    ("train", "data", "pipeline"),
    ("distil", "real", "weights"),
    ("distil", "fake", "weights"),
)
"""A recipe's keys that name files."""


def on_disk(recipe: Mapping[str, Any], download: bool, needed: bool = True) -> dict[str, Any]:
    """A recipe's plain data, with what it names on the hub named by its path here.

    Args:
        recipe: left as it is.
        download: whether to download what is not here.
        needed: whether all of it must be here.

    Raises:
        ValueError: something is not here, and not downloaded; says how to download it.
    """
    made = dict(recipe)
    for keys in _PATHS:
        section: Any = made
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, Mapping) else None
        named = section.get(keys[-1]) if isinstance(section, Mapping) else None
        where = ".".join(keys)
        if isinstance(named, str):
            _set(made, keys, _here(named, where, download, needed))
        elif isinstance(named, list):
            _set(made, keys, [_here(name, where, download, needed) for name in named])
    return made


def local(name: str | Path) -> Path:
    """The path that a name stands for: its own, or that of what the hub's cache holds of it."""
    path = Path(name)
    return path if path.exists() else cached(str(name)) or path


def cached(name: str) -> Path | None:
    """Where the hub's cache on this machine holds what a name stands for; None if it does not."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _fetched(name, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def remedy(name: str) -> str:
    """How to get what a name stands for on the hub; empty if it is no name of the hub."""
    if (found := _ID.fullmatch(name)) is None:
        return ""
    what = " ".join(part for part in found.groups() if part)
    return (
        f"check the path or, if it is on the Hugging Face hub, run `hf download {what}`, or add "
        "--download"
    )


def _here(name: Any, where: str, download: bool, needed: bool) -> Any:
    """The path of what a name stands for; the name itself if it is none of the hub's."""
    if not isinstance(name, str) or Path(name).exists() or _ID.fullmatch(name) is None:
        return name
    found = _download(name, where) if download else cached(name)
    if found is None and needed:
        raise ValueError(f"{where}: {name} is not here; {remedy(name)}")
    return name if found is None else str(found)


def _download(name: str, where: str) -> Path | None:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return _fetched(name, local_files_only=False)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{where}: {name} cannot be downloaded ({reason}); check the network and the name, "
            "which is OWNER/NAME on the Hugging Face hub"
        ) from error


def _fetched(name: str, local_files_only: bool) -> Path | None:
    import huggingface_hub

    found = _ID.fullmatch(name)
    if found is None:
        return None
    repository, file = found.groups()
    if file is None:
        return Path(
            huggingface_hub.snapshot_download(repository, local_files_only=local_files_only)
        )
    return Path(
        huggingface_hub.hf_hub_download(repository, file, local_files_only=local_files_only)
    )


def _set(data: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set a nested key, in copies of the mappings on the way."""
    for key in keys[:-1]:
        data[key] = data = dict(data[key])
    data[keys[-1]] = value
