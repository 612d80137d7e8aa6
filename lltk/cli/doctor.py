"""``lltk doctor``."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import PackageNotFoundError, requires, version

import click
from rich.console import Console

from lltk import __version__
from lltk.cli.tables import row_table

_NAME = re.compile(r"[\w.-]+")
_EXTRA = re.compile(r"extra == [\"'](.*?)[\"']")
"""Parts of a requirement as packages state it: ``triton; extra == "gpu"``."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(as_json: bool) -> None:
    """Show versions, devices, and what each device can run.

    \b
    Example:
      lltk doctor
    """
    findings = {
        "packages": _packages(),
        "devices": _devices(),
        "implementations": _implementations(),
        "how implementations work": _declarations(),
    }
    if as_json:
        click.echo(json.dumps(findings, indent=2))
        return
    console = Console()
    for title, rows in findings.items():
        names = 2 if "implementation" in rows[0] else 1
        console.print(row_table(title[0].upper() + title[1:], rows, names))


def _packages() -> list[dict[str, str]]:
    rows = []
    for name, extra in _wanted().items():
        try:
            found = __version__ if name == "lltk" else version(name)
        except PackageNotFoundError:
            wanted = f"'lltk[{extra}]'" if extra else name
            found = f"absent: pip install {wanted}"
        rows.append({"package": name, "version": found, "extra": extra})
    return rows


def _wanted() -> dict[str, str]:
    """Packages that lltk can use, each with the extra that brings it; "" if lltk always does."""
    from lltk.ops.hardware import package_of
    from lltk.ops.implementations import every_implementation

    try:
        stated = requires("lltk") or []
    except PackageNotFoundError:  # a checkout that is not installed
        stated = []
    found = {"lltk": ""}
    for requirement in stated:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name is not None and (extra is None or extra[1] != "dev"):
            found.setdefault(name[0], extra[1] if extra else "")
    for implementation in every_implementation():
        for module in implementation.modules:
            found.setdefault(package_of(module), "")
    return found


def _devices() -> list[dict[str, str]]:
    import torch

    from lltk.graph.memory import readable

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = [
        {
            "device": "cpu",
            "name": f"{len(os.sched_getaffinity(0))} cores",
            "memory": readable(memory),
            "architecture": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        rows.append(
            {
                "device": f"cuda:{index}",
                "name": found.name,
                "memory": readable(found.total_memory),
                "architecture": f"sm_{found.major}{found.minor}",
            }
        )
    return rows


def _implementations() -> list[dict[str, str]]:
    import torch

    from lltk.ops.implementations import every_implementation

    return [
        {"op": each.op, "implementation": each.name}
        | {device: each.missing(torch.device(device)) or "runs" for device in ("cpu", "cuda")}
        for each in every_implementation()
    ]


def _declarations() -> list[dict[str, str]]:
    from lltk.ops.hardware import architectures
    from lltk.ops.implementations import every_implementation

    return [
        {
            "op": each.op,
            "implementation": each.name,
            "GPUs": "any" if each.architectures is None else architectures(each.architectures),
            "result": f"{each.declared.exactness.value}: {each.declared.how}",
        }
        for each in every_implementation()
    ]
