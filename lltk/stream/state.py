"""Sessions on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lltk.graph.files import written_whole
from lltk.stream.session import SessionState

KEY = "lltk.stream"
FORMAT = "2"
_log = logging.getLogger(__name__)


def save_state(path: Path, state: SessionState, identity: Mapping[str, Any]) -> None:
    """Write a session's state.

    Args:
        path: the file; replaced if it is there.
        state: of the session.
        identity: what must be the same where the stream goes on, as plain data.

    Raises:
        OSError: the file cannot be written.
    """
    about = {
        "format": FORMAT,
        "identity": dict(identity),
        "torch": torch.__version__,
        "facts": state.facts,
    }
    # One entry, because safetensors writes several in any order: equal states are equal files.
    metadata = {KEY: json.dumps(about, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_state(path: Path, identity: Mapping[str, Any]) -> SessionState:
    """Read a session's state.

    Args:
        path: the file.
        identity: of the stream that is to go on; see `save_state`.

    Raises:
        ValueError: no state, damaged, or of another model, sampling or version; says which.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name one that lltk stream --save wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no state, or damaged ({error})") from error
    about = json.loads(metadata.get(KEY, "{}"))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(
            f"{path}: is not a stream's state of format {FORMAT}; name one that this lltk wrote"
        )
    made, wanted = about["identity"], json.loads(json.dumps(dict(identity)))
    differing = [key for key in {**made, **wanted} if made.get(key) != wanted.get(key)]
    if differing:
        found = "; ".join(
            f"{key}: {_short(made.get(key))} there, {_short(wanted.get(key))} here"
            for key in differing
        )
        raise ValueError(
            f"{path}: was made with another model, recipe or version ({found}); resume it with "
            "what made it"
        )
    if about["torch"] != torch.__version__:
        _log.warning(
            "%s: was made with torch %s, this is %s: frames may differ in their last bits",
            path,
            about["torch"],
            torch.__version__,
        )
    return SessionState(tensors, about["facts"])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
