"""The sizes that a Program is made for, and the rules they obey."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lltk.graph.spec import Spec

Kind = Literal["train", "score", "stream", "reference", "decode", "encode", "text"]

_LARGEST = 1 << 16
"""What any size may be; a larger one is a slip."""


class Geometry(BaseModel):
    """Sizes of a Program. Frames are latent frames. C, W and S stand for chunk, window, sink."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(1, ge=1, le=_LARGEST, description="clips that one call takes")
    height: int = Field(ge=1, le=_LARGEST, description="video height in pixels")
    width: int = Field(ge=1, le=_LARGEST, description="video width in pixels")
    chunk: int = Field(
        8, ge=1, le=_LARGEST, description="latent frames of a chunk, and of a page of the cache"
    )
    window: int = Field(
        32, ge=1, le=_LARGEST, description="latent frames that a chunk attends to, its own included"
    )
    sink: int = Field(
        8,
        ge=0,
        le=_LARGEST,
        description="latent frames of a sink, which are never evicted; 0 for no sinks",
    )
    shot_sink: bool = Field(True, description="whether the latest shot keeps a sink of its own")
    frames: int = Field(
        ge=1,
        le=_LARGEST,
        description="latent frames of a clip, by default 4 chunks; streams do not read it",
    )
    text_tokens: int = Field(512, ge=1, le=_LARGEST, description="tokens a prompt is padded to")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        chunk = data.get("chunk", 8) if isinstance(data, dict) else None
        if not isinstance(chunk, int):
            return data
        return {"window": 4 * chunk, "sink": chunk, "frames": 4 * chunk, **data}

    @model_validator(mode="after")
    def _fits(self) -> Geometry:
        sinks = 2 if self.shot_sink else 1
        room = (self.window - self.chunk) // sinks // self.chunk * self.chunk
        self._check_multiple("sink", least=0, most=max(room, 0))
        least = sinks * self.sink + self.chunk
        self._check_multiple("window", least=least)
        self._check_multiple("frames", least=self.chunk)
        if self.window < least:
            rule = "2*sink + chunk" if self.shot_sink else "sink + chunk"
            raise ValueError(
                f"geometry.window: {self.window} is less than {rule} = {least}; "
                f"the nearest that fit: window={least}, or sink={room}"
            )
        return self

    def _check_multiple(self, name: str, least: int, most: int | None = None) -> None:
        """Refuse a size that is no multiple of the chunk; names the nearest sizes that fit."""
        value = getattr(self, name)
        if value % self.chunk == 0:
            return
        below = value // self.chunk * self.chunk
        near = [size for size in (below, below + self.chunk) if size >= least]
        near = [size for size in near if most is None or size <= most]
        fits = " and ".join(str(size) for size in near or [least if most is None else most])
        raise ValueError(
            f"geometry.{name}: {value} latent frames is not a multiple of the chunk "
            f"({self.chunk}); the nearest that fit: {fits}"
        )

    @property
    def chunks(self) -> int:
        """Chunks of a clip."""
        return self.frames // self.chunk

    @property
    def pages(self) -> int:
        """Pages of the cache: as many as chunks in the window, the chunk in flight included."""
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
        """Latent frames of the captured forward. The train graph has them twice: clean, noisy."""
        if kind == "stream":
            return self.chunk
        return 2 * self.frames if kind == "train" else self.frames
