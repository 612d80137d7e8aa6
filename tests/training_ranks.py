"""What ranks that train together make, for the tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import captures
import replay_longlive
import replay_sp
import torch
import torch.distributed as dist
from helpers import PASSES, make_program, make_recipe, tiny_config
from ranks import ends, forked, free_port, grouped
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lltk.graph.contract import Contract, Role
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe
from lltk.ops import philox
from lltk.ops.block_causal_attention import reference, sdpa
from lltk.ops.nvfp4_quantise import reference as nvfp4
from lltk.ops.nvfp4_quantise_transposed import reference as nvfp4_transposed
from lltk.parallel import exchange
from lltk.parallel.mesh import Mesh, local_part, meshed, whole
from lltk.parallel.ranks import Ranks
from lltk.train import pieces
from lltk.train.data import Batch
from lltk.train.flow_matching import FlowMatching
from lltk.train.loop import Trainer
from lltk.train.optimiser import Optimiser
from lltk.train.pieces import Pieces
from lltk.train.recipe import ErrorRecyclingSection, TrainSection

BATCH, STEPS = 2, 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        frames, chunk: of a clip, in latent frames.
        options: of the objective.
        padded: whether clips have padding, which no two of them have as much of.
        naive: whether ranks divide [clean; noisy] as it stands.
        nvfp4: whether linears are in NVFP4.
        exchange: how ranks send each other what they attend with.
    """

    frames: int = 8
    chunk: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    padded: bool = False
    naive: bool = False
    nvfp4: bool = False
    exchange: str = "compute"


CASES = {
    "text": Case(),
    "images and padding": Case(options={"image": 0.6}, padded=True),
    "errors and noise": Case(12, 3, {"context_error": 0.7, "context_noise": 0.4}),
    "recycled errors": Case(
        options={"error_recycling": ErrorRecyclingSection(clean=0.3, buckets=2, entries=3)},
        padded=True,
    ),
    "naive": Case(
        options={
            "image": 0.6,
            "error_recycling": ErrorRecyclingSection(clean=0.3, buckets=2, entries=3, owners=2),
        },
        padded=True,
        naive=True,
    ),
    "nvfp4": Case(4, nvfp4=True),
    "sent in fp8": Case(exchange="fp8"),
    "sent in nvfp4": Case(exchange="nvfp4"),
}


class Clips:
    """Random clips. Each has prompts of its own for its chunks."""

    def __init__(self, program: Program, case: Case) -> None:
        self._program = program
        self._case = case

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        geometry, spec = self._program.geometry, self._program.spec
        size = (spec.channels, geometry.frames, *geometry.latent(spec))
        made: dict[str, list[Tensor]] = {"latents": [], "text": [], "opens": [], "valid": []}
        for index in indices:
            generator = torch.Generator().manual_seed(1000 * seed + index)
            made["latents"].append(torch.randn(size, generator=generator))
            text = (geometry.chunks, geometry.text_tokens, spec.text_dim)
            made["text"].append(torch.randn(text, generator=generator))
            made["opens"].append(torch.arange(geometry.chunks) % 3 == 0)
            left = geometry.frames - index % 4 * geometry.chunk if self._case.padded else None
            made["valid"].append(torch.arange(geometry.frames) < (left or geometry.frames))
        return {name: torch.stack(parts) for name, parts in made.items()}


def program(name: str, sequence: int, dtype: str = "float32") -> Program:
    """A case's Program, for so many ranks a clip, with weights of its own seed."""
    return _program(name, sequence, dtype)


@cache
def _program(name: str, sequence: int, dtype: str) -> Program:
    case = CASES[name]
    steps: list[Any] = list(PASSES["train"])
    place = steps.index("teacher_forcing")
    if sequence > 1 and case.naive:
        steps[place] = {"naive_sp": {"size": sequence}}
    elif sequence > 1:
        shared = {"balanced_sp": {"size": sequence, "exchange": case.exchange}}
        steps.insert(place + 1, shared)
    if case.nvfp4:
        steps.insert(place + 1, {"nvfp4_train": {"activation_rule": "mse"}})
    width, text = (128, 16) if case.nvfp4 else (96, 5)
    head_dim = 16 if case.nvfp4 or case.exchange == "nvfp4" else 12
    ffn = 64 if case.nvfp4 else 32
    config = tiny_config(
        1 if case.nvfp4 else 2, num_attention_heads=4, attention_head_dim=head_dim, ffn_dim=ffn
    )
    sizes = {"frames": case.frames, "chunk": case.chunk, "window": 4 * case.chunk, "sink": 0}
    sizes |= {"height": 64, "width": width, "text_tokens": text}
    return make_program(make_recipe("train", steps, config=config, dtype=dtype, **sizes))


@contextmanager
def in_float64() -> Iterator[None]:
    """Let Programs take their floating-point inputs in float64."""
    contract_of = Program.contract

    def contract(self: Program, graph: str) -> Contract:
        found = contract_of(self, graph)
        inputs = {
            name: replace(spec, dtype=torch.float64) if spec.dtype.is_floating_point else spec
            for name, spec in found.inputs.items()
        }
        return Contract(inputs, found.outputs)

    with patch.object(Program, "contract", contract):
        yield


def trained(
    name: str, ranks: Ranks, sequence: int = 1, shards: int = 1, steps: int = STEPS
) -> dict[str, Tensor]:
    """Losses, gradients and weights of a few steps in float64, on the CPU.

    Also the 4-bit values of the last weights, if linears are in NVFP4.
    """
    case, made = CASES[name], program(name, sequence)
    found: dict[str, Tensor] = {}
    step = Optimiser.step

    def noting(self: Optimiser, rate: float) -> None:
        number = sum(key.endswith("loss") for key in found)
        for parameter, master in self._parameters.items():
            found[f"{number}.gradient.{parameter}"] = whole(master.grad).clone().cpu()
        step(self, rate)

    section = TrainSection.model_validate(
        {"steps": 99, "batch": BATCH, "lr": 1e-3, "clip": 0.5, "shards": shards, "seed": 3}
    )
    with (
        meshed(ranks, sequence, shards) as mesh,
        in_float64(),
        patch.object(Optimiser, "step", noting),
        TemporaryDirectory() as folder,
    ):
        module = instantiate(made, ranks.device, torch.float64)
        module.recompute_blocks()
        parameters = sum(p.untyped_storage().nbytes() for p in module.parameters())
        objective = FlowMatching(made, module, **case.options)
        run = Trainer(objective, Clips(made, case), section, Path(folder), {}, mesh=mesh)
        held = sum(local_part(p).untyped_storage().nbytes() for p in module.parameters())
        assert held < 1.1 * parameters / shards
        for number in range(steps):
            metrics = next(run)
            found[f"{number}.loss"] = torch.tensor(metrics.loss, dtype=torch.float64)
            found[f"{number}.norm"] = torch.tensor(metrics.grad_norm, dtype=torch.float64)
        found |= {f"quantised.{n}": bits(value) for n, value in objective._quantised.items()}
        return found | {f"weight.{n}": value.cpu() for n, value in run.weights.items()}


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor, as numbers."""
    return value.cpu().flatten().view(torch.uint8).double()


def quantised(ranks: Ranks) -> dict[str, Tensor]:
    """The 4-bit values of weights in bfloat16, which all ranks share, and the bytes received."""
    made = program("nvfp4", 1, "bfloat16")
    section = TrainSection.model_validate(
        {"steps": 1, "batch": ranks.size, "lr": 0.1, "shards": ranks.size}
    )
    received = 0

    def counted(sent: Tensor, size: int, group: str) -> Tensor:
        nonlocal received
        received += sent.nbytes
        return begin(sent, size, group)

    begin = exchange._begin
    with meshed(ranks, 1, ranks.size) as mesh, TemporaryDirectory() as folder:
        objective = FlowMatching(made, instantiate(made))
        run = Trainer(objective, Clips(made, CASES["nvfp4"]), section, Path(folder), {}, mesh=mesh)
        run._updates.masters.publish()
        with patch.object(exchange, "_begin", counted):
            objective.weights_changed()
        found = {name: bits(value) for name, value in objective._quantised.items()}
    return found | {"received": torch.tensor(received)}


Run = tuple[int, tuple[int, int], str]
"""Number of ranks; those that share a clip, and shards; case."""
HIGH = [
    name
    for name, case in CASES.items()
    if case.exchange == "compute" and not case.nvfp4 and not case.naive
]
"""Cases for every mesh of two ranks."""
RUNS: list[Run] = [
    *product([2], [(2, 1), (1, 2), (2, 2)], HIGH),
    *product([4], [(4, 1), (4, 4), (2, 4), (2, 2)], ["images and padding"]),
    (4, (2, 1), "recycled errors"),
    (4, (4, 1), "errors and noise"),
    (2, (2, 2), "naive"),
    (4, (4, 1), "naive"),
    (2, (2, 2), "nvfp4"),
    (4, (2, 4), "nvfp4"),
]
RECORDED = Path(__file__).parent / "data" / "longlive" / "sp_2ranks.safetensors"


@contextmanager
def another_layout() -> Iterator[None]:
    """Let the mask take what the ranks' exchange gives for [clean; noisy] of the whole clip."""

    def wrong(tokens: int, chunk_tokens: int, teacher_forcing: bool, ranks: int) -> Any:
        return reference.chunks(tokens, chunk_tokens, teacher_forcing, 1)

    with patch.object(sdpa, "chunks", wrong):
        yield


@contextmanager
def own_counts() -> Iterator[None]:
    """Let each rank divide its loss by the number of its own frames that count."""
    total = Mesh.total

    def count(self: FlowMatching, batch: Batch) -> int:
        frames = self._program.contract("train").input(Role.TIME).shape
        return int(self._share.own(self._counted(batch), frames).sum())

    def unsummed(self: Mesh, value: Tensor) -> Tensor:
        return value * self.sequence if value.dtype == torch.int64 else total(self, value)

    with patch.object(FlowMatching, "count", count), patch.object(Mesh, "total", unsummed):
        yield


@contextmanager
def own_draws() -> Iterator[None]:
    """Let random numbers go by a row's place among the rank's own."""

    def drawn(seed: Tensor, stream: int, shape: tuple[int, ...], run: int = 0) -> Tensor:
        return philox.uniform(seed, stream, shape)

    with patch.object(nvfp4, "uniform", drawn):
        yield


@contextmanager
def own_scales() -> Iterator[None]:
    """Let each rank scale what it quantises by its own largest magnitude."""
    quantise = nvfp4.nvfp4_quantise

    def own(*given: Any, run: int = 0) -> nvfp4.Quantised:
        return quantise(*given[:5], run=run)

    with (
        patch.object(nvfp4, "nvfp4_quantise", own),
        patch.object(nvfp4_transposed, "nvfp4_quantise", own),
    ):
        yield


_PADDED = (2, (2, 1), "images and padding")
ROUNDED: list[Run] = [
    (2, (2, 1), "sent in fp8"),
    *((size, (size, 1), "sent in nvfp4") for size in (2, 4)),
]
"""Runs that are only near to those of one process."""
FAULTS: dict[str, tuple[Run, Callable[[], AbstractContextManager[None]]]] = {
    "another layout": (_PADDED, another_layout),
    "own counts": (_PADDED, own_counts),
    "own draws": ((2, (2, 1), "nvfp4"), own_draws),
    "own scales": ((2, (2, 1), "nvfp4"), own_scales),
    "own scales of shards": ((2, (1, 2), "nvfp4"), own_scales),
}
"""What must be seen, and in which run, all of two ranks."""


def goes_on(
    ranks: Ranks,
    folder: Path,
    steps: int,
    dtype: str = "float32",
    every: int = 100,
    shards: int | None = None,
) -> list[float]:
    """The losses of a run up to a step, each and then its gradient's norm.

    All ranks share the clips, and as many as there are shards the weights, by default all of them.
    A training state is written every few steps.
    """
    rate = 1e-3 if dtype == "float32" else 1e-5  # AdamW's first steps are as large, whatever rounds
    settings = {
        "steps": steps,
        "batch": 2,
        "lr": rate,
        "ema_start": 1,
        "shards": shards or ranks.size,
    }
    settings |= {"validate_every": 2}  # by averaged weights, which the next step must not see
    section = TrainSection.model_validate(settings | {"checkpoint_every": every})
    case, made = CASES["text"], program("text", ranks.size, dtype)
    with meshed(ranks, ranks.size, section.shards) as mesh:
        objective = FlowMatching(made, instantiate(made))
        about = {"recipe": made.recipe, "log": [], "versions": {}}
        clips = Clips(made, case)
        run = Trainer(objective, clips, section, folder, about, resume=True, mesh=mesh)
        return [found for metrics in run for found in (metrics.loss, metrics.grad_norm)]


@contextmanager
def noting_what_is_read() -> Iterator[dict[str, int]]:
    """How many values of each tensor this rank reads from training states."""
    read: dict[str, int] = {}
    box = Pieces._box

    def noted(self: Pieces, name: str, *place: Any) -> Tensor:
        found = box(self, name, *place)
        read[name] = read.get(name, 0) + found.numel()
        return found

    with patch.object(Pieces, "_box", noted):
        yield read


def told(ranks: Ranks, folder: Path, steps: int) -> str:
    """What ends a run."""
    try:
        goes_on(ranks, folder, steps)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextmanager
def dying(rank: int, state: int, end: Callable[[], None]) -> Iterator[None]:
    """Let a rank do something else than write its optimiser's part of a state of this number."""
    write, written = pieces.write_tensors, 0

    def half(file: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        nonlocal written
        written += any(name.startswith("exp_avg.") for name in tensors)
        if written == state:
            end()
        write(file, tensors, metadata)

    with patch.object(pieces, "write_tensors", half) if rank == 1 else nullcontext():
        yield


def is_full() -> None:
    raise OSError(28, "No space left on device")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_until_killed(rank: int, size: int, port: int, folder: Path) -> None:
    """Train until a rank is killed while it writes its pieces of the second state."""
    torch.set_num_threads(1)
    with grouped(rank, size, port), dying(rank, 2, kill):
        goes_on(Ranks(rank, size, CPU), folder / "killed", 3, every=1)


def file_of(run: Run, rank: int) -> str:
    size, (sequence, shards), case = run
    return f"{case}, {size} ranks, {sequence} a clip, {shards} shards, {rank}"


def save_trained(rank: int, size: int, port: int, folder: Path) -> None:
    """Write what this rank makes of its runs; for a process of its own."""
    torch.set_num_threads(1)
    ranks = Ranks(rank, size, CPU)
    with grouped(rank, size, port):
        for run in [*RUNS, *ROUNDED]:
            if run[0] == size:
                save_file(trained(run[2], ranks, *run[1]), folder / file_of(run, rank))
        save_file(quantised(ranks), folder / f"quantised on {size}, {rank}")
        if size == 2:
            losses = goes_on(ranks, folder / "whole", 3, every=2)
            (folder / f"whole, {rank}").write_text(json.dumps(losses))
            if rank == 0:
                shutil.rmtree(folder / "whole" / "checkpoints" / "step_00000003")
                shutil.copytree(folder / "whole", folder / "half")
            rounded = goes_on(ranks, folder / "rounded", 2, "bfloat16")
            (folder / f"rounded, {rank}").write_text(json.dumps(rounded))
            after = goes_on(ranks, folder / "killed", 3, every=1)
            (folder / f"after the kill, {rank}").write_text(json.dumps(after))
            with dying(rank, 1, is_full):
                (folder / f"full, {rank}").write_text(told(ranks, folder / "disk", 1))
            if rank == 0:
                shutil.copytree(folder / "half", folder / "damaged")
                damage(folder / "damaged")
            dist.barrier()
            (folder / f"damaged, {rank}").write_text(told(ranks, folder / "damaged", 3))
        else:
            goes_on(ranks, folder / "replicas", 2, shards=2)
        if rank == 0:
            shutil.copytree(folder / "half", folder / f"half on {size}")
        dist.barrier()
        with noting_what_is_read() as read:
            losses = goes_on(ranks, folder / f"half on {size}", 3)
        (folder / f"read on {size}, {rank}").write_text(json.dumps(read))
        (folder / f"resumed on {size}, {rank}").write_text(json.dumps(losses))
        if size == 2:
            for name, (run, fault) in FAULTS.items():
                with fault():
                    save_file(trained(run[2], ranks, *run[1], 1), folder / f"{name}, {rank}")
            with meshed(ranks, size, 1):
                made, meta = recorded_program()
                own = replay_sp.call(made, meta, load_file(RECORDED), rank)
                save_file(own, folder / f"recorded, {rank}")


def save_on_gpu(rank: int, size: int, port: int, folder: Path) -> None:
    """Write what this rank makes on a GPU of its own, over NCCL; for a process of its own."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    with grouped(rank, size, port, "cpu:gloo,cuda:nccl"):
        for run in RUNS:
            if run[0] == size:
                found = trained(run[2], Ranks(rank, size, device), *run[1])
                save_file(found, folder / file_of(run, rank))


def damage(run: Path) -> Path:
    """Change a byte in the second shard of a run's weights."""
    (file,) = run.glob("checkpoints/*/weights.shard1of2.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return file


def recorded(file: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the facts of a recorded call."""
    with safe_open(file, "pt") as opened:
        meta = json.loads(opened.metadata()["meta"])
    return replay_longlive.recipe(meta, "train"), meta


@cache
def recorded_program() -> tuple[Program, dict[str, Any]]:
    """The Program of the recorded call, with its weights, and the facts of the call."""
    recipe, meta = recorded(RECORDED)
    return replay_sp.program_of(recipe, replay_sp.weights_beside(RECORDED)), meta


def save_all(folder: Path) -> None:
    """Run every case on every mesh; for a new process, of which the ranks are forks."""
    torch.set_num_threads(1)
    with captures.shared():
        for _, (sequence, _), case in [*RUNS, *ROUNDED, *(run for run, _ in FAULTS.values())]:
            program(case, sequence)
        program("text", 4)
        program("text", 2, "bfloat16")
        program("nvfp4", 1, "bfloat16")
        recorded_program()
    port = free_port()
    codes = ends(save_until_killed, [(rank, 2, port, folder) for rank in range(2)])
    assert codes[1] == -signal.SIGKILL and codes[0]
    for size in sorted({run[0] for run in RUNS}):
        port = free_port()
        forked(save_trained, [(rank, size, port, folder) for rank in range(size)])
