"""What cannot be edited, and what does not fit: an error that says where and why, and a model that is left clean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hookattn
from hookattn import EditError, HookattnError, InputError, SelectionError, TraceTooLargeError, edit
from hookattn.testing import check_clean
from tests.edit.test_fields import Fused
from tests.reference import draw, same_bits

X = draw(2, 6, 16, seed=4)


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Fused(2, enable_gqa=True), Fused()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return Two()


BAD: dict[str, tuple[Callable[[hookattn.Trace], Any], type[HookattnError], str]] = {
    "no such field": (lambda t: edit.zero("pattern"), SelectionError, "weights"),
    "a field that is no text": (lambda t: edit.zero(3), InputError, "field=3"),  # type: ignore[arg-type]
    "keys of an output": (lambda t: edit.zero("output", keys=1), SelectionError, "no axis of keys"),
    "queries of k": (lambda t: edit.zero("k", queries=1), SelectionError, "no axis of queries"),
    "no heads": (lambda t: edit.zero(heads=[]), SelectionError, "selects nothing"),
    "no such option": (lambda t: edit.zero(head=3), InputError, "head"),  # type: ignore[call-arg]
    "a step from the end": (lambda t: edit.zero(step=-1), SelectionError, "counted from 0"),
    "every edge": (lambda t: edit.knockout(layer=1), SelectionError, "edit.zero"),
    "no values": (lambda t: edit.set("weights", "x"), InputError, "values="),  # type: ignore[arg-type]
    "a flag as values": (lambda t: edit.add("weights", True), InputError, "values=True"),
    "gates that are a complex number": (lambda t: edit.scale("output", 1j), InputError, "gates="),  # type: ignore[arg-type]
    "a number that no float can be": (lambda t: edit.set("q", 10**400), InputError, "values=1000"),
    "an array as values": (lambda t: edit.set("q", np.ones(4)), InputError, "got ndarray"),  # type: ignore[arg-type]
    "values on the meta device": (lambda t: edit.set("q", torch.ones(1, device="meta")), EditError, "meta device"),
    "gates on the meta device": (lambda t: edit.scale("q", torch.ones(4, device="meta")), EditError, "meta device"),
    "sparse values": (lambda t: edit.add("weights", torch.eye(6).to_sparse()), EditError, "sparse_coo"),
    "sparse gates": (lambda t: edit.scale("weights", torch.ones(4).to_sparse()), EditError, "sparse_coo"),
    "a patch without values": (lambda t: edit.patch("q", torch.ones(1, device="meta")), EditError, "meta device"),
    "a nested tensor": (lambda t: edit.set("q", torch.nested.nested_tensor([torch.ones(2)])), EditError, "nested"),
    "a flag that a function returns": (lambda t: edit.call(lambda c: True, "q"), EditError, "got True"),
    "no function": (lambda t: edit.call(3), InputError, "function="),  # type: ignore[arg-type]
    "no trace": (lambda t: edit.freeze(3), InputError, "of=3"),  # type: ignore[arg-type]
    "no corpus": (lambda t: edit.mean(over=3), InputError, "over=3"),  # type: ignore[arg-type]
    "no layer": (lambda t: edit.zero(layer=2), EditError, "met no attention call; what ran is main self"),
    "no layer among others": (lambda t: edit.zero(layer=[0, 7]), EditError, "layer 7 was in no call"),
    "no head": (lambda t: edit.zero(heads=4), EditError, "names 4, and this call has 4 heads"),
    "no key head": (lambda t: edit.zero("k", heads=2, layer=0), EditError, "names 2, and this call has 2 heads"),
    "no batch entry": (lambda t: edit.zero(batch=2), EditError, "this call has 2 batch"),
    "no query": (lambda t: edit.zero(queries=6), EditError, "met no attention call"),
    "no query among others": (lambda t: edit.zero(queries=[1, 6]), EditError, "queries 6 was in no call"),
    "no path": (lambda t: edit.zero(path="layers.9"), EditError, "met no attention call"),
    "values of another shape": (
        lambda t: edit.set("weights", torch.ones(3, 7)),
        EditError,
        r"\[2, 4, 6, 6\].*\[3, 7\]",
    ),
    "values that are no numbers": (lambda t: edit.set("q", torch.ones(1, dtype=torch.int64)), EditError, "int64"),
    "a function that returns nothing": (lambda t: edit.call(lambda c: None), EditError, "got None"),  # type: ignore[arg-type,return-value]
    "gates of other heads": (lambda t: edit.scale("output", torch.ones(3)), EditError, "3 gates for 4 heads"),
    "gates of too few layers": (lambda t: edit.scale("output", torch.ones(1, 4)), EditError, "gates of 1 layers"),
    "a trace of another length": (lambda t: edit.patch("weights", t), EditError, "no query at position 4"),
    "a trace of other layers": (
        lambda t: edit.patch("weights", t.select(layer=0), layer=1),
        EditError,
        "no call at this site",
    ),
    "a trace without the field": (lambda t: edit.patch("weights", _only(t, "q")), EditError, "was not captured"),
    "another batch": (lambda t: edit.resample("output", t[:1]), EditError, ""),
    "a batch of one": (lambda t: edit.resample(batch=0), EditError, "there is one"),
    "values where there are none yet": (lambda t: edit.call(lambda c: c.output, "q"), EditError, "not known yet"),
}


def _only(trace: hookattn.Trace, field: str) -> hookattn.Trace:
    torch.manual_seed(1)
    return hookattn.trace(Two(), X, capture=(field,))


@pytest.mark.parametrize("name", BAD)
def test_bad_edits(model: nn.Module, name: str) -> None:
    make, error, said = BAD[name]
    short = hookattn.trace(model, X[:, :4])
    plain = model(X)
    with pytest.raises(error, match=said):
        hookattn.edited(model, X, make(short))
    check_clean(model)
    assert same_bits(model(X), plain)


@pytest.mark.parametrize("number", [2, 10**20, np.int64(2), np.float32(2.5), -(10**30)], ids=repr)
def test_a_number_of_any_library(model: nn.Module, number: float) -> None:
    """As values and as what a function returns; an int may be larger than 64 bits."""
    values = torch.full((1, 1, 1, 1), float(number))
    expected = hookattn.edited(model, X, edit.set("v", values, heads=1)).output
    assert same_bits(hookattn.edited(model, X, edit.set("v", number, heads=1)).output, expected)
    assert same_bits(hookattn.edited(model, X, edit.call(lambda c: number, "v", heads=1)).output, expected)


def test_an_error_names_the_place_and_the_edit(model: nn.Module) -> None:
    with pytest.raises(EditError, match=r"layers\.1 \(step 0, tap sdpa\): edit\.set\('weights', layer=1\)"):
        hookattn.edited(model, X, edit.set("weights", torch.ones(3, 7), layer=1))
    with pytest.raises(InputError, match="capture"):
        hookattn.edited(model, X, edit.zero(), captur="weights")  # type: ignore[call-arg]
    with pytest.raises(InputError, match="edits of"):
        hookattn.edited(model, X, "zero")  # type: ignore[arg-type]


def test_inference_mode(model: nn.Module) -> None:
    """Edits are done in it; gates that want a gradient are told that they get none."""
    with torch.no_grad():
        expected = hookattn.edited(model, X, edit.zero("weights", heads=1)).output
    with torch.inference_mode():
        made = hookattn.edited(model, X, edit.zero("weights", heads=1))
        assert torch.equal(made.output, expected) and made.faithful
        with pytest.raises(EditError, match="inference_mode"):
            hookattn.edited(model, X, edit.scale("output", torch.ones(4, requires_grad=True)))
    later = hookattn.edited(model, X, edit.patch("output", made, heads=1))
    later.output.sum().backward()
    assert model.layers[0].query.weight.grad is not None  # type: ignore[index,union-attr]


def test_the_model_raises_in_an_edit(model: nn.Module) -> None:
    def broken(call: edit.EditedCall) -> Tensor:
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError):
        hookattn.edited(model, X, edit.call(broken, layer=1))
    check_clean(model)


def test_an_edit_can_be_used_again(model: nn.Module) -> None:
    """In several blocks, with the same draws in each."""
    one = edit.resample("output", "positions", seed=3)
    first, second = (hookattn.edited(model, X, one).output for _ in range(2))
    assert torch.equal(first, second)
    other = hookattn.edited(model, X, edit.resample("output", "positions", seed=4)).output
    assert not torch.equal(first, other)


def test_what_is_skipped_was_not_edited() -> None:
    """An edit that is meant for it raises, and one that is meant for another goes on."""

    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            several = torch.nested.nested_tensor([draw(4, 3, 8, seed=1), draw(4, 5, 8, seed=2)])
            nn.functional.scaled_dot_product_attention(several, several, several)
            return x

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nested, self.fused = Nested(), Fused()

        def forward(self, x: Tensor) -> Tensor:
            return self.fused(self.nested(x))  # type: ignore[no-any-return]

    model = Both()
    with torch.no_grad():
        assert len(hookattn.trace(model, X).skipped) == 1
        with pytest.raises(EditError, match=r"nested .* cannot be done here: .* nested tensors"):
            hookattn.edited(model, X, edit.zero())
        assert len(hookattn.edited(model, X, edit.zero(path="fused")).skipped) == 1


def test_no_room_for_edited_weights(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept whole, as they follow from nothing; without them the edit is done all the same."""
    from hookattn.edit import doing

    monkeypatch.setattr(doing, "_LARGE", 0)
    monkeypatch.setattr(doing.devices, "free_memory", lambda device: 100)
    with pytest.raises(TraceTooLargeError, match=r"weights were edited.*Leave weights and scores out of capture="):
        hookattn.edited(model, X, edit.zero("weights", heads=1))
    check_clean(model)
    kept = hookattn.edited(model, X, edit.zero("weights", heads=1), capture=("q", "output"))
    assert bool((kept[0].output[:, 1] == 0).all())
    hookattn.edited(model, X, edit.zero("output", heads=1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_second_run_draws_the_same(reentrant: bool) -> None:
    """A checkpoint runs its part again in the backward: with other samples its gradient would be of another model."""
    torch.manual_seed(1)
    model, x = Fused().double(), X.double().requires_grad_()
    one = edit.resample("output", "positions", seed=3)

    def gradient(checkpointed: bool) -> Tensor:
        with hookattn.editing(model, one):
            out = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            (found,) = torch.autograd.grad(out.square().sum(), x) if not (checkpointed and reentrant) else (None,)
            if found is None:
                out.square().sum().backward()
                found, x.grad = x.grad, None
        assert found is not None
        return found

    assert torch.allclose(gradient(True), gradient(False), atol=1e-12)


@pytest.mark.parametrize("field", ["weights", "output", "v"])
def test_dropout_between(field: str) -> None:
    """The kernel's own dropout is in the other heads; of the edited one it is drawn anew, which the record says."""
    torch.manual_seed(1)
    model = Fused(dropout_p=0.5)
    torch.manual_seed(2)
    plain = model(X)
    torch.manual_seed(2)
    made = hookattn.edited(model, X, edit.scale(field, 2.0, heads=1))
    torch.manual_seed(2)
    clean = hookattn.trace(model, X)
    assert made.faithful and torch.equal(clean.output, plain)
    assert same_bits(made[0].output[:, [0, 2, 3]], clean[0].output[:, [0, 2, 3]])
    drawn = any("drawn anew" in note for note in made[0].notes)
    assert drawn is (field == "weights")
