"""Latents to video, call by call: a decoder's graphs over its feature caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lltk.graph.contract import Contract, Role, TensorSpec
from lltk.graph.spec import DecoderSpec
from lltk.stream.lanes import Lane
from lltk.stream.runtimes.cuda_graph import CudaGraphs

if TYPE_CHECKING:
    from lltk.graph.module import ProgramModule
    from lltk.graph.program import Program


@dataclass(frozen=True)
class DecoderState:
    """What a decoder remembers of the latents so far: plain tensors, which any format can save.

    Attributes:
        caches: feature caches by the names under which the ``step`` graph reads them; none before
            a video's first latent.
    """

    caches: Mapping[str, Tensor] = field(default_factory=dict)


class LatentDecoder(Protocol):
    """Makes the latents of one video into frames, in any split of calls."""

    state: DecoderState

    @property
    def device(self) -> torch.device:
        """Where it takes latents."""

    @property
    def lane(self) -> Lane:
        """Where decoders over the same weights take turns: a call decodes within one turn."""

    def parts(self, latents: Tensor, first: bool) -> list[Tensor]:
        """Split latents, [B, z, n, h, w], into what one graph decodes at once.

        Args:
            latents: of consecutive frames.
            first: whether they begin the video.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Video of the next latents."""

    def warm_up(self) -> None:
        """Decode zeros, so that kernels are compiled and loaded before the first video needs them.

        The state stays as it is.
        """


def no_video(like: Tensor) -> Tensor:
    """What a rank makes of latents whose video another rank has: [B, 3, 0, 0, 0]."""
    return like.new_empty((len(like), 3, 0, 0, 0))


class DecodedElsewhere:
    """Stands for the decoder in a rank whose latents another rank decodes: its video is empty."""

    def __init__(self, device: torch.device) -> None:
        self.state = DecoderState()
        self.lane = Lane(device)

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self.lane.device

    def parts(self, latents: Tensor, first: bool) -> list[Tensor]:
        return [latents]

    def decode(self, latents: Tensor) -> Tensor:
        """No frames."""
        return no_video(latents)

    def warm_up(self) -> None:
        """Nothing to do."""


class GraphDecoder(ABC):
    """Runs a decoder's graphs over their feature caches; see `LatentDecoder`.

    Args:
        spec: of the decoder.
        contracts: of its graphs, by name.
        lane: where the calls take turns.
    """

    def __init__(self, spec: DecoderSpec, contracts: Mapping[str, Contract], lane: Lane) -> None:
        self._spec = spec
        self._contracts = contracts
        self._latents = contracts["first"].input(Role.LATENTS)
        inputs = contracts["step"].inputs
        self._caches = {name: inputs[name] for name in spec.cache_inputs}
        steady = contracts.get("steps", contracts["step"])
        self._several = steady.input(Role.LATENTS).shape[2]
        self._held: dict[str, Tensor] | None = {}  # caches; None where decoding failed
        self.lane = lane
        self._warm = False

    @abstractmethod
    def _run(self, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a graph. It may empty the inputs, to free each once it is read."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.lane.device

    @property
    def state(self) -> DecoderState:
        """The state after the latents so far. Later calls do not change its tensors.

        Raises:
            ValueError: a call failed, for which the caches before it were given up.
        """
        if self._held is None:
            raise ValueError(
                "decoder: it failed at a latent, and its caches are gone; go on from a state that "
                "was saved before"
            )
        return DecoderState(dict(self._held))

    @state.setter
    def state(self, state: DecoderState) -> None:
        caches = state.caches
        if caches and caches.keys() != self._caches.keys():
            raise ValueError(
                f"state: caches {', '.join(caches)} are not this program's, "
                f"{', '.join(self._caches)}; restore a state of the same decoder"
            )
        for name, cache in caches.items():
            found, wanted = TensorSpec.of(cache), self._caches[name]
            if found != wanted:
                raise ValueError(
                    f"state: {name} is {found.dtype} {found.shape}, not {wanted.dtype} "
                    f"{wanted.shape}; restore a state of the same decoder and resolution"
                )
        self._held = {n: c.to(self.device) for n, c in caches.items()}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video of the next latents.

        Args:
            latents: [B, z, n, h, w] with any n ≥ 1, normalised, on the decoder's device.

        Returns:
            [B, 3, n·stride, H, W] in [-1, 1]; a video's first latent is one frame, not ``stride``.

        Raises:
            ValueError: the latents are of another shape.
        """
        batch, channels, _, *sides = self._latents.shape
        if latents.dim() != 5 or latents.shape[2] < 1 or (
            latents.shape[:2] != (batch, channels) or latents.shape[3:] != tuple(sides)
        ):  # fmt: skip
            raise ValueError(
                f"latents: {tuple(latents.shape)} is not [{batch}, {channels}, n, "
                f"{sides[0]}, {sides[1]}] with n ≥ 1; decode what the program was captured for"
            )
        video = [self._decode(part) for part in self.parts(latents, not self.state.caches)]
        return torch.cat(video, dim=2)

    def parts(self, latents: Tensor, first: bool) -> list[Tensor]:
        """See `LatentDecoder.parts`.

        A video's first latent is alone. After it come groups of as many as graph ``steps`` takes,
        and then those that are left, one by one.
        """
        opening = int(first)
        together = (latents.shape[2] - opening) // self._several * self._several
        alone = latents.shape[2] - opening - together
        sizes = [1] * opening + [self._several] * (together // self._several) + [1] * alone
        return list(latents.split(sizes, dim=2))

    def warm_up(self) -> None:
        """See `LatentDecoder.warm_up`; a second call does nothing."""
        if self._warm:
            return
        batch, channels, _, *sides = self._latents.shape
        # The graph of most calls runs twice: its second call reads the caches that its first made,
        # and their layout in memory may differ from that of the caches which the first read.
        count = 1 + 2 * self._several + int(self._several > 1)
        size = (batch, channels, count, *sides)
        zeros = torch.zeros(size, dtype=self._latents.dtype, device=self.device)
        caches: dict[str, Tensor] = {}
        for part in self.parts(zeros, first=True):
            _, caches = self._decoded(part, caches)
        self._warm = True

    def _decode(self, latents: Tensor) -> Tensor:
        held, self._held = dict(self.state.caches), None
        video, self._held = self._decoded(latents, held)
        return video

    @torch.no_grad()
    def _decoded(
        self, latents: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode one of `parts`: its video, and the caches after it.

        Args:
            latents: of the part.
            caches: those before it. The call empties the dict, so that each cache is freed once it
                is read: there is memory for one set of caches.
        """
        spec, begun = self._spec, bool(caches)
        steady = "step" if latents.shape[2] == 1 else "steps"
        graph = steady if begun else "first"
        if latents.is_cuda:
            _record(caches, torch.cuda.current_stream(latents.device))
        # Compilers tell strides apart.
        caches |= self._contracts[graph].named({Role.LATENTS: latents.contiguous()})
        result = self._run(graph, caches)
        names = zip(spec.cache_inputs, spec.cache_outputs, strict=True)
        return result[spec.output], {read: result[given] for read, given in names}


class Decoder(GraphDecoder):
    """Runs a decode Program; see `LatentDecoder`.

    Args:
        program: a decode Program.
        module: the same Program, runnable; decoders may share it.
        cuda_graphs: whether the graphs that follow a video's first latent are recorded once, and
            then replayed.
        lane: where the calls take turns; by default a lane for this decoder alone.

    Raises:
        ValueError: the Program is for something else, or CUDA graphs where there is no GPU.
    """

    def __init__(
        self,
        program: Program,
        module: ProgramModule,
        cuda_graphs: bool = False,
        lane: Lane | None = None,
    ) -> None:
        if not isinstance(program.model, DecoderSpec):
            raise ValueError(
                f"the program is for {program.kind}, not for decode; make one from a recipe with "
                "program: decode"
            )
        contracts = {name: program.contract(name) for name in program.graphs}
        super().__init__(program.model, contracts, lane or decoder_lane(module))
        self._module = module
        option = "stream.decoder.cuda_graphs"
        self._graphs = CudaGraphs(self.lane, option) if cuda_graphs else None

    def _run(self, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if graph == "first" or self._graphs is None:
            return self._module(graph, given)
        return self._graphs(graph, lambda inputs: self._module(graph, dict(inputs)), given)


def decoder_lane(module: ProgramModule) -> Lane:
    """Where decoders over a module take turns; on a GPU on a stream beside the transformer's."""
    return Lane(next(module.parameters()).device, own_stream=True)


def _record(caches: Mapping[str, Tensor], stream: torch.cuda.Stream) -> None:
    """Keep the memory of caches until a stream has read them; they may be made on another."""
    for cache in caches.values():
        cache.record_stream(stream)
