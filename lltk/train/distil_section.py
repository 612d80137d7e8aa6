"""What a recipe says about distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lltk.graph.recipe import validated

Passes = list[str | dict[str, dict[str, Any] | None]]


class ScoreSection(BaseModel):
    """A score network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str | None = Field(
        None, description="its weights, as model.checkpoint; null: those that the student begins on"
    )
    passes: Passes | None = Field(
        None,
        description="as a recipe's passes; null: those of a score program in the compute dtype, "
        "with the student's lora where the network trains",
    )


class CriticSection(ScoreSection):
    """The fake score, which learns the student's distribution."""

    lr: float = Field(
        gt=0, description="its learning rate, after the warm-up; the schedule is the student's"
    )
    updates: int = Field(5, ge=1, description="its updates for each of the student's")
    lead: int = Field(
        0,
        ge=0,
        description="its updates before the student's first, without a warm-up; so g tells of the "
        "student from the beginning on",
    )


class DistilSection(BaseModel):
    """The ``distil`` section of a recipe, by which a student learns few passes a chunk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[int, ...] = Field(
        (2,),
        description="numbers of denoising passes a chunk that the student learns; each clip that "
        "it trains on is made with one of them",
    )
    exit: Literal["any", "last"] = Field(
        "any",
        description="the pass at which chunks stop while the student trains: any, all equally "
        "likely, as LongLive-2.0 has it; or always the last, as where the student is used",
    )
    guidance: float = Field(
        4.0,
        description="g of u + g·(c − u) of the real score, 1 for none; u has "
        "stream.negative_prompt",
    )
    real: ScoreSection = Field(
        ScoreSection.model_validate({}), description="the network that knows the data"
    )
    fake: CriticSection = Field(description="the network that knows the student")

    @field_validator("steps")
    @classmethod
    def _different_ones(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or len(set(steps)) < len(steps) or not all(1 <= n <= 1000 for n in steps):
            raise ValueError(
                f"distil.steps: {list(steps)} are not different numbers of passes, from 1 to 1000; "
                "write such as [4, 2]"
            )
        return steps


def distil_section(data: Mapping[str, Any] | None, where: str) -> DistilSection:
    """The ``distil`` section of a recipe; errors begin with ``where``.

    Raises:
        ValueError: there is none, or unknown or misfit keys; names the key and the nearest.
    """
    if data is None:
        raise ValueError(f"{where}: has no distil section; add one with at least fake.lr")
    return validated(DistilSection, data, f"{where}: distil")
