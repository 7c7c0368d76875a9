"""Kernels that other code hides: torch's native layers, compiled code, foreign operators, transforms. Each is changed
as it would be in the open, or said to be missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from hookattn.taps import Change
from hookattn.taps.nn_attention import PYTHON_FORM
from hookattn.testing import check_clean
from tests.reference import draw, same_bits
from tests.taps.test_changes import EXACT, Edit, Editor, Projected, attend, cut, listening, louder

T = 6
X = draw(2, T, 16, seed=4, dtype=torch.float64)
PADDED = torch.zeros(2, T, dtype=torch.bool)
PADDED[1, 4:] = True


# -------------------------------------------------------------------------------------------- torch's native layers


class Attends(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.attn, self.given = nn.MultiheadAttention(16, 4, batch_first=True), given

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False, **self.given)[0].tanh()  # type: ignore[no-any-return]


class Encodes(nn.Module):
    """A layer, or several with what makes nested tensors of a padded batch."""

    def __init__(self, layers: int, norm_first: bool = False, **given: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers) if layers else layer
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, **self.given)  # type: ignore[no-any-return]


NATIVE: dict[str, tuple[Callable[[], nn.Module], Tensor | None]] = {
    "attention": (Attends, None),
    "attention, padded": (lambda: Attends(key_padding_mask=PADDED), ~PADDED[:, None, None]),
    "attention, masked": (lambda: Attends(attn_mask=~cut(T, T)[0, 0]), cut(T, T)),
    "layer": (lambda: Encodes(0), None),
    "layer, norm first": (lambda: Encodes(0, True), None),
    "layer, padded": (lambda: Encodes(0, src_key_padding_mask=PADDED), ~PADDED[:, None, None]),
    "encoder": (lambda: Encodes(2), None),
    "encoder, padded": (lambda: Encodes(2, src_key_padding_mask=PADDED), ~PADDED[:, None, None]),
}


def by_hand(model: nn.Module, x: Tensor, mask: Tensor | None, change: Callable[..., Any]) -> Tensor:
    """The same modules, with attention by the book in them: ``change`` of q, k, v, mask and the kernel's output."""

    def attended(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (4, 4)).transpose(1, 2)
            for y in F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        )
        return attn.out_proj(change(q, k, v, mask).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    if isinstance(model, Attends):
        return attended(model.attn, x).tanh()
    assert isinstance(model, Encodes)
    for layer in model.encoder.layers if isinstance(model.encoder, nn.TransformerEncoder) else [model.encoder]:
        if layer.norm_first:
            x = x + attended(layer.self_attn, layer.norm1(x))
            x = x + layer.linear2(F.relu(layer.linear1(layer.norm2(x))))
        else:
            x = layer.norm1(x + attended(layer.self_attn, x))
            x = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
    return x


EDITS = [
    Edit("q", lambda c: Change(q=louder(c.q)), lambda q, k, v, m: attend(louder(q), k, v, m)),  # type: ignore[arg-type]
    Edit(
        "mask",
        lambda c: Change(mask=_late() if c.mask is None else c.mask & _late()),
        lambda q, k, v, m: attend(q, k, v, _late() if m is None else m & _late()),  # type: ignore[arg-type]
    ),
    Edit("output", lambda c: None, lambda q, k, v, m: louder(attend(q, k, v, m))),  # type: ignore[arg-type]
]


def _late() -> Tensor:
    mask = torch.ones(1, 4, T, T, dtype=torch.bool)
    mask[0, 2, 3:, 0] = False
    return mask


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
@pytest.mark.parametrize("name", NATIVE)
def test_the_fast_path_is_left_where_somebody_listens(name: str, edit: Edit) -> None:
    make, mask = NATIVE[name]
    torch.manual_seed(1)
    model = make().double().eval()
    editor = Editor(edit.change)
    if edit.name == "output":
        editor.answer = lambda c: louder(c.output)  # type: ignore[arg-type]
    real = ~PADDED if "padded" in name else torch.ones(2, T, dtype=torch.bool)
    with torch.no_grad():
        plain = model(X)
        with listening(model, editor) as trace:
            got = model(X)
        assert same_bits(model(X), plain)
        expected = by_hand(model, X, mask, edit.by_hand)
        unedited = by_hand(model, X, mask, attend)
    assert float((unedited - plain)[real].abs().max()) < EXACT
    assert float((got - expected)[real].abs().max()) < EXACT
    assert float((unedited - expected)[real].abs().max()) > 1e-3
    n = 2 if name.startswith("encoder") else 1
    assert len(editor.asked) == len(editor.told) == len(trace.calls) == n and not editor.unasked
    assert {tap for _, tap, _ in editor.asked} == {"sdpa"} and trace.notes == [PYTHON_FORM]
    check_clean(model)


@pytest.mark.parametrize("name", ["attention", "layer"])
def test_what_would_not_take_the_fast_path_is_not_noted(name: str) -> None:
    torch.manual_seed(1)
    model = NATIVE[name][0]().double().eval()
    expected = model(X)
    with listening(model, Editor()) as trace:
        got = model(X)
    assert same_bits(got, expected) and trace.notes == []


class Weighs(nn.Module):
    """Weights are asked for, so that they are formed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0].tanh()  # type: ignore[no-any-return]


@pytest.mark.parametrize("train", [True, False])
def test_weights_that_are_asked_for_are_no_longer_native_either(train: bool) -> None:
    """What is written out by hand is the other taps' to change; here it has to come to them."""
    torch.manual_seed(1)
    model, editor = Weighs().double().train(train), Editor()
    with torch.no_grad(), listening(model, editor) as trace:
        model(X)
    assert [c.tap for c in trace.calls] == ["eager"]
    assert len(editor.unasked) + len(editor.asked) + len(editor.told) >= 1


# --------------------------------------------------------------------------------------------------- compiled code


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def random(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.dropout(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), 0.5, True), v)


def noisy(scores: Tensor) -> Tensor:
    return torch.dropout(torch.softmax(scores, -1), 0.5, True)


class Calls(Projected):
    """Attention in a function of its own, or its softmax."""

    def __init__(self, function: Any, softmax: bool = False) -> None:
        super().__init__()
        self.function, self.softmax = function, softmax

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.operands(x)
        return self.finish(self.function(q @ k.mT) @ v if self.softmax else self.function(q, k, v))


SCRIPTS = {
    "scripted": torch.jit.script,
    "traced": lambda f: torch.jit.trace(f, [draw(2, 4, T, 8, dtype=torch.float64)] * 3),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", SCRIPTS)
def test_what_compiled_code_was_made_from_runs_in_its_place(how: str) -> None:
    torch.manual_seed(1)
    model = Calls(SCRIPTS[how](fused)).double()
    for editor in (Editor(lambda c: Change(q=louder(c.q))), Editor()):
        changes = editor.change(type("C", (), {"q": X[None]})) is not None  # type: ignore[arg-type]
        with listening(model, editor) as trace:
            out = model(X)
        got = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        q, k, v = model.operands(X)
        hand = model.finish(attend(louder(q) if changes else q, k, v))
        expected = torch.autograd.grad(hand.square().sum(), list(model.parameters()))
        assert float((out - hand).detach().abs().max()) < EXACT
        assert max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) < EXACT * 100
        assert changes or same_bits(out, model(X))
        assert len(editor.asked) == len(editor.told) == len(trace.calls) == 1 and not editor.unasked


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_that_cannot_run_as_python_is_missed() -> None:
    model, editor = Calls(torch.jit.script(random)).double(), Editor()
    with listening(model, editor, strict=False):
        model(X)
    assert editor.unasked and not editor.asked


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_softmax_that_cannot_run_as_python() -> None:
    """What is around it is asked about: the values, and the output."""
    model, editor = Calls(torch.jit.script(noisy), True).double(), Editor()
    with listening(model, editor, strict=False) as trace:
        model(X)
    assert [tap for _, tap, _ in editor.asked] == ["eager"] and editor.told == [""] and not editor.unasked
    assert len(trace.calls) == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_torch_compile(fullgraph: bool) -> None:
    torch.manual_seed(1)
    inner = Projected(is_causal=True).double()
    model, editor = (
        nn.Sequential(torch.compile(inner, backend="eager", fullgraph=fullgraph)),
        Editor(lambda c: Change(q=louder(c.q))),
    )
    with torch.no_grad():
        plain = model(X)
        with listening(model, editor):
            got = model(X)
        q, k, v = inner.operands(X)
        expected = inner.finish(F.scaled_dot_product_attention(louder(q), k, v, is_causal=True))
        assert float((got - expected).abs().max()) < EXACT and same_bits(model(X), plain)
    assert len(editor.asked) == len(editor.told) == 1 and not editor.unasked


# ------------------------------------------------------------------------------------------------ foreign operators


@torch.library.custom_op("changes_test::fused_attention", mutates_args=())
def opaque(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_a_foreign_operator_is_missed() -> None:
    model, editor = Calls(opaque).double(), Editor()
    with torch.no_grad(), listening(model, editor):
        model(X)
    ((_, reason),) = editor.unasked
    assert "changes_test.fused_attention attends by its name" in reason


# ------------------------------------------------------------------------------------------------------- transforms


class Mapped(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.how = Projected(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "vmap":
            return vmap(self.one)(x.unsqueeze(1))[:, 0]  # type: ignore[no-any-return]
        if self.how == "functionalize":
            return torch.func.functionalize(self.one)(x)  # type: ignore[no-any-return]
        return torch.func.grad(lambda y: self.one(y).square().sum())(x)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::hookattn.SkippedWarning")
@pytest.mark.parametrize("how", ["vmap", "functionalize"])
def test_what_stands_for_others_is_missed(how: str) -> None:
    """Its batch is not the batch that is recorded."""
    torch.manual_seed(1)
    model, editor = Mapped(how).double(), Editor(lambda c: Change(q=louder(c.q)), lambda c: louder(c.output))  # type: ignore[arg-type]
    expected = model(X)
    with listening(model, editor):
        got = model(X)
    assert same_bits(got, expected) and len(editor.unasked) == 1 and not editor.asked and not editor.told


def test_what_is_derived_is_changed() -> None:
    torch.manual_seed(1)
    model, editor = Mapped("grad").double(), Editor(lambda c: Change(q=louder(c.q)))
    with listening(model, editor):
        got = model(X)
    x = X.clone().requires_grad_()
    q, k, v = model.one.operands(x)
    (expected,) = torch.autograd.grad(model.one.finish(attend(louder(q), k, v)).square().sum(), x)
    assert float((got - expected).abs().max()) < EXACT and len(editor.asked) == 1 and not editor.unasked
