"""What a backward pass runs again gets the changes of its first run, so that the gradients are those of the edit."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hookattn
from hookattn.attention.kernel_call import KernelCall
from hookattn.taps import Change
from hookattn.testing import check_clean
from tests.reference import draw
from tests.taps.test_changes import Editor, Projected, cut, listening, louder

T = 6


class Layers(nn.Module):
    """Layers that are checkpointed, or not: each by itself, or the first in one that holds both."""

    def __init__(self, reentrant: bool | None, nested: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        given = {"is_causal": True, "dropout_p": dropout}
        self.layers = nn.ModuleList([Projected(2, enable_gqa=True, **given), Projected(**given)])
        self.reentrant, self.nested = reentrant, nested

    def again(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    def both(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.again(layer, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.both, x) if self.nested else self.both(x)


EDITS: dict[str, Callable[[], Editor]] = {
    "q": lambda: Editor(lambda c: Change(q=louder(c.q)), layer=1),
    "mask": lambda: Editor(lambda c: Change(mask=cut(T, T))),
    "output": lambda: Editor(answer=lambda c: louder(c.output), layer=0),  # type: ignore[arg-type]
}
each_kind = pytest.mark.parametrize("reentrant", [True, False])


def gradients(model: nn.Module, x: Tensor, listener: Any, backward: str = "inside") -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    with listening(model, listener):
        loss = model(x).square().sum()
        if backward == "inside":
            loss.backward()
        elif backward == "another thread":
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
    if backward == "after it":
        loss.backward()
    elif backward == "in another trace":
        other = Projected().double()
        with hookattn.tracing(other) as trace:
            other(x.detach())
            loss.backward()
        assert len(trace) == 1
    elif backward == "in the same model's trace":
        with hookattn.tracing(model) as trace:
            with torch.no_grad():
                model(x.detach())
            loss.backward()
        assert len(trace) == 2
    check_clean(model)
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def pair(reentrant: bool, **given: Any) -> tuple[Layers, Layers]:
    torch.manual_seed(1)
    plain = Layers(None, **given).double()
    model = Layers(reentrant, **given).double()
    model.load_state_dict(plain.state_dict())
    return plain, model


@each_kind
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "backward", ["inside", "after it", "another thread", "in another trace", "in the same model's trace"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_gradients_are_those_without_checkpointing(reentrant: bool, edit: str, backward: str, nested: bool) -> None:
    plain, model = pair(reentrant, nested=nested)
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    unedited = gradients(plain, x, Editor())
    expected, got = gradients(plain, x, EDITS[edit]()), gradients(model, x, EDITS[edit](), backward)
    assert len(expected) == len(got) == 1 + len(list(model.parameters()))
    for a, b, c in zip(got, expected, unedited, strict=True):
        assert float((a - b).abs().max()) < 1e-12 * max(1.0, float(b.abs().max()))
        if c is unedited[0]:
            assert float((b - c).abs().max()) > 1e-3


@each_kind
def test_dropout_falls_where_it_fell(reentrant: bool) -> None:
    plain, model = pair(reentrant, dropout=0.3)
    x = draw(2, T, 16, seed=4, dtype=torch.float64)
    for a, b in zip(gradients(model, x, EDITS["q"](), "after it"), gradients(plain, x, EDITS["q"]()), strict=True):
        assert float((a - b).abs().max()) < 1e-12 * max(1.0, float(b.abs().max()))


@each_kind
@pytest.mark.parametrize("backward", ["inside", "after it"])
def test_nothing_is_recorded_twice_and_the_step_is_that_of_the_first_run(reentrant: bool, backward: str) -> None:
    """Of two forwards the first is changed, and its gradient alone is of a changed run."""

    class OfStep(Editor):
        def before(self, call: KernelCall, site: Any, step: int, changeable: Any) -> Change | None:
            steps.append((site.layer, step))
            super().before(call, site, step, changeable)
            return Change(q=louder(call.q)) if step == 0 else None

    plain, model = pair(reentrant)
    inputs = [draw(2, T, 16, seed=n, dtype=torch.float64).requires_grad_() for n in (4, 5)]
    found = []
    for m in (plain, model):
        steps: list[tuple[int | None, int]] = []
        with listening(m, OfStep()) as trace:
            losses = [m(x).square().sum() for x in inputs]
            if backward == "inside":
                found.append(torch.autograd.grad(sum(losses), inputs) if not reentrant else _backward(losses, inputs))  # type: ignore[arg-type]
        if backward == "after it":
            found.append(_backward(losses, inputs))
        assert [(c.site.layer, c.step) for c in trace.calls] == [(0, 0), (1, 0), (0, 1), (1, 1)] == steps[:4]
        assert sorted(steps[4:]) == ([] if m is plain else [(0, 0), (0, 1), (1, 0), (1, 1)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) < 1e-12 * float(b.abs().max())


def _backward(losses: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    for x in inputs:
        x.grad = None
    for loss in losses:
        loss.backward()
    return tuple(x.grad for x in inputs)  # type: ignore[misc]


@each_kind
@pytest.mark.parametrize("backward", ["inside", "after it"])
@pytest.mark.parametrize("covered", [True, False])
def test_in_transformers(reentrant: bool, backward: str, covered: bool) -> None:
    pytest.importorskip("transformers")
    from tests import tiny_models as tiny

    ids = torch.arange(2 * T).view(2, T) + 3
    model = tiny.gpt2().double().train()
    for p in model.modules():
        if isinstance(p, nn.Dropout):
            p.p = 0.0
    model.config.attn_pdrop = 0.0
    for layer in model.transformer.h:
        layer.attn.attn_dropout.p = 0.0
    host = model if covered else nn.Sequential(model)

    def run(listener: Any) -> list[Tensor]:
        model.zero_grad()
        with listening(host, listener):
            loss = host(ids).logits.square().mean()
            if backward == "inside":
                loss.backward()
        if backward == "after it":
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, expected = run(Editor()), run(EDITS["q"]())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = run(EDITS["q"]())
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).abs().max()) < 1e-12 * max(1.0, float(b.abs().max()))
    assert max(float((a - b).abs().max()) for a, b in zip(plain, expected, strict=True)) > 1e-6
    check_clean(model)


@each_kind
def test_nothing_is_asked_again_where_nobody_listens(reentrant: bool) -> None:
    _, model = pair(reentrant)
    x = draw(2, T, 16, seed=4, dtype=torch.float64).requires_grad_()
    with hookattn.tracing(model) as trace:
        loss = model(x).sum()
    seen: list[str] = []
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append(hookattn.taps.active.current().__class__.__name__))  # type: ignore[attr-defined]
    loss.backward()
    assert seen == ["NoneType"] and len(trace) == 2


def test_it_lives_no_longer_than_the_graph() -> None:
    _, model = pair(False)
    listener = EDITS["q"]()
    with listening(model, listener):
        loss = model(draw(2, T, 16, seed=4, dtype=torch.float64).requires_grad_()).sum()
    alive = weakref.ref(listener)
    del listener
    loss.backward()
    del loss
    gc.collect()
    assert alive() is None


@each_kind
def test_an_error_in_the_second_run_leaves_the_model_clean(reentrant: bool) -> None:
    _, model = pair(reentrant)
    runs = 0

    def change(call: KernelCall) -> Change:
        nonlocal runs
        runs += 1
        if runs > 2:
            raise ZeroDivisionError
        return Change(q=louder(call.q))

    x = draw(2, T, 16, seed=4, dtype=torch.float64).requires_grad_()
    with listening(model, Editor(change)):
        loss = model(x).sum()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    check_clean(model)
    assert hookattn.trace(model, x.detach()).faithful
