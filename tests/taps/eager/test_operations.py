"""The table of operations: each name is one of torch's, stands once, and leads to its row in every form."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hookattn.taps.eager import entry_rules
from hookattn.taps.eager.operations import _OPERATORS, _ROWS, OPERATIONS, kind_of, name_of, writes_to
from hookattn.taps.eager.states import ScatteredScores, Scores, Weights

PLACES = (torch, Tensor, F, torch._C, torch._C._nn, torch.special, torch.ops.aten, Tensor.data)
# A method of this name has its arguments in another order than the function, and a row of its own.
OURS = {"where_method"}


def test_every_name_is_one_of_torch() -> None:
    names = [name.removeprefix("aten::") for name in (*OPERATIONS, *_OPERATORS, *_OPERATORS.values())]
    unknown = [name for name in names if name not in OURS and not any(hasattr(place, name) for place in PLACES)]
    assert not unknown


def test_a_name_stands_in_one_row() -> None:
    counts = Counter(name for names in _ROWS for name in names.split())
    assert [name for name, n in counts.items() if n > 1] == []


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (torch.softmax, "softmax"),
        (Tensor.softmax, "softmax"),
        (torch.special.softmax, "softmax"),
        (torch.special.log_softmax, "log_softmax"),
        (Tensor.T.__get__, "T"),  # type: ignore[attr-defined]
        (Tensor.H.__get__, "T"),  # type: ignore[attr-defined]
        (Tensor.mH.__get__, "mT"),  # type: ignore[attr-defined]
        (Tensor.shape.__get__, ""),  # type: ignore[attr-defined]
        (torch.where, "where"),
        (Tensor.where, "where_method"),
        (Tensor.matmul, "matmul"),
        (Tensor.size, ""),
        (torch.zeros, ""),
    ],
)
def test_functions_methods_and_properties_have_one_name(func: object, name: str) -> None:
    assert name_of(func) == name


def test_an_operation_without_a_row_keeps_the_axes_and_has_no_rule() -> None:
    kind = kind_of("some_operation_of_a_later_torch")
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    assert kind.axes(x, y, (x,), {}) is not None and kind.entries is None and not kind.rules
    assert not kind.moves_scores and not kind.ignored and kind.arithmetic is None


@pytest.mark.parametrize("name", ["squeeze", "unsqueeze", "clip", "swapaxes", "t", "roll", "divide"])
def test_an_operation_in_place_that_has_no_row_moves_entries_alone(name: str) -> None:
    """What it leaves of the tensor before it is gone, so that no rule of the other form holds."""
    assert f"{name}_" not in OPERATIONS and writes_to(f"{name}_", (), {})
    assert kind_of(f"{name}_").entries is kind_of(name).entries and not kind_of(f"{name}_").rules


def test_operators_are_the_operations_that_they_stand_for() -> None:
    for name, operators in {"mul": "__mul__ __rmul__ __imul__", "add": "__add__ __iadd__", "sub": "__isub__"}.items():
        for operator in operators.split():
            kind = kind_of(operator)
            assert kind.arithmetic == name and kind.rules[Scores] is kind_of(name).rules[Scores]
            assert kind.entries is entry_rules.same_places_of_either
    assert writes_to("__iadd__", (), {}) and not writes_to("__add__", (), {})


def test_views_of_the_whole_keep_every_state_but_scattered_scores() -> None:
    """Those go by their entries, which the view moves as it moves the tensor."""
    for name in ("view", "transpose", "permute", "expand", "to", "contiguous"):
        rules = kind_of(name).rules
        assert Scores in rules and Weights in rules and ScatteredScores not in rules
        assert kind_of(name).entries is not None and kind_of(name).moves_scores


def test_which_operations_write_to_what_they_are_given() -> None:
    """In place by name, by an argument, and by its place among the arguments."""
    x = torch.ones(2)
    for name in ("add_", "masked_fill_", "softmax_", "__iadd__", "__imul__", "__setitem__"):
        assert writes_to(name, (x,), {}), name
    for name in ("add", "masked_fill", "softmax", "__add__", "__getitem__", "__matmul__", "__rsub__", "__init__x"):
        assert not writes_to(name, (x,), {}), name
    assert writes_to("dropout", (x, 0.5, True, True), {})
    assert not writes_to("dropout", (x, 0.5, True, False), {}) and not writes_to("dropout", (x, 0.5, True), {})
    assert not writes_to("where", (x, x, x, True), {})
    assert writes_to("relu", (x,), {"inplace": True}) and not writes_to("relu", (x,), {"inplace": False})
    assert writes_to("matmul", (x, x), {"out": x}) and not writes_to("matmul", (x, x), {"out": None})


def test_a_convolution_maps_the_channels_of_a_batch_and_of_one_sample() -> None:
    """Along one axis, two and three; one that maps each channel by itself moves positions and makes no features."""
    from hookattn.taps.eager import axis_history
    from hookattn.taps.eager.view_rules import convolved, map_of

    for rank in (1, 2, 3):
        weight, each = torch.ones(6, 4, *[1] * rank), torch.ones(4, 1, *[1] * rank)
        for lead in ((), (2,)):
            x, out = torch.ones(*lead, 4, *[5] * rank), torch.ones(*lead, 6, *[5] * rank)
            assert convolved(x, out, (x, weight), {}) == (axis_history.mapped, (len(lead), map_of(weight)))
            assert convolved(x, out, (x,), {"weight": weight}) == (axis_history.mapped, (len(lead), map_of(weight)))
            assert convolved(x, x, (x, each), {}) == (axis_history.resized, None)
        x = torch.ones(2, 2, 4, *[5] * rank)
        assert convolved(x, x, (x, weight), {}) is None and convolved(x[0, 0, 0], x, (x, weight), {}) is None
    assert convolved(torch.ones(3, 4), torch.ones(3, 4), (None, torch.ones(4, 4)), {}) is None
    assert convolved(torch.ones(3, 4), torch.ones(3, 4), (None,), {}) is None
