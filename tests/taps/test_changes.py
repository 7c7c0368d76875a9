"""What a listener changes of a kernel's arguments or its output reaches the model, exactly as explicit math says."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.attention.kernel_call import KernelCall
from hookattn.errors import ModelError
from hookattn.models.discovery import make_watch_plan
from hookattn.recording.recorder import CallRecorder
from hookattn.recording.selection import Selection
from hookattn.recording.session import Session
from hookattn.taps import ActiveTrace, Change
from hookattn.testing import check_clean
from tests.reference import causal, draw, same_bits

EXACT = 1e-12  # in float64, of outputs of about 1
T = 6


@dataclass
class Editor:
    """Listens, and changes what it is told to; remembers what it was asked."""

    change: Callable[[KernelCall], Change | None] = lambda call: None
    answer: Callable[[KernelCall], Tensor | None] = lambda call: None
    layer: int | None = None
    asked: list[tuple[str, str, frozenset[str]]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    unasked: list[tuple[str | None, str]] = field(default_factory=list)

    def before(self, call: KernelCall, site: hookattn.Site, step: int, changeable: frozenset[str]) -> Change | None:
        assert call.output is None
        self.asked.append((site.path, call.tap, changeable))
        call.edits = len(self.asked)
        return self.change(call) if self.layer in (None, site.layer) else None

    def formed(self, call: KernelCall, site: hookattn.Site, step: int) -> Tensor | None:
        return None

    def after(self, call: KernelCall, site: hookattn.Site, step: int) -> Tensor | None:
        assert call.output is not None and call.edits == (len(self.asked) or None), (
            "what was noted before is there afterwards"
        )
        self.told.append(site.path)
        return self.answer(call) if self.layer in (None, site.layer) else None

    def missed(self, site: hookattn.Site, step: int, reason: str) -> None:
        self.unasked.append((site.path, reason))


@contextmanager
def listening(model: nn.Module, listener: Any, strict: bool = True) -> Iterator[hookattn.Trace]:
    """A trace with a listener; every call is verified in full."""
    made, selection = hookattn.Trace(), Selection.of()
    session = Session(
        make_watch_plan(model), made, selection, CallRecorder(selection, "full", True), strict, listener=listener
    )
    try:
        session.start()
        try:
            yield made
        finally:
            session.stop()
        session.finish()
    finally:
        session.close()


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention by the book. q: B H T D; k, v: B G S D."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


@dataclass(frozen=True)
class Edit:
    """One change, told to the tap and done to the operands by hand."""

    name: str
    change: Callable[[KernelCall], Change | None]
    by_hand: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]


def louder(x: Tensor) -> Tensor:
    """Head 1 three times as large."""
    return torch.cat([x[:, :1], 3 * x[:, 1:2], x[:, 2:]], 1)


def cut(t: int, s: int) -> Tensor:
    """The last query does not see key 1."""
    mask = torch.ones(t, s, dtype=torch.bool)
    mask[-1, 1] = False
    return mask[None, None]


def slope(t: int, s: int) -> Tensor:
    return torch.arange(t * s, dtype=torch.float64).view(1, 1, t, s).sin()


def _and(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


EDITS = [
    Edit("q", lambda c: Change(q=louder(c.q)), lambda q, k, v, m, b: (louder(q), k, v, m, b)),
    Edit("k", lambda c: Change(k=louder(c.k)), lambda q, k, v, m, b: (q, louder(k), v, m, b)),
    Edit("v", lambda c: Change(v=louder(c.v)), lambda q, k, v, m, b: (q, k, louder(v), m, b)),
    Edit(
        "mask",
        lambda c: Change(mask=_and(c.mask, cut(c.q.shape[2], c.k.shape[2]))),
        lambda q, k, v, m, b: (q, k, v, _and(m, cut(q.shape[2], k.shape[2])), b),
    ),
    Edit(
        "bias",
        lambda c: Change(bias=slope(c.q.shape[2], c.k.shape[2])),
        lambda q, k, v, m, b: (q, k, v, m, slope(q.shape[2], k.shape[2])),
    ),
    Edit(
        "all",
        lambda c: Change(
            louder(c.q), louder(c.k), louder(c.v), slope(c.q.shape[2], c.k.shape[2]), cut(c.q.shape[2], c.k.shape[2])
        ),
        lambda q, k, v, m, b: (
            louder(q),
            louder(k),
            louder(v),
            cut(q.shape[2], k.shape[2]),
            slope(q.shape[2], k.shape[2]),
        ),
    ),
]
each_edit = pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)


# ------------------------------------------------------------------------------------- torch's kernel, anybody's model


class Projected(nn.Module):
    """A model of the user's own around the fused kernel."""

    def __init__(self, groups: int = 4, **given: Any):
        super().__init__()
        self.groups, self.given = groups, given
        self.query, self.pair = nn.Linear(16, 32), nn.Linear(16, 2 * groups * 8)
        self.out = nn.Linear(32, 16)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.pair(x).unflatten(-1, (2, self.groups, 8)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def finish(self, z: Tensor) -> Tensor:
        return self.out(z.transpose(1, 2).flatten(2)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(F.scaled_dot_product_attention(*self.operands(x), **self.given))


class Repeated(Projected):
    """The same, with grouped heads repeated by hand."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.operands(x)
        k, v = (t.repeat_interleave(4 // self.groups, 1) for t in (k, v))
        return self.finish(F.scaled_dot_product_attention(q, k, v, **self.given))


HIDDEN = torch.ones(1, 1, T, T, dtype=torch.bool)
HIDDEN[..., 0] = False
ADDED = draw(1, 4, T, T, seed=8, dtype=torch.float64)
ADDED_HIDDEN = ADDED.masked_fill(~HIDDEN, -torch.inf)
KERNELS: dict[str, tuple[Callable[[], Projected], Tensor | None, Tensor | None]] = {
    "plain": (Projected, None, None),
    "causal": (lambda: Projected(is_causal=True), causal(T)[None, None], None),
    "bool mask": (lambda: Projected(attn_mask=HIDDEN), HIDDEN, None),
    "float mask": (lambda: Projected(attn_mask=ADDED), None, ADDED),
    "float mask that hides": (lambda: Projected(attn_mask=ADDED_HIDDEN), HIDDEN, ADDED),
    "grouped by the kernel, causal": (
        lambda: Projected(2, enable_gqa=True, is_causal=True),
        causal(T)[None, None],
        None,
    ),
    "scaled": (lambda: Projected(scale=0.7), None, None),
}


@each_edit
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_gets_what_it_is_to_get(name: str, edit: Edit) -> None:
    make, mask, bias = KERNELS[name]
    torch.manual_seed(1)
    model = make().double()
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    editor = Editor(edit.change)
    with listening(model, editor) as trace:
        got = model(x)
    with torch.no_grad():
        q, k, v = model.operands(x)
        if edit.name == "all":  # says the whole mask; what the kernel hides by itself stays hidden
            hidden = causal(T)[None, None] if model.given.get("is_causal") else None
            q, k, v, mask, bias = edit.by_hand(q, k, v, None, None)
            mask = _and(hidden, mask)  # type: ignore[arg-type]
        else:
            q, k, v, mask, bias = edit.by_hand(q, k, v, mask, bias)
        z = attend(q, k, v, mask, bias, model.given.get("scale"))
        expected, plain = model.finish(z), model(x)
    assert float((got - expected).detach().abs().max()) < EXACT
    assert float((plain - expected).abs().max()) > 1e-3, "so the edit does something"
    (call,) = trace.calls
    assert call.certificate.faithful and torch.allclose(call.q, q, atol=EXACT) and torch.allclose(call.v, v, atol=EXACT)
    assert [tap for _, tap, _ in editor.asked] == ["sdpa"] and editor.told == [""] and not editor.unasked
    check_clean(model)


@pytest.mark.parametrize("of", ["q", "k", "v"])
def test_heads_that_the_model_repeats(of: str) -> None:
    """The kernel has copies of each key head, and is told of the one that they are copies of."""
    torch.manual_seed(1)
    model = Repeated(2).double()
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    with listening(model, Editor(lambda c: Change(**{of: louder(getattr(c, of))}))) as trace:
        got = model(x)
    with torch.no_grad():
        q, k, v = model.operands(x)
        given = {"q": q, "k": k, "v": v}
        given[of] = louder(given[of])
        expected = model.finish(attend(**given))
    assert float((got - expected).detach().abs().max()) < EXACT
    (call,) = trace.calls
    assert call.certificate.faithful and torch.allclose(attend(call.q, call.k, call.v), call.output, atol=EXACT)


@pytest.mark.parametrize("name", KERNELS)
def test_an_output_in_place_of_the_kernels(name: str) -> None:
    """The model gets it; the record keeps what the kernel returned, which its certificate is about."""
    make, mask, bias = KERNELS[name]
    torch.manual_seed(1)
    model = make().double()
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    with listening(model, Editor(answer=lambda c: louder(c.output))) as trace:  # type: ignore[arg-type]
        got = model(x)
    with torch.no_grad():
        z = attend(*model.operands(x), mask, bias, model.given.get("scale"))
        assert float((got - model.finish(louder(z))).detach().abs().max()) < EXACT
    assert trace.calls[0].certificate.faithful and torch.allclose(trace.calls[0].output, z, atol=EXACT)


class Heads(nn.Module):
    """MultiheadAttention in its Python form."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0].tanh()  # type: ignore[no-any-return]


def test_the_kernel_inside_multihead_attention() -> None:
    torch.manual_seed(1)
    model = Heads().double().train()
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    editor = Editor(lambda c: Change(q=louder(c.q), mask=cut(T, T)))
    with listening(model, editor):
        got = model(x)
    with torch.no_grad():
        q, k, v = F.linear(x, model.attn.in_proj_weight, model.attn.in_proj_bias).unflatten(-1, (3, 4, 4)).unbind(-3)
        z = attend(*(t.transpose(1, 2) for t in (louder(q.transpose(1, 2)).transpose(1, 2), k, v)), cut(T, T))
        expected = model.attn.out_proj(z.transpose(1, 2).flatten(2)).tanh()
    assert float((got - expected).detach().abs().max()) < EXACT
    assert [tap for _, tap, _ in editor.asked] == ["sdpa"] and not editor.unasked


def test_gradients_go_through_what_was_changed() -> None:
    """To a gate of the listener's, to the model, and to a bias that was learned where only the mask is changed."""
    torch.manual_seed(1)
    model = Projected().double()
    bias = nn.Parameter(draw(1, 4, T, T, seed=8, dtype=torch.float64))
    gate = nn.Parameter(torch.ones(1, 4, 1, 1, dtype=torch.float64))
    hidden = bias.masked_fill(~HIDDEN, -torch.inf)
    model.given["attn_mask"] = hidden
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    leaves = [bias, gate, *model.parameters()]
    with listening(model, Editor(lambda c: Change(q=gate * c.q, mask=c.mask & cut(T, T)))):  # type: ignore[operator]
        got = torch.autograd.grad(model(x).square().sum(), leaves, retain_graph=True)
    q, k, v = model.operands(x)
    z = attend(gate * q, k, v, HIDDEN & cut(T, T), bias)
    expected = torch.autograd.grad(model.finish(z).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).abs().max()) < EXACT * 100 and float(b.abs().max()) > 1e-3


# -------------------------------------------------------------------------------------------- transformers' interface

IDS = torch.arange(2 * T).view(2, T) + 3


@each_edit
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["alone", "mode open"])
def test_the_interface(name: str, how: str, edit: Edit) -> None:
    """Layer 1 of a model, against the same model with attention by the book in it."""
    transformers = pytest.importorskip("transformers")
    from tests import tiny_models as tiny

    model = getattr(tiny, name)().double()
    host: nn.Module = model if how == "alone" else nn.Sequential(model, Unread())
    editor = Editor(edit.change, layer=1)
    with torch.no_grad(), listening(host, editor) as trace:
        got = host(IDS)
    ran = 0

    def by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
        nonlocal ran
        ran += 1
        hides, bias = causal(T)[None, None], None
        if module.layer_idx == 1:
            q, k, v, changed, bias = edit.by_hand(q, k, v, None, None)
            hides = hides if changed is None else hides & changed
        return attend(q, k, v, hides, bias, given.get("scaling")).transpose(1, 2), None

    transformers.AttentionInterface.register("by_hand", by_hand)
    try:
        with torch.no_grad():
            plain = model(IDS).logits
        model.set_attn_implementation("by_hand")
        with torch.no_grad():
            expected = model(IDS).logits
    finally:
        del transformers.AttentionInterface._global_mapping["by_hand"]
    assert ran == 2
    got = got.logits
    assert float((got - expected).abs().max()) < 1e-10 * float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 1e-4
    assert len(editor.asked) == len(editor.told) == 2 and not editor.unasked
    assert all(c.certificate.faithful for c in trace.calls)
    if name == "llama" and how == "alone":
        assert [c.k.shape[1] for c in trace.calls] == [2, 2]


@pytest.mark.parametrize("of", ["k", "v"])
def test_grouped_heads_that_the_interface_repeats(of: str) -> None:
    """With a mask it hands the kernel a copy for every query head; listener and record have the groups."""
    pytest.importorskip("transformers")
    from tests import tiny_models as tiny

    model, inputs = tiny.llama().double(), tiny.padded("left")
    editor = Editor(lambda c: Change(**{of: louder(getattr(c, of))}), layer=1)
    with torch.no_grad():
        plain = hookattn.trace(model, inputs).calls[1]
        with listening(model, editor) as trace:
            model(**inputs)
    call = trace.calls[1]
    assert call.k.shape[1] == call.v.shape[1] == 2 and call.mask is not None and not editor.unasked
    for name in ("q", "k", "v"):
        expected = louder(getattr(plain, name)) if name == of else getattr(plain, name)
        assert torch.equal(getattr(call, name), expected)
    rows = call.mask.any(-1).expand(call.output.shape[:3])
    assert float((attend(call.q, call.k, call.v, call.mask) - call.output)[rows].abs().max()) < EXACT * 100
    assert float((call.output - plain.output)[rows].abs().max()) > 1e-3


class Unread(nn.Module):
    """No adapter covers it, so that the mode stays open for the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Heads()

    def forward(self, x: Any) -> Any:
        return x


# ----------------------------------------------------------------------------------------------------- flex_attention


class Flexed(Projected):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.operands(x)
        return self.finish(flex_attention(q, k, value=v, score_mod=_later_hidden))  # type: ignore[arg-type]


def _later_hidden(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, score, -torch.inf)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@each_edit
def test_flex_attention(edit: Edit) -> None:
    torch.manual_seed(1)
    model = Flexed()
    x = draw(2, T, 16, seed=4)
    editor = Editor(edit.change)
    if edit.name not in ("q", "k", "v"):
        said = r"a changed \w+ cannot be handed to its kernel \(tap flex_attention\)"
        with torch.no_grad(), pytest.raises(ModelError, match=said), listening(model, editor):
            model(x)
        check_clean(model)
        return
    with torch.no_grad():
        with listening(model, editor) as trace:
            got = model(x)
        q, k, v, _, _ = edit.by_hand(*model.operands(x), None, None)
        expected = model.finish(attend(q, k, v, causal(T)[None, None]))
        assert float((got - expected).abs().max()) < 1e-5
        assert float((model(x) - expected).abs().max()) > 1e-2
    assert trace.calls[0].certificate.faithful and not editor.unasked


# ------------------------------------------------------------------------------------------- nothing changed, or lost


def _models() -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    x = draw(2, T, 16, seed=4)
    found: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        name: (make, x.double() if "float" in name else x) for name, (make, _, _) in KERNELS.items()
    }
    return {**found, "heads": (Heads, x), "flex": (Flexed, x), "repeated": (lambda: Repeated(2), x)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("same", [lambda c: None, lambda c: Change()], ids=["nothing", "a change of nothing"])
@pytest.mark.parametrize("name", _models())
def test_a_listener_that_changes_nothing(name: str, same: Any) -> None:
    make, x = _models()[name]
    torch.manual_seed(1)
    model, editor = make().to(x.dtype).train(), Editor(same)
    with torch.set_grad_enabled(name != "flex"):  # it has no backward on a CPU
        expected = model(x)
        with listening(model, editor):
            got = model(x)
    assert same_bits(got, expected) and len(editor.asked) == len(editor.told) == 1 and not editor.unasked


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_listener_that_changes_nothing_in_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    from tests import tiny_models as tiny

    model, editor = getattr(tiny, name)(), Editor()
    with torch.no_grad():
        expected = model(IDS)[0]
        with listening(model, editor):
            got = model(IDS)[0]
    assert same_bits(got, expected) and len(editor.asked) == len(editor.told) == 2 and not editor.unasked


class Folded(Projected):
    """Heads in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in self.operands(x))
        return self.finish(F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, 4)))


class Packed(Projected):
    """Grouped heads in the rows of one query."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.operands(x)
        q = q.unflatten(1, (self.groups, -1)).flatten(2, 3)
        return self.finish(F.scaled_dot_product_attention(q, k, v).unflatten(2, (-1, T)).flatten(1, 2))


@pytest.mark.parametrize("make", [Folded, lambda: Packed(2)], ids=["heads in the batch", "heads in the rows"])
def test_where_heads_lie_elsewhere_the_output_alone_is_changed(make: Callable[[], nn.Module]) -> None:
    """A changed q could not be laid as the kernel's is; an output is brought back to where the model has it."""
    torch.manual_seed(1)
    model, x = make(), draw(2, T, 16, seed=4)
    with torch.no_grad():
        expected = model(x)
        same, other = Editor(lambda c: Change(q=2 * c.q)), Editor(answer=lambda c: louder(c.output))  # type: ignore[arg-type]
        with listening(model, same) as trace:
            got = model(x)
        assert same_bits(got, expected) and len(trace.calls) == 1
        assert not same.asked and same.told == [trace.calls[0].site.path] and not same.unasked
        with listening(model, other):
            assert not torch.allclose(model(x), expected)
    check_clean(model)


def test_what_cannot_be_read_is_said_too() -> None:
    """A kernel on nested tensors is listed as skipped; whoever wanted to change it hears of it."""
    editor = Editor()
    nested = torch.nested.nested_tensor([draw(4, 3, 8, seed=1), draw(4, 5, 8, seed=2)])

    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    model = Nested()
    with listening(model, editor) as trace:
        model(nested)
    assert [(s.path, s.reason) for s in trace.skipped] == editor.unasked and editor.unasked


def test_another_model_is_not_asked_about() -> None:
    torch.manual_seed(1)
    model, other, editor = Projected(), Projected(), Editor(lambda c: Change(q=2 * c.q))
    x = draw(2, T, 16, seed=4)
    expected = other(x)
    with listening(model, editor):
        model(x)
        got = other(x)
    assert same_bits(got, expected) and len(editor.asked) == 1


def test_nobody_is_asked_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("before", "after"):
        monkeypatch.setattr(Session, name, lambda *_: pytest.fail("asked"))
    for name, (make, x) in _models().items():
        if name != "flex":
            assert len(hookattn.trace(make().to(x.dtype).train(), x)) == 1


# ----------------------------------------------------------------------------------------------------------- the seam

TAPS = Path(hookattn.__file__).parent / "taps"


def test_the_seam_holds_what_taps_use_and_no_more() -> None:
    """That they use nothing else is the type checker's to say, as none of them sees an ``Any``."""
    members = {
        name for name, x in vars(ActiveTrace).items() if not name.startswith("_") and callable(getattr(x, "fget", x))
    } | set(ActiveTrace.__annotations__)
    used = set()
    for path in TAPS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                of = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
                if of in ("tracing", "recorder"):
                    used.add(node.attr)
    assert used == members and len(members) > 10
