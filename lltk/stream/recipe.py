"""What a recipe says about streaming."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lltk.graph.recipe import validated
from lltk.stream.script import SCENE_CUT

Dtype = Literal["bfloat16", "float16", "float32"]
_DEVICE = r"cpu|cuda(:\d+)?"
EVERY_RANK = "ranks"
"""In the place of a decoder's device: every rank decodes a part of the columns on its own."""


def _named(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    names = [value] if isinstance(value, str) else value
    if names is not None and not (names and all(re.fullmatch(_DEVICE, name) for name in names)):
        raise ValueError(f"device: {value!r} names none; write cpu, cuda, or one GPU as cuda:1")
    return value


def _decoding(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    return value if value == EVERY_RANK else _named(value)


class TextSection(BaseModel):
    """Where prompts are encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Annotated[str | None, AfterValidator(_named)] = Field(
        None, description="where the encoder runs; null: with the rest"
    )
    after: Literal["keep", "offload", "free"] = Field(
        "free", description="what becomes of the encoder once a script's prompts are encoded"
    )
    cache: str | None = Field(None, description="folder that keeps embeddings; null keeps none")


class DecoderSection(BaseModel):
    """How latents become frames."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str | None = Field(
        None, description="a named configuration, to plan without the pipeline's files"
    )
    dtype: Dtype = Field("float32", description="compute dtype")
    device: Annotated[str | tuple[str, ...] | None, AfterValidator(_decoding)] = Field(
        None,
        description="where it runs, null: with the rest; several devices share a frame's columns, "
        "and so do all ranks where it says ranks",
    )
    passes: list[str | dict[str, dict[str, Any] | None]] | None = Field(
        None,
        description="as a recipe's passes; null: canonicalise, and on a CPU what it gains by",
    )
    latents: int = Field(
        1, ge=1, description="latents that are decoded at once where so many are at hand"
    )
    compile: bool = Field(
        False,
        description="whether steady decoding is compiled: on a GPU while the first chunk is made, "
        "else the second latent waits",
    )
    cuda_graphs: bool = Field(
        False,
        description="whether steady decoding is recorded and replayed, at the cost of memory",
    )


class ServeSection(BaseModel):
    """What ``lltk serve`` makes of a stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    codec: Literal["h264", "vp9", "av1"] = Field(
        "h264", description="how live video and the videos of jobs are encoded"
    )


class StreamSection(BaseModel):
    """The ``stream`` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    pipeline: str = Field(
        description="folder with transformer, vae, text_encoder and tokenizer, or a shipped one's "
        "name"
    )
    fps: float = Field(ge=1, le=1000, description="video frames a second")
    steps: int = Field(4, ge=1, le=1000, description="denoising passes a chunk")
    shift: float = Field(5.0, gt=0, description="above 1 for more time at high noise")
    guidance: float = Field(
        1.0, description="g of u + g·(c − u); 1 for none, else a second cache is kept"
    )
    negative_prompt: str = Field("", description="u's prompt")
    scene_cut: str = Field(
        SCENE_CUT, description="precedes the caption in the first chunk after a cut"
    )
    shot_offset: float = Field(
        0.0, description="φ: RoPE positions skipped at a cut, in latent frames"
    )
    recache: bool = Field(
        False, description="whether a prompt switch within a shot renews the cache"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the noise")
    compile: bool = Field(
        False, description="whether the transformer's blocks are compiled; the first chunks wait"
    )
    cuda_graphs: bool = Field(
        False, description="whether the transformer's passes are recorded and replayed (GPUs)"
    )
    text: TextSection = Field(TextSection.model_validate({}), description="prompts")
    decoder: DecoderSection = Field(DecoderSection.model_validate({}), description="frames")
    serve: ServeSection = Field(ServeSection.model_validate({}), description="for lltk serve")


def stream_section(data: Mapping[str, Any] | None, where: str) -> StreamSection:
    """The ``stream`` section of a recipe; ``where`` is named in errors.

    Raises:
        ValueError: there is none, or unknown or misfit keys; names the key and the nearest.
    """
    if data is None:
        raise ValueError(f"{where}: has no stream section; add one with at least pipeline and fps")
    return validated(StreamSection, data, f"{where}: stream")
