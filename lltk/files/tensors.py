"""safetensors files with a seal: the file's own checksum.

The first entry of the header's metadata is ``lltk.sha256``. It is the SHA-256 of the whole file, in
which these 64 digits are zeros. Other software reads such a file as any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from lltk.files.reading import opened
from lltk.files.writing import NewFile, whole_file

if TYPE_CHECKING:
    from typing_extensions import Buffer

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
SEAL = "lltk.sha256"
_NONE = "0" * 64
_BEFORE = f'{{"__metadata__":{{"{SEAL}":"'.encode()
_SEAL = slice(8 + len(_BEFORE), 8 + len(_BEFORE) + len(_NONE))
"""Where the digits are in a file: after the header's length and the beginning of the header."""
_BLOCK = 1 << 24


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a sealed safetensors file, whole or not at all; arguments as `write_tensors`'.

    Raises:
        OSError: as `whole_file`.
    """
    with whole_file(path) as file:
        write_tensors(file, tensors, metadata)


def write_tensors(
    file: NewFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata to an empty file, and seal it. Equal contents are equal files.

    Args:
        file: to write to.
        tensors: by name, on any device. They go to the CPU one at a time.
        metadata: the header's other entries.
    """
    for piece in _pieces(tensors, metadata):
        file.write(piece)
    file.patch(_SEAL.start, file.checksum.encode())


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytearray:
    """The file that `write_tensors` writes."""
    data = bytearray().join(_pieces(tensors, metadata))
    data[_SEAL] = hashlib.sha256(data).hexdigest().encode()
    return data


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a sealed file, on the CPU.

    Raises:
        ValueError: it is no safetensors file, has no seal, or was changed.
    """
    seal = _found(data[: _SEAL.stop])
    digest = hashlib.sha256(data[: _SEAL.start] + _NONE.encode())
    digest.update(memoryview(data)[_SEAL.stop :])
    if seal is None or seal != digest.hexdigest():
        raise ValueError("differs from its checksum, or has none")
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"is no safetensors file ({error})") from error


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    """A file as `write_tensors` writes it, with zeros for its seal."""
    header: dict[str, object] = {"__metadata__": {SEAL: _NONE, **dict(sorted(metadata.items()))}}
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in ordered:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.dtype.itemsize
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in ordered:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        dtype, shape: the tensor's.
        start, end: where its bytes begin and end.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_places(path: Path) -> dict[str, Place]:
    """Where in a safetensors file each tensor is, all within the file.

    Raises:
        ValueError: it is no safetensors file, or holds another dtype than `write_tensors` writes.
        OSError: it cannot be read.
    """
    with _explained(path), safe_open(path, "pt"):
        pass  # it has checked the header, and that what it describes fills the file
    with opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, which lltk does not read")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        places[name] = Place(dtypes[entry["dtype"]], tuple(entry["shape"]), start, end)
    return places


def checksum(path: Path) -> str:
    """The SHA-256 of a file; its seal, if it has one, is read as zeros.

    Raises:
        ValueError: it is no regular file.
        OSError: it cannot be read.
    """
    return _checksum(path)[0]


def is_unchanged(path: Path, wanted: str) -> bool:
    """Whether a file has a checksum, and its seal, if it has one, is that too.

    Raises:
        ValueError, OSError: as `checksum`.
    """
    made, seal = _checksum(path)
    return made == wanted and seal in (None, made)


def check_seal(path: Path, needed: bool = False) -> None:
    """Check a file against its seal.

    Args:
        path: of the file.
        needed: whether a file without a seal is refused.

    Raises:
        ValueError: the file was changed; says so.
        OSError: it cannot be read.
    """
    if not needed and not is_sealed(path):
        return
    made, seal = _checksum(path)
    if seal != made:
        why = "has no checksum" if seal is None else "differs from its checksum"
        raise ValueError(
            f"{path}: {why}: it is damaged or was changed; restore it, or delete it and use another"
        )


def is_sealed(path: Path) -> bool:
    """Whether a file has a seal, true or not."""
    with opened(path) as file:
        return _found(file.read(_SEAL.stop)) is not None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a sealed file, on the CPU.

    Raises:
        ValueError: it is no safetensors file, has no seal, or was changed.
        OSError: it cannot be read.
    """
    check_seal(path, needed=True)
    with _explained(path), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    del metadata[SEAL]
    return tensors, metadata


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Let an error of safetensors say which file it is about, and what to do."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged ({error}); restore it, or use another") from error


def _found(start: bytes) -> str | None:
    """The seal in a file's first bytes."""
    if start[8 : _SEAL.start] != _BEFORE:
        return None
    return start[_SEAL].decode("ascii", "replace")


def _checksum(path: Path) -> tuple[str, str | None]:
    """A file's checksum as `checksum` has it, and its seal."""
    digest = hashlib.sha256()
    with opened(path) as file:
        start = file.read(_SEAL.stop)
        seal = _found(start)
        digest.update(start if seal is None else start[: _SEAL.start] + _NONE.encode())
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest(), seal
