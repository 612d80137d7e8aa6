"""Kernels that were compiled beforehand, loaded and launched through CUDA's driver.

Whoever launches them needs neither Triton, which compiles them, nor TensorRT, whose plugins may be
made of them. A folder has the machine code and a file that says how to launch it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from lltk.files.reading import read_json
from lltk.files.tensors import is_unchanged
from lltk.graph.contract_facts import GraphFacts
from lltk.stream.runtimes.operands import operands

FACTS = "kernels.json"
"""The file that says how to launch a folder's kernels."""
_SHARED = 48 << 10
"""Shared memory that a block may have without asking for it, in bytes."""
_MAX_DYNAMIC_SHARED = 8
"""The driver's number for how much a kernel may ask for."""


_Columns = Annotated[int, Field(ge=1, lt=1 << 31)]
_Rows = Annotated[int, Field(ge=1, lt=1 << 16)]
"""Blocks that CUDA launches in x, and in y or z."""


class Launch(BaseModel):
    """One launch of one kernel.

    Attributes:
        file: the machine code, in the folder.
        sha256: of the file.
        entry: the kernel's name in it.
        grid: blocks in x, y and z.
        threads: of a block.
        shared: dynamic shared memory of a block, in bytes.
        arguments: names of the tensors whose addresses it takes, in order; None for an address that
            it does not use.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    sha256: str
    entry: str
    grid: tuple[_Columns, _Rows, _Rows]
    threads: Annotated[int, Field(ge=1, le=1024)]
    shared: Annotated[int, Field(ge=0, lt=1 << 31)]
    arguments: tuple[str | None, ...]


class KernelFacts(BaseModel):
    """Kernels that compute one thing, for tensors of one shape, on one kind of GPU.

    Attributes:
        sm: the compute capability that they are for, 90 for 9.0.
        made_by: versions of what compiled them.
        tensors: what they read and write.
        workspaces: bytes of the buffers that they need beside, by name.
        launches: in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sm: PositiveInt
    made_by: dict[str, str]
    tensors: GraphFacts
    workspaces: dict[str, NonNegativeInt]
    launches: tuple[Launch, ...]


def read_kernels(folder: Path) -> KernelFacts:
    """What a folder's kernels are, with every file's checksum compared.

    Raises:
        ValueError: a file is missing or another than it was, lies elsewhere, or is launched with
            what the kernels do not have.
    """
    path = folder / FACTS
    try:
        facts = KernelFacts.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}: {first['msg']}; compile the kernels again") from None
    tensors = facts.tensors.inputs.keys() | facts.tensors.outputs.keys()
    if twice := sorted(tensors & facts.workspaces.keys()):
        raise ValueError(f"{path}: {twice[0]} is there twice; compile the kernels again")
    known = tensors | facts.workspaces.keys() | {None}
    whole = folder.resolve()
    for launch in facts.launches:
        if odd := [name for name in launch.arguments if name not in known]:
            raise ValueError(
                f"{path}: {launch.entry} takes {odd[0]}, which is not there; compile the kernels "
                "again"
            )
        if "\0" in launch.file or (folder / launch.file).resolve().parent != whole:
            raise ValueError(f"{path}: {launch.file!r} lies in another folder; compile them again")
        if not (folder / launch.file).is_file():
            raise ValueError(f"{path}: {launch.file!r} is not there; compile the kernels again")
        if not is_unchanged(folder / launch.file, launch.sha256):
            raise ValueError(
                f"{folder / launch.file}: is not the file that was compiled; compile the kernels "
                "again"
            )
    return facts


class Kernels:
    """A folder's kernels, loaded on a GPU.

    They are machine code. The files are compared with their checksums, which shows damage and not
    who wrote them.

    Args:
        folder: see `lltk.export.kernels`.
        device: the GPU.

    Raises:
        ValueError: a file is missing or damaged, the kernels are for another GPU, or the driver
            does not load them.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.facts, self.device = read_kernels(folder), device
        self.contract = self.facts.tensors.contract
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor != self.facts.sm:
            sm = self.facts.sm
            raise ValueError(
                f"{folder}: its kernels are for compute capability {sm // 10}.{sm % 10}, and "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}; compile them for this"
            )
        self._driver, self._folder = ctypes.CDLL("libcuda.so.1"), folder
        modules: dict[str, ctypes.c_void_p] = {}
        self._functions = []
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # torch makes its context, into which the driver loads
            for launch in self.facts.launches:
                if launch.file not in modules:
                    modules[launch.file] = module = ctypes.c_void_p()
                    code = (folder / launch.file).read_bytes()
                    self._call("cuModuleLoadData", ctypes.byref(module), code)
                function, entry = ctypes.c_void_p(), launch.entry.encode()
                module = modules[launch.file]
                self._call("cuModuleGetFunction", ctypes.byref(function), module, entry)
                if launch.shared > _SHARED:
                    wanted = _MAX_DYNAMIC_SHARED, launch.shared
                    self._call("cuFuncSetAttribute", function, *wanted)
                self._functions.append(function)

    def __call__(
        self, given: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The outputs of a call, which is launched on torch's current stream.

        Args:
            given: every input, as the facts say and on the GPU.
            into: where outputs are put; the others are new tensors.
        """
        inputs, put = operands(self.contract, given, into, self.device)
        spaces = {
            name: torch.empty(size, dtype=torch.uint8, device=self.device)
            for name, size in self.facts.workspaces.items()
        }
        addresses = {
            name: tensor.data_ptr()
            for each in (inputs, put, spaces)
            for name, tensor in each.items()
        }
        with torch.cuda.device(self.device):
            self.launch(addresses, torch.cuda.current_stream(self.device).cuda_stream)
        return put

    def launch(self, addresses: Mapping[str, int], stream: int) -> None:
        """Launch every kernel.

        Args:
            addresses: on the GPU, of inputs, outputs and workspaces, by name.
            stream: CUDA's handle of a stream.

        Raises:
            ValueError: the driver refuses it.
        """
        for launch, function in zip(self.facts.launches, self._functions, strict=True):
            values = [
                ctypes.c_void_p(None if name is None else addresses[name])
                for name in launch.arguments
            ]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
            self._call(
                "cuLaunchKernel", function, *launch.grid, launch.threads, 1, 1, launch.shared,
                ctypes.c_void_p(stream), pointers, None,
            )  # fmt: skip

    def _call(self, name: str, *arguments: object) -> None:
        """Call the driver."""
        if code := getattr(self._driver, name)(*arguments):
            said = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(said))
            reason = said.value.decode() if said.value else f"error {code}"
            raise ValueError(f"{self._folder}: {name}: {reason}; compile the kernels again")
