"""Triton kernels compiled for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def compiling_for(architecture: int) -> Iterator[dict[str, list[Any]]]:
    """Compile kernels where they would be launched, on tensors of the CPU, within the block.

    Gives what was compiled, by the kernel's name. What the kernels would write is undefined.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    found: dict[str, list[Any]] = {}

    class Absent:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return architecture

        def get_current_stream(self, device: int) -> int:
            return 0

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> Any:
        result = run(kernel, *arguments, **{**options, "warmup": True})
        found.setdefault(kernel.fn.__name__, []).append(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Absent())
        patch.setattr(JITFunction, "run", compile_only)
        yield found
