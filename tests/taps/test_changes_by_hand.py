"""What a listener changes in attention that is written out by hand reaches the model, in whatever form it is written.

Each form is a model in plain operations that says at which moment it has weights, values and outputs, and how they lie.
The same model with the change made there by hand is the reference; nothing of hookattn is used for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.attention.kernel_call import KernelCall
from hookattn.errors import EditError
from hookattn.models.discovery import make_watch_plan
from hookattn.recording.recorder import CallRecorder
from hookattn.recording.selection import Selection
from hookattn.recording.session import Session
from hookattn.taps import Change
from hookattn.testing import check_clean
from tests.reference import draw, reference_attention, repeat_heads, same_bits
from tests.taps.eager.test_entries import Moved
from tests.zoo import CASES, Case
from tests.zoo.other_weights import OTHER_WEIGHTS, SAID

B, T, E, H = 2, 6, 16, 4
D = E // H
EXACT, GRADIENT = 1e-12, 1e-10
HEAD = 1
HIDDEN = torch.arange(T) == 2


@dataclass
class Listener:
    """Answers what it is told to, and remembers what it was asked."""

    weights: Callable[[KernelCall], Tensor | None] = lambda call: None
    values: Callable[[KernelCall], Tensor | None] = lambda call: None
    output: Callable[[KernelCall], Tensor | None] = lambda call: None
    strict: bool = True
    asked: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    tokens: list[object] = field(default_factory=list)

    def formed(self, call: KernelCall, site: hookattn.Site, step: int) -> Tensor | None:
        assert call.v is None and call.output is None and call.weights is not None
        answer = self.weights(call)
        call.edits = "asked" if answer is None else "changed"
        return self._heard("weights", call, site, answer)

    def before(self, call: KernelCall, site: hookattn.Site, step: int, changeable: frozenset[str]) -> Change | None:
        assert call.output is None and changeable == {"v"}
        answer = self.values(call)
        call.edits = call.edits if answer is None else f"{call.edits} values"
        return None if self._heard("values", call, site, answer) is None else Change(v=answer)

    def after(self, call: KernelCall, site: hookattn.Site, step: int) -> Tensor | None:
        assert call.output is not None
        return self._heard("output", call, site, self.output(call))

    def missed(self, site: hookattn.Site, step: int, reason: str) -> None:
        self.asked.append("missed")
        if self.strict:
            raise EditError(f"{site.label}: {reason}")

    def _heard(self, what: str, call: KernelCall, site: hookattn.Site, answer: Tensor | None) -> Tensor | None:
        self.asked.append(what)
        self.paths.append(site.path)
        self.tokens.append(call.edits)
        return answer


@contextmanager
def listening(model: nn.Module, listener: Any) -> Iterator[hookattn.Trace]:
    """A trace with a listener; what a certificate says of a changed call is another's business."""
    made, selection = hookattn.Trace(), Selection.of()
    session = Session(
        make_watch_plan(model), made, selection, CallRecorder(selection, "full", True), False, listener=listener
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


def changed(x: Tensor, gate: Tensor | float = 1.0, dim: int = 1) -> Tensor:
    """Head 1 of what has heads along a dimension, turned round along its last axis and mixed with itself."""
    first, mine, rest = x.narrow(dim, 0, HEAD), x.narrow(dim, HEAD, 1), x.narrow(dim, HEAD + 1, x.shape[dim] - HEAD - 1)
    return torch.cat([first, gate * (0.3 * mine.flip(-1) + 0.5 * mine), rest], dim)


def louder(x: Tensor, gate: Tensor | float = 1.0, dim: int = 1) -> Tensor:
    return torch.cat(
        [x.narrow(dim, 0, HEAD), 3 * gate * x.narrow(dim, HEAD, 1), x.narrow(dim, 2, x.shape[dim] - 2)], dim
    )


# ------------------------------------------------------------------------------------------- attention in many forms


class Form(nn.Module):
    """Attention written out by hand; :attr:`by_hand` makes a change of what lies in it as it says.

    Attributes:
        groups: heads of keys and values.
        queries: how many there are.
    """

    groups, queries = H, T

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, E), nn.Linear(E, self.groups * D), nn.Linear(E, self.groups * D)
        self.o = nn.Linear(E, E)
        self.by_hand: dict[str, Callable[[Tensor, int], Tensor]] = {}

    def at(self, what: str, x: Tensor, axes: str) -> Tensor:
        """What there is at one moment: ``axes`` has a letter for each of its axes, ``(bh)`` where heads are folded."""
        change = self.by_hand.get(what)
        if change is None:
            return x
        if "(bh)" in axes:
            return change(x.unflatten(0, (-1, H)), 1).flatten(0, 1)
        if "gn" in axes:
            at = axes.index("g")
            return change(x.flatten(at, at + 1), at).unflatten(at, (-1, x.shape[at + 1]))
        return change(x, axes.index("h"))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B H T D each, grouped heads as they are."""
        return tuple(m(x).unflatten(-1, (-1, D)).transpose(1, 2) for m in (self.q, self.k, self.v))  # type: ignore[return-value]

    def merge(self, z: Tensor) -> Tensor:
        return self.o(z.transpose(1, 2).flatten(2)).tanh()

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.split(x)
        return self.merge(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.mT / math.sqrt(D)).softmax(-1), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class ScaledBefore(Form):
    """Queries scaled before the product, and a causal mask of numbers."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        w = self.at("weights", F.softmax((q * D**-0.5) @ k.transpose(-1, -2) + mask, dim=-1), "bhts")
        return self.at("output", torch.matmul(w, self.at("values", v, "bhsd")), "bhtd")


class Folded(Form):
    """Heads in the batch, and bmm."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        w = self.at("weights", torch.bmm(q, k.transpose(1, 2)).mul(0.5).softmax(-1), "(bh)ts")
        return self.at("output", torch.bmm(w, self.at("values", v, "(bh)sd")), "(bh)td").unflatten(0, (-1, H))


class Added(Form):
    """baddbmm with a bias for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(draw(H, T, T, seed=5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        scores = torch.baddbmm(self.bias.repeat(q.shape[0] // H, 1, 1), q, k.mT, alpha=0.5)
        w = self.at("weights", scores.softmax(-1), "(bh)ts")
        return self.at("output", w.bmm(self.at("values", v, "(bh)sd")), "(bh)td").unflatten(0, (-1, H))


class Letters(Form):
    """An einsum over B T H D."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        w = self.at("weights", torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1), "bhts")
        return self.at("output", torch.einsum("bhij,bjhd->bihd", w, self.at("values", v, "bshd")), "bthd").transpose(
            1, 2
        )


class KeysFirst(Form):
    """T H B D, and weights with keys first, whose softmax runs over the first axis."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(2, 1, 0, 3) for t in (q, k, v))
        w = self.at("weights", torch.softmax(torch.einsum("ihbd,jhbd->jbih", q, k), 0).movedim(0, -1), "bths")
        z = torch.einsum("bihj,jhbd->ihbd", w, self.at("values", v, "shbd"))
        return self.at("output", z, "thbd").permute(2, 1, 0, 3)


class KeysFirstAsTheyAre(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.softmax(torch.einsum("bhid,bhjd->jbih", q, k), 0)
        if "weights" in self.by_hand:  # the last axis is turned round
            w = self.at("weights", w.movedim(0, -1), "bths").movedim(-1, 0)
        return self.at("output", torch.einsum("jbih,bhjd->bhid", w, self.at("values", v, "bhsd")), "bhtd")


class NoBatch(Form):
    """One sequence at a time."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = []
        for i in range(len(q)):
            w = self.at("weights", (q[i] @ k[i].mT).softmax(-1), "hts")
            made.append(self.at("output", w @ self.at("values", v[i], "hsd"), "htd"))
        return torch.stack(made)


class Interleaved(Form):
    groups = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.repeat_interleave(2, 1).mT).softmax(-1), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd").repeat_interleave(2, 1), "bhtd")


class Expanded(Form):
    groups = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k, self.at("values", v, "bhsd")
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(-1, H, T, D) for t in (k, v))
        return self.at("output", self.at("weights", (q @ k.mT).softmax(-1), "bhts") @ v, "bhtd")


class FiveAxes(Form):
    """Groups on an axis of their own, against which keys and values are broadcast."""

    groups = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q.unflatten(1, (2, 2)) @ k[:, :, None].mT).softmax(-1), "bgnts")
        v = self.at("values", v, "bhsd")
        return self.at("output", w @ v[:, :, None], "bgntd").flatten(1, 2)


class SinkLast(Form):
    first = False

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(draw(H, seed=6))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, sink = q @ k.mT, self.sink.view(1, H, 1, 1).expand(len(q), H, T, 1)
        p = torch.cat([sink, s] if self.first else [s, sink], -1).softmax(-1)
        w = self.at("weights", p[..., 1:] if self.first else p[..., :-1], "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class SinkFirst(SinkLast):
    first = True


class Padded(Form):
    """A column of zeros beside the scores, and the weights of the keys taken off."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., 1:], "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Steps(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        p = (s - s.amax(-1, keepdim=True)).exp()
        w = self.at("weights", p / p.sum(-1, keepdim=True), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Logarithm(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", F.log_softmax(q @ k.mT, -1).exp(), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Joined(Form):
    """Two blocks of keys, one softmax over both."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.cat([q @ k[:, :, :2].mT, q @ k[:, :, 2:].mT], -1)
        w = self.at("weights", s.softmax(-1), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Cut(Form):
    """Weights cut along the keys, each part with its values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.mT).softmax(-1), "bhts")
        return self.at("output", w[..., :2] @ v[:, :, :2] + w[..., 2:] @ v[:, :, 2:], "bhtd")


class Chunks(Form):
    """Queries in pieces."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = []
        for some in q.split(2, 2):
            w = self.at("weights", (some @ k.mT).softmax(-1), "bhts")
            made.append(self.at("output", w @ v, "bhtd"))
        return torch.cat(made, 2)


class Dropped(Form):
    """Weights are changed before the dropout."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = F.dropout(self.at("weights", (q @ k.mT).softmax(-1), "bhts"), 0.4, True)
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Cast(Form):
    """Softmax in another dtype, cast and mixed across heads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(draw(H, H, seed=7))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.mT).softmax(-1, dtype=torch.float64), "bhts").to(q.dtype)
        w = torch.einsum("bhij,hg->bgij", w, self.mix)
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Relu(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", torch.relu(q @ k.mT / T), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Sigmoid(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", torch.sigmoid(q @ k.mT * 0.5), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Nothing(Form):
    """Scores that are the weights as they are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.mT) / T, "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Largest(Form):
    """The softmax of the three largest scores, put back among all keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        top, index = s.topk(3, -1)
        w = self.at("weights", torch.zeros_like(s).scatter(-1, index, top.softmax(-1)), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Multiplied(Form):
    """Values times their weights, summed after."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.mT).softmax(-1), "bhts")
        return self.at("output", (w.unsqueeze(-1) * v.unsqueeze(2)).sum(3), "bhtd")


class Learned(Form):
    """Queries that are a parameter as it is."""

    queries = 3

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(draw(H, 3, D, seed=9))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.query, k, v)


class Masked(Form):
    """Weights set to 0 after the softmax, for keys that nobody may see."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.mT).masked_fill(HIDDEN, -1e30).softmax(-1), "bhts").masked_fill(HIDDEN, 0.0)
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


class Returned(Form):
    """The weights are a result of the model, too."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.split(x)
        w = self.at("weights", (q @ k.mT).softmax(-1), "bhts")
        return torch.cat(
            [self.merge(self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")).flatten(), w.flatten()]
        )


class Viewed(Form):
    """The result of the softmax is reshaped by views, which fit no other strides."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at(
            "weights", torch.einsum("bihd,bjhd->bijh", q.transpose(1, 2), k.transpose(1, 2)).softmax(2).mT, "bths"
        )
        return self.at("output", torch.einsum("bihj,bhjd->bhid", w, self.at("values", v, "bhsd")), "bhtd")


FORMS: dict[str, type[Form]] = {
    kind.__name__: kind
    for kind in (
        Form,
        ScaledBefore,
        Folded,
        Added,
        Letters,
        KeysFirst,
        KeysFirstAsTheyAre,
        NoBatch,
        Interleaved,
        Expanded,
        FiveAxes,
        SinkLast,
        SinkFirst,
        Padded,
        Steps,
        Logarithm,
        Joined,
        Cut,
        Chunks,
        Dropped,
        Cast,
        Relu,
        Sigmoid,
        Nothing,
        Largest,
        Multiplied,
        Learned,
        Masked,
        Returned,
        Viewed,
    )
}
NO_VALUES = {"Cut", "Multiplied"}  # their values are not asked about before they are met
each_form = pytest.mark.parametrize("name", FORMS)


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[Form, Tensor]:
    torch.manual_seed(1)
    return FORMS[name]().to(dtype), draw(B, T, E, seed=4, dtype=dtype)


def run(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)  # of dropouts
    return model(x)  # type: ignore[no-any-return]


CHANGES: dict[str, Callable[..., Tensor]] = {"weights": changed, "values": louder, "output": louder}


@each_form
@pytest.mark.parametrize("what", CHANGES)
def test_what_takes_the_place_of_weights_values_and_outputs(name: str, what: str) -> None:
    """Exact, and the gradients to the model and to what was changed with, too."""
    if what == "values" and name in (*NO_VALUES, "Chunks"):
        pytest.skip("it has no moment for it")
    model, x = made(name)
    change = CHANGES[what]
    gate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves = [gate, *(p for p in model.parameters())]

    def answer(call: KernelCall) -> Tensor:
        return change({"weights": call.weights, "values": call.v, "output": call.output}[what], gate)

    plain = run(model, x).detach()
    listener = Listener(**{what: answer})
    with listening(model, listener) as trace:
        got = run(model, x)
    model.by_hand[what] = lambda t, dim: change(t, gate, dim)
    expected = run(model, x)
    model.by_hand.clear()
    assert float((got - expected).detach().abs().max()) < EXACT
    assert float((plain - expected.detach()).abs().max()) > 1e-3, "so the change does something"
    mine = torch.autograd.grad(got.square().sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None) and (a is None or float((a - b).abs().max()) < GRADIENT)
    assert "missed" not in listener.asked and trace.calls
    n = listener.asked.count("output")
    assert listener.asked.count("weights") == n and listener.asked.count("values") == (0 if name in NO_VALUES else n)
    noted = [token for heard, token in zip(listener.asked, listener.tokens, strict=True) if heard == "output"]
    if what == "values" and FORMS[name].groups < H:
        assert all(c.v.shape[1] == c.k.shape[1] == FORMS[name].groups for c in trace.calls)
    assert set(noted) == {{"weights": "changed", "values": "asked values", "output": "asked"}[what]}
    assert set(listener.paths) == {""}
    check_clean(model)


@each_form
@pytest.mark.parametrize("grad", [False, True])
def test_a_listener_that_answers_with_what_it_got(name: str, grad: bool) -> None:
    """Bit for bit; and one that answers nothing at all."""
    model, x = made(name, torch.float32)
    with torch.set_grad_enabled(grad):
        plain = run(model, x)
        for listener in (
            Listener(),
            Listener(lambda c: c.weights.clone(), lambda c: c.v.clone(), lambda c: c.output.clone()),  # type: ignore[union-attr]
        ):
            with listening(model, listener) as trace:
                got = run(model, x)
            assert same_bits(got, plain) and "missed" not in listener.asked
            assert all(c.certificate.faithful for c in trace.calls)


@each_form
@pytest.mark.parametrize("what", CHANGES)
def test_other_heads_stay_bit_for_bit(name: str, what: str) -> None:
    if name == "Cast" or (what == "values" and (name in NO_VALUES or FORMS[name].groups < H)):
        pytest.skip("heads are mixed, or share their values")
    model, x = made(name, torch.float32)
    change = CHANGES[what]
    with torch.no_grad():
        with listening(model, Listener()) as plain:
            run(model, x)
        listener = Listener(**{what: lambda c: change({"weights": c.weights, "values": c.v, "output": c.output}[what])})
        with listening(model, listener) as trace:
            run(model, x)
    others = [h for h in range(H) if h != HEAD]
    for a, b in zip(trace.calls, plain.calls, strict=True):
        assert torch.equal(a.output[:, others], b.output[:, others])
        assert torch.equal(a.weights[:, others], b.weights[:, others])
        if what == "weights":
            mine = changed(b.weights)[:, HEAD]
            assert torch.equal(a.weights[:, HEAD], mine.masked_fill(HIDDEN, 0.0) if name == "Masked" else mine)
        assert torch.equal(a.output[:, HEAD], b.output[:, HEAD]) == (what == "output"), "the model's own is recorded"


@each_form
def test_the_record_has_the_weights_that_met_the_values(name: str) -> None:
    model, x = made(name)
    with torch.no_grad(), listening(model, Listener(lambda c: changed(c.weights))) as trace:  # type: ignore[arg-type]
        run(model, x)
    for call in trace.calls:
        w = call.weights if call.applied is None else call.applied
        z = w @ repeat_heads(call.v, w.shape[1])
        assert float((z - call.output).abs().max()) < EXACT


class Penalised(Form):
    """Keys that are hidden by a penalty, as windows are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + torch.zeros(T, dtype=q.dtype).masked_fill(HIDDEN, -100.0)).softmax(-1) @ v


@pytest.mark.parametrize("kind", [Penalised, Relu])
def test_changed_weights_tell_nothing_of_scores(kind: type[Form]) -> None:
    """What is a mask, and what made the weights, is as it was before they were changed."""
    torch.manual_seed(1)
    model = kind().double()
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    with torch.no_grad():
        (plain,) = hookattn.trace(model, x).calls
        with listening(model, Listener(lambda c: torch.full_like(c.weights, 1 / T))) as trace:  # type: ignore[arg-type]
            model(x)
    (call,) = trace.calls
    assert torch.equal(call.weights, torch.full_like(plain.weights, 1 / T)) and call.normalizer == plain.normalizer
    assert call.bias is plain.bias is None
    if kind is Penalised:
        assert torch.equal(call.mask.expand(B, H, T, T), ~HIDDEN.expand(B, H, T, T)) and plain.mask is not None
    else:
        assert "relu" in call.normalizer


# ---------------------------------------------------------------------- what an operation writes to, without gradients


class InPlace(Form):
    """Exponentials divided by their sum where they lie."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).exp_()
        p /= p.sum(-1, keepdim=True)
        if "weights" in self.by_hand:
            p = self.at("weights", p, "bhts")
        return self.at("output", p @ self.at("values", v, "bhsd"), "bhtd")


class IntoScores(Form):
    """A softmax that overwrites the scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        torch.softmax(s, -1, out=s)
        s = self.at("weights", s, "bhts")
        return self.at("output", s @ self.at("values", v, "bhsd"), "bhtd")


class IntoBuffers(Form):
    """Each result in memory that was there before."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, w, z = q.new_empty(len(q), H, T, T), q.new_empty(len(q), H, T, T), torch.empty_like(q)
        torch.matmul(q, k.mT, out=s)
        torch.softmax(s, -1, out=w)
        w.copy_(self.at("weights", w, "bhts"))
        torch.matmul(w, self.at("values", v, "bhsd"), out=z)
        return self.at("output", z, "bhtd")


class DroppedInPlace(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = F.dropout(self.at("weights", (q @ k.mT).softmax(-1), "bhts"), 0.4, True, inplace=True)
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")


WRITING: dict[str, type[Form]] = {kind.__name__: kind for kind in (InPlace, IntoScores, IntoBuffers, DroppedInPlace)}


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("what", CHANGES)
def test_operations_that_write_to_memory(name: str, what: str) -> None:
    torch.manual_seed(1)
    model, change = WRITING[name]().double(), CHANGES[what]
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    held: list[Tensor] = []

    def answer(call: KernelCall) -> Tensor:
        given = {"weights": call.weights, "values": call.v, "output": call.output}[what]
        assert given is not None
        held.append(given)
        return change(given)

    with torch.no_grad():
        listener = Listener(**{what: answer})
        with listening(model, listener) as trace:
            got = run(model, x)
        model.by_hand[what] = lambda t, dim: change(t, 1.0, dim)
        assert float((got - run(model, x)).abs().max()) < EXACT
        model.by_hand.clear()
        plain = hookattn.trace(model, x, verify="full") if "Dropped" not in name else None
    assert listener.asked == ["weights", "values", "output"]
    (call,) = trace.calls
    if plain is not None and what == "output":
        assert torch.equal(held[0], plain[0].output) and torch.equal(call.output, plain[0].output)
    if plain is not None and what == "weights":
        assert torch.equal(held[0], plain[0].weights), "what the listener was given is not written to"


# ------------------------------------------------------------- where weights never are a tensor that can be exchanged


class Unnormalized(Form):
    """Divided by the sum after the values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT * 0.5).exp()
        return self.at("output", p @ v / p.sum(-1, keepdim=True), "bhtd")


class Online(Form):
    """Blocks of keys with a running maximum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        top, total, z = q.new_full((B, H, T, 1), -1e9), q.new_zeros(B, H, T, 1), torch.zeros_like(q)
        for i in range(0, T, 2):
            s = q @ k[:, :, i : i + 2].mT * 0.5
            new = torch.maximum(top, s.amax(-1, keepdim=True))
            p = (s - new).exp()
            total = total * (top - new).exp() + p.sum(-1, keepdim=True)
            z = z * (top - new).exp() + p @ v[:, :, i : i + 2]
            top = new
        return self.at("output", z / total, "bhtd")


class Merged(Form):
    """The outputs of two blocks of keys, merged by their logsumexps."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = []
        for part in (slice(0, 2), slice(2, T)):
            s = q @ k[:, :, part].mT * 0.5
            made.append((s.logsumexp(-1, keepdim=True), s.softmax(-1) @ v[:, :, part]))
        whole = torch.logaddexp(made[0][0], made[1][0])
        return self.at("output", sum((lse - whole).exp() * z for lse, z in made), "bhtd")  # type: ignore[arg-type]


class Gated(Form):
    """A sum of values is multiplied by a gate for each entry, which only then shows that it is an output."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT * 0.5).exp()
        return self.at("output", p @ v / p.sum(-1, keepdim=True), "bhtd") * torch.sigmoid(v)


class Additive(Form):
    """A score that is no product: a number for each query and one for each key, through tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Parameter(draw(D, seed=3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) @ self.score
        return self.at("output", s.softmax(-1) @ self.at("values", v, "bhsd"), "bhtd")


class Positions(Form):
    """Weights that a map makes of each position alone, with nothing to compare."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(E, H * T)

    def forward(self, x: Tensor) -> Any:
        _, _, v = self.split(x)
        w = self.map(x).unflatten(-1, (H, T)).transpose(1, 2).softmax(-1)
        return self.merge(self.at("output", w @ self.at("values", v, "bhsd"), "bhtd"))


LATE: dict[str, type[Form]] = {
    kind.__name__: kind for kind in (Unnormalized, Online, Merged, Gated, Additive, Positions)
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LATE)
def test_outputs_that_are_known_only_late(name: str, grad: bool) -> None:
    torch.manual_seed(1)
    model = LATE[name]().double()
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    gate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(grad):
        plain = run(model, x)
        with listening(model, Listener()):
            assert same_bits(run(model, x), plain)
        listener = Listener(output=lambda c: louder(c.output, gate))  # type: ignore[arg-type]
        with listening(model, listener) as trace:
            got = run(model, x)
        model.by_hand["output"] = lambda t, dim: louder(t, gate, dim)
        expected = run(model, x)
    assert float((got - expected).detach().abs().max()) < EXACT
    assert float((plain - expected).detach().abs().max()) > 1e-3
    assert len(trace.calls) == 1 == listener.asked.count("output") and "missed" not in listener.asked
    assert trace.calls[0].certificate.faithful
    if grad:
        leaves = [gate, *model.parameters()]
        for a, b in zip(
            *(torch.autograd.grad(z.square().sum(), leaves, allow_unused=True) for z in (got, expected)), strict=True
        ):
            assert (a is None) == (b is None) and (a is None or float((a - b).abs().max()) < GRADIENT)


@pytest.mark.parametrize("name", ["Unnormalized", "Online", "Merged"])
def test_weights_that_are_never_formed_are_changed_by_what_they_make(name: str) -> None:
    """By explicit math on the call, whose tensors are in the model's graph."""
    torch.manual_seed(1)
    model = LATE[name]().double()
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    gate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves = [gate, *model.parameters()]

    def answer(call: KernelCall) -> Tensor:
        assert call.edits is None and call.weights is None
        w = (call.q @ call.k.mT * call.scale).softmax(-1)
        return changed(w, gate) @ call.v

    with listening(model, Listener(output=answer)):
        got = run(model, x)
    q, k, v = model.split(x)
    expected = model.merge(changed((q @ k.mT * 0.5).softmax(-1), gate) @ v)
    assert float((got - expected).detach().abs().max()) < EXACT
    mine, theirs = (torch.autograd.grad(z.square().sum(), leaves) for z in (got, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert float((a - b).abs().max()) < GRADIENT


# ---------------------------------------------------------------- one softmax or several, values or several, by name


class Shaw(Form):
    """Relative values: the weights meet values, and vectors of each distance."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Parameter(draw(T, T, D, seed=8))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.mT).softmax(-1), "bhts")
        return self.at("output", w @ self.at("values", v, "bhsd"), "bhtd") + torch.einsum(
            "bhts,tsd->bhtd", w, self.relative
        )


class Shared(Form):
    """The same weights for two sets of values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.at("weights", (q @ k.mT).softmax(-1), "bhts")
        first = self.at("output", w @ self.at("values", v, "bhsd"), "bhtd")
        return first * self.at("output", w @ self.at("values", k, "bhsd"), "bhtd")


class Differential(Form):
    """The difference of two softmaxes, which is no weights of one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one, two = (self.at("weights", (a @ b.mT).softmax(-1), "bhts") for a, b in ((q, k), (q.flip(-1), k)))
        return self.at("output", (one - 0.4 * two) @ self.at("values", v, "bhsd"), "bhtd")


SEVERAL: dict[str, tuple[type[Form], dict[str, int]]] = {
    "Shaw": (Shaw, {"weights": 1, "values": 1, "output": 1}),
    "Shared": (Shared, {"weights": 1, "values": 2, "output": 2}),
    "Differential": (Differential, {"weights": 2, "values": 2, "output": 2}),
}


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("what", CHANGES)
def test_weights_and_values_that_meet_several_times(name: str, what: str) -> None:
    torch.manual_seed(1)
    kind, counts = SEVERAL[name]
    model, change = kind().double(), CHANGES[what]
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    gate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves = [gate, *model.parameters()]
    plain = run(model, x)
    with listening(model, Listener(strict=False)):
        assert same_bits(run(model, x), plain)
    listener = Listener(
        strict=name != "Shaw" or what == "weights",
        **{what: lambda c: change({"weights": c.weights, "values": c.v, "output": c.output}[what], gate)},
    )
    with listening(model, listener) as trace:
        got = run(model, x)
    model.by_hand[what] = lambda t, dim: change(t, gate, dim)
    expected = run(model, x)
    assert float((got - expected).detach().abs().max()) < EXACT
    assert float((plain - expected).detach().abs().max()) > 1e-3
    assert {x: listener.asked.count(x) for x in counts} == counts
    assert ("missed" in listener.asked) == (name == "Shaw" and what != "weights"), "which meets other values, too"
    assert len(trace.calls) == counts["output"]
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), leaves) for z in (got, expected)), strict=True):
        assert float((a - b).abs().max()) < GRADIENT


class Halves(Form):
    """One softmax for two heads at a time, whose difference is taken."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = (q @ k.mT).softmax(-1).unflatten(1, (2, 2))
        return ((w[:, :, 0] - 0.4 * w[:, :, 1]) @ v[:, :2]).repeat_interleave(2, 1)


class Slots(Form):
    """A softmax over queries, which compete for the keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = (q @ k.mT).softmax(-2)
        return (w / w.sum(-1, keepdim=True)) @ v


class LateMerge(Form):
    """Blocks whose softmaxes are formed before anything tells that they are merged."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = []
        for part in (slice(0, 2), slice(2, T)):
            s = q @ k[:, :, part].mT * 0.5
            w = s.softmax(-1)
            made.append((s.logsumexp(-1, keepdim=True), w @ v[:, :, part]))
        whole = torch.logaddexp(made[0][0], made[1][0])
        return (made[0][0] - whole).exp() * made[0][1] + (made[1][0] - whole).exp() * made[1][1]


@pytest.mark.parametrize("kind", [Halves, Slots, LateMerge])
def test_weights_that_turn_out_to_be_others(kind: type[Form]) -> None:
    """Whoever changed them was told what they are not: that is said, and not passed over. Outputs can be changed."""
    torch.manual_seed(1)
    model = kind().double()
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
        with listening(model, listener := Listener()):
            assert same_bits(model(x), plain) and "missed" not in listener.asked
        assert {token for heard, token in zip(listener.asked, listener.tokens, strict=True) if heard == "output"} == {
            None
        }
        with listening(model, Listener(output=lambda c: 2 * c.output)):  # type: ignore[operator]
            assert float((model(x) - plain).abs().max()) > 1e-3
        wrong = Listener(lambda c: 2 * c.weights)  # type: ignore[operator]
        with pytest.raises(EditError, match="changed as they were formed"), listening(model, wrong):
            model(x)
    check_clean(model)


# -------------------------------------------------------------------------------------------------- what goes wrong


class UsedBefore(Form):
    """A sum of values that is written into another tensor, before anything else is done with it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT * 0.5).exp()
        return q.mul_(1).add_(p @ v / p.sum(-1, keepdim=True))


class NoValues(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1)[..., :D]


@pytest.mark.parametrize("kind", [UsedBefore, NoValues])
def test_what_can_no_longer_be_changed_is_said(kind: type[Form]) -> None:
    torch.manual_seed(1)
    model = kind().double()
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    with torch.no_grad():
        listener = Listener(strict=False)
        with listening(model, listener):
            model(x)
        assert listener.asked[-1] == "missed"
        with pytest.raises(EditError), listening(model, Listener()):
            model(x)
    check_clean(model)


@pytest.mark.parametrize("what", CHANGES)
def test_errors_of_a_listener_are_its_own(what: str) -> None:
    model, x = made("Form")

    def fails(call: KernelCall) -> Tensor:
        raise ZeroDivisionError("in an edit")

    with pytest.raises(ZeroDivisionError), listening(model, Listener(**{what: fails})):
        model(x)
    check_clean(model)


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_another_shape(what: str) -> None:
    model, x = made("Form")
    said = r"shape \(1, 2, 3, 4\) was given for one of \(2, 4, 6, "
    with pytest.raises(EditError, match=said), listening(model, Listener(**{what: lambda c: torch.zeros(1, 2, 3, 4)})):
        model(x)
    check_clean(model)


class OneForAll(Form):
    """Values that every batch entry shares, in one tensor."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhts,hsd->bhtd", (q @ k.mT).softmax(-1), self.at("values", v[0], "hsd"))


def test_values_that_the_batch_shares() -> None:
    torch.manual_seed(1)
    model = OneForAll().double()
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    with torch.no_grad():
        with listening(model, Listener(values=lambda c: louder(c.v))):
            got = model(x)
        model.by_hand["values"] = lambda t, dim: louder(t, 1.0, dim)
        assert float((got - model(x)).abs().max()) < EXACT
        model.by_hand.clear()
        each = torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1)
        said = r"its v cannot be changed so \(tap eager\): the model has one"
        with pytest.raises(EditError, match=said), listening(model, Listener(values=lambda c: c.v * each)):
            model(x)


class Broadcast(Form):
    """Values of one head, broadcast: a change for the batch is one for all of them."""

    groups = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


def test_values_of_one_head() -> None:
    torch.manual_seed(1)
    model = Broadcast().double()
    x = draw(B, T, E, seed=4, dtype=torch.float64)
    with torch.no_grad():
        listener = Listener(values=lambda c: 2 * c.v[:, :1].expand(c.v.shape))
        with listening(model, listener) as trace:
            got = model(x)
        q, k, v = model.split(x)
        assert float((got - model.merge((q @ k.mT).softmax(-1) @ (2 * v))).abs().max()) < EXACT
    assert trace.calls[0].v.shape[1] == 1


def test_backward_after_each_of_several_forwards() -> None:
    """Nothing that is shared between forwards holds the graph of one."""
    model, x = made("ScaledBefore")
    mask = nn.Parameter(draw(H, 1, T, seed=2, dtype=torch.float64))
    model.register_parameter("mask", mask)
    model.attend = lambda q, k, v: (q @ k.mT + mask.masked_fill(HIDDEN, -torch.inf)).softmax(-1) @ v  # type: ignore[method-assign]
    with listening(model, Listener(lambda c: c.weights * 1.5)):  # type: ignore[operator]
        for _ in range(2):
            model(x).sum().backward()
    assert mask.grad is not None


def test_a_trace_that_nobody_listens_to_recognises_what_it_saw() -> None:
    """And one with a listener follows everything."""
    model, x = made("Form")
    with torch.no_grad():
        for _ in range(3):
            hookattn.trace(model, x)
        with listening(model, listener := Listener()):
            model(x)
    assert listener.asked == ["weights", "values", "output"]


# ------------------------------------------------------------------------------------------ what others have written


@pytest.mark.parametrize("how", ["band", "skewed", "poured", "gathered", "cut", "scaled_after", "split", "folded"])
@pytest.mark.parametrize("grad", [False, True])
def test_scores_that_lie_elsewhere(how: str, grad: bool) -> None:
    """Their output is changed where the model has it."""
    torch.manual_seed(1)
    model = Moved(how).double().eval()
    x = draw(B, T, model.proj.in_features, seed=4, dtype=torch.float64)
    heads = model.proj.in_features // (model.parts(x)[0].shape[-1])
    with torch.set_grad_enabled(grad):
        plain = model(x)
        with listening(model, listener := Listener()) as trace:
            assert same_bits(model(x), plain)
        assert listener.asked[-1] == "output" and "missed" not in listener.asked
        z = trace.calls[0].output
        assert torch.equal(model.proj(z.transpose(1, 2).flatten(2)), plain), "so this is what is to be changed"
        with listening(model, Listener(output=lambda c: louder(c.output))):  # type: ignore[arg-type]
            got = model(x)
        q, k, v = model.parts(x)
        own = getattr(model, how)(q, k, v)
        assert own.shape[1] == heads
        expected = model.proj(louder(own).transpose(1, 2).flatten(2))
    assert float((got - expected).detach().abs().max()) < EXACT
    assert float((plain - expected).detach().abs().max()) > 1e-3
    if grad:
        for a, b in zip(
            *(torch.autograd.grad(z.square().sum(), list(model.parameters())) for z in (got, expected)), strict=True
        ):
            assert float((a - b).abs().max()) < GRADIENT


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_other_weights(name: str) -> None:
    """Nothing changes where nothing is changed; where weights were asked about, what is answered meets the values."""
    torch.manual_seed(1)
    model = OTHER_WEIGHTS[name]().eval()
    x = draw(2, 5, 16, seed=4)
    with torch.no_grad():
        plain = run(model, x)
        own = dict(SAID)
        with listening(model, Listener(strict=False)) as trace:
            assert same_bits(run(model, x), plain)
        same = Listener(
            lambda c: c.weights.clone(),  # type: ignore[union-attr]
            lambda c: c.v.clone(),
            lambda c: c.output.clone(),  # type: ignore[union-attr]
            strict=False,
        )
        if "over_queries" in name:  # as in :func:`test_weights_that_turn_out_to_be_others`
            with pytest.raises(EditError, match="softmax over queries"), listening(model, same):
                run(model, x)
            return
        with listening(model, same):
            assert same_bits(run(model, x), plain)
        reasons = len(trace.skipped) + len(trace.calls)
        assert same.asked.count("output") + same.asked.count("missed") >= min(reasons, 1)
        model.double()
        before = run(model, x.double())
        own = dict(SAID)
        once = Listener(lambda c: changed(c.weights) if c.weights.shape[1] > 1 else None, strict=False)  # type: ignore
        with listening(model, once):
            got = run(model, x.double())
    if once.asked != ["weights", "values", "output"] or not isinstance(own.get("weights"), Tensor):
        return
    if not isinstance(own.get("output"), Tensor) or not torch.equal(own["weights"] @ own["v"], own["output"]):
        return
    if own["weights"].shape[1] < 2 or not torch.equal(own["output"].transpose(1, 2).flatten(2), before):
        return
    expected = (changed(own["weights"]) @ own["v"]).transpose(1, 2).flatten(2)
    assert float((got - expected).abs().max()) < EXACT


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_entry_of_the_zoo(case: Case, what: str) -> None:
    """Against plain code on the same weights, in float64; some models have their softmax in float32 all the same."""
    model, inputs = case.model(torch.float64).eval(), case.inputs(torch.float64)
    calls = model.entry.calls(*inputs)
    if min(e.q.shape[1] for e in calls) < 2 or case.name == "self_then_cross_in_one_module":
        pytest.skip("it has one head; or its second attention is of the first's output, which plain code does not see")
    heads: list[int] = []

    def answer(call: KernelCall) -> Tensor:
        if what != "values":
            return changed(call.weights) if what == "weights" else louder(call.output)  # type: ignore[arg-type]
        heads.append(call.v.shape[1])
        return louder(call.v) if call.v.shape[1] > 1 else 2 * call.v

    with torch.no_grad():
        plain = model(*inputs)
        listener = Listener(**{what: answer})
        with listening(model, listener):
            got = model(*inputs)
    if case.name == "softmax_logsumexp" and what != "output":  # as blocks of keys may be made, that are merged
        assert listener.asked == ["output"]
        return
    outputs = []
    for i, call in enumerate(calls):
        _, weights, output = reference_attention(**call.reference_args())
        n = weights.shape[1]
        if what == "weights":
            outputs.append(changed(weights) @ repeat_heads(call.v.double(), n))
        elif what == "output":
            outputs.append(louder(output))
        else:
            v = repeat_heads(call.v.double(), heads[i])
            outputs.append(weights @ repeat_heads(louder(v) if heads[i] > 1 else 2 * v, n))
    with torch.no_grad():
        expected = model.entry.finish(outputs, *inputs)
    assert float((got - expected).abs().max()) < max(3e-7, case.tol)
    assert float((plain - expected).abs().max()) > 1e-4
    assert "missed" not in listener.asked and set(listener.paths) <= {"layers.0.attn", "layers.0.attn.attention"}


IDS = torch.arange(2 * T).view(2, T) + 3


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_eager_models_of_transformers(name: str, what: str) -> None:
    """The second layer, against the same function with the change written into it."""
    transformers = pytest.importorskip("transformers")
    from tests import tiny_models as tiny

    model = getattr(tiny, name)("eager").double()
    given = {"input_ids": IDS, "decoder_input_ids": IDS} if name == "t5" else {"input_ids": IDS}
    ran = 0

    def by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **more: Any) -> Any:
        nonlocal ran
        mine, ran = ran == 1, ran + 1
        w = q @ repeat_heads(k, q.shape[1]).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        bias = more.get("position_bias")
        for x in (bias, mask):
            w = w if x is None else w + x
        w = w.softmax(-1)
        w = changed(w) if mine and what == "weights" else w
        v = louder(v) if mine and what == "values" else v
        z = w @ repeat_heads(v, q.shape[1])
        z = louder(z) if mine and what == "output" else z
        return z.transpose(1, 2), w

    asked = 0

    def answer(call: KernelCall) -> Tensor | None:
        nonlocal asked
        asked += 1
        x = {"weights": call.weights, "values": call.v, "output": call.output}[what]
        return None if asked != 2 else (changed if what == "weights" else louder)(x)  # type: ignore[arg-type]

    def result() -> Tensor:
        made = model(**given)
        return made.logits if "logits" in made else made[0]  # type: ignore[no-any-return]

    with torch.no_grad():
        plain = result()
        listener = Listener(**{what: answer})
        with listening(model, listener):
            got = result()
    transformers.AttentionInterface.register("by_hand", by_hand)
    transformers.AttentionMaskInterface.register("by_hand", transformers.masking_utils.eager_mask)
    try:
        model.set_attn_implementation("by_hand")
        with torch.no_grad():
            expected = result()
    finally:
        del transformers.AttentionInterface._global_mapping["by_hand"]
        del transformers.AttentionMaskInterface._global_mapping["by_hand"]
    assert ran == asked == listener.asked.count("output") and "missed" not in listener.asked
    assert float((plain - expected).abs().max()) > 1e-4
    # Some have their softmax in float32, whatever the model is in.
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())
