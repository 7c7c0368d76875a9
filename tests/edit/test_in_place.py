"""Functions that write into what they are given, as hooks of other libraries do: it is what they return that counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import edit
from hookattn.demo.induction import example_tokens, load_pretrained

FIELDS = ("q", "k", "v", "scores", "weights", "output")


def halved(call: edit.EditedCall) -> Tensor:
    call.value.mul_(0.5)
    return call.value


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("heads", [None, 1, [0, 2]], ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_what_is_written_in_place_is_done_and_recorded(
    field: str, heads: int | Sequence[int] | None, grad: bool
) -> None:
    model, ids = load_pretrained(), example_tokens(0, length=7)
    with torch.set_grad_enabled(grad):
        where: edit.Where = {"layer": 0, "heads": heads}
        expected = hookattn.edited(model, ids, edit.scale(field, 0.5, **where))
        made = hookattn.edited(model, ids, edit.call(halved, field, **where))
    assert torch.equal(made.output, expected.output) and not torch.equal(made.output, model(ids))
    (one,) = made[0].edits
    assert (one.edit, one.field, one.note) == ("call", field, "halved")
    for name in FIELDS:
        assert torch.equal(made[0].get(name), expected[0].get(name)), name
    assert made.faithful


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_written_and_not_returned_is_not_done(field: str) -> None:
    model, ids = load_pretrained(), example_tokens(0, length=7)

    def thrown_away(call: edit.EditedCall) -> Tensor:
        kept = call.value.clone()
        call.value.zero_()
        return kept

    with torch.no_grad():
        made = hookattn.edited(model, ids, edit.call(thrown_away, field, layer=0))
        assert torch.equal(made.output, model(ids)) and made[0].edits == ()


def test_an_edit_after_one_that_writes_in_place() -> None:
    model, ids = load_pretrained(), example_tokens(0, length=7)
    for field in FIELDS:
        halve = edit.call(halved, field, layer=0, heads=[0, 2])
        made = hookattn.edited(model, ids, halve, edit.scale(field, 2.0, layer=0))
        expected = hookattn.edited(
            model, ids, edit.scale(field, 0.5, layer=0, heads=[0, 2]), edit.scale(field, 2.0, layer=0)
        )
        assert torch.equal(made.output, expected.output), field


def test_what_is_no_number_is_returned_as_it_was() -> None:
    model, ids = load_pretrained(), example_tokens(0, length=7)
    for field in FIELDS:
        edits = edit.set(field, float("nan"), layer=0, heads=1), edit.call(lambda call: call.value, field)
        with torch.no_grad():
            made = hookattn.edited(model, ids, *edits)
        assert [one.edit for call in made for one in call.edits] == ["set"], field
