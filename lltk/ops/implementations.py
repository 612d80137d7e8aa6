"""Which implementations an ``lltk::`` op has, and what each needs.

An op is a folder of `lltk.ops` with an ``op.py``. Its implementations are the files in the folder
that declare themselves; see `lltk.ops.declaration`.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any

import torch

import lltk.ops
from lltk.module_paths import find_by_path, import_by_path
from lltk.ops.declaration import Declaration, read_declaration
from lltk.ops.hardware import Capability, lacking

_REGISTERING = RLock()
"""Held while an operator is registered: a second registration would end the first."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        op: the op, as ``paged_attention``.
        name: what recipes call it.
        module: the Python module that holds it.
        declared: what it says of itself.
    """

    op: str
    name: str
    module: str
    declared: Declaration

    def load(self) -> Callable[..., Any]:
        """The callable, with the op's parameters.

        Raises:
            ValueError: the module cannot be imported, or defines no such function.
        """
        with _REGISTERING:
            return _load(self.op, self.name)

    def missing(self, device: torch.device) -> str | None:
        """What the device or installation lacks to run it, or None."""
        return lacking(device, self.devices, self.modules, self.architectures)

    @property
    def devices(self) -> tuple[str, ...]:
        """Device types that it and its parts run on."""
        return tuple(d for d in ("cpu", "cuda") if all(d in each.devices for each in self._all()))

    @property
    def modules(self) -> tuple[str, ...]:
        """Python modules that it and its parts need."""
        return tuple(dict.fromkeys(module for each in self._all() for module in each.modules))

    @property
    def architectures(self) -> tuple[Capability, ...] | None:
        """CUDA devices that it and its parts run on, or None for any."""
        stated = [each.architectures for each in self._all() if each.architectures is not None]
        if not stated:
            return None
        return tuple(able for able in stated[0] if all(able in each for each in stated))

    def _all(self) -> Iterator[Declaration]:
        """Its declaration and those of its parts."""
        yield self.declared
        for op, name in self.declared.parts.items():
            yield from find_implementation(op, name)._all()


@cache
def ops() -> tuple[str, ...]:
    """Every op."""
    found = pkgutil.iter_modules(lltk.ops.__path__)
    return tuple(module.name for module in found if module.ispkg)


@cache
def implementations(op: str) -> dict[str, Implementation]:
    """An op's implementations by name, its reference first."""
    package = f"{lltk.ops.__name__}.{op}"
    folders = import_module(package).__path__
    found = {}
    for file in sorted(file for folder in folders for file in Path(folder).glob("*.py")):
        declared = read_declaration(file)
        if declared is not None:
            name = "reference" if file.stem == "op" else file.stem
            found[name] = Implementation(op, name, f"{package}.{file.stem}", declared)
    return {"reference": found.pop("reference"), **found}


def every_implementation() -> Iterator[Implementation]:
    """The implementations of every op."""
    for op in ops():
        yield from implementations(op).values()


def ops_with_choices() -> tuple[str, ...]:
    """Ops that have more than their reference."""
    return tuple(op for op in ops() if len(implementations(op)) > 1)


def find_implementation(op: str, name: str) -> Implementation:
    """An implementation of an op.

    Args:
        op: the op.
        name: one of the op's own, or the path of another module that holds one, as
            ``my_kernels.fast``.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if "." in name:
        return _in_module(op, name)
    choices = implementations(op)
    if name not in choices:
        near = get_close_matches(name, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{op} has no implementation {name!r} (it has {', '.join(choices)}){hint}")
    return choices[name]


def _in_module(op: str, module: str) -> Implementation:
    """The implementation of an op that a module outside lltk holds."""
    file = find_by_path(module).origin
    declared = None if file is None else read_declaration(Path(file))
    if declared is None:
        raise ValueError(
            f"{file or module}: declares no implementation of {op}; assign DECLARATION as "
            "lltk.ops.declaration says"
        )
    return Implementation(op, module, module, declared)


def preferred(op: str, names: Sequence[str] = ()) -> Implementation:
    """The first of some names that an op has, or else its default."""
    choices = implementations(op)
    default = next((name for name, each in choices.items() if each.declared.default), "reference")
    return choices[next((name for name in names if name in choices), default)]


def load_parts(declared: Declaration) -> list[Callable[..., Any]]:
    """The callables of what an implementation is made of, in the order of its declaration."""
    return [find_implementation(op, name).load() for op, name in declared.parts.items()]


@cache
def _load(op: str, name: str) -> Callable[..., Any]:
    if name == "reference":
        return overload(op)
    if not find_implementation(op, name).declared.opaque:
        return function_of(op, name)
    schema, operator = overload(op)._schema, f"{op}_{name.replace('.', '_')}"
    made = torch.library.custom_op(
        f"lltk::{operator}",
        lambda *given: function_of(op, name)(*given),
        mutates_args=[each.name for each in schema.arguments if each.is_write],
        schema=str(schema).removeprefix(schema.name),
    )
    made.register_fake(lambda *given: overload(op)(*given))
    found: torch._ops.OpOverload = getattr(torch.ops.lltk, operator).default
    return found


@cache
def function_of(op: str, name: str) -> Callable[..., Any]:
    """The function in an implementation's file, which is imported.

    Raises:
        ValueError: the file cannot be imported, or defines no function with the op's parameters.
    """
    implementation = find_implementation(op, name)
    module = import_by_path(implementation.module)
    function: object = getattr(module, op, None)
    wanted = [argument.name for argument in overload(op)._schema.arguments]
    if not callable(function) or _parameters(function) != wanted:
        raise ValueError(f"{module.__file__}: define a function {op}({', '.join(wanted)})")
    return function


def _parameters(function: Callable[..., Any]) -> list[str]:
    if isinstance(function, torch._ops.OpOverload):
        return [argument.name for argument in function._schema.arguments]
    return list(inspect.signature(function).parameters)


def check_device(
    chosen: Mapping[str, str], device: torch.device, lower: str = "the recipe's lower pass"
) -> None:
    """Check that a device can run the chosen implementations, by op.

    Args:
        chosen: implementations, by op.
        device: to run on.
        lower: what the user calls the pass that chose.

    Raises:
        ValueError: says what is lacking and what the device has.
    """
    for op, name in chosen.items():
        reason = find_implementation(op, name).missing(device)
        if reason is not None:
            able = [
                other
                for other, each in implementations(op).items()
                if not (each.declared.simulates or each.missing(device))
            ]
            slow = f", or leave out the pass that makes {op}" if able == ["reference"] else ""
            raise ValueError(
                f"{op}: {name} {reason}; {device.type} has {' and '.join(able) or 'none'}: set "
                f"{op} of {lower}{slow}"
            )


def register_ops() -> None:
    """Import every op, so that ``torch.ops.lltk`` has it."""
    for op in ops():
        overload(op)


def overload(op: str) -> torch._ops.OpOverload:
    """The op as a graph node's target."""
    import_module(f"lltk.ops.{op}.op")
    found: torch._ops.OpOverload = getattr(torch.ops.lltk, op).default
    return found


def op_called(target: object) -> str | None:
    """The name of the op that a graph node's target is, or None if it is something else."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    return name if namespace == "lltk" and name in ops() else None
