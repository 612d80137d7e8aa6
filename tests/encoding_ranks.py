"""What ranks that encode videos together make, for the tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import captures
import prepared_sets
import torch
import torch.distributed as dist
from footage import FPS, numbered, write_clip
from prepared_sets import dies_preparing, prepared
from ranks import forked, free_port, grouped
from safetensors.torch import save_file
from test_folder import GEOMETRY, VAE, WHOLE, dataset_of
from test_vae_frames import frames_seen, vae
from torch import Tensor

from lltk.compiler import with_weights
from lltk.graph.geometry import Geometry
from lltk.graph.module import instantiate
from lltk.graph.passes import run_passes
from lltk.models import vae_ranks
from lltk.models.tiny.text import save_text_encoder
from lltk.models.vae_encoder import captured, encoder_weights
from lltk.models.vae_frames import LONGEST
from lltk.models.vae_ranks import Turn, encode_apart, encode_shared
from lltk.models.wan_vae import build, encode, save_vae
from lltk.parallel import groups
from lltk.parallel.mesh import ALONE, Mesh, meshed
from lltk.parallel.ranks import Ranks
from lltk.passes import make_pass
from lltk.stream.encoder import Encoder
from lltk.tasks.encoder import PipelineEncoder
from lltk.train.data import Dataset, first_samples

SIZES = (2, 4)
LATENTS = (4, 5, 17)
"""Of the videos. 4 ranks have one latent each of the first, and take three turns for the last."""


RUNS = [*((0, latents) for latents in LATENTS), (1, 5), (3, 5)]
"""The number of the VAE, and the latents of the video."""
FAULTY = (4, (0, 17))
"""The number of ranks that have the faults, and their run."""


def video(latents: int) -> Tensor:
    """Two clips that differ, in float64."""
    generator = torch.Generator().manual_seed(latents)
    frames = 4 * latents - 3
    return torch.randn(2, 3, frames, 48, 16, generator=generator, dtype=torch.float64)


@cache
def encoder(number: int, device: str = "cpu") -> Encoder:
    """A VAE's encoder as a Program for these videos, fused as on a GPU."""
    model, sizes = vae(number), {"batch": 2, "height": 48, "width": 16}
    geometry = Geometry.model_validate(sizes)
    program = captured(model.config, geometry, torch.float64, LONGEST)
    passes = ("canonicalise", "fuse_norm_silu", "channels_last", "lower")
    program = run_passes(program, [make_pass(name, {}) for name in passes])
    program = with_weights(program, encoder_weights(model.state_dict()))
    return Encoder(program, instantiate(program, device))


def counting(encoder: Encoder) -> tuple[Callable[..., Tensor], list[int]]:
    """What encodes parts, and how many frames each has."""
    found: list[int] = []

    def part(video: Tensor, turn: Turn) -> Tensor:
        found.append(video.shape[2])
        return encoder.encode_part(video, turn)

    return part, found


def without(name: str) -> Callable[[], AbstractContextManager[None]]:
    """A fault: a convolution sees zeros in place of the frames of the rank before."""

    @contextmanager
    def faulty() -> Iterator[None]:
        receive = groups.receive

        def zeros(awaited: Tensor, *group: Any) -> None:
            receive(awaited, *group)
            if awaited.shape[1] == (1 if name == "halving" else 2):
                awaited.zero_()

        with patch.object(vae_ranks, "receive", zeros):
            yield

    return faulty


FAULTS = {"convolutions": without("convolutions"), "halving": without("halving")}


def datasets(folder: Path, mesh: Mesh = ALONE) -> dict[str, Dataset]:
    """New clips of the tiny world, and kept ones of a folder, whose held-out clips are new."""
    pipeline = {"pipeline": str(folder), "shots": 2}
    clips = pipeline | {"folder": str(folder), "fps": FPS}
    square = GEOMETRY.model_copy(update={"height": 128, "width": 128})
    return {
        "world": dataset_of(pipeline, square, mesh),
        "kept": dataset_of(clips | {"clips": 5}, GEOMETRY, mesh),
    }


def batches(dataset: Dataset, group: int) -> dict[str, Tensor]:
    """What a group of ranks sees of a dataset: samples of the seed of kept ones, and held out."""
    other = {f"other {name}": value for name, value in dataset.batch(4, range(2)).items()}
    found = {**dataset.batch(3, range(group, group + 2)), **other}
    return {name: value.contiguous() for name, value in found.items()}


def save_clips(folder: Path) -> None:
    """What the clips are made from."""
    torch.manual_seed(0)
    save_vae(folder / "vae", build(VAE).state_dict(), VAE)
    save_text_encoder(folder)
    write_clip(folder, "a", 0, numbered(0, WHOLE + 8), "a red square")


def save_alone(folder: Path) -> None:
    """Write what one process makes of the clips, for a process of its own."""
    for name, dataset in datasets(folder).items():
        for group in range(2):
            save_file(batches(dataset, group), folder / f"{name} alone, {group}")
    prepared(folder / "clips", folder / "prepared alone")


class Odd:
    """Samples of several dtypes, some of which do not lie in one piece."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self.asked: list[range] = []

    def batch(self, seed: int, indices: range) -> dict[str, Tensor]:
        self.asked.append(indices)
        count = torch.tensor(indices)
        return {
            "half": (seed + count[:, None] + torch.arange(3) / 8).to(self._device, torch.bfloat16),
            "turned": torch.arange(24.0).view(4, 3, 2)[: len(count)].transpose(1, 2) + count[0],
            "flags": count % 3 == 0,
        }


def save_encoded(rank: int, size: int, port: int, folder: Path) -> None:
    """Write what this rank makes of the videos; for a process of its own."""
    torch.set_num_threads(1)
    with grouped(rank, size, port):
        for name, fault in {"": nullcontext, **(FAULTS if size == FAULTY[0] else {})}.items():
            with fault():
                made = {}
                for number, latents in FAULTY[1:] if name else RUNS:
                    part, seen = counting(encoder(number))
                    encoded = encode_shared(part, vae(number).config, video(latents), size)
                    made[f"{number}, {latents}"] = encoded
                    if not name:
                        alone = partial(encode, vae(number))
                        with frames_seen(vae(number)) as seen_apart:
                            apart = encode_apart(alone, vae(number).config, video(latents), size)
                        made[f"{number}, {latents} apart"] = apart
                        made[f"{number}, {latents} apart frames"] = torch.tensor(seen_apart)
                    made[f"{number}, {latents} frames"] = torch.tensor(seen)
            made["after"] = encode(vae(), video(4))
            save_file(made, folder / f"{name}, {size} ranks, {rank}")
        with meshed(Ranks(rank, size, torch.device("cpu")), 2, 1) as mesh:
            if mesh.groups > 1:
                for name, dataset in datasets(folder, mesh).items():
                    made = batches(dataset, mesh.group)
                    save_file(made, folder / f"{name}, {size} ranks, {rank}")
            odd = Odd()
            made = first_samples(odd, 7, 9, block=2, mesh=mesh)
            made["asked"] = torch.tensor([asked.start for asked in odd.asked])
            save_file(made, folder / f"odd, {size} ranks, {rank}")
        if size == 2:
            ranks = Ranks(rank, size, torch.device("cpu"))
            prepared(folder / "clips", folder / "prepared", ranks)
            prepared(folder / "clips", folder / "killed", ranks, resume=True)
        dist.barrier()  # the first to end takes its connections with it


def save_on(kind: str, rank: int, size: int, port: int, folder: Path) -> None:
    """Write what this rank makes on a device of its own; for a process of its own."""
    device = torch.device(kind, rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    part, config = encoder(0, kind).encode_part, vae().config
    with grouped(rank, size, port, "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"):
        made = {str(n): encode_shared(part, config, video(n), size) for n in LATENTS}
        with meshed(Ranks(rank, size, device), size, 1) as mesh:
            made |= first_samples(Odd(kind), 7, 9, block=2, mesh=mesh)
        dist.barrier()  # the first to end takes its connections with it
    save_file(made, folder / f"{kind}, {size} ranks, {rank}")


def save_all(folder: Path) -> None:
    """Encode the videos on as many ranks as there are sizes; for a new process to fork."""
    torch.set_num_threads(1)
    save_clips(folder)
    prepared_sets.save_clips(folder / "clips")
    for number, _ in RUNS:
        encoder(number)
    with captures.shared():
        pipeline = PipelineEncoder(folder, 16, torch.device("cpu"), torch.float32)
        for sizes in ((1, GEOMETRY.height, GEOMETRY.width), (2, 128, 128)):
            pipeline._encoder(*sizes)
        killed = get_context("fork").Process(
            target=dies_preparing, args=(folder / "clips", folder / "killed")
        )
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        forked(save_alone, [(folder,)])
        for size in SIZES:
            port = free_port()
            forked(save_encoded, [(rank, size, port, folder) for rank in range(size)])
