"""FSDP2 over two ranks, with activation checkpointing per block, gives one process's gradients."""

from __future__ import annotations

import importlib
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import PASSES, inputs, reached
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program

pytestmark = pytest.mark.cpu

RANKS = 2
LIMIT = 180
"""Seconds until hung ranks are ended."""
BOUND = 1e-5
FAR = 1e-2


def program() -> Program:
    return reached("train", *PASSES["train"], frames=4)


def loss(module: ProgramModule, given: dict[str, Tensor]) -> Tensor:
    sample: Tensor = module("train", dict(given))["sample"]
    return sample.square().mean()


def gradients_of_one_process(seeds: list[int]) -> dict[str, Tensor]:
    """The gradients of the mean loss over the batches of ``seeds``."""
    module = instantiate(program())
    losses = [loss(module, inputs(program(), "train", seed)) for seed in seeds]
    torch.stack(losses).mean().backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def run_rank(rank: int, port: int, folder: str) -> None:
    """One rank: its own batch, gradients saved whole; asserts that shards are shards."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=LIMIT),
    )
    try:
        module = instantiate(program())
        whole = sum(p.numel() for p in module.parameters())
        module.recompute_blocks()
        mesh = init_device_mesh("cpu", (RANKS,))
        for block in module.blocks_by_path.values():
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        assert all(isinstance(block, FSDPModule) for block in module.blocks_by_path.values())
        assert all(isinstance(p, DTensor) for p in module.parameters())
        held = sum(p.to_local().numel() for p in module.parameters())
        assert held < 0.6 * whole
        loss(module, inputs(program(), "train", rank)).backward()
        gradients = {n: p.grad.full_tensor() for n, p in module.named_parameters()}
        torch.save(gradients, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference, relative to each gradient's largest value."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - g).abs().max() / g.abs().max()) for n, g in theirs.items())


def test_two_ranks_give_the_gradients_of_one(tmp_path: Path) -> None:
    # Spawned ranks import the function by its module's name: the plain one is on their path.
    function = importlib.import_module("test_fsdp").run_rank
    arguments = (free_port(), str(tmp_path))
    ranks = mp.spawn(function, arguments, nprocs=RANKS, join=False)
    theirs = gradients_of_one_process([0, 1])
    end = time.monotonic() + LIMIT
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < end, "the ranks hang"
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert worst(first, theirs) <= BOUND
    assert worst(first, gradients_of_one_process([0])) > FAR, "one rank's batch alone"
