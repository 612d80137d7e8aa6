"""Joining the ranks that torchrun started, and stopping together."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lltk.parallel.devices import find_device
from lltk.parallel.groups import FRAMES, SEQUENCE, lost, registered

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for another one; compiling blocks takes less."""
GRACE = 2.0
"""Seconds that a rank has to end by itself, once any rank has failed."""
_POLL = 0.2
_FAILED = "lltk/failed"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """The processes that run a stream together, and which one this is.

    Attributes:
        rank: the number of this process, from 0. Rank 0 takes the video and prints.
        size: how many there are; 1 for a process by itself.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks must call it."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())


def launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str | None, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Run the block together with the other ranks that torchrun started, if it did.

    If a rank fails, all end within seconds. The first to fail raises its error; the others exit
    with code 1 and print nothing. So do those on its machine if one is killed, and the first to
    know logs it; torchrun ends the rest. Each rank takes the GPU of its own number.

    Args:
        device: ``cpu`` or ``cuda``; by default GPUs if there are any.
        timeout: how long an exchange waits for a rank that does not join it.

    Raises:
        ValueError: there is no such device, ranks would share a GPU or run on different kinds, or
            torch has no library to exchange with.
    """
    if not launched():
        yield Ranks(0, 1, find_device(device))
        return
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    done = threading.Event()
    others: dict[int, int] = {}
    watcher = threading.Thread(target=_watch, args=(store.clone(), others, done), daemon=True)
    watcher.start()
    try:
        own = _own_device(find_device(device))
        dist.init_process_group(
            "gloo" if own.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=PrefixStore("lltk", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        _check_alike(own)
        others |= _processes(rank)
        group = dist.group.WORLD
        assert group is not None
        ranks = Ranks(rank, size, own)
        frames = dist.new_group(timeout=timeout, backend="gloo")
        with registered(SEQUENCE, group), registered(FRAMES, frames):
            yield ranks
        ranks.any(False)  # all are done
    except BaseException as error:
        _end_soon()
        if not _first_to_fail(store):
            raise SystemExit(1) from None
        if isinstance(error, RuntimeError) and _any_ended(others, _POLL):  # an exchange failed
            raise lost(error) from error
        raise
    finally:
        done.set()
        watcher.join(GRACE)  # the interpreter's end aborts a thread within the store
        for process in others.values():
            os.close(process)
    dist.destroy_process_group()


def _first_to_fail(store: Store) -> bool:
    try:
        return store.add(_FAILED, 1) == 1
    except RuntimeError:  # who kept it is gone, so it failed before
        return False


def _processes(rank: int) -> dict[int, int]:
    """Descriptors of the other ranks' processes on this machine, which tell of their ends."""
    if not hasattr(os, "pidfd_open"):  # it is Linux's
        return {}
    own = socket.gethostname(), os.getpid()
    every: list[tuple[str, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    found = {}
    for other, place in enumerate(every):
        if other != rank and place is not None and place[0] == own[0]:
            found[other] = os.pidfd_open(place[1])
    return found


def _watch(store: Store, others: Mapping[int, int], done: threading.Event) -> None:
    """End this process soon after any rank has failed or was killed, whatever it waits for.

    NCCL would wait for a killed one for minutes.
    """
    while not done.wait(_POLL):
        try:
            failed = store.check([_FAILED])
        except RuntimeError:  # who kept it is gone
            failed = not done.is_set()
        ended = _any_ended(others)
        if not failed and ended and not done.wait(_POLL):
            failed = True
            if _first_to_fail(store):
                lost = next(rank for rank, process in others.items() if process in ended)
                _log.error("ranks: rank %d has stopped; start again", lost)
        if failed:
            _end_soon()
            return


def _any_ended(others: Mapping[int, int], wait: float = 0) -> list[int]:
    """Of the other ranks' processes on this machine, the descriptors of those that have ended.

    A process that is killed loses its connections a moment before it counts as ended.
    """
    ended, _, _ = select.select([*others.values()], [], [], wait)
    return ended


def _end_soon() -> None:
    """End this process after `GRACE`, if it has not ended by itself."""
    ending = threading.Timer(GRACE, os._exit, (1,))
    ending.daemon = True
    ending.start()


def _own_device(device: torch.device) -> torch.device:
    """The GPU of this rank's number on its machine."""
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"ranks: {device} is one GPU, and each rank needs its own; name cuda")
    if not dist.is_nccl_available():
        raise ValueError("ranks: this torch has no NCCL to exchange with; install one that has")
    index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"ranks: rank {index} needs a GPU of its own, there are {count}")
    own = torch.device("cuda", index)
    torch.cuda.set_device(own)
    return own


def _check_alike(device: torch.device) -> None:
    name = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name)
    if len(set(names)) > 1:
        found = ", ".join(f"rank {rank} has {name}" for rank, name in enumerate(names))
        raise ValueError(f"ranks: they must run on GPUs of one kind; {found}")
