"""Tensors in pieces: any box of them is read from any pieces, and what does not fit is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lltk.files.writing import whole_file
from lltk.train.pieces import Piece, opened_pieces, own_piece, write_pieces

pytestmark = pytest.mark.cpu

SIZE = 7, 5


def whole() -> torch.Tensor:
    return torch.arange(35.0).view(SIZE)


def cut(folder: Path, axis: int, cuts: list[int]) -> list[Path]:
    """Write a matrix in pieces along an axis, a file each, and a number that is whole."""
    ends = [0, *sorted(set(cuts)), SIZE[axis]]
    files = []
    for number, (start, end) in enumerate(pairwise(ends)):
        offset = (start, 0) if axis == 0 else (0, start)
        value = whole().narrow(axis, start, end - start)
        pieces = {"matrix": Piece(value, offset, SIZE)}
        if not number:
            pieces["number"] = Piece(torch.tensor(3.0), (), ())
        files.append(folder / f"{number}.safetensors")
        with whole_file(files[-1]) as file:
            write_pieces(file, pieces)
    return files


sides = st.tuples(st.integers(0, 7), st.integers(0, 7)).map(sorted)


@given(st.sampled_from([0, 1]), st.lists(st.integers(1, 4), max_size=3), sides, sides)
def test_any_box_is_read(axis: int, cuts: list[int], rows: list[int], columns: list[int]) -> None:
    (top, bottom), (left, right) = rows, [min(side, 5) for side in columns]
    with TemporaryDirectory() as folder, opened_pieces(cut(Path(folder), axis, cuts)) as pieces:
        assert pieces.shapes == {"matrix": SIZE, "number": ()}
        assert torch.equal(pieces.read("matrix"), whole()) and float(pieces.read("number")) == 3
        box = pieces._box("matrix", (top, left), (bottom - top, right - left))
        assert torch.equal(box, whole()[top:bottom, left:right])


def test_what_is_not_there_once_is_refused(tmp_path: Path) -> None:
    files = cut(tmp_path, 0, [2, 4])
    with opened_pieces(files[:2]) as pieces:
        assert refused(pieces.read, "matrix") == "matrix has 20 of 35 values"
    with opened_pieces([*files, files[0]]) as pieces:
        assert refused(pieces.read, "matrix") == "matrix has 45 of 35 values"


@pytest.mark.parametrize(
    ("offset", "shape", "message"),
    [
        ((5, 0), SIZE, "the piece of matrix does not fit its tensor"),
        ((0,), (7,), "the piece of matrix does not fit its tensor"),
        ((-1, 0), SIZE, "does not say where the piece of matrix lies"),
        (("0", 0), SIZE, "does not say where the piece of matrix lies"),
    ],
)
def test_pieces_that_fit_nowhere_are_refused(
    tmp_path: Path, offset: tuple[int, ...], shape: tuple[int, ...], message: str
) -> None:
    with whole_file(tmp_path / "file") as file:
        write_pieces(file, {"matrix": Piece(torch.ones(3, 5), offset, shape)})
    assert message in refused(opened_pieces([tmp_path / "file"]).__enter__)


def test_pieces_of_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    for name, value in (("one", torch.ones(3, 5)), ("other", torch.ones(4, 5).half())):
        with whole_file(tmp_path / name) as file:
            write_pieces(file, {"matrix": Piece(value, (0, 0), SIZE)})
    message = refused(opened_pieces([tmp_path / "one", tmp_path / "other"]).__enter__)
    assert message == f"{tmp_path / 'other'}: the piece of matrix does not fit its tensor"


def test_the_first_rank_writes_what_is_whole() -> None:
    value = torch.ones(3)
    piece = own_piece(value, first=True)
    assert piece is not None and (piece.offset, piece.shape) == ((0,), (3,))
    value.zero_()
    assert piece.value.all() and own_piece(value, first=False) is None
