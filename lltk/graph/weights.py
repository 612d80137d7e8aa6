"""Checks that weights are those of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from lltk.graph.packed import plain_name


def few(names: Iterable[str]) -> str:
    """The first three names, and an ellipsis if there are more."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")


def check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Check that weights are exactly those that are expected, floating-point and finite.

    Args:
        weights: by name.
        expected: the shape of each weight by its name.
        where: the file or model that the error names.

    Raises:
        ValueError: a weight is missing, unexpected, of another shape or kind of dtype, or not
            finite.
    """
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    misshapen = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    check_names(found, expected, misshapen, where)
    for name, weight in weights.items():
        if name == plain_name(name) and not weight.is_floating_point():
            raise ValueError(
                f"{where}: {name} is {weight.dtype}, and weights are floating-point numbers; use "
                "the file as it was saved"
            )
    check_finite(weights, where)


def check_names(
    found: Collection[str],
    expected: Collection[str],
    misshapen: list[str],
    where: str,
    remedy: str = "use the weights or the configuration of one model",
) -> None:
    """Raise ValueError if weights are missing, unexpected or of another shape.

    Args:
        found: names.
        expected: names.
        misshapen: what the error says of each weight that has another shape.
        where: the file or model that the error names.
        remedy: what the error says to do.
    """
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": misshapen,
    }
    problems = [f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(f"{where}: weights {', '.join(problems)}; {remedy}")


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if a weight holds NaN or infinity."""
    broken = [name for name, weight in weights.items() if not _finite(weight)]
    if broken:
        raise ValueError(
            f"{where}: {broken[0]} holds NaN or infinity ({len(broken)} of {len(weights)} tensors "
            "do); use a checkpoint from before the run diverged"
        )


def _finite(weight: Tensor) -> bool:
    # aminmax of values with a NaN is NaN. It takes neither one-byte floats nor empty tensors.
    wide = weight.float() if weight.dtype.itemsize == 1 else weight
    return not wide.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(wide))
