"""Engines of a bundle, as commands show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from lltk.cli.tables import row_table

if TYPE_CHECKING:
    from lltk.export.facts import EnginesFacts

NOT_RUN = "The engines were built and their layers were looked at. They were not run."
"""What must be said of engines wherever they were only built."""


def print_engines(console: Console, engines: EnginesFacts) -> None:
    """Print what was built, and what the layers do."""
    rows = [
        {
            "engine": f"{each.stage}/{each.graph}",
            "built in": f"{each.seconds:.0f} s",
            "memory": f"{each.peak_bytes / 2**30:.1f} GiB",
            "layers": ", ".join(f"{count} × {does}" for does, count in each.layers.items()),
        }
        for each in engines.built
    ]
    gpu = f"{engines.sm // 10}.{engines.sm % 10}"
    title = f"Engines for compute capability {gpu}, by TensorRT for RTX {engines.version}"
    console.print(row_table(title, rows))
    if engines.waived:
        waived = ", ".join(engines.waived)
        console.print(f"Not held to be fast: {waived}", highlight=False, markup=False)
