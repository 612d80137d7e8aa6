"""Tables that several commands show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from lltk.graph.contract import Contract, TensorSpec
from lltk.graph.memory import readable, total
from lltk.graph.program import LogEntry
from lltk.graph.text import dtype_name

_STYLE: dict[str, Any] = {"box": SIMPLE_HEAD, "title_justify": "left", "title_style": "bold"}


def log_tables(log: Sequence[LogEntry]) -> Group:
    """A table of the passes; and one of the modules that they were told to leave, if any."""
    kept = _kept_table(log)
    return Group(_pass_table(log), *([kept] if kept.rows else []))


def _pass_table(log: Sequence[LogEntry]) -> Table:
    """For each pass the stage it led to, its matches, the number of ops after it, and its time."""
    table = Table("", "pass", "stage", title="Passes", **_STYLE)
    table.add_column("matches", overflow="fold")
    for heading in ("ops", "s"):
        table.add_column(heading, justify="right")
    for column in table.columns[1:3]:
        column.no_wrap = True
    for number, entry in enumerate(log, 1):
        change = entry.ops_after - entry.ops_before
        table.add_row(
            str(number),
            entry.name,
            str(entry.stage),
            ", ".join(f"{count} {kind}" for kind, count in entry.matches.items()),
            f"{entry.ops_after} ({change:+d})",
            f"{entry.seconds:.1f}",
        )
    return table


def _kept_table(log: Sequence[LogEntry]) -> Table:
    """The modules that passes were told to leave, and why."""
    table = Table("pass", title="Kept", **_STYLE)
    table.add_column("modules", overflow="fold")
    table.add_column("because", overflow="fold")
    for entry in log:
        for reason, modules in entry.kept.items():
            table.add_row(entry.name, ", ".join(_ranges(modules)), reason)
    return table


def contract_table(name: str, contract: Contract) -> Table:
    """The inputs and outputs of a graph. What is the same in every layer shares a row."""
    table = Table("", "name", "type", "role", title=f"Graph {name}", **_STYLE)
    for direction, specs in (("in", contract.inputs), ("out", contract.outputs)):
        for label, (spec, role) in _grouped(specs).items():
            table.add_row(direction, label, escape(spec), role)
    return table


def memory_table(owners: Mapping[str, int]) -> Table:
    """A size for each owner, and the sum."""
    table = Table("owner", title="Memory to run it", **_STYLE)
    table.add_column("size", justify="right")
    for owner, count in owners.items():
        table.add_row(owner, readable(count))
    table.add_section()
    table.add_row("total", readable(total(owners)))
    return table


def row_table(title: str, rows: Sequence[Mapping[str, str]], names: int = 1) -> Table:
    """A table of rows that have the same keys, which are the headings.

    The first ``names`` columns hold the names of the rows, and never wrap.
    """
    table = Table(title=title, **_STYLE)
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, no_wrap=number < names, overflow="fold")
    for row in rows:
        table.add_row(*(escape(value) for value in row.values()))
    return table


def _ranges(modules: Sequence[str]) -> list[str]:
    """Module paths, with one entry for those that differ only in their layer."""
    groups: dict[str, list[int]] = {}
    for module in modules:
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            groups[module] = []
        else:
            key = ".".join([*parts[:at], "{}", *parts[at + 1 :]])
            groups.setdefault(key, []).append(int(parts[at]))
    return [key.format(_span(sorted(layers))) for key, layers in groups.items()]


def _span(layers: Sequence[int]) -> str:
    """Sorted layer numbers as ``3``, ``3…7`` or ``3,5``."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}…{layers[-1]}"
    return ",".join(map(str, layers))


def _grouped(specs: dict[str, TensorSpec]) -> dict[str, tuple[str, str]]:
    """Type and role by name; names such as ``k_pages_0 … k_pages_29`` that share them are one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, spec in specs.items():
        base, _, index = name.rpartition("_")
        key = base if index.isdigit() else name
        text = f"{dtype_name(spec.dtype)}{list(spec.shape)}"
        groups.setdefault((key, text, spec.role or ""), []).append(name)
    return {
        names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}": (text, role)
        for (_, text, role), names in groups.items()
    }
