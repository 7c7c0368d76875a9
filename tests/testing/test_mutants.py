"""``check_adapter`` notices planted mistakes: in what the taps hand over, and in what an adapter leaves behind.

Every mistake in a record is planted twice: as it is, and with an output made to fit it, so that the certificate calls
the record faithful and only a witness from outside can tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import hookattn
from hookattn import AdapterCheckError, KernelCall
from hookattn.models.module_hooks import ModuleHooks
from hookattn.recording.session import Session
from hookattn.testing import Failure, check_adapter
from hookattn.testing.failure import listing
from tests import reference

HEADS, GROUPS, WIDTH = 4, 2, 8


def rotate(x: Tensor, sign: float = 1.0, first: int = 0) -> Tensor:
    """Rotary position embedding of B H T D."""
    half = x.shape[-1] // 2
    angle = sign * (first + torch.arange(x.shape[2]))[:, None] * 0.7 ** torch.arange(half)
    a, b, cos, sin = x[..., :half], x[..., half:], angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Rotary(nn.Module):
    """Grouped heads, rotated, through the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, HEADS * WIDTH)
        self.kv = nn.Linear(32, 2 * GROUPS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, 32)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, GROUPS, WIDTH)).permute(2, 0, 3, 1, 4)
        return rotate(q), rotate(k), v

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        causal = keep is None
        y = scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Sunk(Rotary):
    """The same in eager arithmetic, with a learned bias and learned sinks."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.bias = nn.Parameter(torch.randn(1, HEADS, 6, 6))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (y.repeat_interleave(HEADS // GROUPS, 1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5 + self.bias
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
        sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Toy(nn.Module):
    def __init__(self, kind: type[Rotary] = Rotary, masked: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind(), kind()])
        self.masked = masked
        with torch.no_grad():
            for p in self.parameters():
                p *= 2.5

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[1], x.shape[1]).tril(1).bool() if self.masked else None
        for layer in self.layers:
            x = x + layer(x, keep)
        return x


class ToyAdapter(hookattn.Adapter):
    name = "toy"
    covers = (__name__,)
    attention: ClassVar[dict[str, str]] = {"Rotary": "self", "Sunk": "self"}
    stack = "decoder"


def inputs() -> Tensor:
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------------------------------- mistakes in a record


def other_sign(c: KernelCall) -> None:
    c.q, c.k = rotate(c.q, -2.0), rotate(c.k, -2.0)


def unrotated_k(c: KernelCall) -> None:
    c.k = rotate(c.k, -1.0)


def unrotated_both(c: KernelCall) -> None:
    c.q, c.k = rotate(c.q, -1.0), rotate(c.k, -1.0)


def rotated_further(c: KernelCall) -> None:
    """The same scores from other vectors."""
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    c.q, c.k = c.q @ turn.to(c.q.dtype), c.k @ turn.to(c.q.dtype)


def wrong_scale(c: KernelCall) -> None:
    c.scale = c.scale * 1.02


def scale_in_q(c: KernelCall) -> None:
    c.q, c.scale = c.q * c.scale, 1.0


def causal_lost(c: KernelCall) -> None:
    c.causal, c.mask = False, None


def causal_added(c: KernelCall) -> None:
    c.causal = True


def inverted_mask(c: KernelCall) -> None:
    full = torch.ones(c.q.shape[2], c.k.shape[2], dtype=torch.bool)
    mask = full.tril()[None, None] if c.mask is None else c.mask
    c.causal, c.mask = False, ~mask


def swapped(c: KernelCall) -> None:
    c.q, c.k = c.k.repeat_interleave(HEADS // GROUPS, 1), c.q[:, :: HEADS // GROUPS]


def keys_in_another_order(c: KernelCall) -> None:
    c.k, c.v = c.k.flip(1), c.v.flip(1)


def heads_in_another_order(c: KernelCall) -> None:
    """As if query heads were counted group by group: everything agrees, and every head has another's name."""
    order = torch.arange(HEADS).view(GROUPS, -1).T.flatten()
    c.q = c.q[:, order]
    c.k, c.v = (x.repeat_interleave(HEADS // GROUPS, 1)[:, order] for x in (c.k, c.v))
    c.output = None if c.output is None else c.output[:, order]
    for name in ("bias", "sinks"):
        x = getattr(c, name)
        if isinstance(x, Tensor):
            setattr(c, name, x[:, order] if x.dim() > 1 else x[order])


def repeated(c: KernelCall) -> None:
    c.k, c.v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (c.k, c.v))


def no_bias(c: KernelCall) -> None:
    c.bias = None


def no_sinks(c: KernelCall) -> None:
    c.sinks = None


def other_v(c: KernelCall) -> None:
    c.v = c.v + 0.01


Mutant = Callable[[KernelCall], None]
FUSED: tuple[Mutant, ...] = (
    other_sign,
    unrotated_k,
    unrotated_both,
    rotated_further,
    wrong_scale,
    scale_in_q,
    causal_lost,
    inverted_mask,
    swapped,
    keys_in_another_order,
    heads_in_another_order,
    repeated,
    other_v,
)
EAGER: tuple[Mutant, ...] = (*FUSED, no_bias, no_sinks)
CASES = [(Rotary, m) for m in FUSED] + [(Sunk, m) for m in EAGER]


def fitted(c: KernelCall) -> None:
    """An output, scores and weights that fit the rest of the record."""
    mask = torch.ones(c.q.shape[2], c.k.shape[2], dtype=torch.bool)
    mask = mask.tril()[None, None] if c.causal else mask[None, None]
    mask = mask if c.mask is None else mask & c.mask
    scores, weights, output = reference.reference_attention(
        c.q, c.k, c.v, scale=c.scale, bias=c.bias, mask=mask, softcap=c.softcap, sinks=c.sinks
    )
    c.output = output.to(c.q.dtype)
    c.scores = None if c.scores is None else scores.to(c.q.dtype)
    c.weights = None if c.weights is None else weights.to(c.q.dtype)
    c.applied = c.undropped = None


def plant(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, fit: bool) -> None:
    record = Session.record

    def changed(self: Session, call: KernelCall) -> None:
        call = dataclasses.replace(call)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            mutant(call)
            if fit:
                fitted(call)
        record(self, call)

    monkeypatch.setattr(Session, "record", changed)


def caught(model: Callable[[], nn.Module], **options: Any) -> AdapterCheckError:
    with pytest.raises(AdapterCheckError) as error:
        check_adapter(ToyAdapter(), model, inputs, **options)
    assert isinstance(error.value, AssertionError)
    return error.value


@pytest.mark.parametrize("kind", [Rotary, Sunk])
def test_the_right_one_passes(kind: type[Rotary]) -> None:
    told = check_adapter(ToyAdapter(), lambda: Toy(kind), inputs)
    assert told.pop("half precision") == "passed"
    assert {name for name, said in told.items() if said != "passed"} == {"padding", "cache", "weights", "more inputs"}


@pytest.mark.parametrize("fit", [False, True], ids=["as it is", "with an output to fit"])
@pytest.mark.parametrize(("kind", "mutant"), CASES, ids=lambda x: x.__name__)
def test_a_mistake_in_a_record_is_caught(
    kind: type[Rotary], mutant: Mutant, fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, mutant, fit)
    error = caught(lambda: Toy(kind))
    found = {f.check for f in error.failures}
    assert found & {"invariants", "formed by the model", "grouped heads"}
    assert all("layers." in f.where for f in error.failures if f.check == "formed by the model")
    if fit:
        assert "formed by the model" in found
        trace = hookattn.trace(Toy(kind).eval(), inputs(), verify="full")
        assert trace.faithful, "so the certificate alone would have said nothing"


@pytest.mark.parametrize("mutant", [inverted_mask, causal_added, causal_lost])
def test_a_mistake_about_an_explicit_mask_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    check_adapter(ToyAdapter(), lambda: Toy(masked=True), inputs)
    for fit in (False, True):
        with monkeypatch.context() as patched:
            plant(patched, mutant, fit)
            caught(lambda: Toy(masked=True))


def test_a_causal_flag_that_the_mask_does_not_bear_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Session._site

    def flagged(self: Session, within: str) -> hookattn.Site:
        for call in self.trace.calls:
            call.causal = True
        return keep(self, within)

    monkeypatch.setattr(Session, "_site", flagged)
    assert any(f.what == "causal" for f in caught(lambda: Toy(masked=True)).failures)


# ------------------------------------------------------------------------------------------- what is left or lost


def test_a_leaked_hook_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModuleHooks, "remove", lambda self: None)
    found = {f.check for f in caught(Toy).failures}
    assert {"nothing changed", "nothing left behind"} <= found


class Leaking(ToyAdapter):
    def check(self, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: None)


class Changing(ToyAdapter):
    def check(self, module: nn.Module) -> None:
        with torch.no_grad():
            module.q.weight *= 1.01  # type: ignore[union-attr, operator]


class Seeding(ToyAdapter):
    def check(self, module: nn.Module) -> None:
        module.train()


class Blind(ToyAdapter):
    attention: ClassVar[dict[str, str]] = {}


class Raising(ToyAdapter):
    def site(self, path: str, module: nn.Module, root: nn.Module) -> hookattn.Site:
        raise ZeroDivisionError(path)


@pytest.mark.parametrize(
    ("adapter", "checks"),
    [
        (Leaking(), {"nothing changed", "nothing left behind"}),
        (Changing(), {"nothing changed"}),
        (Seeding(), {"nothing changed"}),
        (Blind(), {"sites"}),
        (Raising(), {"sites", "layers", "invariants", "nothing changed"}),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, hookattn.Adapter) else "",
)
def test_an_adapter_that_misbehaves_is_caught(adapter: hookattn.Adapter, checks: set[str]) -> None:
    with pytest.raises(AdapterCheckError) as error:
        check_adapter(adapter, Toy, inputs)
    assert checks <= {f.check for f in error.value.failures}
    assert repr(adapter.name) in str(error.value)


def test_a_call_that_is_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Session.record
    monkeypatch.setattr(Session, "record", lambda self, c: None if self.trace.calls else record(self, c))
    found = {f.check for f in caught(Toy).failures}
    assert "nothing missing" in found
    trace = check_adapter(ToyAdapter(), Toy, inputs, skipped=["Rotary"], only=["nothing missing"])
    assert trace == {"nothing missing": "passed"}


def test_attention_that_tells_nothing_is_said() -> None:
    def flat() -> nn.Module:
        model = Toy()
        with torch.no_grad():
            for layer in model.layers:
                layer.q.weight *= 1e-4
                layer.q.bias *= 1e-4
        return model

    assert {f.check for f in caught(flat).failures} == {"far from uniform"}


# ---------------------------------------------------------------------------------------------- what it says


def test_everything_is_told_at_once_and_so_that_it_can_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_scale, False)
    error = caught(Toy, only=("invariants", "formed by the model", "layers"))
    told = str(error)
    assert told.startswith("the adapter 'toy' does not hold to the contract: ")
    for word in ("layers.0 (call 0, step 0, sdpa)", "layers.1 (call 1", "weights @ v == output", "expected", "mend"):
        assert word in told
    assert {f.check for f in error.failures} == {"invariants"}


def test_a_reference_of_ones_own() -> None:
    def own(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for i, layer in enumerate(model.layers):  # type: ignore[arg-type]
            q, k, _ = layer.heads(x)
            scores = q.double() @ k.repeat_interleave(2, 1).double().mT / WIDTH**0.5
            hidden = torch.ones(6, 6).triu(1).bool()
            found[f"layers.{i}"] = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            x = x + layer(x)
        return found

    assert check_adapter(ToyAdapter(), Toy, inputs, weights=own, only=["weights"]) == {"weights": "passed"}
    wrong = caught(Toy, weights=lambda m, x: {p: w.flip(1) for p, w in own(m, x).items()}, only=["weights"])
    assert [f.where for f in wrong.failures] == ["layers.0", "layers.1"]
    lost = caught(Toy, weights=lambda m, x: {"layers.7": x}, only=["weights"])
    assert lost.failures[0].where == "layers.7"


def test_further_inputs() -> None:
    more = {"long": lambda: torch.randn(1, 11, 32), "one token": lambda: torch.randn(1, 1, 32)}
    assert check_adapter(ToyAdapter(), Toy, inputs, more_inputs=more)["more inputs"] == "passed"


def test_a_call_that_is_lost_in_half_precision_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Session.record

    def some(self: Session, call: KernelCall) -> None:
        if call.q.dtype == torch.float32 or self.trace.calls:
            record(self, call)

    monkeypatch.setattr(Session, "record", some)
    assert {f.check for f in caught(Toy).failures} == {"half precision"}


def test_what_holds_for_many_calls_is_said_once() -> None:
    failures = [Failure(f"layers.{i}", "a promise", "this", "that", "do so", "a check") for i in range(9)]
    told = listing("title", [*failures, *failures])
    assert told.splitlines() == [
        "title",
        "",
        "a check",
        *(f"  layers.{i}" for i in range(4)),
        "  and 5 more",
        "    a promise",
        "    expected  this",
        "    got       that",
        "    mend      do so",
    ]
    assert str(failures[0]) == "layers.0: a promise: expected this, got that. Do so."
