"""Whether a plan can run here."""

from __future__ import annotations

from lltk.ops.implementations import check_device
from lltk.parallel.devices import find_device
from lltk.stream.runtimes.cuda_graph import check_graphs
from lltk.streaming.memory import check_memory
from lltk.streaming.plan import Plan, StreamPlan


def check_plan(plan: Plan, image: bool = False) -> None:
    """Refuse a plan that cannot run here.

    Args:
        plan: of a stream.
        image: whether the video begins with an image.

    Raises:
        ValueError: there are not as many ranks as the recipe is for, a device is not here or lacks
            what the recipe wants, or there is too little memory.
    """
    rank = plan.rank  # which refuses another number of ranks
    find_device(str(plan.device), "the stream's device")
    find_device(str(plan.text_device), "stream.text.device")
    if isinstance(plan, StreamPlan):
        _check_programs(plan, rank)
    check_memory(plan, image, rank)


def _check_programs(plan: StreamPlan, rank: int) -> None:
    """Refuse Programs whose implementations do not run where they are to run."""
    check_device(plan.implementations, plan.device)
    if plan.section.cuda_graphs:
        check_graphs(plan.device, "stream.cuda_graphs")
    for decoder in plan.decoders_of(rank):
        find_device(str(decoder.device), "stream.decoder.device")
        made = decoder.program.implementations
        check_device(made, decoder.device, "the lower pass in stream.decoder.passes")
        if plan.section.decoder.cuda_graphs:
            check_graphs(decoder.device, "stream.decoder.cuda_graphs")


def refusal(plan: Plan, image: bool = False) -> str:
    """What `check_plan` says; empty if the stream can run."""
    try:
        check_plan(plan, image)
    except ValueError as error:
        return str(error)
    return ""
