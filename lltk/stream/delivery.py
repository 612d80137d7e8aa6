"""A session's latents on their way to its sink, as video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor

from lltk.stream.decode_pipeline import DecodePipeline
from lltk.stream.decoder import DecoderState, LatentDecoder


@dataclass(frozen=True)
class DeliveryState:
    """What a delivery has done and still has to do.

    Attributes:
        latents: how many latent frames were submitted.
        caches: the decoder's, before the first latents that are not decoded.
        undecoded: submitted latents that are not video yet, in order.
        undelivered: video that the sink has not taken, in order.
    """

    latents: int = 0
    caches: Mapping[str, Tensor] = field(default_factory=dict)
    undecoded: Sequence[Tensor] = ()
    undelivered: Sequence[Tensor] = ()


class Delivery:
    """Decodes a session's latents, delivers their video and knows which frame is next.

    A context manager: within its block it works, and leaving the block waits for the last frames,
    or with an error drops what has not begun.

    Args:
        decoder: for this delivery alone.
        sink: takes the video of latents as they are decoded; see `DecodePipeline`.
        stride: video frames a latent frame.
    """

    def __init__(self, decoder: LatentDecoder, sink: Callable[[Tensor], None], stride: int) -> None:
        self._decoder = decoder
        self._stride = stride
        overlap = decoder.device.type != "cpu"
        self._pipeline = DecodePipeline(decoder, sink, overlap=overlap)
        self._restored = DeliveryState()
        """What the block has to do first."""
        self._latents = 0

    @property
    def latents(self) -> int:
        """How many latent frames were submitted."""
        return self._latents

    @property
    def frame(self) -> int:
        """The video frame that the sink is to take next; ask at rest."""
        undecoded = (*self._restored.undecoded, *self._pipeline.latents)
        waiting = (*self._restored.undelivered, *self._pipeline.videos)
        decoded = self._frames(self._latents - sum(part.shape[2] for part in undecoded))
        return decoded - sum(part.shape[2] for part in waiting)

    @property
    def undelivered(self) -> int:
        """How many video frames of the submitted latents the sink has not taken; ask at rest."""
        return self._frames(self._latents) - self.frame

    def _frames(self, latents: int) -> int:
        """Video frames of a video's first latents."""
        return max(0, (latents - 1) * self._stride + 1)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds so far in the decoder's graphs, ``decode``, and in the sink, ``deliver``."""
        return self._pipeline.seconds

    @property
    def has_room(self) -> bool:
        """Whether `wait_for_room` would not wait."""
        return self._pipeline.has_room

    def wait_for_room(self) -> None:
        """Wait until the decoder has room for more latents; raises as `submit`."""
        self._pipeline.wait_for_room()

    def submit(self, latents: Tensor) -> None:
        """Queue latents, [B, C, F, h, w], once the decoder has room; they must not change.

        Raises:
            Exception: what decoding or the sink raised for earlier latents.
        """
        assert not self._restored.undecoded and not self._restored.undelivered, (
            "a restored session is iterated within its block"
        )
        self._pipeline.submit(latents.to(self._decoder.device))
        self._latents += latents.shape[2]

    def rest(self) -> None:
        """Wait until what was submitted is video that the sink has taken, or until one fails."""
        self._pipeline.rest()

    def close(self) -> None:
        """Wait for the last frames; raises what decoding or the sink raised."""
        self._pipeline.close()

    def state(self) -> DeliveryState:
        """What it has done and still has to do; waits until it is at rest.

        Raises:
            ValueError: decoding failed within a latent.
        """
        self._pipeline.rest()
        return DeliveryState(
            self._latents,
            self._decoder.state.caches,
            [*self._restored.undecoded, *self._pipeline.latents],
            [*self._restored.undelivered, *self._pipeline.videos],
        )

    def restore(self, state: DeliveryState) -> None:
        """Go on from a `state`, before anything is submitted; the block begins with what is left.

        Raises:
            ValueError: the caches are another decoder's.
        """
        self._decoder.state = DecoderState(state.caches)
        self._latents, self._restored = state.latents, state

    def __enter__(self) -> Delivery:
        device, restored = self._decoder.device, self._restored
        if device.type == "cuda":  # whose decoder compiles and loads kernels as they first run
            self._pipeline.warm_up()
        self._restored = DeliveryState()
        for video in restored.undelivered:
            self._pipeline.deliver(video.to(device))
        if restored.undecoded:
            self._pipeline.submit(*(part.to(device) for part in restored.undecoded))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipeline.__exit__(kind, error, trace)
