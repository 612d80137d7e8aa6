"""Flow matching, under teacher forcing or over the whole clip.

A noisy latent is x_s = (1 − s)·x₀ + s·ε, with ε ~ N(0, 1) and s = t/1000. The model predicts its
velocity v = ε − x₀.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lltk.graph.contract import Role
from lltk.graph.diagnose import first_bad_node
from lltk.graph.flops import training_flops
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.train.data import Batch
from lltk.train.error_recycling import ErrorRecycling, Given, without_errors
from lltk.train.excerpt import excerpt, leaps
from lltk.train.graphs import Graphed, OneOutput
from lltk.train.noise_levels import LEVELS, level_weights, noise_grid
from lltk.train.objective import Work
from lltk.train.recipe import ErrorRecyclingSection
from lltk.train.share import Share, joined, takes_joined

_LARGEST_ERROR = 2.0
"""A context error is at most this many times the error of one prediction.

While streaming, the errors of consecutive chunks add up.
"""


class FlowMatching:
    """Flow matching through a train, a reference or a score Program.

    A train program sees a clip twice, clean and noisy, and each chunk has a noise level of its own.
    A reference and a score program see the noisy clip, which has one noise level; but where the
    first frame is given to a score program, each chunk has its own. Levels are drawn uniformly from
    `noise_grid`. The squared error is averaged over each latent frame, weighted by `level_weights`,
    and summed over the frames that count.

    While it streams, a causal model sees chunks that it made itself. So that it learns this, the
    clean chunks of a train program may carry errors and noise. The model is told of neither.

    - The error is the difference between x₀ and the model's own prediction x_s − s·v, times a
      random number up to `_LARGEST_ERROR`. Chunks that open a shot carry none. They are the shot's
      sink, by which the model can correct the others.
    - The noise has a random level up to ``context_noise``.

    With ``error_recycling`` the errors of earlier steps are added instead, also to what is noised;
    see `ErrorRecycling`. That is done where gradients are computed, and not in validation.

    Clips that are longer than the program's are seen as an `excerpt`. Where several ranks share a
    clip, each gets the whole clip, and its loss is that of its own frames.

    A batch holds

    - ``latents`` [B, C, F, h, w], normalised;
    - ``text`` [B, N, S, E], one prompt a chunk;
    - ``opens``, bool [B, N], true where a chunk opens a shot; read if there are context errors;
    - ``valid``, bool [B, F], false for padding; may be left out.

    Args:
        program: causal or later, with weights.
        module: the same Program, runnable.
        image: share of the clips whose first latent frame is given. It is then free of noise, at
            t = 0, and does not count.
        context_error: share of the clean chunks that carry the model's error, among those that open
            no shot. Above 0 each call makes a second forward pass, without gradients.
        context_noise: largest noise level of the clean chunks.
        gap: see `excerpt`.
        graphs: whether to replay CUDA graphs.
        error_recycling: which errors of earlier steps are added; None for none.

    Raises:
        ValueError: the program is of another kind; or it is a reference or a score, which see
            no clean chunks, and they should carry errors or noise; or ranks have clean chunks apart
            from noisy ones, which should carry errors of their predictions.
    """

    critic = None

    def __init__(
        self,
        program: Program,
        module: ProgramModule,
        image: float = 0.0,
        context_error: float = 0.0,
        context_noise: float = 0.0,
        gap: float = 1.0,
        graphs: bool = False,
        error_recycling: ErrorRecyclingSection | None = None,
    ) -> None:
        if program.kind not in ("train", "reference", "score"):
            raise ValueError(
                f"a {program.kind} program has no flow-matching objective; set the recipe's "
                "program to train, reference or score"
            )
        if program.kind != "train" and (context_error or context_noise or error_recycling):
            raise ValueError(
                "train.context_error, train.context_noise and train.error_recycling: a "
                f"{program.kind} program sees no clean chunks; remove them, or set the recipe's "
                "program to train"
            )
        self._program = program
        self._contract = program.contract(program.kind)
        self._joined = takes_joined(program)
        if self._joined and context_error:
            raise ValueError(
                "train.context_error: with naive_sp a rank has no clean chunk beside its noisy "
                "one; set it to 0, or use balanced_sp"
            )
        self._module = module
        self._image = image
        self._context_error = context_error
        self._context_noise = context_noise
        self._gap = gap
        self._share = Share(program)
        if graphs and self._share.ranks > 1:
            raise ValueError(
                f"train.graphs: the {self._share.ranks} ranks that share a clip exchange tensors, "
                "which such graphs cannot hold; set it to false"
            )
        flow = OneOutput(module, program)
        self._flow = Graphed(flow) if graphs else flow
        self._grid = noise_grid()
        self._weights = level_weights(self._grid)
        self._device = next(module.parameters()).device
        self._quantised: dict[str, Tensor] = {}
        self.memory: ErrorRecycling | None = None
        if error_recycling is not None:
            _, channels, _, *size = (latents := self._contract.input(Role.LATENTS)).shape
            chunk = (channels, program.geometry.chunk, *size)
            count = program.geometry.chunks
            self.memory = ErrorRecycling(error_recycling, chunk, latents.dtype, count)
        self.weights_changed()

    @property
    def module(self) -> ProgramModule:
        return self._module

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self._program.weights

    @property
    def clips(self) -> int:
        return self._program.geometry.batch

    @cached_property
    def work(self) -> Work:
        geometry = self._program.geometry
        frames = geometry.batch * geometry.frames
        tokens = frames * geometry.frame_tokens(self._program.spec)
        return Work(tokens, training_flops(self._program))

    def count(self, batch: Batch) -> int:
        if "valid" in batch.tensors:  # without padding every excerpt counts the same
            batch = self._excerpt(batch)
        return int(self._counted(batch).sum())

    def loss(self, batch: Batch) -> Tensor:
        batch = self._excerpt(batch)
        inputs, target, weight, given = self._prepared(batch)
        if self._context_error:
            mistaken = self._mistaken(batch, inputs, target)
            inputs |= self._contract.named({Role.CLEAN: mistaken})
        flow = self._flow(*inputs.values())
        if self.memory is not None and torch.is_grad_enabled():
            every = self._share.whole(flow.detach(), axis=2)
            self.memory.note(batch, given, every[:, :, -self._program.geometry.frames :])
        wide = torch.promote_types(flow.dtype, torch.float32)
        error = (flow.to(wide) - target).square().mean(dim=(1, 3, 4))
        return (weight * error).sum()

    def weights_changed(self) -> None:
        self._quantised = self._module.quantised_weights()

    def first_bad(self, batch: Batch) -> str | None:
        inputs, *_ = self._prepared(self._excerpt(batch))
        return first_bad_node(self._program, self._module, self._program.kind, inputs)

    def _excerpt(self, batch: Batch) -> Batch:
        return excerpt(batch, self._program.geometry, self._gap)

    def _counted(self, batch: Batch) -> Tensor:
        """Which frames count, bool [B, F]."""
        frames = self._program.geometry.frames
        counted = torch.ones(len(batch.indices), frames, dtype=torch.bool)
        if "valid" in batch.tensors:
            counted &= batch.tensors["valid"].cpu()
        counted[:, 0] &= ~self._given(batch)
        return counted

    def _given(self, batch: Batch) -> Tensor:
        """For which clips the first latent frame is given, bool [B]."""
        return batch.uniform("image") < self._image

    def _prepared(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor, Given]:
        """For this rank's frames: the graph's inputs; the target ε − x₀, float32 [B, C, F, h, w];
        each frame's loss weight, float32 [B, F], 0 where it does not count. And for the whole
        clips: what they are given."""
        program, device = self._program, self._device
        clean = batch.tensors["latents"].to(device, torch.float32)
        _, channels, frames, height, width = clean.shape
        span = frames if program.kind == "reference" else program.geometry.chunk
        levels = batch.integers("level", LEVELS, frames // span)
        if program.kind == "score":
            levels = torch.where(self._given(batch)[:, None], levels, levels[:, :1])
        level, counted = levels.repeat_interleave(span, dim=1), self._counted(batch)
        weight = (self._weights[level] * counted).to(device)
        timestep = self._grid[level]
        timestep[self._given(batch), 0] = 0
        timestep = timestep.to(device)
        noise = batch.normal("noise", channels, frames, height, width, device=device)
        given = without_errors(clean, noise, levels, timestep / LEVELS, counted)
        if self.memory is not None and torch.is_grad_enabled():
            given = self.memory.inject(batch, given)
        values = {
            Role.LATENTS: given.noisy,
            Role.CLEAN: self._context(batch, given.context),
            Role.TIME: timestep,
            Role.TEXT: batch.tensors["text"],
            Role.POSITIONS: batch.tensors["positions"],
            Role.RANDOM: torch.tensor([batch.seed, batch.indices.start]),
        }
        target = given.target
        if self._joined:
            values = joined(values)
            target = torch.cat([torch.zeros_like(target), target], 2)
            weight = F.pad(weight, (weight.shape[1], 0))
        inputs = self._contract.named(values) | self._quantised
        share, contract = self._share, self._contract
        own = {
            name: share.own(inputs[name], spec.shape).to(device, spec.dtype)
            for name, spec in contract.inputs.items()
        }
        target = share.own(target, contract.input(Role.LATENTS).shape)
        return own, target, share.own(weight, contract.input(Role.TIME).shape), given

    def _context(self, batch: Batch, clean: Tensor) -> Tensor:
        """The clean chunks with noise of random levels, uniform from 0 to the largest."""
        if not self._context_noise:
            return clean
        chunks = self._program.geometry.chunks
        level = self._spread(self._context_noise * batch.uniform("context level", chunks))
        noise = batch.normal("context", *clean.shape[1:], device=clean.device)
        return (1 - level) * clean + level * noise

    @torch.no_grad()
    def _mistaken(self, batch: Batch, inputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """The clean chunks; some carry the error of the model's prediction from the noisy ones.

        The prediction x_s − s·v misses x₀ by s·(ε − x₀ − v). Chunks after a leap carry no error,
        since the chunks before them hardly tell the model what they should show.
        """
        timestep = inputs[self._contract.name(Role.TIME)]
        sigma = (timestep / LEVELS)[:, None, :, None, None]
        error = sigma * (target - self._flow(*inputs.values()))
        geometry = self._program.geometry
        follows = ~leaps(batch.tensors["positions"], geometry.chunk)
        share, size = batch.uniform("error", 2, geometry.chunks).unbind(1)
        chosen = (share < self._context_error) & follows & ~batch.tensors["opens"].cpu()
        clean = inputs[self._contract.name(Role.CLEAN)]
        batch_size, _, frames, _, _ = clean.shape
        sizes = self._spread(_LARGEST_ERROR * size * chosen)
        own = self._share.own(sizes, (batch_size, 1, frames, 1, 1))
        return (clean + own * error).to(clean.dtype)

    def _spread(self, values: Tensor) -> Tensor:
        """Values for chunks, [B, N], as values for their frames, [B, 1, F, 1, 1] on the device."""
        frames = values.repeat_interleave(self._program.geometry.chunk, dim=1)
        return frames.to(self._device)[:, None, :, None, None]
