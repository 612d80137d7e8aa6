"""What a recipe says about training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lltk.graph.recipe import explain


class DataSection(BaseModel):
    """Which clips."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    world: Literal["tiny"] = Field("tiny", description="tiny: procedural clips of moving shapes")
    folder: str | None = Field(
        None, description="captioned clips to train on in the place of the world's: a folder"
    )
    fps: float = Field(24.0, gt=0, description="video frames a second that its clips are read at")
    shots: int = Field(
        1, ge=1, description="most shots a clip; in the world their number is uniform from 1"
    )
    clips: int | None = Field(
        None, ge=1, description="clips, encoded once; null: new ones every step"
    )
    frames: int | None = Field(
        None,
        ge=1,
        description="latent frames a clip, of which a sample shows some chunks, as a stream sees "
        "them late in a video; null: as many as the model trains on",
    )
    pipeline: str | None = Field(
        None, description="folder with vae, text_encoder and tokenizer, which make latents and text"
    )


class TrainSection(BaseModel):
    """The ``train`` section of a recipe. A step is one update of the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSection = Field(DataSection.model_validate({}), description="which clips")
    steps: int = Field(ge=1, description="updates of the weights")
    batch: int = Field(
        1, ge=1, description="clips a step; what exceeds the clips of a call is accumulated"
    )
    lr: float = Field(gt=0, description="AdamW's learning rate, after the warm-up")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine falls to 0 at the last step"
    )
    warmup: int = Field(0, ge=0, description="steps over which the rate rises from 0")
    betas: tuple[float, float] = Field((0.0, 0.999), description="AdamW's")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    clip: float = Field(10.0, gt=0, description="largest norm of the gradient")
    ema_decay: float | None = Field(
        0.99, ge=0, lt=1, description="decay a step of the averaged weights; null for none"
    )
    ema_start: int = Field(100, ge=0, description="steps before averaging begins")
    image: float = Field(
        0.0, ge=0, le=1, description="share of clips whose first latent frame is given"
    )
    context_error: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the clean chunks that others see, of those that open no shot, that "
        "carry the model's own error",
    )
    context_noise: float = Field(
        0.0, ge=0, lt=1, description="largest noise level of the clean chunks that others see"
    )
    gap: float = Field(
        1.0, ge=1, description="most that a leap between chunks of a clip is longer in positions"
    )
    seed: int = Field(0, ge=0, description="of first weights, clips and noise")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    validate_every: int | None = Field(None, ge=1, description="steps between validations")
    sample_every: int | None = Field(None, ge=1, description="steps between samples")
    compile: bool = Field(False, description="compile the blocks")
    graphs: bool = Field(
        False, description="replay CUDA graphs: a GPU and one call a step; for small models"
    )
    recompute: bool = Field(False, description="recompute each block in the backward pass")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 + math.cos(math.pi * done)) / 2

    def calls(self, clips: int) -> int:
        """Calls a step.

        Args:
            clips: clips of a call.

        Raises:
            ValueError: they do not divide the batch (names the nearest batches), or are not all of
                it where graphs are replayed.
        """
        calls, rest = divmod(self.batch, clips)
        if rest:
            near = [str(clips * n) for n in (calls, calls + 1) if n]
            raise ValueError(
                f"train.batch: {self.batch} clips a step are not a multiple of the {clips} of a "
                f"call; the nearest that fit: {' and '.join(near)}"
            )
        if self.graphs and calls > 1:
            raise ValueError(
                f"train.graphs: replays one call a step, and a batch of {self.batch} takes {calls} "
                f"of {clips} clips; train {clips} a step, or drop it"
            )
        return calls


MAY_CHANGE = ("steps", "checkpoint_every", "keep", "validate_every", "sample_every")
"""Keys of the train section that a resumed run may change."""


class VaeSection(BaseModel):
    """The ``vae`` section of a recipe that trains an autoencoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str | dict[str, Any] = Field(
        description="a named configuration, or AutoencoderKLWan's arguments"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="it runs in this; what trains is float32"
    )
    frames: int = Field(ge=1, description="video frames of a clip, 1 + 4·k")
    batch: int = Field(1, ge=1, description="clips a call")
    kl: float = Field(1e-6, ge=0, description="weight of the latents' KL divergence")
    edges: float = Field(1.0, ge=0, description="weight of the difference of edges")

    @field_validator("frames")
    @classmethod
    def _whole_latents(cls, frames: int) -> int:
        if frames % 4 != 1:
            below = (frames - 1) // 4 * 4 + 1
            raise ValueError(
                f"vae.frames: {frames} video frames are not 1 + 4·k; the nearest that fit: "
                f"{below} and {below + 4}"
            )
        return frames


class VaeRecipe(BaseModel):
    """A recipe that trains an autoencoder; there is no Program in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vae: VaeSection
    train: TrainSection


R = TypeVar("R", bound=BaseModel)


def train_section(data: Mapping[str, Any] | None, where: str) -> TrainSection:
    """The ``train`` section of a recipe; ``where`` is named in errors.

    Raises:
        ValueError: there is none, or unknown or misfit keys; names the key and the nearest.
    """
    if data is None:
        raise ValueError(f"{where}: has no train section; add one with at least steps and lr")
    return _parsed(TrainSection, data, f"{where}: train")


def vae_recipe(data: Mapping[str, Any], where: str) -> VaeRecipe:
    """Check plain data as a recipe that trains an autoencoder; errors as `train_section`'s."""
    return _parsed(VaeRecipe, data, where)


def _parsed(model: type[R], data: Mapping[str, Any], where: str) -> R:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error, model)}") from error
