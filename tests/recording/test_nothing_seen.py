"""A model without attention: the error says what was seen of it. Other libraries' operators that attend are listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.taps.foreign import handler_of
from tests.reference import draw

X = draw(2, 5, 24, seed=1)


class Runs(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.fixture
def library() -> Iterator[Any]:
    """Operators of somebody else; what is in them cannot be seen."""
    with torch.library._scoped_library("hookattn_tests", "DEF") as library:
        for name in ("fused_attention", "mix", "attention_backward"):
            library.define(f"{name}(Tensor x) -> Tensor")
            library.impl(name, lambda x: (x @ x.mT).softmax(-1) @ x, "CompositeExplicitAutograd")
        yield torch.ops.hookattn_tests


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: x + 1, "neither a kernel of torch, nor a product of two tensors or a softmax ran"),
        (lambda x: x.size(), "no operation of torch was seen"),
        (lambda x: x @ torch.ones(24, 3), r"products \(.*matmul.*\) ran, and nothing was made of one"),
        (lambda x: F.softmax(x, -1), "a softmax ran, and no values were weighted by it"),
    ],
)
def test_what_was_seen(function: Any, said: str) -> None:
    with pytest.raises(hookattn.NoAttentionError, match=rf"^no attention ran in Runs: .*{said}"):
        hookattn.trace(Runs(function), X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_in_which_nothing_is_seen() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    with pytest.raises(hookattn.NoAttentionError, match="Nothing can be seen in the scripted function double: if"):
        hookattn.trace(Runs(torch.jit.trace(double, X)), X)


def test_an_operator_in_which_nothing_is_seen(library: Any) -> None:
    with pytest.raises(hookattn.NoAttentionError, match="Nothing can be seen in hookattn_tests::mix: if it attends"):
        hookattn.trace(Runs(library.mix.default), X)


def test_an_operator_that_attends_by_its_name_is_listed(library: Any) -> None:
    """Beside an attention that is read, too, as an overload and as what all of them are called by."""

    def forward(x: Tensor) -> Tensor:
        y = library.fused_attention(library.attention_backward(x)) + library.fused_attention.default(x)
        return y + F.scaled_dot_product_attention(x, x, x)

    with pytest.warns(hookattn.SkippedWarning):
        trace = hookattn.trace(Runs(forward), X)
    assert len(trace) == 1 and torch.equal(trace.output, forward(X))
    (skipped,) = trace.skipped
    assert skipped.reason == (
        "torch.ops.hookattn_tests.fused_attention attends by its name, and its arguments are not known"
    )


def test_names_that_attend() -> None:
    attends = ("a::flash_attn_fwd", "b::unified_attention", "c::sdpa", "higher_order::flex_attention", "d::paged_attn")
    others = (
        "aten::index",
        "softmax",
        "a::flash_attn_bwd",
        "b::attention_mask",
        "c::rope",
        "d::reshape_and_cache_attn",
    )
    assert [n for n in (*attends, *others) if handler_of(n) is not None] == list(attends)
