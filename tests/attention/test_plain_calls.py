"""Which calls go the short way, what statistics are given of a call, and letters that name the axes of q."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookattn import KernelCall
from hookattn.attention.axis_letters import problem_of
from hookattn.attention.kernel_call import is_plain
from hookattn.attention.masks import Diagonal
from hookattn.attention.pieces import Piece
from hookattn.attention.score_inputs import ScoreInputs
from tests.reference import draw

X = torch.ones(1, 1, 2, 2)


def call(**more: Any) -> KernelCall:
    q, k, v = draw(2, 4, 3, 8, seed=1), draw(2, 2, 5, 8, seed=2), draw(2, 2, 5, 6, seed=3)
    made = KernelCall(q, k, v, draw(2, 4, 3, 6, seed=4), 0.5, "tap")
    for name, value in more.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    "more", [{}, {"mask": X > 0}, {"causal": True, "offset": 2, "window": 3}, {"kind": "self"}], ids=str
)
def test_a_softmax_over_products_with_a_mask_at_most_is_plain(more: dict[str, Any]) -> None:
    assert is_plain(call(**more))


NOT_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("bias", "sinks", "scores", "weights", "applied", "undropped", "outer_error"), X),
    "softcap": 30.0,
    "softmax_dtype": torch.float32,
    "piece": Piece("whole", (("T", 7),), 0, 3),
    "basis": dict.fromkeys("BHTSG", "kernel"),
    "output": None,
    "scale": torch.tensor(0.5),
    "score": "distance",
    "normalizer": "sigmoid",
    "q": None,
    "k": None,
    "dropout": 0.1,
    "notes": ["a line"],
    "opaque": True,
    "mixed": True,
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_one_thing_more_and_a_call_is_not_plain(name: str) -> None:
    assert not is_plain(call(**{name: NOT_PLAIN[name]}))


def test_what_statistics_are_of() -> None:
    """Of a product, what makes its scores; else the scores alone, beside vectors that say no more than extents."""
    rows, positions = torch.tensor([2, 0]), torch.tensor([[4, 2]])
    given = {"bias": draw(3, 5), "mask": draw(4, 1, 5) > 0, "sinks": draw(4), "softcap": 2.0, "scale": 0.25}
    made = call(**given, causal=True, offset=2, window=3)
    found = ScoreInputs.of(made, rows, positions)
    assert found.q is made.q and found.k is made.k and found.scores is None
    assert (found.scale, found.softcap, found.diagonal) == (0.25, 2.0, Diagonal(True, 2, 3))
    assert found.bias is not None and torch.equal(found.bias, given["bias"][None, None])
    assert found.mask is not None and torch.equal(found.mask, given["mask"][None])
    assert found.sinks is not None and torch.equal(found.sinks, given["sinks"].view(1, 4, 1, 1))
    assert found.rows is rows and found.positions is positions and found.notes is made.notes
    own = draw(2, 4, 3, 5, seed=7)
    for change in ({"opaque": True}, {"score": "distance"}, {"q": None, "weights": own}):
        found = ScoreInputs.of(call(scores=own, scale=0.25, **change), None, None)
        assert found.scores is own and found.scale == 1.0
        assert found.q.shape == (2, 4, 3, 1) and found.k.shape == (2, 2, 5, 1)


@pytest.mark.parametrize("letters", ["BTHD", "BHTD", "THD", "TD", "DT"])
def test_letters_that_name_the_axes_of_q(letters: str) -> None:
    assert problem_of(letters) is None


@pytest.mark.parametrize(
    ("letters", "problem"),
    [
        (None, "None is no string of letters"),
        (("T", "D"), "('T', 'D') is no string of letters"),
        ("BTSD", "'S' is none of B (batch), H (heads), T (queries) and D (width)"),
        ("btd", "'b' is none of B (batch), H (heads), T (queries) and D (width)"),
        ("BTTD", "T is there twice, and q has each axis once"),
        ("BHD", "T is missing, which q has in any case"),
        ("BHT", "D is missing, which q has in any case"),
    ],
)
def test_letters_that_do_not(letters: object, problem: str) -> None:
    assert problem_of(letters) == problem
