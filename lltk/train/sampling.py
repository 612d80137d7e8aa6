"""Samples through the graph that trains: what the weights can do so far, with no other Program."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lltk.graph.contract import Role
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.stream.denoise import denoise
from lltk.stream.sampler import Schedule
from lltk.train.progress import Note, noted, silent
from lltk.train.share import Share, joined, takes_joined


@torch.no_grad()
def sample(
    program: Program,
    module: ProgramModule,
    text: Tensor,
    steps: int,
    seed: int,
    note: Note = silent,
) -> Tensor:
    """Clips from noise, as a stream with a full window makes them, or all frames at once.

    A train program makes a chunk after the other: as the noisy chunk, after the clean chunks that
    were made before it. A reference program denoises the whole clip.

    Args:
        program: a train or a reference Program of batch B.
        module: the same Program, runnable.
        text: [B, N, S, E], a prompt a chunk, where the module is.
        steps: denoising passes, of a chunk or of the clip.
        seed: of the noise, which is drawn on the device of the text.
        note: told how many chunks are made, or clips where all frames are denoised at once.

    Returns:
        Latents, float32 [B, C, F, h, w], normalised.
    """
    geometry, spec = program.geometry, program.spec
    device = text.device
    schedule = Schedule.make(steps, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (geometry.batch, spec.channels, geometry.frames, *geometry.latent(spec))
    noise = torch.randn(shape, generator=generator, device=device)
    contract = program.contract(program.kind)
    values = {
        Role.LATENTS: torch.zeros_like(noise),
        Role.CLEAN: torch.zeros_like(noise),
        Role.TIME: torch.zeros(geometry.batch, geometry.frames, device=device),
        Role.TEXT: text,
        Role.POSITIONS: torch.arange(geometry.frames, dtype=torch.float64, device=device),
        Role.RANDOM: torch.tensor([seed, 0], device=device),
    }
    share, quantised = Share(program), module.quantised_weights()
    span = geometry.chunk if program.kind == "train" else geometry.frames
    made = torch.zeros_like(noise)

    def velocity(frames: slice, latents: Tensor, timestep: Tensor, index: int) -> Tensor:
        now = made.clone()
        now[:, :, frames] = latents
        values[Role.LATENTS], values[Role.CLEAN] = now, made
        values[Role.TIME][:, frames] = timestep
        given = contract.named(joined(values) if takes_joined(program) else values) | quantised
        own = {
            name: share.own(given[name].to(device, like.dtype), like.shape)
            for name, like in contract.inputs.items()
        }
        every = share.whole(module(program.kind, own)[spec.output], axis=2)
        return every[:, :, -geometry.frames :][:, :, frames]

    starts = range(0, geometry.frames, span)
    for start in noted(starts, "sampling", len(starts), note):
        frames = slice(start, start + span)
        made[:, :, frames] = denoise(schedule, noise[:, :, frames], partial(velocity, frames))
    return made
