"""Tensors in files, in pieces: each rank writes its own, and any number of ranks reads them.

A piece lies in a safetensors file under the name of its tensor. Where it is not the whole tensor,
the entry ``lltk.pieces`` of the header's metadata says where in the tensor it lies: an object in
JSON with the offsets and the whole tensor's shape for each name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from lltk.files.reading import parse_json
from lltk.files.tensors import tensor_places, write_tensors
from lltk.files.writing import NewFile

_PIECES = "lltk.pieces"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor.

    Attributes:
        value: on the CPU.
        offset: where in the tensor it begins, along each axis.
        shape: the tensor's.
    """

    value: Tensor
    offset: Shape
    shape: Shape


def own_piece(value: Tensor, first: bool, copy: bool = True) -> Piece | None:
    """The piece of a tensor that this rank writes; None if others write all of it.

    Args:
        value: divided among ranks, or the same on all.
        first: whether this is the first rank, which writes what is not divided.
        copy: whether the piece must stay as it is when the tensor changes.
    """
    if not isinstance(value, DTensor):
        if not first:
            return None
        whole = value.detach().to("cpu", copy=copy)
        return Piece(whole, (0,) * whole.dim(), tuple(whole.shape))
    places = zip(value.placements, value.device_mesh.get_coordinate() or (), strict=True)
    local = value.to_local().detach()
    if not local.numel() or any(place.is_replicate() and at for place, at in places):
        return None
    return Piece(local.to("cpu", copy=copy), _offset(value), tuple(value.shape))


def write_pieces(file: NewFile, pieces: Mapping[str, Piece]) -> None:
    """Write pieces by their tensors' names to an empty file; see `write_tensors`."""
    parts = {
        name: [piece.offset, piece.shape]
        for name, piece in sorted(pieces.items())
        if tuple(piece.value.shape) != piece.shape
    }
    metadata = {"format": "pt"} | ({_PIECES: json.dumps(parts)} if parts else {})
    write_tensors(file, {name: piece.value for name, piece in pieces.items()}, metadata)


class Pieces:
    """Tensors that lie in pieces in files. Only headers are read until a tensor is asked for.

    Args:
        files: that hold them, which have been checked.
        opened: the files stay open as long as this.

    Raises:
        ValueError: a file is damaged, or its pieces do not fit together.
    """

    def __init__(self, files: Sequence[Path], opened: ExitStack) -> None:
        self._boxes: dict[str, list[tuple[Any, Shape, Shape]]] = {}
        self.shapes: dict[str, Shape] = {}
        """The tensors' shapes, by name."""
        self.dtypes: dict[str, torch.dtype] = {}
        """The tensors' dtypes, by name."""
        for path in files:
            places = tensor_places(path)
            file = opened.enter_context(safe_open(path, "pt"))
            parts = _described(file.metadata() or {}, path)
            for name, place in places.items():
                offset, shape = parts.get(name, ((0,) * len(place.shape), place.shape))
                known = (
                    self.shapes.setdefault(name, shape),
                    self.dtypes.setdefault(name, place.dtype),
                )
                ends = [at + size for at, size in zip(offset, place.shape, strict=False)]
                fits = len(offset) == len(shape) == len(place.shape) and all(
                    at >= 0 and end <= size
                    for at, end, size in zip(offset, ends, shape, strict=True)
                )
                if not fits or known != (shape, place.dtype):
                    raise ValueError(f"{path}: the piece of {name} does not fit its tensor")
                self._boxes.setdefault(name, []).append((file, offset, place.shape))

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """A tensor; divided as another one of its shape if that is given and is divided.

        Raises:
            ValueError: there is not exactly one value for each place in it.
        """
        shape = self.shapes[name]
        if not isinstance(like, DTensor) or tuple(like.shape) != shape:
            return self._box(name, (0,) * len(shape), shape)
        local = self._box(name, _offset(like), tuple(like.to_local().shape))
        return DTensor.from_local(
            local.to(like.device),
            like.device_mesh,
            like.placements,
            shape=torch.Size(shape),
            stride=like.stride(),
        )

    def _box(self, name: str, offset: Shape, size: Shape) -> Tensor:
        """A box of a tensor."""
        found, filled = None, 0
        for file, at, extent in self._boxes[name]:
            begins = [max(a, b) for a, b in zip(offset, at, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(offset, size, at, extent, strict=True)]
            lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
            if any(length <= 0 for length in lengths):
                continue
            if tuple(lengths) == extent:
                part = file.get_tensor(name)
            else:
                inner = zip(begins, ends, at, strict=True)
                part = file.get_slice(name)[tuple(slice(b - a, e - a) for b, e, a in inner)]
            filled += prod(lengths)
            if tuple(lengths) == size:
                found = part
                continue
            if found is None:
                found = part.new_empty(size)
            outer = zip(begins, ends, offset, strict=True)
            found[tuple(slice(b - o, e - o) for b, e, o in outer)] = part
        if filled != prod(size):
            raise ValueError(f"{name} has {filled} of {prod(size)} values")
        return torch.empty(size, dtype=self.dtypes[name]) if found is None else found


@contextmanager
def opened_pieces(files: Sequence[Path]) -> Iterator[Pieces]:
    """Tensors that lie in pieces in files, which are open inside the block; see `Pieces`."""
    with ExitStack() as opened:
        yield Pieces(files, opened)


def _offset(value: DTensor) -> Shape:
    """Where this rank's part of a tensor begins."""
    (chunk,) = value.__create_chunk_list__()
    return tuple(chunk.offsets)


def _described(metadata: Mapping[str, str], path: Path) -> dict[str, tuple[Shape, Shape]]:
    """Offset and whole shape of those of a file's tensors that are pieces."""
    content = parse_json(metadata.get(_PIECES, "{}"), str(path))
    made = {}
    for name, part in content.items() if isinstance(content, dict) else ():
        sizes = part if isinstance(part, list) and len(part) == 2 else ([None], [])
        if not all(isinstance(n, int) and n >= 0 for each in sizes for n in each):
            raise ValueError(f"{path}: does not say where the piece of {name} lies")
        made[name] = tuple(sizes[0]), tuple(sizes[1])
    return made
