"""Attention over listed pages in NVFP4, compiled beforehand for one kind of GPU.

Triton compiles on any machine, and makes machine code that `lltk.stream.runtimes.cubin` launches
without it. Sizes are compiled in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from lltk.files.writing import NewFolder
from lltk.graph.contract import Contract, TensorSpec
from lltk.graph.contract_facts import GraphFacts
from lltk.graph.edit import calls
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_quantise.reference import BLOCK
from lltk.stream.runtimes.cubin import FACTS, KernelFacts, Launch

if TYPE_CHECKING:
    from lltk.graph.program import Program

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """What the kernels are compiled for.

    Attributes:
        batch: B.
        tokens: of the chunk and of a page, L and T.
        pages: P, of an arena.
        heads: H.
        width: D.
        k_means, v_means: whether pages have means.
    """

    batch: int
    tokens: int
    pages: int
    heads: int
    width: int
    k_means: bool = False
    v_means: bool = False

    @property
    def contract(self) -> Contract:
        """What the kernels read and write."""
        own = TensorSpec((self.batch, self.tokens, self.heads, self.width), torch.bfloat16)
        page = self.batch, self.pages, self.tokens, self.heads
        of_head = self.batch, self.pages, self.heads
        inputs = dict.fromkeys("qkv", own)
        for name, means in ("k", self.k_means), ("v", self.v_means):
            inputs |= {
                f"{name}_codes": TensorSpec((*page, self.width // 2), torch.uint8),
                f"{name}_scales": TensorSpec((*page, self.width // BLOCK), torch.float8_e4m3fn),
                f"{name}_decode_scales": TensorSpec(of_head, torch.float32),
            }
            if means:
                inputs[f"{name}_means"] = TensorSpec((*of_head, self.width), torch.bfloat16)
        inputs["listed"] = TensorSpec((self.pages,), torch.bool)
        return Contract(inputs, {"out": own})


@dataclass(frozen=True)
class Tiles:
    """How attention is cut.

    Attributes:
        m, n: queries and keys of a tile.
        warps: of a block.
        stages: tiles of keys and values that are loaded ahead.
        hopper: whether the kernel for Hopper runs, of which a block has 128 queries and 12 warps.
        turns: whether its groups of warps take turns.
    """

    m: int
    n: int
    warps: int
    stages: int
    hopper: bool = False
    turns: bool = False


TILES = {
    90: Tiles(128, 128, 4, 2, hopper=True, turns=True),
    100: Tiles(128, 128, 4, 2),
    120: Tiles(128, 64, 8, 2),
}
"""Attention's tiles, by the compute capability that kernels are compiled for."""
_ROWS = 32
"""Rows that a program decodes."""


def check_kernels(sizes: Sizes, sm: int) -> None:
    """Check that kernels can be compiled.

    Raises:
        ValueError: they are for other sizes or GPUs.
    """
    if sm not in TILES:
        known = ", ".join(map(str, TILES))
        raise ValueError(
            f"--sm: the attention kernels are for {known}, not for {sm}; use --attention native"
        )
    if sizes.width % BLOCK or sizes.width & (sizes.width - 1):
        raise ValueError(
            f"the attention kernels are for heads of 16, 32, 64, …, not of {sizes.width}; use "
            "--attention native"
        )


def kernel_sizes(program: Program) -> Sizes | None:
    """What a Program's graphs need the kernels for; None if they attend without them.

    Raises:
        ValueError: layers differ in what they need.
    """
    found = {
        _sizes(*node.args)
        for _, graph in program.every_graph()
        for node in calls(graph, overload("nvfp4_listed_attention"))
    }
    if len(found) > 1:
        raise ValueError(
            "the attention kernels are of one kind, and layers have pages of several; export the "
            "recipe with --attention native"
        )
    return next(iter(found), None)


def _sizes(*operands: Any) -> Sizes:
    """Of a node's operands."""
    q, codes = (operands[index].meta["val"] for index in (0, 3))
    batch, tokens, heads, width = q.shape
    assert codes.shape[2] == tokens, "a page holds a chunk"
    return Sizes(
        batch, tokens, codes.shape[1], heads, width, operands[6] is not None,
        operands[10] is not None,
    )  # fmt: skip


def write_kernels(
    folder: NewFolder, sizes: Sizes, sm: int, tiles: Tiles | None = None, under: str = "."
) -> KernelFacts:
    """Compile the kernels into a folder that is being written.

    Args:
        folder: for the machine code, and for the file that says how to launch it.
        sizes: of what they read.
        sm: compute capability, 90 for 9.0.
        tiles: of attention; by default those of `TILES`.
        under: a folder in the folder, for all files.

    Raises:
        ValueError: they are for other sizes or GPUs.
    """
    check_kernels(sizes, sm)
    from lltk.ops.nvfp4_paged_attention.listed import attend_listed_kernel, decode_listed_kernel
    from lltk.ops.nvfp4_paged_attention.listed_hopper import attend_listed_hopper_kernel

    tiles = tiles or TILES[sm]
    held = sizes.batch * sizes.pages * sizes.tokens * sizes.heads * sizes.width
    workspaces = {f"{name}_held": 2 * held for name in "kv"}
    counts = {"PAGES": sizes.pages, "TOKENS": sizes.tokens, "HEADS": sizes.heads}
    counts |= {"WIDTH": sizes.width, "SLOTS": 1 << (sizes.pages - 1).bit_length()}
    launches = []
    for name, means in ("k", sizes.k_means), ("v", sizes.v_means):
        tensors: dict[str, str | None] = {
            part: f"{name}_{part}" for part in ("codes", "scales", "decode_scales", "held")
        }
        tensors |= {"means": f"{name}_means" if means else None, "listed": "listed"}
        made = _compiled(
            decode_listed_kernel, sm, {**counts, "MEANS": means, "ROWS": _ROWS},
            {"num_warps": 4, "enable_fp_fusion": False},
        )  # fmt: skip
        grid = -(-sizes.tokens * sizes.heads // _ROWS), sizes.pages, sizes.batch
        launches.append(_written(folder, under, f"decode_{name}", made, grid, tensors))
    if tiles.hopper:
        made = _compiled(
            attend_listed_hopper_kernel, sm,
            {**counts, "N": tiles.n, "STAGES": tiles.stages, "TURNS": tiles.turns},
            {"num_warps": tiles.warps},
        )  # fmt: skip
    else:
        made = _compiled(
            attend_listed_kernel, sm, {**counts, "M": tiles.m, "N": tiles.n},
            {"num_warps": tiles.warps, "num_stages": tiles.stages},
        )  # fmt: skip
    grid = -(-sizes.tokens // tiles.m), sizes.batch * sizes.heads, 1
    workspaces["scratch"] = made.metadata.global_scratch_size * grid[0] * grid[1]
    own = {name: name for name in ("q", "k", "v", "k_held", "v_held", "listed", "out", "scratch")}
    launches.append(_written(folder, under, "attend", made, grid, own))
    facts = KernelFacts(
        sm=sm,
        made_by={"triton": version("triton")},
        tensors=GraphFacts.of(sizes.contract),
        workspaces=workspaces,
        launches=tuple(launches),
    )
    folder.write_text(str(PurePosixPath(under, FACTS)), facts.model_dump_json(indent=1) + "\n")
    return facts


_TYPES = {
    "codes": "*u8",
    "scales": "*u8",
    "decode_scales": "*fp32",
    "means": "*bf16",
    "listed": "*u8",
}
"""Triton's types of the kernels' arguments; those of others are ``*bf16``."""


def _compiled(kernel: Any, sm: int, constants: Mapping[str, Any], options: dict[str, Any]) -> Any:
    """A Triton kernel's code for a GPU; addresses are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else _TYPES.get(name, "*bf16") for name in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants
    }
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, signature, dict(constants), aligned)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def _written(
    folder: NewFolder,
    under: str,
    name: str,
    made: Any,
    grid: Grid,
    tensors: Mapping[str, str | None],
) -> Launch:
    """Write a kernel's code and make the launch of it.

    Triton appends two addresses to a kernel's own arguments: memory for descriptors of tensors, and
    memory for a profiler, which is not there.
    """
    names = [each for each in made.src.fn.arg_names if each in tensors]
    file, code = f"{name}.cubin", made.asm["cubin"]
    with folder.file(str(PurePosixPath(under, file))) as new:
        new.write(code)
    return Launch(
        file=file,
        sha256=hashlib.sha256(code).hexdigest(),
        entry=made.metadata.name,
        grid=grid,
        threads=32 * made.metadata.num_warps,
        shared=made.metadata.shared,
        arguments=(*(tensors[each] for each in names), tensors.get("scratch"), None),
    )
