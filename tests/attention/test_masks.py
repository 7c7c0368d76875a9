"""What a kernel hides by itself: a Diagonal's answers against a loop over pairs of query and key."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hookattn import KernelCall
from hookattn.attention import Diagonal, causal_mask
from hookattn.attention.masks import complete_mask
from hookattn.attention.score_inputs import ScoreInputs
from tests.reference import draw

diagonals = st.builds(
    Diagonal, causal=st.booleans(), offset=st.integers(-9, 9), window=st.sampled_from([None, 1, 2, 5, 100])
)
many = settings(max_examples=200, deadline=None)
CPU = torch.device("cpu")


def sees(diagonal: Diagonal, i: int, j: int) -> bool:
    """By the definition of causal, offset and window."""
    back = i + diagonal.offset - j
    if diagonal.causal and back < 0:
        return False
    return diagonal.window is None or abs(back) < diagonal.window


def matrix(diagonal: Diagonal, rows: list[int], s: int) -> Tensor:
    return torch.tensor([[sees(diagonal, i, j) for j in range(s)] for i in rows], dtype=torch.bool)


rows_of = st.lists(st.integers(0, 11), min_size=1, max_size=6)


@given(diagonals, rows_of, st.integers(1, 12), st.data())
@many
def test_which_keys_are_hidden(diagonal: Diagonal, rows: list[int], s: int, data: st.DataObject) -> None:
    """Of rows in any order, some of them twice, and some of the keys."""
    start = data.draw(st.integers(0, s - 1))
    keys = slice(start, data.draw(st.integers(start + 1, s)))
    want = matrix(diagonal, rows, s)[:, keys]
    assert torch.equal(diagonal.allows(torch.tensor(rows), keys), want)
    assert torch.equal(diagonal.hides(torch.tensor(rows), keys), ~want)
    assert diagonal.hides_any or want.all()


@given(diagonals, st.integers(1, 9), st.integers(1, 9))
@many
def test_masks_of_all_queries_and_keys(diagonal: Diagonal, t: int, s: int) -> None:
    want = matrix(diagonal, list(range(t)), s)
    mask = diagonal.mask(t, s)
    assert mask.shape == (1, 1, t, s) and torch.equal(mask[0, 0], want)
    causal, offset, window = diagonal
    assert torch.equal(causal_mask(t, s, causal=causal, offset=offset, window=window), mask)
    whole = complete_mask(None, t, s, diagonal, CPU)
    assert torch.equal(whole.mask.expand(1, 1, t, s), mask)
    assert (whole.real is None) == (not diagonal.hides_any) and whole.empty == (not bool(want.any(1).all()))


@given(diagonals, rows_of, st.integers(1, 12))
@many
def test_reach_is_no_more_than_what_is_seen(diagonal: Diagonal, rows: list[int], s: int) -> None:
    """``some`` has every key that is seen, and all rows see all of ``all``: no key less, and no key more."""
    rows = list(range(min(rows), max(rows) + 1))
    some, every = diagonal.reach(rows[0], rows[-1], s)
    seen = matrix(diagonal, rows, s)
    assert 0 <= some.start <= every.start <= every.stop <= some.stop <= s and some.start < some.stop
    assert not seen[:, : some.start].any() and not seen[:, some.stop :].any()
    assert seen[:, every].all()
    if seen.any():
        assert seen[:, some.start].any() and seen[:, some.stop - 1].any()
    assert every.stop - every.start == int(seen.all(0).sum())


@given(diagonals, st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
@many
def test_seers_are_reach_from_the_keys(diagonal: Diagonal, t: int, s: int, size: int) -> None:
    assume(diagonal.hides_any)
    first = torch.arange(0, s, size)
    last = (first + size - 1).clamp_max(s - 1)
    seers = diagonal.seers(first, last)
    seen = matrix(diagonal, list(range(t)), s)
    for block, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        part = seen[:, a : b + 1]
        some, every = (
            {i for i in range(t) if int(begin[block]) <= i and (end is None or i <= int(end[block]))}
            for begin, end in ((seers.first, seers.last), (seers.all_first, seers.all_last))
        )
        assert some == set(part.any(1).nonzero().flatten().tolist())
        assert every == set(part.all(1).nonzero().flatten().tolist())


@given(diagonals)
@settings(max_examples=30, deadline=None)
def test_calls_and_what_statistics_are_of_have_the_same(diagonal: Diagonal) -> None:
    """What a tap says in words, after the call was made, too, is one thing for all who read it."""
    q, k = draw(1, 1, 3, 2, seed=1), draw(1, 1, 4, 2, seed=2)
    given: dict[str, Any] = dict(zip(("causal", "offset", "window"), diagonal, strict=True))
    call = KernelCall(q, k, k, None, 1.0, "tap", **given)
    assert call.diagonal == diagonal
    assert ScoreInputs.of(call, None, None).diagonal == ScoreInputs(q, k, **given).diagonal == diagonal
    at = diagonal.positions(torch.arange(3))
    assert (at is None) == (not diagonal.causal) and (
        at is None or at.tolist() == [i + diagonal.offset for i in range(3)]
    )
    call.causal, call.offset, call.window = True, 1, 7
    assert call.diagonal == Diagonal(True, 1, 7)
