"""Which blocks of queries a kernel that goes by keys looks at: all that may see some, and no more than it needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.language")

from hookattn.attention.kernels.statistics import _query_blocks
from hookattn.attention.masks import Diagonal
from hookattn.attention.score_inputs import ScoreInputs

diagonals = st.builds(
    Diagonal, causal=st.booleans(), offset=st.integers(-9, 9), window=st.sampled_from([None, 1, 2, 5, 100])
).filter(lambda d: d.hides_any)


@given(
    diagonals, st.integers(1, 14), st.integers(1, 14), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.data()
)
@settings(max_examples=400, deadline=None)
def test_blocks_of_queries_by_the_keys_that_they_see(
    diagonal: Diagonal, t: int, s: int, bm: int, bn: int, data: st.DataObject
) -> None:
    rows = data.draw(st.sampled_from([None, "some", "any"]))
    numbers = list(range(t)) if rows is None else data.draw(st.lists(st.integers(0, 20), min_size=t, max_size=t))
    if rows == "some":
        numbers = sorted(numbers)
    problem = ScoreInputs(
        torch.zeros(1, 1, t, 1),
        torch.zeros(1, 1, s, 1),
        causal=diagonal.causal,
        offset=diagonal.offset,
        window=diagonal.window,
        rows=None if rows is None else torch.tensor(numbers),
    )
    found = _query_blocks(problem, bm, bn)
    seen = diagonal.allows(torch.tensor(numbers), slice(0, s))
    blocks = [slice(i, i + bn) for i in range(0, t, bn)]
    assert found.shape == (4, -(-s // bm)) and found.dtype == torch.int64
    for j, (first, left, right, last) in enumerate(found.T.tolist()):
        assert 0 <= first <= left <= right <= last <= len(blocks)
        keys = slice(j * bm, min((j + 1) * bm, s))
        some = [i for i, block in enumerate(blocks) if seen[block, keys].any()]
        every = [i for i, block in enumerate(blocks) if seen[block, keys].all()]
        assert set(some) <= set(range(first, last)), "a block that sees some is left out"
        assert set(range(left, right)) <= set(every), "a block is taken to see all that does not"
        if rows is None:  # in order: nothing is looked at for nothing, and no mask made for nothing
            assert not some or (first, last) == (some[0], some[-1] + 1)
            assert not every or (left, right) == (every[0], every[-1] + 1)
