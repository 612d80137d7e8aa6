"""Video to latents, call by call: an encoder's graphs over its feature caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from lltk.graph.contract import Role
from lltk.graph.spec import EncoderSpec
from lltk.stream.handed_on import HandedOn, HandingOn, promptly
from lltk.stream.lanes import Lane
from lltk.stream.runtimes.cuda_graph import CudaGraphs
from lltk.stream.video import signal

if TYPE_CHECKING:
    from lltk.graph.module import ProgramModule
    from lltk.graph.program import Program


class Encoder:
    """Makes whole videos into latents.

    A video's first frame is encoded alone. After it come the frames of as many latents as graph
    ``steps`` makes, and then those that are left, latent by latent.

    Args:
        program: an encode Program.
        module: the same Program, runnable.
        cuda_graphs: whether the graphs that follow a video's first frame are recorded once, and
            then replayed.

    Raises:
        ValueError: the Program is for something else, or CUDA graphs where there is no GPU.
    """

    def __init__(self, program: Program, module: ProgramModule, cuda_graphs: bool = False) -> None:
        if not isinstance(program.model, EncoderSpec):
            raise ValueError(
                f"the program is for {program.kind}, not for encode; make one from a recipe with "
                "program: encode"
            )
        self._spec = program.model
        self._contracts = {name: program.contract(name) for name in program.graphs}
        self._module = module
        self._device = next(module.parameters()).device
        self._graphs = CudaGraphs(Lane(self._device), "cuda_graphs") if cuda_graphs else None
        self._prompt: dict[str, fx.Graph] = {}
        """The graphs that hand caches on as soon as they are made, once they have run."""

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The latents of a video.

        Args:
            video: [B, 3, 1 + k·stride, H, W], in [-1, 1] or as uint8, on any device: it is moved
                and made a `signal` part by part.

        Returns:
            Normalised latents [B, z, 1 + k, h, w] on the encoder's device, float32, or float64
            where the Program computes in it.

        Raises:
            ValueError: the video is of another size, or no whole number of latents.
        """
        batch, channels, _, *sides = self._contracts["first"].input(Role.VIDEO).shape
        stride = self._spec.stride[0]
        if video.dim() != 5 or video.shape[2] % stride != 1 or (
            (*video.shape[:2], *video.shape[3:]) != (batch, channels, *sides)
        ):  # fmt: skip
            raise ValueError(
                f"video: {tuple(video.shape)} is not [{batch}, {channels}, 1 + k·{stride}, "
                f"{sides[0]}, {sides[1]}]; encode what the program was captured for"
            )
        caches: dict[str, Tensor] = {}
        latents, parts = [], self.parts(video.shape[2])
        frames = video.split([count for _, count in parts], dim=2)
        for (graph, _), part in zip(parts, frames, strict=True):
            made, caches = self._encoded(graph, part, caches)
            latents.append(made)
        return torch.cat(latents, dim=2)

    @torch.no_grad()
    def encode_part(self, video: Tensor, handed: HandedOn) -> Tensor:
        """The latents of some consecutive frames of a video, whose caches other ranks have.

        Args:
            video: the frames of as many latents as one graph makes, [B, 3, n, H, W], on any device.
                The part that the video begins with may have the first frame before them.
            handed: where the caches before these frames come from, and those after them go to.

        Returns:
            As `encode` gives them.
        """
        caches: dict[str, Tensor] = {}
        latents, parts = [], self.parts(video.shape[2], handed.begins)
        *own, last = video.split([count for _, count in parts], dim=2)
        for (graph, _), part in zip(parts, own, strict=False):
            made, caches = self._encoded(graph, part, caches)
            latents.append(made)
        graph = parts[-1][0]
        assert handed.begins or len(parts) == 1, "a part is what one graph encodes"
        if graph not in self._prompt:
            found = self._module.program.graphs[graph]
            self._prompt[graph] = promptly(found, self._spec.cache_outputs)
        contract = self._contracts[graph]
        given = caches | contract.named({Role.VIDEO: self._given(last)})
        run = HandingOn(self._module, self._prompt[graph], given, contract.inputs, handed)
        latents.append(run.run()[self._spec.output])
        return torch.cat(latents, dim=2)

    def parts(self, frames: int, begins: bool = True) -> list[tuple[str, int]]:
        """The graphs that encode so many frames in turn, and how many each reads.

        Args:
            frames: of a video or a part of one.
            begins: whether the video's first frame is among them.
        """
        parts, left = ([("first", 1)], frames - 1) if begins else ([], frames)
        for graph in ("steps", "step"):
            if graph in self._contracts:
                size = self._contracts[graph].input(Role.VIDEO).shape[2]
                parts += [(graph, size)] * (left // size)
                left %= size
        return parts

    def _encoded(
        self, graph: str, video: Tensor, caches: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents of one of `parts`, and the caches after it.

        Args:
            graph: of the part.
            video: its frames.
            caches: those before it. The call empties the dict, so that each cache is freed once it
                is read: there is memory for one set of caches.
        """
        spec = self._spec
        caches |= self._contracts[graph].named({Role.VIDEO: self._given(video)})
        result = self._run(graph, caches)
        names = zip(spec.cache_inputs, spec.cache_outputs, strict=True)
        return result[spec.output], {read: result[given] for read, given in names}

    def _given(self, video: Tensor) -> Tensor:
        """Some frames as graphs take them; compilers tell strides apart."""
        return signal(video.to(self._device)).contiguous()

    def _run(self, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if graph == "first" or self._graphs is None:
            return self._module(graph, given)
        return self._graphs(graph, lambda inputs: self._module(graph, dict(inputs)), given)
