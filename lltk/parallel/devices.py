"""The devices that are here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def find_device(name: str | None, said: str = "--device") -> torch.device:
    """The device of a name; without a name a GPU if there is one, else the CPU.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:1``.
        said: where the name is from, for an error.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or int(index or 0) >= count:
        have = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(f"{said}: {name} is not here; there is {', '.join(have)}")
    return torch.device(name)
