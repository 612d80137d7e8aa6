"""Writing training states while the run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lltk.files.writing import NewFolder, explained, whole_folder
from lltk.parallel.mesh import ALONE, Mesh
from lltk.train.pieces import Piece, own_piece, write_pieces
from lltk.train.state import (
    CONSTANT,
    TrainingState,
    part_file,
    remove_old_states,
    state_path,
    write_manifest,
)

Parts = Mapping[str, Iterable[tuple[str, Tensor]]]
"""The tensors of each part of a state, by name. They are taken one by one."""


@dataclass(frozen=True)
class _Pending:
    """A state that is being written.

    Attributes:
        path: where it will be.
        facts: for its manifest.
        block: in which it is made.
        made: its folder until then.
        written: the checksums of this rank's files, once they are on the disk.
    """

    path: Path
    facts: Mapping[str, Any]
    block: ExitStack
    made: NewFolder
    written: Future[dict[str, str]]


class StateWriter:
    """Writes training states, each rank its own pieces, one state at a time.

    All ranks call its methods alike.

    Args:
        folder: holds the run's states.
        keep: how many states are kept.
        mesh: the ranks.
    """

    def __init__(self, folder: Path, keep: int, mesh: Mesh = ALONE) -> None:
        self._folder = folder
        self._keep = keep
        self._mesh = mesh
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="training state")
        self._pending: _Pending | None = None

    def begin(self, step: int, position: int, about: Mapping[str, Any], parts: Parts) -> None:
        """Copy a state to main memory, and begin to write it.

        No other may be under way: `settle` tells.

        Args:
            step: how many steps are done.
            position: how many samples the run has seen.
            about: as `TrainingState` has it.
            parts: the tensors.

        Raises:
            OSError: its folder cannot be made.
        """
        assert self._pending is None
        path, first, block = state_path(self._folder, step), self._mesh.rank == 0, ExitStack()
        place = None
        if first:
            place = block.enter_context(whole_folder(path)).path
        else:
            block.enter_context(explained(path))
        place = self._mesh.every(place)[0]
        assert place is not None
        made = NewFolder(place)
        pieces = {
            name: {
                key: piece
                for key, value in tensors
                if (piece := own_piece(value, first, name not in CONSTANT)) is not None
            }
            for name, tensors in parts.items()
        }
        written = self._thread.submit(_write, made, pieces, self._mesh)
        facts = {"step": step, "position": position, **about}
        self._pending = _Pending(path, facts, block, made, written)

    def settle(self, wait: bool) -> Path | None:
        """Let a state that is written on all ranks take its place, and remove older ones.

        Args:
            wait: until it is written.

        Returns:
            Its folder; None if there is none, or it is not written yet.

        Raises:
            OSError: it could not be written. The states before it are left as they were.
        """
        pending = self._pending
        if pending is None:
            return None
        ready = wait or pending.written.done()
        error = pending.written.exception() if ready else None
        if error is not None and not isinstance(error, OSError):
            raise error
        why = None if error is None else str(error.strerror or error)
        sums = pending.written.result() if ready and error is None else {}
        reports = self._mesh.every((ready, why, sums))
        if not all(ready for ready, *_ in reports):
            return None
        self._pending = None
        failed = next((why for _, why, _ in reports if why), None)
        with pending.block:
            if failed is not None:
                raise OSError(failed)
            if self._mesh.rank == 0:
                for _, _, found in reports:
                    pending.made.checksums |= found
                write_manifest(pending.made, pending.facts)
        if self._mesh.rank == 0:
            remove_old_states(self._folder, self._keep)
        return pending.path


def save_training_state(folder: Path, state: TrainingState, keep: int) -> Path:
    """Write a state by this process alone, then remove all but the newest.

    Args:
        folder: holds the run's states.
        state: what to write.
        keep: how many states to keep, this one included.

    Returns:
        The folder of this state.

    Raises:
        OSError: it cannot be written. The states before it are left as they were.
    """
    writer = StateWriter(folder, keep)
    parts = {name: tensors.items() for name, tensors in state.parts().items()}
    writer.begin(state.step, state.position, state.about, parts)
    path = writer.settle(wait=True)
    assert path is not None
    return path


def _write(
    made: NewFolder, pieces: Mapping[str, Mapping[str, Piece]], mesh: Mesh
) -> dict[str, str]:
    """Write this rank's files, and wait until the disk has them; their checksums."""
    own = NewFolder(made.path)
    for part, named in pieces.items():
        if named:
            with own.file(part_file(part, mesh)) as file:
                write_pieces(file, named)
                file.sync()
    return own.checksums
