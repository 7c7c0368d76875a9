"""Scores and weights block by block, at sizes where every bound of a block is met, against plain math in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hookattn.attention import Diagonal, derivation
from hookattn.attention.derivation import derive
from tests.reference import draw, reference_attention

few = settings(max_examples=150, deadline=None)
diagonals = st.builds(
    Diagonal, causal=st.booleans(), offset=st.integers(-9, 9), window=st.sampled_from([None, 1, 3, 100])
)
sizes = st.fixed_dictionaries(
    {
        "b": st.integers(1, 2),
        "g": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "t": st.sampled_from([1, 2, 15, 16, 17, 33, 50]),
        "s": st.integers(1, 9),
    }
)


def sees(diagonal: Diagonal, row: int, key: int) -> bool:
    """By the definition of causal, offset and window."""
    back = row + diagonal.offset - key
    return (back >= 0 or not diagonal.causal) and (diagonal.window is None or abs(back) < diagonal.window)


@given(sizes, diagonals, st.integers(1, 400), st.data())
@few
def test_every_block_is_in_its_place(n: dict[str, int], diagonal: Diagonal, block: int, data: st.DataObject) -> None:
    """Whatever is cut: several heads, one head, some rows of one; the kernel's own mask is of the rows asked for."""
    b, g, h, t, s = n["b"], n["g"], n["g"] * n["groups"], n["t"], n["s"]
    q, k = draw(b, h, t, 4, seed=1), draw(b, g, s, 4, seed=2)
    options: dict[str, Any] = {"softcap": data.draw(st.sampled_from([None, 2.0]))}
    if data.draw(st.booleans()):
        options["bias"] = draw(*(data.draw(st.sampled_from(sorted({1, m}))) for m in (b, h, t, s)), seed=3)
    mask = None
    if data.draw(st.booleans()):
        mask = draw(*(data.draw(st.sampled_from(sorted({1, m}))) for m in (b, h, t, s)), seed=4) > -0.5
        options["mask"] = mask
    else:
        rows = data.draw(st.sampled_from([None, [3 * i % 60 for i in range(t)]]))
        options |= {"diagonal": diagonal, "rows": None if rows is None else torch.tensor(rows)}
        numbers = rows or list(range(t))
        mask = torch.tensor([[sees(diagonal, i, j) for j in range(s)] for i in numbers])[None, None]
    scores, weights, _ = reference_attention(
        q, k, k, scale=0.7, softcap=options["softcap"], bias=options.get("bias"), mask=mask
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derivation, "_BLOCK", block)
        found, made = derive(q, k, 0.7, **options)
        alone = derive(q, k, 0.7, want_scores=False, **options)
        assert derive(q, k, 0.7, want_scores=False, want_weights=False, **options) == (None, None)
        only = derive(q, k, 0.7, want_weights=False, **options)
    assert found is not None and made is not None and alone[1] is not None and only[0] is not None
    torch.testing.assert_close(found.double(), scores, atol=1e-5, rtol=1e-5)
    live = mask.expand(b, h, t, s).any(-1)
    torch.testing.assert_close(made.double()[live], weights[live], atol=1e-5, rtol=1e-5)
    assert not made[~live].any() and not made[~mask.expand(b, h, t, s)].any()
    assert torch.equal(alone[1], made) and torch.equal(only[0], found) and alone[0] is None is only[1]


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 8), st.integers(1, 1 << 12))
@few
def test_a_block_is_no_larger_than_its_bound_and_whole_groups_stay_together(
    t: int, s: int, groups: int, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derivation, "_BLOCK", most)
        heads, rows = derivation._block_size(t, s, groups)
    if groups * t * s <= most:
        assert rows == t and heads % groups == 0 and heads * t * s <= most < (heads + groups) * t * s
    else:
        assert heads == 1
        assert rows == 16 or (rows > 16 and rows * s <= most < (rows + 1) * s)
