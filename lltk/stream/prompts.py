"""Prompts into embeddings, ahead of the chunks that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from lltk.stream.text import Encoder

Embed = Callable[[str], Tensor]
"""From a prompt to its embedding, [1, S, E] where the transformer runs; the same every time."""


class PromptWorker:
    """Encodes prompts in a thread of its own, each by itself, in the order they were asked for.

    Sessions may share it.

    Args:
        embed: encodes a prompt.
        rest: called in the thread whenever no prompt waits any more.
    """

    def __init__(self, embed: Embed, rest: Callable[[], None] = lambda: None) -> None:
        self._embed = embed
        self._rest = rest
        self._thread = ThreadPoolExecutor(1, "text")
        self._waiting = 0
        self._lock = Lock()

    def begin(self, prompt: str) -> Future[Tensor]:
        """Have a prompt encoded; the result is its embedding."""
        with self._lock:
            self._waiting += 1
            return self._thread.submit(self._encoded, prompt)

    def _encoded(self, prompt: str) -> Tensor:
        try:
            made = self._embed(prompt)
            if made.is_cuda:  # other threads may use another stream
                torch.cuda.current_stream(made.device).synchronize()
            return made
        finally:
            self._over()

    def forget(self, made: Future[Tensor]) -> None:
        """Leave a prompt that nobody wants any more, if its turn has not come."""
        if made.cancel():
            self._thread.submit(self._over)

    def _over(self) -> None:
        with self._lock:
            self._waiting -= 1
            idle = not self._waiting
        if idle:
            self._rest()


def pipeline_worker(
    encoder: Encoder, after: Literal["keep", "offload", "free"], device: torch.device
) -> PromptWorker:
    """A worker with a text encoder.

    Args:
        encoder: for the worker alone.
        after: what becomes of the encoder when no prompt waits: it stays, goes to the CPU, or is
            dropped and loaded again for the next prompt.
        device: where the embeddings are wanted.
    """
    home = encoder.device

    def embed(prompt: str) -> Tensor:
        encoder.to(home)
        return encoder.encode([prompt]).to(device)

    def rest() -> None:
        if after == "offload":
            encoder.to("cpu")
        elif after == "free":
            encoder.free()

    return PromptWorker(embed, rest)


class Prompts:
    """The embeddings of one session's prompts, encoded before they are asked for.

    Args:
        worker: encodes them.
        always: prompts that are never forgotten.
    """

    def __init__(self, worker: PromptWorker, always: Sequence[str] = ()) -> None:
        self._worker = worker
        self._always = always
        self._begun: dict[str, Future[Tensor]] = {}
        self._lock = Lock()

    def expect(self, prompts: Iterable[str]) -> None:
        """Have the prompts encoded that will be asked for; all others are forgotten."""
        with self._lock:
            known = self._begun
            wanted = [*prompts, *self._always]
            self._begun = {p: known.get(p) or self._worker.begin(p) for p in wanted}
            for prompt in known.keys() - self._begun.keys():
                self._worker.forget(known[prompt])

    def wait(self) -> None:
        """Wait until all expected prompts are encoded.

        Raises:
            ValueError: the encoder's files, or a cached embedding, cannot be read.
        """
        for prompt in list(self._begun):
            self(prompt)

    def done(self, prompts: Iterable[str]) -> bool:
        """Whether asking for these prompts waits for nothing, or raises at once."""
        with self._lock:
            return all(prompt in self._begun and self._begun[prompt].done() for prompt in prompts)

    def __call__(self, prompt: str) -> Tensor:
        """The embedding, [1, S, E]; waits for it. After an error the next call encodes anew.

        Raises:
            ValueError: see `wait`.
        """
        with self._lock:
            future = self._begun.pop(prompt, None) or self._worker.begin(prompt)
        made = future.result()
        with self._lock:
            self._begun[prompt] = future
        return made
