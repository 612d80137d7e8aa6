"""Video to latents, call by call: an encoder's graphs over its feature caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lltk.graph.contract import Role
from lltk.graph.spec import EncoderSpec
from lltk.stream.lanes import Lane
from lltk.stream.runtimes.cuda_graph import CudaGraphs

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
        self._inputs = {name: program.contract(name).input(Role.VIDEO) for name in program.graphs}
        self._video = program.contract("first").name(Role.VIDEO)
        self._module = module
        self._device = next(module.parameters()).device
        self._graphs = CudaGraphs(Lane(self._device), "cuda_graphs") if cuda_graphs else None

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The latents of a video.

        Args:
            video: [B, 3, 1 + k·stride, H, W] in [-1, 1], on any device: it is moved part by part.
                B is any multiple of the Program's batch; as many clips are encoded at a time.

        Returns:
            Normalised latents [B, z, 1 + k, h, w] on the encoder's device, float32, or float64
            where the Program computes in it.

        Raises:
            ValueError: the video is of another size, or no whole number of latents.
        """
        batch, channels, _, *sides = self._inputs["first"].shape
        stride = self._spec.stride[0]
        fits = video.dim() == 5 and len(video) and len(video) % batch == 0
        if not fits or video.shape[1] != channels or list(video.shape[3:]) != sides or (
            video.shape[2] % stride != 1
        ):  # fmt: skip
            raise ValueError(
                f"video: {tuple(video.shape)} is not [k·{batch}, {channels}, 1 + k·{stride}, "
                f"{sides[0]}, {sides[1]}]; encode what the program was captured for"
            )
        return torch.cat([self._encoded(clips) for clips in video.split(batch)])

    def parts(self, frames: int) -> list[tuple[str, int]]:
        """The graphs that encode a video of so many frames in turn, and how many each reads."""
        sizes, made = [("first", 1)], 1
        for graph in [name for name in ("steps", "step") if name in self._inputs]:
            size = self._inputs[graph].shape[2]
            count = (frames - made) // size
            sizes += [(graph, size)] * count
            made += count * size
        return sizes

    def _encoded(self, video: Tensor) -> Tensor:
        spec, caches = self._spec, dict[str, Tensor]()
        names = list(zip(spec.cache_inputs, spec.cache_outputs, strict=True))
        latents, begun = [], 0
        for graph, frames in self.parts(video.shape[2]):
            part = video[:, :, begun : begun + frames]
            begun += frames
            caches[self._video] = part.to(self._device).contiguous()
            result = self._run(graph, caches)
            latents.append(result[spec.output])
            caches = {read: result[given] for read, given in names}
        return torch.cat(latents, dim=2)

    def _run(self, graph: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if graph == "first" or self._graphs is None:
            return self._module(graph, given)
        return self._graphs(graph, lambda inputs: self._module(graph, dict(inputs)), given)
