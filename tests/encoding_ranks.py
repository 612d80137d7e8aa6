"""What ranks that encode videos together make, for the tests."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ranks import LIMIT, free_port, grouped
from safetensors.torch import save_file
from test_vae_frames import frames_seen, vae
from torch import Tensor

from lltk.models import vae_ranks
from lltk.models.vae_ranks import encode_shared
from lltk.models.wan_vae import encode
from lltk.parallel import groups

SIZES = (2, 4)
LATENTS = (4, 5, 8, 11)
"""Of the videos. With 4 ranks each has one latent of the first, and not as many of the others."""


RUNS = [*((0, latents) for latents in LATENTS), (1, 5), (3, 5)]
"""The number of the VAE, and the latents of the video."""


def video(latents: int) -> Tensor:
    """Two clips that differ, in float64."""
    generator = torch.Generator().manual_seed(latents)
    frames = 4 * latents - 3
    return torch.randn(2, 3, frames, 48, 16, generator=generator, dtype=torch.float64)


def without(name: str) -> Callable[[], AbstractContextManager[None]]:
    """A fault: a hook sees zeros in place of the frames of the rank before."""

    @contextmanager
    def faulty() -> Iterator[None]:
        hand_on = groups.hand_on

        def zeros(sent: Tensor | None, awaited: Tensor | None, *group: Any) -> None:
            hand_on(sent, awaited, *group)
            if awaited is not None and awaited.shape[2] == (1 if name == "halving" else 2):
                awaited.zero_()

        with patch.object(vae_ranks, "hand_on", zeros):
            yield

    return faulty


FAULTS = {"convolutions": without("convolutions"), "halving": without("halving")}


def save_encoded(rank: int, size: int, port: int, folder: Path) -> None:
    """Write what this rank makes of the videos; for a process of its own."""
    torch.set_num_threads(1)
    with grouped(rank, size, port):
        for name, fault in {"": nullcontext, **FAULTS}.items():
            with fault():
                made = {}
                for number, latents in RUNS:
                    with frames_seen(vae(number)) as seen:
                        made[f"{number}, {latents}"] = encode_shared(vae(number), video(latents), size)
                    made[f"{number}, {latents} frames"] = torch.tensor(seen)
            made["after"] = encode(vae(), video(4))
            save_file(made, folder / f"{name}, {size} ranks, {rank}")


def save_all(folder: Path) -> None:
    """Encode the videos on as many ranks as there are sizes; for a new process to fork."""
    torch.set_num_threads(1)
    for number, _ in RUNS:
        vae(number)
    fork = multiprocessing.get_context("fork")
    for size in SIZES:
        port = free_port()
        ranks = [
            fork.Process(target=save_encoded, args=(rank, size, port, folder))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(LIMIT)
            process.kill()
        if any(process.exitcode for process in ranks):
            sys.exit(1)
