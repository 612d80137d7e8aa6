"""``lltk doctor``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import click
from rich.console import Console

from lltk.cli.tables import row_table

_PACKAGES = {
    "lltk": "core", "torch": "core", "diffusers": "core", "transformers": "core",
    "safetensors": "core", "numpy": "core", "av": "core", "triton": "gpu",
    "nvidia-cudnn-frontend": "gpu", "onnx": "export", "onnxruntime": "export",
    "tensorrt-rtx": "tensorrt-rtx", "transformer-engine": "te", "torchao": "ao",
    "nvidia-modelopt": "modelopt",
}  # fmt: skip


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
        "implementations": _choices(),
        "NVFP4 backends": _backends(),
        "NVFP4 by hardware": _hardware(),
    }
    if as_json:
        click.echo(json.dumps(findings, indent=2))
        return
    console = Console()
    hardware = findings.pop("NVFP4 by hardware")
    for title, rows in findings.items():
        console.print(row_table(title[0].upper() + title[1:], rows))
    for ops, rows in _by_ops(hardware):
        console.print(row_table(f"{', '.join(ops)} by hardware", rows))


def _packages() -> list[dict[str, str]]:
    rows = []
    for name, extra in _PACKAGES.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            wanted = name if extra == "core" else f"'lltk[{extra}]'"
            found = f"absent: pip install {wanted}"
        rows.append({"package": name, "version": found, "extra": "" if extra == "core" else extra})
    return rows


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


def _choices() -> list[dict[str, str]]:
    import torch

    from lltk.ops.implementations import IMPLEMENTATIONS

    return [
        {"op": choice.op, "implementation": choice.name}
        | {device: choice.missing(torch.device(device)) or "runs" for device in ("cpu", "cuda")}
        for choice in IMPLEMENTATIONS
    ]


def _backends() -> list[dict[str, str]]:
    import torch

    from lltk.ops.nvfp4_backends import BACKENDS

    return [
        {"backend": backend.name}
        | {device: backend.missing(torch.device(device)) or "runs" for device in ("cpu", "cuda")}
        for backend in BACKENDS.values()
    ]


def _by_ops(
    rows: Sequence[Mapping[str, str]],
) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """Ops, and the rows of each without it: one group for ops whose rows are the same."""
    of_op: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        rest = {heading: text for heading, text in row.items() if heading != "op"}
        of_op.setdefault(row["op"], []).append(rest)
    ops = list(of_op)
    while ops:
        own = of_op[ops[0]]
        yield [op for op in ops if of_op[op] == own], own
        ops = [op for op in ops if of_op[op] != own]


def _hardware() -> list[dict[str, str]]:
    from lltk.ops.implementations import capability_table

    return list(capability_table())
