"""Where the axes of a piece lie in what was cut: each answer against the list of rows that the piece has."""

from __future__ import annotations

import itertools

import pytest

from hookattn.attention.pieces import Piece


def rows_of(piece: Piece) -> list[tuple[int, ...]]:
    """The index of every row of a piece along each of the axes that were cut, the outer first."""
    every = list(itertools.product(*(range(extent) for _, extent in piece.axes)))
    return every[piece.start : piece.stop]


@pytest.mark.parametrize("letter", "BHT")
def test_a_piece_of_one_axis_lies_where_it_was_cut(letter: str) -> None:
    piece = Piece("whole", ((letter, 7),), 2, 5)
    assert (piece.of, piece.letters) == (7, letter)
    assert piece.place(letter, 3) == (2, 7)
    for other in set("BHT") - {letter}:
        assert piece.place(other, 4) == (0, 4), "what was not cut is whole"
    assert piece.place(letter, 1) == (0, 1), "rows that a call has otherwise are not those of the cut"


@pytest.mark.parametrize(("b", "h"), [(1, 4), (2, 4), (3, 2), (3, 1)])
def test_heads_that_were_folded_into_the_batch(b: int, h: int) -> None:
    """A place is right where it names the heads of every row, and there is none where it cannot."""
    for start, stop in itertools.combinations(range(b * h + 1), 2):
        piece = Piece("whole", (("B", b), ("H", h)), start, stop)
        assert piece.of == b * h and piece.letters == "BH"
        rows = rows_of(piece)
        entries, heads = sorted({i for i, _ in rows}), [j for _, j in rows]
        if len(entries) == 1:  # some heads of one batch entry
            assert piece.place("H", len(rows)) == (heads[0], h), (start, stop)
        if heads == list(range(h)) * len(entries):  # all heads of some
            assert piece.place("H", h) == (0, h), (start, stop)
        elif len(entries) > 1:
            assert piece.place("H", h) is None and piece.place("H", len(rows)) is None, (start, stop)
        assert piece.place("T", 5) == (0, 5)


def test_batch_entries_that_were_folded_into_the_heads_have_heads_from_everywhere() -> None:
    piece = Piece("whole", (("H", 4), ("B", 2)), 2, 4)
    assert piece.place("H", 2) is None and piece.place("H", 4) is None
    assert piece.place("B", 2) == (0, 2) and piece.place("T", 3) == (0, 3)
