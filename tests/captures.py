"""Models that are captured once in a process, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from lltk.graph.passes import run_passes
from lltk.graph.program import Program
from lltk.models import vae_encoder, wan22, wan_vae

Captured = Callable[..., Program]


def once(captured: Captured) -> Captured:
    """A function that captures a model, which keeps what it made and gives copies of it."""
    made: dict[str, Program] = {}

    @wraps(captured)
    def copied(*given: Any, **options: Any) -> Program:
        key = repr((given, sorted(options.items())))
        if key not in made:
            made[key] = captured(*given, **options)
        return run_passes(made[key], [])

    return copied


@contextmanager
def shared() -> Iterator[None]:
    """Let recipes and encoders take models of equal sizes from one capture."""
    with ExitStack() as stack:
        for module in (wan22, wan_vae, vae_encoder):
            stack.enter_context(patch.object(module, "captured", once(module.captured)))
        yield
