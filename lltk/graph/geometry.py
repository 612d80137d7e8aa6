"""Sizes a Program is made for, and the rules they obey."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lltk.graph.spec import Spec

Kind = Literal["train", "score", "stream", "reference", "decode"]


class Geometry(BaseModel):
    """Sizes of a Program. Frames are latent frames; C, W, S stand for chunk, window, sink."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(1, ge=1, description="clips a call")
    height: int = Field(ge=1, description="video height in pixels")
    width: int = Field(ge=1, description="video width in pixels")
    chunk: int = Field(8, ge=1, description="latent frames a chunk (and a cache page)")
    window: int = Field(
        32, ge=1, description="latent frames attended, the chunk in flight included"
    )
    sink: int = Field(8, ge=0, description="latent frames never evicted; 0 for no sinks")
    shot_sink: bool = Field(True, description="whether the latest shot keeps a sink of its own")
    frames: int = Field(32, ge=1, description="latent frames of a clip (all but stream)")
    text_tokens: int = Field(512, ge=1, description="tokens a prompt is padded to")

    @model_validator(mode="after")
    def _fits(self) -> Geometry:
        for name in ("window", "sink", "frames"):
            value = getattr(self, name)
            if value % self.chunk:
                below = value // self.chunk * self.chunk
                above = below + self.chunk
                near = f"{below} and {above}" if below or name == "sink" else f"{above}"
                raise ValueError(
                    f"geometry.{name}: {value} latent frames is not a multiple of the chunk "
                    f"({self.chunk}); the nearest that fit: {near}"
                )
        sinks = self.sink * (2 if self.shot_sink and self.sink else 1)
        if self.window < sinks + self.chunk:
            rule = "2*sink + chunk" if self.shot_sink else "sink + chunk"
            room = self.window - self.chunk
            smaller = room // (2 if self.shot_sink else 1) // self.chunk * self.chunk
            raise ValueError(
                f"geometry.window: {self.window} is less than {rule} = {sinks + self.chunk}; "
                f"the nearest that fit: window={sinks + self.chunk}, or sink={max(smaller, 0)}"
            )
        return self

    @property
    def chunks(self) -> int:
        """Chunks of a clip."""
        return self.frames // self.chunk

    @property
    def pages(self) -> int:
        """Cache pages: the window in chunks, one of them for the chunk in flight."""
        return self.window // self.chunk

    def grid(self, spec: Spec) -> tuple[int, int]:
        """Tokens (down, across) of a latent frame.

        Raises:
            ValueError: the resolution is not a whole number of tokens.
        """
        sides = []
        for name, stride, patch in zip(
            ("height", "width"), spec.stride[1:], spec.patch[1:], strict=True
        ):
            size, unit = getattr(self, name), stride * patch
            if size % unit:
                below = max(size // unit, 1) * unit
                raise ValueError(
                    f"geometry.{name}: {size} pixels is not a multiple of {unit} (one token); "
                    f"the nearest that fit: {below} and {below + unit}"
                )
            sides.append(size // unit)
        return sides[0], sides[1]

    def latent(self, spec: Spec) -> tuple[int, int]:
        """Latent (height, width)."""
        down, across = self.grid(spec)
        return down * spec.patch[1], across * spec.patch[2]

    def frame_tokens(self, spec: Spec) -> int:
        """T: tokens of a latent frame."""
        down, across = self.grid(spec)
        return down * across

    def captured_frames(self, kind: Kind) -> int:
        """Latent frames of the captured forward: the train graph holds [clean; noisy]."""
        if kind == "stream":
            return self.chunk
        return 2 * self.frames if kind == "train" else self.frames
