"""Shards: plain tar files of encoded clips, as WebDataset reads them.

A clip is two files of one key, which is its number::

    00000017.safetensors   latents      float32 [C, F, h, w], normalised
                           prompts      float32 [P, S, E], the clip's different prompts, up to the
                                        longest one's last token
                           prompt       int64 [N], which of them a chunk has
                           opens        bool [N], whether a chunk opens a shot
                           valid        bool [F], false for padding; where there may be any
    00000017.json          the prompts as text, one a chunk, and which chunks open a shot

Each safetensors file has its own checksum (`lltk.files.tensors`), so that a shard can be read clip
by clip, and what is read is checked. Equal clips are equal shards.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.files.reading import opened
from lltk.files.tensors import parse_tensors, tensor_bytes
from lltk.files.writing import NewFile, whole_file

_BLOCK, _END = 512, bytes(1024)
"""What files in a tar file are padded to, and what it ends with."""
_NAMES = {"latents", "prompts", "prompt", "opens"}
Clip = tuple[int, Mapping[str, Tensor], tuple[str, ...]]
"""Its number, its tensors as a `Dataset` has them but for the first axis, and its prompts."""
REMEDY = "remove it and make it again by lltk prepare … --resume"


def write_shard(path: Path, clips: Iterable[Clip]) -> str:
    """Write a shard, whole or not at all.

    Args:
        path: of the file.
        clips: to write, which are taken one by one.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: as `whole_file`.
    """
    with whole_file(path) as file:
        for number, tensors, prompts in clips:
            described = {"prompts": prompts, "opens": tensors["opens"].tolist()}
            _add(file, f"{number:08d}.safetensors", tensor_bytes(packed(tensors), {}))
            _add(file, f"{number:08d}.json", (json.dumps(described) + "\n").encode())
        file.write(_END)
    return file.checksum


class Shard:
    """A shard, of which a clip at a time is read.

    Args:
        path: of the file. It is opened when a clip is asked for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def clip(self, number: int) -> dict[str, Tensor]:
        """The tensors of a clip, packed, on the CPU.

        Raises:
            ValueError: it is not there, or was changed; names the file.
        """
        name = f"{number:08d}.safetensors"
        if name not in self._places:
            raise ValueError(f"{self._path}: holds no {name}, or is damaged; {REMEDY}")
        start, size = self._places[name]
        try:
            with opened(self._path) as file:
                file.seek(start)
                tensors = parse_tensors(file.read(size))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._path}: {name}: {error}; {REMEDY}") from error
        if tensors.keys() - {"valid"} != _NAMES:
            raise ValueError(f"{self._path}: {name}: is no encoded clip; {REMEDY}")
        return tensors

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Where each file in it begins, and its size."""
        try:
            with opened(self._path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                length = self._path.stat().st_size
                return {
                    member.name: (member.offset_data, min(member.size, length)) for member in tar
                }
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{self._path}: cannot be read ({error}); {REMEDY}") from error


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A clip's tensors as a shard has them: each prompt's embedding once, without padding."""
    prompts, prompt = torch.unique(tensors["text"].cpu(), dim=0, return_inverse=True)
    tokens = torch.arange(1, prompts.shape[1] + 1)
    longest = int((prompts.any(2).any(0) * tokens).max())
    own = {"prompts": prompts[:, :longest], "prompt": prompt}
    return own | {name: tensor for name, tensor in tensors.items() if name != "text"}


def unpacked(tensors: Mapping[str, Tensor], text_tokens: int) -> dict[str, Tensor]:
    """A clip's tensors as a `Dataset` has them, with ``text`` padded to so many tokens."""
    prompts = tensors["prompts"]
    text = F.pad(prompts, (0, 0, 0, text_tokens - prompts.shape[1]))[tensors["prompt"]]
    others = {name: tensor for name, tensor in tensors.items() if name not in ("prompts", "prompt")}
    return others | {"text": text}


def _add(file: NewFile, name: str, data: bytes | bytearray) -> None:
    """Add a file to a tar file."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for part in (info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)):
        file.write(part)
