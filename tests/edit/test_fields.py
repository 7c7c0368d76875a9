"""Every edit of every field, against attention by the book in float64; and whoever is not edited keeps its bits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import edit
from hookattn.calls.fields import EditedRows
from hookattn.testing import check_clean
from tests.edit.by_hand import CASES, Case, at, attend
from tests.reference import causal, draw, same_bits
from tests.taps.test_changes import Projected as Fused
from tests.taps.test_changes import Repeated

EXACT = 1e-12
T = 6
each_case = pytest.mark.parametrize("case", CASES, ids=str)


HIDDEN = torch.ones(1, 1, T, T, dtype=torch.bool)
HIDDEN[..., 0] = False
HIDDEN[..., 0, 0] = True
ADDED = draw(1, 4, T, T, seed=8, dtype=torch.float64)
KERNELS: dict[str, tuple[Callable[[], Fused], Tensor | None, Tensor | None]] = {
    "plain": (Fused, None, None),
    "causal": (lambda: Fused(is_causal=True), causal(T)[None, None], None),
    "bool mask": (lambda: Fused(attn_mask=HIDDEN), HIDDEN, None),
    "float mask": (lambda: Fused(attn_mask=ADDED.masked_fill(~HIDDEN, -torch.inf)), HIDDEN, ADDED),
    "grouped, causal": (lambda: Fused(2, enable_gqa=True, is_causal=True), causal(T)[None, None], None),
    "repeated": (lambda: Repeated(2, scale=0.7), None, None),
}


def single(name: str) -> Fused:
    """A model in float32."""
    torch.manual_seed(1)
    model = KERNELS[name][0]()
    if isinstance(mask := model.given.get("attn_mask"), Tensor) and mask.dtype == torch.float64:
        model.given["attn_mask"] = mask.float()
    return model


@each_case
@pytest.mark.parametrize("name", KERNELS)
def test_through_the_fused_kernel(name: str, case: Case) -> None:
    make, mask, bias = KERNELS[name]
    torch.manual_seed(1)
    model = make().double()
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    made: list[Tensor] = []
    with torch.no_grad():
        plain = model(x)
        trace = hookattn.edited(model, x, case.edit(), verify="full", strict=True)
        z = attend(*model.operands(x), mask, bias, model.given.get("scale"), case.changes, made)
        assert float((trace.output - model.finish(z)).abs().max()) < EXACT
        assert float((plain - model.finish(z)).abs().max()) > 1e-4, "so the edit does something"
    (call,) = trace.calls
    assert float((call.output - z).abs().max()) < EXACT and float((call.weights - made[0]).abs().max()) < EXACT
    assert call.certificate.faithful and [e.edit for e in call.edits] == [case.edit().name]
    check_clean(model)


@each_case
@pytest.mark.parametrize("name", KERNELS)
def test_others_keep_their_bits(name: str, case: Case) -> None:
    """The output of a head that is not edited, in float32, where rounding would tell."""
    model, x = single(name), draw(2, T, 16, seed=4)
    with torch.no_grad():
        clean, edited = hookattn.trace(model, x)[0], hookattn.edited(model, x, case.edit())[0]
    assert same_bits(clean.output[:, case.others], edited.output[:, case.others])
    assert not same_bits(clean.output, edited.output)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("field", ["q", "k", "v", "scores", "weights", "output"])
def test_an_edit_that_returns_what_it_got(name: str, field: str) -> None:
    """Bits, in float32 and with gradients on: its value, a copy of it, and gates of one that want a gradient."""
    model, x = single(name), draw(2, T, 16, seed=4)
    plain = model(x)
    for same in (
        edit.call(lambda c: c.value, field),
        edit.call(lambda c: c.value.clone(), field),
        edit.scale(field, torch.ones(1, 1, 1, 1)),
        edit.scale(field, torch.ones((), requires_grad=True)),
        edit.scale(field, 1.0),
    ):
        trace = hookattn.edited(model, x, same)
        assert torch.equal(trace.output, plain)


@pytest.mark.parametrize("grad", [False, True])
def test_edits_compose(grad: bool) -> None:
    """Fields in the order in which one is made of the other, of one field in the order that is given."""
    torch.manual_seed(1)
    model = Fused(is_causal=True).double()
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    edits = [
        edit.zero("output", heads=3),
        edit.scale("weights", 0.5, heads=[0, 1]),
        edit.add("weights", 0.25, heads=[1, 2]),
        edit.knockout(heads=[0], queries=[5], keys=[1]),
        edit.scale("q", 2.0, heads=[0, 2]),
        edit.add("output", 1.0, heads=3),
        edit.add("v", 1.0, keys=[0]),
    ]
    changes = {
        "q": at(lambda x: 2 * x, slice(None), [0, 2]),
        "v": at(lambda x: x + 1, slice(None), slice(None), [0]),
        "mask": at(lambda x: False, slice(None), [0], [5], [1]),
        "weights": lambda w: at(lambda x: x + 0.25, slice(None), [1, 2])(at(lambda x: x / 2, slice(None), [0, 1])(w)),
        "output": lambda z: at(lambda x: x + 1, slice(None), [3])(at(lambda x: 0.0, slice(None), [3])(z)),
    }
    with torch.set_grad_enabled(grad):
        trace = hookattn.edited(model, x, edits[:3], *edits[3:], strict=True, verify="full")
    z = attend(*model.operands(x), causal(T)[None, None], changes=changes)
    assert float((trace.output - model.finish(z)).detach().abs().max()) < EXACT
    assert [e.edit for e in trace[0].edits] == ["scale", "add", "knockout", "scale", "add", "zero", "add"]


@each_case
@pytest.mark.parametrize("name", ["plain", "float mask", "grouped, causal"])
def test_gradients_go_through(name: str, case: Case) -> None:
    make, mask, bias = KERNELS[name]
    torch.manual_seed(1)
    model = make().double()
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    leaves = list(model.parameters())
    got = torch.autograd.grad(hookattn.edited(model, x, case.edit()).output.square().sum(), leaves, allow_unused=True)
    z = attend(*model.operands(x), mask, bias, model.given.get("scale"), case.changes)
    expected = torch.autograd.grad(model.finish(z).square().sum(), leaves, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).abs().max()) < 1e-10


@pytest.mark.parametrize("field", ["q", "k", "v", "scores", "weights", "output"])
def test_gates_have_gradients(field: str) -> None:
    """Of gates of one, where no value is changed: by finite differences."""
    torch.manual_seed(1)
    model = Fused(is_causal=True).double()
    x = draw(2, T, 16, seed=4, dtype=torch.float64)

    def loss(gates: Tensor) -> Tensor:
        out: Tensor = hookattn.edited(model, x, edit.scale(field, gates)).output
        return out.square().sum()

    gates = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(loss(gates), gates)
    eye, step = torch.eye(4, dtype=torch.float64), 1e-6
    with torch.no_grad():
        slopes = [(loss(gates + step * e) - loss(gates - step * e)) / (2 * step) for e in eye]
    assert torch.allclose(got, torch.stack(slopes), atol=1e-8) and float(got.abs().max()) > 1e-3


def test_set_weights_are_put_among_the_others_when_they_are_read() -> None:
    """Nothing of the size T·S is formed for the record of a fused kernel; what is read, copied and saved is whole."""
    torch.manual_seed(1)
    model, x = Fused(is_causal=True).double(), draw(2, T, 16, seed=4, dtype=torch.float64)
    with torch.no_grad():
        call = hookattn.edited(model, x, edit.set("weights", 0.25, heads=[1], queries=[0, 3], batch=1))[0]
        clean = hookattn.trace(model, x)[0].weights
    place = call.place("weights")
    assert isinstance(place, EditedRows) and place.rows.shape == (1, 1, 2, T) and tuple(place.shape) == (2, 4, T, T)
    expected = clean.clone()
    expected[1, 1, [0, 3]] = 0.25
    for one in (call, copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        assert torch.equal(one.weights, expected)
    assert torch.equal(call.at(heads=1, queries=3).weights, expected[:, 1:2, 3:4])
    call.weights.zero_()  # the reader's own
    assert torch.equal(call.weights, expected)
