"""Turns: one piece of work at a time on a device, in the order in which threads asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

import torch


class Lane:
    """Lets one thread at a time work on a device; the others wait, in the order in which they came.

    ::

        with lane.turn():
            …  # what this thread launches here runs after what earlier turns launched

    Pieces of work in one lane never overlap, so they may share memory for intermediate results:
    CUDA graphs that are replayed in one lane lie in one pool.
    Work in different lanes may overlap, as a decoder's does with the transformer's next chunk.

    Args:
        device: where the work runs; a GPU with its number.
        own_stream: whether, on a GPU, it runs on a stream of the lane's own. If not, it runs on the
            current stream of the thread that has the turn.
    """

    def __init__(self, device: torch.device, own_stream: bool = False) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        """The lane's own stream, if it has one."""
        self._queue: deque[object] = deque()  # a ticket a thread; the first has the turn
        self._moved = Condition()
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device) if own_stream else None
            self.graph_pool = torch.cuda.graph_pool_handle()
            # One stream for every recording: memory that is freed on another is not used again.
            self.graph_stream = torch.cuda.Stream(device)
            self._done = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it within the block; a thread must not ask for two."""
        ticket = object()
        with self._moved:
            self._queue.append(ticket)
        try:
            with self._moved:
                self._moved.wait_for(lambda: self._queue[0] is ticket)
            with self._in_order():
                yield
        finally:  # also where waiting was interrupted, so that those behind go on
            with self._moved:
                self._queue.remove(ticket)
                self._moved.notify_all()

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Let the GPU begin what is launched here once it has done what earlier turns launched."""
        if self._done is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)
