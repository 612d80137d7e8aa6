"""The attention kernels that are compiled beforehand: what is compiled, refused and launched."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import refused
from nvfp4_pages import KERNEL_BOUND, operands, written
from torch import Tensor

from lltk.export import kernels
from lltk.export.kernels import Sizes, write_kernels
from lltk.files.writing import whole_folder
from lltk.ops.nvfp4_paged_attention.op import nvfp4_paged_attention
from lltk.ops.nvfp4_paged_attention.reference import Pages
from lltk.stream.runtimes import cubin, tensorrt_plugin
from lltk.stream.runtimes.cubin import FACTS, Kernels, read_kernels
from lltk.stream.runtimes.tensorrt_types import DTYPES, tensor_shape

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
cpu, gpu = pytest.mark.cpu, pytest.mark.gpu

SMALL = Sizes(2, 20, 4, 3, 32, k_means=True)
WIDE = Sizes(2, 200, 4, 3, 128, v_means=True)
"""Tokens that fill no tile, and tokens that fill one and a part of another."""
TABLES = [[], [2], [3, 0, 2], [0, 1, 2, 3]]


def made(folder: Path, sizes: Sizes, sm: int) -> Path:
    with whole_folder(folder) as new:
        write_kernels(new, sizes, sm)
    return folder


def case(sizes: Sizes, dtype: torch.dtype) -> tuple[list[Tensor], Pages, Pages]:
    """q, k and v, and the arenas of keys and values."""
    own, arenas = operands(dtype, sizes.tokens, sizes.width, sizes.pages)
    keys, values = (
        written(arena, smooth)
        for arena, smooth in zip(arenas, (sizes.k_means, sizes.v_means), strict=True)
    )
    return own[:3], keys, values


def spoiled(pages: Pages, table: list[int]) -> Pages:
    """Pages with NaN in all parts that can have it, where they are not listed."""
    copy = Pages(*(None if part is None else part.clone() for part in pages))
    for page in set(range(pages.codes.shape[1])) - set(table):
        copy.scales.view(torch.uint8)[:, page] = 0x7F
        copy.decode_scales[:, page] = torch.nan
        if copy.means is not None:
            copy.means[:, page] = torch.nan
    return copy


def given(own: list[Tensor], keys: Pages, values: Pages, table: list[int]) -> dict[str, Tensor]:
    """The kernels' inputs by name."""
    listed = torch.zeros(keys.codes.shape[1], dtype=torch.bool)
    listed[table] = True
    found = dict(zip("qkv", own, strict=True), listed=listed)
    for name, pages in ("k", keys), ("v", values):
        parts = pages._asdict()
        found |= {f"{name}_{part}": t for part, t in parts.items() if t is not None}
    return found


# On a GPU


@gpu
@pytest.mark.parametrize("sizes", [SMALL, WIDE])
def test_launched(tmp_path: Path, sizes: Sizes) -> None:
    """Against the reference in float32, within the bound of the kernels that Triton launches."""
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    run = Kernels(made(tmp_path / "kernels", sizes, 10 * major + minor), device)
    own, keys, values = case(sizes, torch.bfloat16)
    exact = [each.float() for each in own]
    bound = KERNEL_BOUND[torch.bfloat16]
    for table in TABLES:
        listed = torch.tensor(table, dtype=torch.int64)
        wanted = nvfp4_paged_attention(*exact, *keys, *values, listed)
        put = given(own, spoiled(keys, table), spoiled(values, table), table)
        found = run({name: each.to(device) for name, each in put.items()})["out"].cpu()
        assert float((found - wanted).abs().max()) <= bound, table
        other = given(own, keys, values, table[1:] if table else [1])
        found = run({name: each.to(device) for name, each in other.items()})["out"].cpu()
        assert float((found - wanted).abs().max()) > 10 * bound, table


@gpu
def test_other_gpus_are_refused(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    other = next(sm for sm in kernels.TILES if sm != 10 * major + minor)
    said = refused(Kernels, made(tmp_path / "kernels", SMALL, other), device)
    assert f"are for compute capability {other // 10}.{other % 10}" in said


# Anywhere


def interpret() -> None:
    """Compare the kernels in float32 with the reference; a script for Triton's interpreter."""
    from lltk.ops.nvfp4_paged_attention.listed import attend_listed_kernel, decode_listed_kernel

    for sizes in (SMALL, Sizes(2, 40, 3, 3, 16, v_means=True)):
        own, keys, values = case(sizes, torch.float32)
        counts = {"PAGES": sizes.pages, "TOKENS": sizes.tokens, "HEADS": sizes.heads}
        counts |= {"WIDTH": sizes.width, "SLOTS": 4}
        for table in ([], [2], [2, 0], list(range(sizes.pages))):
            put = given(own, spoiled(keys, table), spoiled(values, table), table)
            listed = put["listed"].view(torch.uint8)
            held = [
                torch.full((2, sizes.pages * sizes.tokens, 3, sizes.width), torch.nan)
                for _ in range(2)
            ]
            for name, arena in zip("kv", held, strict=True):
                parts = [put.get(f"{name}_{part}") for part in Pages._fields]
                parts[1] = parts[1].view(torch.uint8)  # type: ignore[union-attr]
                grid = -(-sizes.tokens * 3 // 16), sizes.pages, 2
                decode_listed_kernel[grid](
                    *parts, listed, arena, **counts, MEANS=parts[3] is not None, ROWS=16
                )
            out = torch.full_like(own[0], torch.nan)
            attend_listed_kernel[(-(-sizes.tokens // 16), 6)](
                *own, *held, listed, out, **counts, M=16, N=16
            )
            for name, shown in ("right", table), ("wrong", [1] if table != [1] else []):
                wanted = nvfp4_paged_attention(
                    *own, *keys, *values, torch.tensor(shown, dtype=torch.int64)
                )
                print(name, float((out - wanted).abs().max()))  # noqa: T201


@cpu
def test_interpreted() -> None:
    result = subprocess.run(
        [sys.executable, "-P", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 16
    for name, difference in lines:
        bound = KERNEL_BOUND[torch.float32]
        assert float(difference) <= bound if name == "right" else float(difference) > 100 * bound


@cpu
@pytest.mark.parametrize(
    ("sm", "product"), [(90, "wgmma.mma_async"), (100, "tcgen05.mma"), (120, "mma.sync")]
)
def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sm: int, product: str) -> None:
    """For every GPU, by its own products, without instructions that only others have."""
    texts = []
    compiled = kernels._compiled

    def noted(*arguments: Any) -> Any:
        found = compiled(*arguments)
        texts.append(found.asm["ptx"])
        return found

    monkeypatch.setattr(kernels, "_compiled", noted)
    folder = made(tmp_path / "kernels", WIDE, sm)
    facts = read_kernels(folder)
    assert product in texts[-1] and f".target sm_{sm}" in texts[-1]
    assert not any("e2m1" in text or "mxf4" in text for text in texts)
    assert facts.sm == sm and facts.tensors.contract == WIDE.contract
    attend = "attend_listed_hopper_kernel" if sm == 90 else "attend_listed_kernel"
    entries = [each.entry for each in facts.launches]
    assert entries == ["decode_listed_kernel", "decode_listed_kernel", attend]
    assert facts.launches[0].grid == (-(-200 * 3 // 32), 4, 2)
    assert facts.launches[2].grid == (-(-200 // kernels.TILES[sm].m), 6, 1)
    for launch, text in zip(facts.launches, texts, strict=True):
        (entry,) = re.findall(r"\.entry (\w+)\((.*?)\)", text, re.DOTALL)
        assert entry[0] == launch.entry and entry[1].count(".param") == len(launch.arguments)
        (threads,) = re.findall(r"\.reqntid (\d+)", text)
        assert launch.threads == int(threads)
    assert facts.launches[0].arguments[3] is None and facts.launches[1].arguments[3] == "v_means"
    assert facts.workspaces["k_held"] == 2 * 2 * 4 * 200 * 3 * 128


@cpu
def test_what_is_refused(tmp_path: Path) -> None:
    assert "are for 90, 100, 120, not for 89; use --attention native" in refused(
        made, tmp_path / "a", SMALL, 89
    )
    said = refused(made, tmp_path / "a", Sizes(1, 8, 2, 3, 48), 90)
    assert "heads of 16, 32, 64, …, not of 48; use --attention native" in said
    assert not (tmp_path / "a").exists()


@cpu
def test_damaged_folders(tmp_path: Path) -> None:
    folder = made(tmp_path / "kernels", SMALL, 90)
    facts = json.loads((folder / FACTS).read_text())

    def said(**changed: Any) -> str:
        (folder / FACTS).write_text(json.dumps(facts | changed))
        return refused(read_kernels, folder)

    assert "sm: " in said(sm="ninety")

    def launched(**changed: Any) -> str:
        return said(launches=[{**facts["launches"][0], **changed}])

    for name in ("../decode_k.cubin", "..", "", "/etc/passwd", "a\0b"):
        assert "lies in another folder" in launched(file=name), name
    (folder / "link.cubin").symlink_to(tmp_path / "link.cubin")
    (tmp_path / "link.cubin").write_bytes((folder / "decode_k.cubin").read_bytes())
    assert "'link.cubin' lies in another folder" in launched(file="link.cubin")
    assert "'absent.cubin' is not there; compile" in launched(file="absent.cubin")
    for grid in ([1 << 31, 1, 1], [1, 1 << 16, 1], [1, 1, 1 << 16], [0, 1, 1]):
        assert "launches.0.grid." in launched(grid=grid), grid
    assert "launches.0.threads" in launched(threads=1025)
    assert "launches.0.shared" in launched(shared=1 << 31)
    assert "takes k_other, which is not there" in launched(arguments=["k_codes", "k_other"])
    assert "q is there twice" in said(workspaces={"q": 4})
    (folder / FACTS).write_text(json.dumps(facts))
    with (folder / "attend.cubin").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\xfe")
    assert "attend.cubin: is not the file that was compiled" in refused(read_kernels, folder)


class Driver:
    """A fake of CUDA's driver, which notes what it is asked for."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.attributes: list[tuple[int, int]] = []
        self.launched: list[tuple[Any, ...]] = []

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:
        assert code[:4] == b"\x7fELF"
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, entry: bytes) -> int:
        return 500 if entry.decode() == self.refuses else 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        self.attributes.append((attribute, value))
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *sizes, stream, pointers, extra = rest
        held = [ctypes.cast(each, ctypes.POINTER(ctypes.c_void_p))[0] for each in pointers]
        self.launched.append((tuple(sizes), stream.value, held, extra))
        return 0

    def cuGetErrorString(self, code: int, said: Any) -> int:
        said._obj.value = b"named symbol not found"
        return 0


@contextmanager
def faked(monkeypatch: pytest.MonkeyPatch, driver: Driver, capability: tuple[int, int]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(cubin.ctypes, "CDLL", lambda name: driver)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "device", lambda device: contextmanager(_nothing)())
        yield


def _nothing() -> Iterator[None]:
    yield


@cpu
def test_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel gets the addresses that its arguments name, and the shared memory it needs."""
    folder, driver = made(tmp_path / "kernels", WIDE, 90), Driver()
    with faked(monkeypatch, driver, (9, 0)):
        run = Kernels(folder, torch.device("cpu"))
    facts = run.facts
    shared = [each.shared for each in facts.launches]
    assert shared[2] > 48 << 10 > shared[0] and driver.attributes == [(8, shared[2])]
    names = [*facts.tensors.inputs, *facts.tensors.outputs, *facts.workspaces]
    addresses = {name: 4096 * number for number, name in enumerate(names, 1)}
    run.launch(addresses, 77)
    for (sizes, stream, held, extra), launch in zip(driver.launched, facts.launches, strict=True):
        assert sizes == (*launch.grid, launch.threads, 1, 1, launch.shared)
        assert stream == 77 and extra is None
        assert held == [name and addresses[name] for name in launch.arguments]
    assert driver.launched[2][2][:7] == [
        addresses[name] for name in ("q", "k", "v", "k_held", "v_held", "listed", "out")
    ]


@cpu
def test_what_a_driver_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "kernels", SMALL, 90)
    with faked(monkeypatch, Driver(), (12, 0)):
        said = refused(Kernels, folder, torch.device("cpu"))
    assert "are for compute capability 9.0, and A GPU has 12.0" in said
    with faked(monkeypatch, Driver("attend_listed_hopper_kernel"), (9, 0)):
        said = refused(Kernels, folder, torch.device("cpu"))
    assert "cuModuleGetFunction: named symbol not found" in said


# The plugin, over a fake of TensorRT


def bindings(monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Any]]:
    """A module that stands for TensorRT's, by its name, and the creators that it is given."""
    given: list[Any] = []

    class Registry:
        def register_creator(self, creator: Any, namespace: str) -> bool:
            given.append((creator, namespace))
            return True

    kinds = ("", "OneCore", "OneBuild", "OneRuntime")
    bases = {f"IPluginV3{kind}": type(f"IPluginV3{kind}", (), {}) for kind in kinds}
    module = ModuleType("tensorrt_of_tests")
    module.__dict__.update(
        bases, IPluginCreatorV3One=type("Creator", (), {}), PluginFieldCollection=list,
        DimsExprs=tuple, get_plugin_registry=Registry,
        TensorFormat=SimpleNamespace(LINEAR="linear"),
        DataType=SimpleNamespace(**{name: name for name in DTYPES.values()}),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tensorrt_plugin._registered.cache_clear()
    return module.__name__, given


@cpu
def test_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs the kernels that are offered for its shapes, with a place for each workspace."""
    module, given = bindings(monkeypatch)
    launched: list[tuple[dict[str, int], int]] = []
    for sizes in (SMALL, WIDE):
        facts = read_kernels(made(tmp_path / str(sizes.width), sizes, 120))
        kernels = SimpleNamespace(launch=lambda *given: launched.append(given))
        tensorrt_plugin.offer(module, facts, kernels)  # type: ignore[arg-type]
    ((creator, namespace),) = given
    assert (creator.name, creator.plugin_version, namespace) == ("LltkListedAttention", "1", "lltk")
    contract = SMALL.contract
    described = [
        SimpleNamespace(
            dims=tensor_shape(spec), type=DTYPES[spec.dtype], format="linear",
        )
        for spec in (*contract.inputs.values(), *contract.outputs.values())
    ]  # fmt: skip
    inputs = len(contract.inputs)
    plugin = creator.create_plugin("a", [], None).clone()
    building = [SimpleNamespace(desc=each) for each in described]
    assert all(
        plugin.supports_format_combination(place, building, inputs)
        for place in range(len(described))
    )
    described[3].type = "FP8"
    assert not plugin.supports_format_combination(3, building, inputs)
    assert plugin.get_output_shapes([each.dims for each in described], [], None) == [(2, 20, 3, 32)]
    assert plugin.get_output_data_types(["BF16"]) == ["BF16"]
    facts = read_kernels(tmp_path / str(SMALL.width))
    memory = plugin.get_workspace_size(building[:inputs], building[inputs:])
    assert 0 <= memory - sum(facts.workspaces.values()) < 256 * len(facts.workspaces)
    addresses = [100 * place for place in range(inputs)]
    plugin.enqueue(described[:inputs], described[inputs:], addresses, [7], 1 << 20, 77)
    ((found, stream),) = launched
    assert stream == 77 and found["out"] == 7
    assert [found[name] for name in contract.inputs] == addresses
    ends = [found[name] + size for name, size in facts.workspaces.items()]
    starts = [found[name] for name in facts.workspaces]
    assert starts[0] == 1 << 20 and all(each % 256 == 0 for each in starts)
    assert all(
        end <= start for end, start in zip(ends, [*starts[1:], starts[0] + memory], strict=True)
    )


if __name__ == "__main__":
    interpret()
