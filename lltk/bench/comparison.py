"""Stream recipes of one model, compared with the first of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

from torch import Tensor

from lltk.bench.agreement import (
    encoded,
    interval,
    lasting,
    one_ahead,
    overlap,
    scored,
    scorers,
    summarise,
    videos,
)
from lltk.bench.layer_errors import OUTPUT, Model, layer_errors
from lltk.bench.quality import DISTANCES, draw_stories
from lltk.bench.record import Record, markdown
from lltk.graph.geometry import Geometry
from lltk.graph.module import instantiate
from lltk.models.tiny.world import RESOLUTION, Story
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.streaming import Plan, StreamPlan, open_runtime

SHOTS = 3
"""Shots in a film."""
CHUNKS = 6
"""Chunks in a shot of a film."""
_LONG_CHUNKS = 80
"""Chunks in a single shot of 60 s."""
_SEED = 30_000


@dataclass(frozen=True)
class Comparison:
    """What is compared, before anything streams.

    Attributes:
        plans: by name, of one model and geometry. The others are compared with the first.
        films: videos of `SHOTS` shots that each plan makes; their shots are scored.
        minutes: single shots of 60 s that each plan makes; their identity is followed.
    """

    plans: Sequence[tuple[str, Plan]]
    films: int
    minutes: int

    @property
    def method(self) -> str:
        """How the results are made, for a record."""
        scores = "; agreement and identity as benchmarks/quality.py has them, 95 % intervals"
        return (
            "Relative errors over the denoising passes of a video, both models seeing the latents "
            f"that the first makes ({self.plans[0][0]}). Captions drawn with a fixed seed, the "
            f"same for all{scores if self.films or self.minutes else ''}."
        )

    def results(self, workers: int, observe: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Compare each plan with the first. While its videos are scored, the next plan streams.

        Args:
            workers: how many processes score.
            observe: told which plan streams next, as ``comparing NAME``.

        Returns:
            Each plan's result for a `Record`. ``errors`` holds the relative error of each block and
            of the output. The fields of `Agreement` follow if there are films. ``minute`` holds
            those of `Lasting` if there are single shots.
        """
        with scorers(workers) as pool:

            def measured() -> Iterator[Callable[[], dict[str, Any]]]:
                for name, plan in self.plans:
                    observe(f"comparing {name}")
                    yield self._measure(name, plan, pool)

            for result in one_ahead(measured()):
                yield result()

    def _measure(self, name: str, plan: Plan, pool: Executor) -> Callable[[], dict[str, Any]]:
        """Make a plan's videos; the result waits for their scores."""
        geometry, base = plan.geometry, self.plans[0][1]
        stories = draw_stories(_SEED, max(self.films, 1), SHOTS, CHUNKS, geometry.chunk)
        pair = _model(base), _model(plan)
        text = encoded(base, _filled(stories, geometry.batch))
        errors = layer_errors(*pair, text, plan.section.steps, _SEED)
        del pair
        scores = [scored(pool, made, some) for made, some in _films(plan, stories[: self.films])]
        long = draw_stories(_SEED + 1, self.minutes, 1, _LONG_CHUNKS, geometry.chunk)
        kept = lasting(pool, [film for made, _ in _films(plan, long) for film in made])

        def result() -> dict[str, Any]:
            found = {
                "name": name,
                "errors": errors,
                "ran": dict(plan.implementations),
                "recipe": [{entry.name: entry.config} for entry in plan.log],
            }
            if self.films:
                found |= asdict(summarise([score for some in scores for score in some()]))
            if self.minutes:
                found["minute"] = asdict(kept())
            return found

        return result


def check_same(what: str, recipes: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse recipes whose values differ from the first one's.

    Args:
        what: the values' name in errors, such as ``geometry``.
        recipes: for each recipe its name and its values.

    Raises:
        ValueError: names the recipe and the keys that differ.
    """
    first, wanted = recipes[0]
    for name, found in recipes[1:]:
        differing = [
            f"{key} ({found.get(key)}, not {wanted.get(key)})"
            for key in {**wanted, **found}
            if found.get(key) != wanted.get(key)
        ]
        if differing:
            raise ValueError(
                f"{name}: {what}: differs from {first}'s in {', '.join(differing)}; name "
                "recipes of one model and geometry"
            )


def check_size(geometry: Geometry) -> None:
    """Refuse frames that the scorer of the tiny world cannot read.

    Raises:
        ValueError: their height or width is not the world's.
    """
    if (geometry.height, geometry.width) != (RESOLUTION, RESOLUTION):
        raise ValueError(
            f"geometry: frames of {geometry.width}×{geometry.height} are not the tiny world's, "
            f"{RESOLUTION}×{RESOLUTION}, and cannot be scored; compare errors alone: --shots 0 "
            "--minutes 0"
        )


def _model(plan: Plan) -> Model:
    """A plan's transformer. The blocks of a bundle are not seen."""
    if not isinstance(plan, StreamPlan):
        return Model(open_runtime(plan))
    module = instantiate(plan.transformer, plan.device)
    return Model(TorchRuntime(plan.transformer, module), module)


def _films(plan: Plan, stories: Sequence[Story]) -> Iterator[tuple[list[Tensor], Sequence[Story]]]:
    """The stories' videos, in batches of the plan's size, each with its stories."""
    batch = plan.geometry.batch
    for start in range(0, len(stories), batch):
        some = stories[start : start + batch]
        made = videos(plan, _filled(some, batch), plan.section.steps, _SEED + start)
        yield made[: len(some)], some


def _filled(stories: Sequence[Story], batch: int) -> list[Story]:
    """A whole batch of stories; too few are repeated."""
    return list(islice(cycle(stories), batch))


def error_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Errors by column: of the first, the last and the worst block, and of the output.

    Blocks are those that are seen in all; the columns are the output's alone if there are none.
    """
    return [_error_row(result, _seen(results)) for result in results]


def _error_row(result: Mapping[str, Any], seen: Sequence[str]) -> dict[str, str]:
    errors, blocks = result["errors"], [name for name in seen if name != OUTPUT]
    cells = {"recipe": result["name"]}
    if blocks:
        worst = max(blocks, key=errors.__getitem__)
        cells |= {name: _error(errors[name]) for name in (blocks[0], blocks[-1])}
        cells["worst block"] = f"{_error(errors[worst])} ({worst})"
    return cells | {OUTPUT: _error(errors[OUTPUT])}


def _seen(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The layers whose errors all results have, in order."""
    first, *others = (result["errors"] for result in results)
    return [name for name in first if all(name in other for other in others)]


def _error(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.4f}"


def quality_row(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe's shots show, by column; ``base`` is the first recipe's result."""
    return {
        "recipe": row["name"],
        "shots": str(row["shots"]),
        "agreement %": interval(row["agreement"]),
        "after a cut %": interval(row["after_cut"]),
        "identity %": interval(row["identity"]),
        **{heading: interval(row[key]) for key, heading in DISTANCES.items() if key in row},
        "as the first": "yes" if overlap(row["agreement"], base["agreement"]) else "no",
    }


def minute_row(row: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe's shots of 60 s keep of their identity, by column."""
    early, late = (interval(row["minute"][when]) for when in ("early", "late"))
    return {"recipe": row["name"], "identity at 2 s %": early, "identity at 60 s %": late}


def text(record: Record) -> str:
    """The record as Markdown: one row for each recipe, with what was measured of it."""
    base = record.results[0]

    def cells(row: Mapping[str, Any]) -> dict[str, str]:
        quality = quality_row(row, base) if "shots" in row else {"recipe": row["name"]}
        minute = minute_row(row) if "minute" in row else {}
        errors = {layer: _error(row["errors"][layer]) for layer in _seen(record.results)}
        return {**quality, **minute, **errors}

    columns = {heading: lambda row, key=heading: cells(row)[key] for heading in cells(base)}
    return markdown(record, "Precisions compared", columns)
