"""What a session tells of each chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lltk.stream.chunks import Chunk


@dataclass(frozen=True)
class ChunkReport:
    """What became of one chunk.

    Attributes:
        chunk: what it was made from, and the receipts of the events that act from it.
        latents: float32 [B, C, F, h, w], clean.
        pages: how many pages it attended to, besides itself.
        seconds: wall time of the session's thread, from its beginning to its commit.
        text: of these, encoding its prompt.
        graphs: of these, in the transformer's graphs: ``prologue``, ``step``, ``commit``,
            ``recache``; on a GPU the device's time.
        waited: of these, until the decoder had room and it was this session's turn.
        decoding: seconds in other threads since the report before: ``decode`` in the decoder's
            graphs, ``deliver`` in the sink.
    """

    chunk: Chunk
    latents: Tensor
    pages: int
    seconds: float
    text: float
    graphs: Mapping[str, float]
    waited: float
    decoding: Mapping[str, float]

    @property
    def outside(self) -> float:
        """Seconds that the session's thread spent neither in a model nor waiting."""
        return self.seconds - self.text - sum(self.graphs.values()) - self.waited
