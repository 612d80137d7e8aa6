"""What an implementation of an op says of itself.

A file in an op's folder that assigns `DECLARATION` is an implementation of the op, and has the
file's name; ``op.py`` is the reference. The file defines a function with the op's name and
parameters::

    DECLARATION = Declaration(Exactness.ROUNDING, "sums in another order", devices=("cuda",))

    def fp8_matmul(a, a_scales, b, b_scales, bias, dtype): ...

`read_declaration` reads that one assignment without importing the file, which may need packages
that are not installed. The names it may use are those of this module.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lltk.ops.hardware import ARITHMETIC, E2M1, E4M3, Capability

__all__ = ["ARITHMETIC", "E2M1", "E4M3", "Declaration", "Exactness", "read_declaration"]


class Exactness(Enum):
    """How near an implementation's results are to those of the op's reference."""

    REFERENCE = "reference"
    """It defines the op."""
    BITWISE = "bitwise"
    """Every bit is the same."""
    ROUNDING = "rounding"
    """The same function, rounded elsewhere or summed in another order."""
    NARROWER = "narrower"
    """Operands are rounded to a format with fewer bits first."""


@dataclass(frozen=True)
class Declaration:
    """What an implementation needs, and what it gives.

    Attributes:
        exactness: how near its results are to the reference's.
        how: what it does, in a few words.
        devices: device types it runs on.
        modules: Python modules it needs beyond torch.
        architectures: compute capabilities of CUDA devices it runs on, or None for any.
        opaque: whether torch.compile sees it as one operator, ``lltk::<op>_<name>``, and does not
            look inside. It has no gradient then. Its file is imported when it first runs.
        default: whether it runs the op where a recipe does not choose.
        in_place: whether it copies none of the pages that it attends to, however many there are.
        simulates: whether it has the arithmetic of another runtime, to judge that beforehand.
            Nobody is advised to run it in place of one that a device lacks.
        parts: implementations of other ops that it is made of, by op. It needs what they need.
    """

    exactness: Exactness
    how: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    modules: tuple[str, ...] = ()
    architectures: tuple[Capability, ...] | None = None
    opaque: bool = False
    default: bool = False
    in_place: bool = False
    simulates: bool = False
    parts: Mapping[str, str] = field(default_factory=dict, hash=False)


def read_declaration(path: Path) -> Declaration | None:
    """The declaration in a Python file, which is not imported; None if it has none.

    Raises:
        ValueError: the file cannot be read, or its declaration cannot be made; names the file.
    """
    try:
        source = path.read_text(encoding="utf-8")
        if "DECLARATION" not in source:
            return None
        for statement in ast.parse(source).body:
            match statement:
                case ast.Assign([ast.Name("DECLARATION")], value) | ast.AnnAssign(
                    ast.Name("DECLARATION"), _, ast.expr() as value
                ):
                    code = compile(ast.Expression(value), str(path), "eval")
                    made = eval(code, {name: globals()[name] for name in __all__})
                    if not isinstance(made, Declaration):
                        raise TypeError(f"{made!r} is no Declaration")
                    return made
    except Exception as error:  # whatever the assigned expression raises
        raise ValueError(f"{path}: its declaration cannot be read: {error}") from error
    return None
