"""Decoders that share a video's columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lltk.parallel.groups import FRAMES, gathered
from lltk.stream.decoder import Decoder, DecoderState, no_video
from lltk.stream.lanes import Lane


def column_cache(index: int, name: str) -> str:
    """The name of a decoder's cache in the state of a `ColumnDecoder`."""
    return f"{index}.{name}"


class ColumnDecoder:
    """Decoders that make a part of a video's columns each, on devices of their own, at once.

    Args:
        decoders: from the left column to the right. Each takes whole latents.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self._decoders = decoders

    @property
    def device(self) -> torch.device:
        """Where it takes latents and gives video: the first decoder's device."""
        return self._decoders[0].device

    @property
    def lane(self) -> Lane:
        """Where decoding takes turns: the first decoder's lane."""
        return self._decoders[0].lane

    @property
    def state(self) -> DecoderState:
        """All decoders' states, their caches under ``0.cache_0`` and so on; see `Decoder.state`."""
        return DecoderState(
            {
                column_cache(index, name): cache
                for index, decoder in enumerate(self._decoders)
                for name, cache in decoder.state.caches.items()
            }
        )

    @state.setter
    def state(self, state: DecoderState) -> None:
        for index, decoder in enumerate(self._decoders):
            start = column_cache(index, "")
            own = {n.removeprefix(start): c for n, c in state.caches.items() if n.startswith(start)}
            decoder.state = DecoderState(own)

    def parts(self, latents: Tensor, first: bool) -> list[Tensor]:
        """See `Decoder.parts`."""
        return self._decoders[0].parts(latents, first)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Decoder.decode`."""
        parts = [decoder.decode(latents.to(decoder.device)) for decoder in self._decoders]
        return torch.cat([part.to(self.device) for part in parts], dim=-1)

    def warm_up(self) -> None:
        """See `LatentDecoder.warm_up`."""
        for decoder in self._decoders:
            decoder.warm_up()


class RankDecoder:
    """A rank's decoder of a part of a video's columns. Rank 0 gathers the parts of all ranks.

    All ranks decode the same latents in the same order. In the other ranks the video is empty.

    Args:
        decoder: makes this rank's columns.
        columns: how many each rank makes, from left to right.
    """

    def __init__(self, decoder: Decoder, columns: Sequence[int]) -> None:
        self._decoder = decoder
        self._columns = columns

    @property
    def device(self) -> torch.device:
        """This rank's."""
        return self._decoder.device

    @property
    def lane(self) -> Lane:
        """Where this rank's decoding takes turns."""
        return self._decoder.lane

    @property
    def state(self) -> DecoderState:
        """This rank's part; see `Decoder.state`."""
        return self._decoder.state

    @state.setter
    def state(self, state: DecoderState) -> None:
        self._decoder.state = state

    def parts(self, latents: Tensor, first: bool) -> list[Tensor]:
        """See `Decoder.parts`."""
        return self._decoder.parts(latents, first)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Decoder.decode`; all ranks must call it."""
        own = self._decoder.decode(latents)
        parts = gathered(own, [(*own.shape[:-1], width) for width in self._columns], FRAMES)
        return torch.cat(parts, dim=-1) if parts else no_video(own)

    def warm_up(self) -> None:
        """See `LatentDecoder.warm_up`."""
        self._decoder.warm_up()
