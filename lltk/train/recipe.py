"""What a recipe says about training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lltk.graph.recipe import validated

_Beta = Annotated[float, Field(ge=0, lt=1)]


class LongLiveSection(BaseModel):
    """How LongLive-2.0 puts a folder's clips together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_chunks_per_shot: int = Field(
        0,
        ge=0,
        description="after so many chunks of one clip a second of it is left out, and what follows "
        "is a new shot with the same caption; 0: never",
    )
    allow_padding: bool = Field(
        False,
        description="whether a sample that its clips do not fill ends with its last frame, which "
        "does not count in the loss; if not, the sample is skipped",
    )
    min_latent_frames: int = Field(
        0,
        ge=0,
        description="where padding is allowed, samples of fewer latent frames before it are "
        "skipped",
    )
    single_clip: bool = Field(False, description="whether a sample has one clip only")

    @model_validator(mode="after")
    def _padding_is_allowed(self) -> LongLiveSection:
        if self.min_latent_frames and not self.allow_padding:
            raise ValueError(
                "train.data.longlive.min_latent_frames: bounds padding, which is not allowed; "
                "remove it, or set train.data.longlive.allow_padding=true"
            )
        return self


class DataSection(BaseModel):
    """The clips to train on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    world: Literal["tiny"] = Field("tiny", description="tiny: procedural clips of moving shapes")
    folder: str | None = Field(
        None, description="a folder of captioned clips to train on instead of the world's"
    )
    fps: float = Field(
        24.0, gt=0, description="video frames a second at which the folder's clips are read"
    )
    prompts: str | None = Field(
        None,
        description="distil from these prompts, without clips: a text file of a line a prompt, or "
        "a folder with caption/<sample>/<number>.json, whose captions are the shots of a video",
    )
    longlive: LongLiveSection | None = Field(
        None,
        description="read the folder as LongLive-2.0 does, each folder in it as one sample; {} for "
        "its defaults; null: samples begin at any place in any clip",
    )
    shots: int = Field(
        1,
        ge=1,
        description="most shots in a clip; a clip of the world has 1 to this many, all equally "
        "likely",
    )
    clips: int | None = Field(
        None,
        ge=1,
        description="encode this many clips once, before the first step, and train on them alone; "
        "null: new clips at every step",
    )
    prepared: str | None = Field(
        None,
        description="a folder in which lltk prepare has encoded these very clips; null: they are "
        "encoded before the first step",
    )
    frames: int | None = Field(
        None,
        ge=1,
        description="latent frames of a clip; where that is more than geometry.frames, a sample "
        "shows some chunks of the clip, as a stream sees them late in a video; null: as many as "
        "geometry.frames",
    )
    pipeline: str | None = Field(
        None,
        description="folder with the vae, text_encoder and tokenizer that make latents and text",
    )

    encoding: Literal["shared", "lookback", "whole"] = Field(
        "shared",
        description="how ranks that share a clip encode it: shared, no frame twice, each hands on "
        "what the encoder looks back to; lookback, each its own part and, again, the frames that "
        "the encoder looks back to; whole, each all of it",
    )

    @model_validator(mode="after")
    def _prompts_alone(self) -> DataSection:
        others = ("folder", "clips", "prepared", "frames")
        if self.prompts is not None and (named := [k for k in others if getattr(self, k)]):
            raise ValueError(
                f"train.data.prompts: are instead of clips, and train.data.{named[0]} is about "
                "clips; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _longlive_reads_a_folder(self) -> DataSection:
        if self.longlive is not None and self.folder is None:
            raise ValueError(
                "train.data.longlive: says how a folder is read; name one in train.data.folder, or "
                "remove it"
            )
        if self.longlive is not None and self.shots != 1:
            raise ValueError(
                f"train.data.shots: {self.shots}, but by train.data.longlive all clips of a folder "
                "are shots of its sample; remove one of the two"
            )
        return self


class ErrorRecyclingSection(BaseModel):
    """Which errors of its predictions a model trains on again. The defaults are LongLive-2.0's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clean: float = Field(
        0.2, ge=0, le=1, description="share of the clips that carry no error; the others may"
    )
    latent: float = Field(
        0.9, ge=0, le=1, description="share of the others whose noised latents carry errors"
    )
    noise: float = Field(
        0.01, ge=0, le=1, description="share of the others whose noise carries errors"
    )
    context: float = Field(
        0.9, ge=0, le=1, description="share of the others whose clean chunks carry errors"
    )
    update: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the clips without errors of whose predictions the errors are kept; "
        "those of other clips always are",
    )
    scale: float = Field(
        0.3,
        ge=0,
        le=1,
        description="an error is multiplied by a random number, at most this far from 1",
    )
    buckets: int = Field(50, ge=1, le=1000, description="into which noise levels are divided")
    entries: int = Field(500, ge=1, description="most errors that are kept in a bucket")
    gigabytes: float = Field(
        16.0,
        gt=0,
        description="most memory of the host for all errors, on each rank; fewer are kept where "
        "that is less",
    )
    owners: int = Field(
        1,
        ge=1,
        description="into how many shares a clip's chunks are divided, each with errors of its own "
        "noise levels; what LongLive-2.0 does on so many ranks for a clip",
    )


class TrainSection(BaseModel):
    """The ``train`` section of a recipe. A step is one update of the weights.

    One forward and backward pass over ``geometry.batch`` clips is a call. A step makes as many
    calls as its batch needs, and adds up their gradients.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSection = Field(DataSection.model_validate({}), description="the clips to train on")
    from_scratch: bool = Field(
        False,
        description="whether random weights are trained where model.checkpoint names none",
    )
    steps: int = Field(ge=1, description="number of updates of the weights")
    batch: int = Field(
        1, ge=1, description="clips in a step; a multiple of the clips in a call (geometry.batch)"
    )
    optimiser: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="AdamW as torch has it, or with moments in 8 bits as torchao has it"
    )
    weights: Literal["float32", "compute"] = Field(
        "float32",
        description="what the optimiser updates: weights in float32, of which the model has copies "
        "in its compute dtype; or the model's own, which saves memory. Those in bfloat16 are then "
        "rounded stochastically, which takes adamw_8bit",
    )
    offload: bool = Field(
        False,
        description="keep the weights in float32, their gradients, AdamW's moments and the average "
        "in main memory, and update them there; the model has copies in its compute dtype",
    )
    lr: float = Field(gt=0, description="AdamW's learning rate, after the warm-up")
    schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="the learning rate after the warm-up; cosine falls to 0 at the last step",
    )
    warmup: int = Field(0, ge=0, description="steps in which the learning rate rises from 0")
    betas: tuple[_Beta, _Beta] = Field((0.0, 0.999), description="AdamW's betas")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    clip: float = Field(10.0, gt=0, description="largest norm of the gradient")
    ema_decay: float | None = Field(
        0.99,
        ge=0,
        lt=1,
        description="at each step the averaged weights keep this share of themselves and take the "
        "rest from the weights; null: nothing is averaged",
    )
    ema_start: int = Field(100, ge=0, description="steps before averaging begins")
    image: float = Field(
        0.0, ge=0, le=1, description="share of clips whose first latent frame is given"
    )
    context_error: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the clean chunks that carry the model's own error; chunks that open "
        "a shot never do",
    )
    context_noise: float = Field(
        0.0, ge=0, lt=1, description="largest noise level of the clean chunks"
    )
    error_recycling: ErrorRecyclingSection | None = Field(
        None,
        description="add errors of earlier predictions to the clean chunks and to what is noised, "
        "as LongLive-2.0 does; {} for its shares; null: none; not together with context_error",
    )
    gap: float = Field(
        1.0,
        ge=1,
        description="a sample that skips chunks of its clip leaps in its positions; the leap is "
        "longer than in the clip by a random number of latent frames, below this one; 1 adds none",
    )
    adapter: Literal["diffusers", "peft", "longlive"] = Field(
        "diffusers",
        description="how adapters are written at the end: as lora.safetensors for diffusers, as "
        "the folder lora for PEFT, or as lora.pt for LongLive, whose scale is 1",
    )
    seed: int = Field(
        0, ge=0, lt=1 << 63, description="seed of the first weights, the clips and the noise"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between training states")
    keep: int = Field(2, ge=1, description="how many of the newest training states are kept")
    validate_every: int | None = Field(
        None,
        ge=1,
        description="steps between validations, each over 16 samples of another seed; null: none",
    )
    sample_every: int | None = Field(None, ge=1, description="steps between samples; null: none")
    tensorboard: bool = Field(
        False, description="also write the metrics as TensorBoard reads them; needs tensorboardX"
    )
    compile: bool = Field(False, description="compile the transformer's blocks")
    graphs: bool = Field(
        False,
        description="replay CUDA graphs, which helps small models; needs a GPU and steps of one "
        "call",
    )
    shards: int = Field(
        1,
        ge=1,
        description="ranks among which weights, gradients and the optimiser's state are divided; "
        "it divides the number of ranks that torchrun starts",
    )
    recompute: bool = Field(
        False, description="recompute each block in the backward pass, which saves memory"
    )
    keep_attention: int = Field(
        0,
        ge=0,
        description="how many of the blocks that are recomputed, the last ones, keep the results "
        "of attention, which costs memory and saves time",
    )

    @model_validator(mode="after")
    def _optimiser_can_do_it(self) -> TrainSection:
        if self.weights == "compute" and self.optimiser == "adamw":
            raise ValueError(
                "train.weights: compute needs updates that are rounded stochastically, which adamw "
                "does not do; set train.optimiser=adamw_8bit, or train.weights=float32"
            )
        return self

    @model_validator(mode="after")
    def _offload_fits(self) -> TrainSection:
        kept = {"optimiser": "adamw", "weights": "float32", "shards": 1}
        wrong = [key for key, value in kept.items() if getattr(self, key) != value]
        if self.offload and wrong:
            raise ValueError(
                f"train.offload: keeps whole weights in float32 and AdamW's moments as torch has "
                f"them; set train.{wrong[0]}={kept[wrong[0]]}, or train.offload=false"
            )
        return self

    @model_validator(mode="after")
    def _errors_of_one_kind(self) -> TrainSection:
        if self.error_recycling is not None and self.context_error:
            raise ValueError(
                "train.error_recycling and train.context_error: both add errors to the clean "
                "chunks; set train.context_error=0, or train.error_recycling=null"
            )
        return self

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 + math.cos(math.pi * done)) / 2

    def calls(self, clips: int) -> int:
        """How many calls a step makes, on each rank.

        Args:
            clips: clips in a call, of all ranks together.

        Raises:
            ValueError: the batch is not a multiple of that (names the nearest batches), or a step
                makes more than one call although it should replay CUDA graphs.
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
                f"train.graphs: replays one call a step, but a batch of {self.batch} takes "
                f"{calls} calls of {clips} clips; let a call have as many by geometry.batch, or "
                f"set train.batch={clips} or train.graphs=false"
            )
        return calls


MAY_CHANGE = (
    "from_scratch", "steps", "checkpoint_every", "keep", "validate_every", "sample_every",
    "shards", "offload", "recompute", "keep_attention", "data.encoding", "data.prepared",
    "tensorboard", "adapter",
)  # fmt: skip
"""Keys of the train section that a resumed run may change."""
_SHOWN = 64
"""Characters of a value in an error."""
_OF_RANKS = ("balanced_sp", "ulysses_stream")
"""Passes that a resumed run may have or not: they say how many ranks share a clip."""


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The `differences` of two recipes that a resumed run may not have."""
    allowed = {f"train.{key}" for key in MAY_CHANGE}
    found = differences(_for_any_ranks(old), _for_any_ranks(new))
    return [each for each in found if each[0] not in allowed]


def _for_any_ranks(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, or a section of one, without what says how many ranks share a clip."""
    kept = {key: _for_any_ranks(v) if isinstance(v, dict) else v for key, v in recipe.items()}
    if isinstance(steps := kept.get("passes"), list):
        names = [next(iter(step)) if isinstance(step, dict) else step for step in steps]
        kept["passes"] = [
            step for step, name in zip(steps, names, strict=True) if name not in _OF_RANKS
        ]
    return kept


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The keys in which plain data differs, such as ``train.lr``, each with both its values."""
    for key in sorted(old.keys() | new.keys()):
        path, ours, theirs = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from differences(ours, theirs, f"{path}.")
        elif ours != theirs:
            yield path, ours, theirs


def in_words(found: Iterable[tuple[str, Any, Any]]) -> str:
    """What `differences` gave, such as ``train.lr was 0.1 and is 0.2``.

    Of long values only the place is shown where they begin to differ.
    """
    said = []
    for key, *values in found:
        texts = [str(value) for value in values]
        start = 0
        if max(map(len, texts)) > _SHOWN:
            pairs = enumerate(zip(*texts, strict=False))
            differing = next((n for n, (old, new) in pairs if old != new), min(map(len, texts)))
            start = max(0, differing - _SHOWN // 2)
        old, new = (_cut(text, start) for text in texts)
        said.append(f"{key} was {old} and is {new}")
    return "; ".join(said)


def _cut(text: str, start: int) -> str:
    """A part of a text, with marks where some is left out."""
    end = start + _SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if text[end:] else ''}"


class VaeSection(BaseModel):
    """The ``vae`` section of a recipe that trains an autoencoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str | dict[str, Any] = Field(
        description="the name of a configuration, or AutoencoderKLWan's arguments"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="the autoencoder computes in this dtype; its trained weights stay float32",
    )
    frames: int = Field(ge=1, description="video frames of a clip, 1 + 4·k")
    batch: int = Field(1, ge=1, description="clips in a call")
    kl: float = Field(1e-6, ge=0, description="weight of the latents' KL divergence in the loss")
    edges: float = Field(1.0, ge=0, description="weight of the difference of edges in the loss")

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
    """A recipe that trains an autoencoder. It has no Program."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vae: VaeSection
    train: TrainSection


def train_section(data: Mapping[str, Any] | None, where: str) -> TrainSection:
    """The ``train`` section of a recipe; errors begin with ``where``.

    Raises:
        ValueError: there is no section, a key is unknown (names the nearest), or a value does not
            fit.
    """
    if data is None:
        raise ValueError(f"{where}: has no train section; add one with at least steps and lr")
    return validated(TrainSection, data, f"{where}: train")


def vae_recipe(data: Mapping[str, Any], where: str) -> VaeRecipe:
    """A recipe that trains an autoencoder, from plain data; errors as `train_section`'s."""
    return validated(VaeRecipe, data, where)
