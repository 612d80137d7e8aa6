"""Computing again, in the backward pass, what a region has not kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)


def recomputed(run: Callable[..., Any], keep_attention: bool) -> Callable[..., Any]:
    """A function that keeps its inputs alone for the backward pass.

    Args:
        run: what it computes, from tensors.
        keep_attention: whether it keeps the results of attention, too.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def recomputing(*inputs: Any) -> Any:
        return checkpoint(run, *inputs, **options)

    return recomputing


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = "attention" in str(op)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
