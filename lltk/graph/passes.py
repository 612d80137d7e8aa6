"""What a pass is, and the runner that applies passes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from inspect import getfile
from typing import ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import fx

from lltk.graph.edit import copy_graph, module_of, prune
from lltk.graph.infer import infer
from lltk.graph.program import LogEntry, Program
from lltk.graph.stages import Stage
from lltk.graph.verify import verify


class PassConfig(BaseModel):
    """Base of every pass's configuration: frozen, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Numerics(Enum):
    """How a pass may change a Program's results."""

    BITWISE = "bitwise"
    """Not at all: every output has the same bits."""
    ROUNDING = "rounding"
    """By rounding: it is the same function, summed in another order."""
    CHANGING = "changing"
    """It is another function."""


class Report:
    """What a pass rewrote, and what it looked at and left, with the reasons."""

    def __init__(self) -> None:
        self.matches: Counter[str] = Counter()
        self.misses: list[str] = []
        self.kept: dict[str, list[str]] = {}

    def match(self, kind: str, count: int = 1) -> None:
        """Count a rewrite."""
        self.matches[kind] += count

    def miss(self, node: fx.Node, reason: str) -> None:
        """Note why a candidate was left."""
        self.misses.append(f"{node.name} ({module_of(node) or 'root'}): {reason}")

    def keep(self, node: fx.Node, what: str, reason: str) -> None:
        """Note what the configuration leaves as it is; the log shows it."""
        self.miss(node, reason)
        names = self.kept.setdefault(reason, [])
        if what not in names:
            names.append(what)


C = TypeVar("C", bound=PassConfig)


class Pass(ABC, Generic[C]):
    """One rewrite of a Program.

    A subclass says in its docstring what changes, with a sketch of before and after. It has no
    state but its configuration: what later code needs to know it leaves in the Program, with
    `Program.leave` and `Program.change_weights`. It sets:

    Attributes:
        Config: the class of its configuration.
        version: raised when the same configuration gives another result than before.
        reads: stages of the Programs that it accepts.
        leaves: stage of the result, or None if the stage stays.
        kinds: kinds of Program that it is for.
        numerics: how it may change results.
        optional: whether it may match nothing.
    """

    Config: type[C]
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[Stage, ...]]
    leaves: ClassVar[Stage | None] = None
    kinds: ClassVar[tuple[str, ...]] = ("train", "score", "stream", "reference")
    numerics: ClassVar[Numerics]
    optional: ClassVar[bool] = False

    def __init__(self, config: C | None = None) -> None:
        self.config = self.Config() if config is None else config

    @property
    def name(self) -> str:
        """Its name in recipes.

        For a pass of lltk this is the file it lives in, such as ``lora``. For any other pass it is
        the whole path of its module, such as ``my_passes.lora``, so the two cannot be confused.
        """
        return type(self).__module__.removeprefix("lltk.passes.")

    def requires(self, program: Program) -> None:
        """Check that the Program fits; raises ValueError that says what to change."""

    @abstractmethod
    def apply(self, program: Program, report: Report) -> None:
        """Rewrite the Program in place, and report it."""

    def ensures(self, program: Program) -> None:
        """Check the result with assertions; one that fails is a defect of the pass."""


def run_passes(
    program: Program,
    steps: Iterable[Pass[PassConfig]],
    observe: Callable[[Program], None] | None = None,
) -> Program:
    """Apply passes in order to a copy of ``program``.

    Args:
        program: left as it is.
        steps: configured passes.
        observe: called with the Program after each pass.

    Raises:
        ValueError: a pass does not fit the Program, or matches nothing.
    """
    program = replace(
        program,
        graphs={name: copy_graph(graph) for name, graph in program.graphs.items()},
        weights=dict(program.weights),
        constants=dict(program.constants),
        regions={
            name: replace(region, graph=copy_graph(region.graph))
            for name, region in program.regions.items()
        },
        implementations=dict(program.implementations),
        log=list(program.log),
        facts=dict(program.facts),
        state_maps=list(program.state_maps),
    )
    for step in steps:
        run_pass(program, step)
        if observe is not None:
            observe(program)
    return program


def run_pass(program: Program, step: Pass[PassConfig]) -> None:
    """Apply one pass in place: requires, apply, infer, verify, ensures, then record.

    Raises:
        ValueError: the pass does not fit; names the pass. Any other exception is a defect of the
            pass, and has a note that names the pass and its file.
    """
    start, before = time.perf_counter(), program.count_ops()
    try:
        report = _apply(program, step)
    except ValueError as error:
        raise ValueError(f"{step.name}: {error}") from error
    except Exception as error:
        error.add_note(f"The pass {step.name} failed; it lies in {getfile(type(step))}.")
        raise
    program.log.append(
        LogEntry(
            name=step.name,
            version=step.version,
            config=step.config.model_dump(mode="json"),
            stage=program.stage,
            numerics=step.numerics.value,
            matches=dict(report.matches),
            kept=report.kept,
            ops_before=before,
            ops_after=program.count_ops(),
            seconds=time.perf_counter() - start,
        )
    )


def _apply(program: Program, step: Pass[PassConfig]) -> Report:
    _check_order(program, step)
    step.requires(program)
    report = Report()
    step.apply(program, report)
    if not report.matches and not step.optional:
        nearest = "; ".join(report.misses[:3]) or "the graphs hold no candidate for it"
        raise ValueError(
            f"matched nothing: {nearest}. Remove it from the recipe's passes, "
            "or run it where its pattern still stands"
        )
    for _, graph in program.every_graph():
        prune(graph)
        infer(program, graph)
        graph.lint()
    program.stage = program.stage if step.leaves is None else step.leaves
    verify(program)
    step.ensures(program)
    return report


def _check_order(program: Program, step: Pass[PassConfig]) -> None:
    names = [entry.name for entry in program.log]
    done = ", ".join(names) or "none"
    if step.name in names:
        raise ValueError(f"has run already (passes so far: {done}); name it once in the recipe")
    if program.kind not in step.kinds:
        raise ValueError(
            f"is for {' and '.join(step.kinds)} programs, this one is for "
            f"{program.kind}; remove it from the recipe's passes"
        )
    if program.stage not in step.reads:
        wanted = " or ".join(str(stage) for stage in step.reads)
        move = "earlier" if program.stage > max(step.reads) else "later"
        raise ValueError(
            f"reads a {wanted} program, this one is {program.stage} (passes so far: "
            f"{done}); move it {move} in the recipe's passes"
        )
