"""Fields that stay in the graph: a loss on them trains the model, whichever kernel it has."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import hookattn
from hookattn.errors import InputError
from tests.reference import causal, draw

F64 = torch.float64
B, H, T, D = 2, 4, 6, 3
MASK = causal(T, T).clone()
MASK[2] = False  # a query with nothing to attend to


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=MASK)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k[:, ::2], v[:, ::2], is_causal=True, enable_gqa=True)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * D**-0.5).masked_fill(~causal(T, T), -math.inf).softmax(-1) @ v


def overwriting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Writes in place to all that was captured."""
    q, k, v = q * 1.0, k * 1.0, v * 1.0
    out = sdpa(q, k, v)
    for x in (q, k, v, out):
        x.mul_(3)
    return out


KERNELS = {"plain": plain, "masked": masked, "grouped": grouped, "by hand": by_hand}


class Layer(nn.Module):
    def __init__(self, run: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.run = run
        self.qkv, self.out = nn.Linear(8, 3 * H * D, dtype=F64), nn.Linear(H * D, 8, dtype=F64)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.run(*self.heads(x)).transpose(1, 2).flatten(2))
        return made


class Model(nn.Module):
    def __init__(self, run: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.layers = nn.ModuleList(Layer(run) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def explicit_weights(model: Model, x: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
    """Weights of every layer by an operation a line; the layers themselves run as they do."""
    found = []
    for layer in model.layers:
        assert isinstance(layer, Layer)
        q, k, _ = layer.heads(x)
        k = k[:, ::2].repeat_interleave(2, 1) if run is grouped else k
        mask = MASK if run is masked else causal(T, T)
        powers = (q @ k.mT * D**-0.5).exp() * mask
        found.append(powers / powers.sum(-1, keepdim=True).clamp_min(1e-300))
        x = x + layer(x)
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_student_learns_to_attend_as_its_teacher(kernel: str) -> None:
    """Attention distillation: gradients of all parameters of the student as explicit float64 math has them."""
    run = KERNELS[kernel]
    torch.manual_seed(0)
    teacher, student = Model(run), Model(run)
    other = copy.deepcopy(student)
    x = draw(B, T, 8, seed=1, dtype=F64)
    wanted = [call.weights for call in hookattn.trace(teacher, (x,))]
    trace = hookattn.trace(student, (x,), attached=True)
    assert len(trace) == 2 and all(call.certificate.faithful and not call.notes for call in trace)
    sum((call.weights - w).square().sum() for call, w in zip(trace, wanted, strict=True)).backward()  # type: ignore[union-attr]
    explicit = explicit_weights(other, x, run)
    sum((a - w).square().sum() for a, w in zip(explicit, wanted, strict=True)).backward()  # type: ignore[union-attr]
    for (name, mine), theirs in zip(student.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None, name
            continue
        assert mine.grad is not None and not mine.grad.isnan().any(), name
        assert float((mine.grad - theirs.grad).abs().max()) <= 1e-10 * float(theirs.grad.abs().max()), name


def test_it_learns() -> None:
    torch.manual_seed(0)
    teacher, student = Model(plain), Model(plain)
    x = draw(B, T, 8, seed=1, dtype=F64)
    wanted = hookattn.trace(teacher, (x,))
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        with hookattn.tracing(student, attached=True) as trace:
            student(x)
        loss = torch.stack([(a.weights - b.weights).square().sum() for a, b in zip(trace, wanted, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("field", ["q", "k", "v", "scores", "weights", "output"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_field_has_a_graph(kernel: str, field: str) -> None:
    torch.manual_seed(0)
    model = Layer(KERNELS[kernel])
    x = draw(B, T, 8, seed=1, dtype=F64)
    trace = hookattn.trace(model, (x,), attached=True)
    (call,) = trace
    detached = hookattn.trace(model, (x,))[0]
    found = call.get(field)
    assert found is not None and found.requires_grad
    torch.testing.assert_close(found.detach(), detached.get(field), rtol=0, atol=1e-14)
    (moved,) = torch.autograd.grad(found.square().sum(), model.qkv.weight)
    assert float(moved.abs().max()) > 0
    step = 1e-6
    direction = draw(*model.qkv.weight.shape, seed=5, dtype=F64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            model.qkv.weight += sign * step * direction
            one = hookattn.trace(model, (x,))[0].get(field)
            assert one is not None
            values.append(float(one.square().sum()))
            model.qkv.weight -= sign * step * direction
    slope, expected = (values[0] - values[1]) / (2 * step), float((moved * direction).sum())
    assert abs(slope - expected) < 1e-5 * max(1.0, abs(expected))


def test_parts_and_pieces_are_in_the_graph() -> None:
    model, x = Layer(plain), draw(B, T, 8, seed=1, dtype=F64)
    call = hookattn.trace(model, (x,), attached=True)[0]
    part = call.at(heads=2, queries=slice(-1, None), batch=0)
    (a,) = torch.autograd.grad(part.weights.square().sum(), model.qkv.weight, retain_graph=True)
    (b,) = torch.autograd.grad(call.weights[:1, 2:3, -1:].square().sum(), model.qkv.weight)
    torch.testing.assert_close(a, b)

    def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([(part @ k.mT).softmax(-1) @ v for part in q.split(2, 2)], 2)

    (call,) = hookattn.trace(Layer(chunks), (x,), attached=True)
    assert call.weights.shape == (B, H, T, T) and call.weights.requires_grad and call.q.requires_grad


def test_some_fields_heads_and_queries() -> None:
    model, x = Layer(plain), draw(B, T, 8, seed=1, dtype=F64)
    whole = hookattn.trace(model, (x,), attached=True)[0]
    (wanted,) = torch.autograd.grad(whole.weights[:, [3, 0]][:, :, 2:].square().sum(), model.qkv.weight)
    for capture in (("weights",), None):
        call = hookattn.trace(model, (x,), attached=True, capture=capture, heads=[3, 0], queries=slice(2, None))[0]
        (found,) = torch.autograd.grad(call.weights.square().sum(), model.qkv.weight)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("length", [T, 200])
def test_what_the_model_overwrites_is_what_it_was(length: int) -> None:
    """Small tensors are copied, and large ones when somebody writes: both in the graph."""
    torch.manual_seed(0)
    model, x = Layer(overwriting), draw(B, length, 8, seed=1, dtype=F64)
    (call,) = hookattn.trace(model, (x,), attached=True)
    q, k, v = model.heads(x)
    expected = (q @ k.mT * D**-0.5).softmax(-1)
    for found, wanted in ((call.weights, expected), (call.output, expected @ v), (call.v, v)):
        torch.testing.assert_close(found.detach(), wanted.detach())
    (wanted,) = torch.autograd.grad(expected.square().sum(), model.qkv.weight)
    (found,) = torch.autograd.grad(call.weights.square().sum(), model.qkv.weight)
    torch.testing.assert_close(found, wanted)


def test_what_is_read_without_gradients_does_not_stay_so() -> None:
    model, x = Layer(plain), draw(B, T, 8, seed=1, dtype=F64)
    call = hookattn.trace(model, (x,), attached=True)[0]
    with torch.no_grad():
        assert not call.weights.requires_grad
    assert call.weights.requires_grad and call.weights is call.weights


def test_fields_that_are_in_no_graph_are_named() -> None:
    model, x = Layer(plain), draw(B, T, 8, seed=1, dtype=F64)
    with torch.no_grad():
        call = hookattn.trace(model, (x,), attached=True)[0]
    assert not call.weights.requires_grad
    assert any("not in the graph: q, k, v, output" in note for note in call.notes)
    assert not hookattn.trace(model, (x,))[0].weights.requires_grad


def test_together_with_gradients() -> None:
    """A loss on weights comes through the weights, and not through the output."""
    model, x = Layer(plain), draw(B, T, 8, seed=1, dtype=F64)
    trace = hookattn.trace(model, (x,), attached=True, gradients=True)
    (trace.output.square().sum() + trace[0].weights.square().sum()).backward()
    alone = hookattn.trace(model, (x,), gradients=True)
    alone.output.square().sum().backward()
    torch.testing.assert_close(trace[0].grad("weights"), alone[0].grad("weights"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, r"dtype=torch\.float16 takes them out"),
        ({"device": "cpu"}, r"device=.*takes them out"),
        ({"capture": ("weights", "entropy")}, "the statistic 'entropy' takes them out"),
        ({"attached": 1}, "attached=1"),
    ],
)
def test_what_would_take_fields_out_of_the_graph(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"attached": True, **options}
    with pytest.raises(InputError, match=message):
        hookattn.trace(Layer(plain), (draw(B, T, 8, dtype=F64),), **given)


def test_a_file_is_in_no_graph(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"to=.*takes them out of it; leave one of the two out"):
        hookattn.trace(Layer(plain), (draw(B, T, 8, dtype=F64),), attached=True, to=tmp_path / "f")
    assert not list(tmp_path.iterdir())
