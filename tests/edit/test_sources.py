"""Values of other runs: patches, frozen patterns, means and samples, each against what is taken by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import edit
from tests.edit.by_hand import attend
from tests.edit.test_fields import Fused
from tests.reference import causal, draw, same_bits

EXACT = 1e-12
T = 6


class Stack(nn.Module):
    """Two causal layers, the first with grouped heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Fused(2, enable_gqa=True, is_causal=True), Fused(is_causal=True)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x

    def by_hand(self, x: Tensor, changes: list[dict[str, Any]]) -> Tensor:
        for layer, changed in zip(self.layers, changes, strict=True):
            assert isinstance(layer, Fused)
            t = x.shape[1]
            z = attend(*layer.operands(x), causal(t)[None, None], changes=changed)
            x = x + layer.finish(z)
        return x


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(1)
    return Stack().double()


def data(seed: int, batch: int = 2, t: int = T) -> Tensor:
    return draw(batch, t, 16, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("field", ["q", "k", "v", "scores", "weights", "output"])
@pytest.mark.parametrize("how", ["trace", "call", "tensor", "file"])
@torch.no_grad()
def test_a_patch(model: Stack, field: str, how: str, tmp_path: Path) -> None:
    """Of one layer, from the run of another input."""
    x, other = data(4), hookattn.trace(model, data(5))
    call = other[1]
    if field == "output":  # what the model formed, and what the kernel returned, are the same
        assert call.output is not None
    of: Any = {"trace": other, "call": call, "tensor": call.get(field), "file": None}[how]
    if how == "file":
        of = other.save(tmp_path / "other.safetensors")
    got = hookattn.edited(model, x, edit.patch(field, of, layer=1), verify="full", strict=True)
    expected = model.by_hand(x, [{}, {field: lambda _: call.get(field)}])
    assert float((got.output - expected).abs().max()) < EXACT
    assert float((got.output - model(x)).abs().max()) > 1e-3


@torch.no_grad()
def test_heads_queries_and_batch_entries_of_a_patch(model: Stack) -> None:
    x, other = data(4), hookattn.trace(model, data(5), heads=[1, 3], queries=[2, 5])
    one = edit.patch("weights", other, layer=1, heads=[3], queries=[5, 2], batch=1)
    got = hookattn.edited(model, x, one).output

    def patched(w: Tensor) -> Tensor:
        w = w.clone()
        w[1, 3, [2, 5]] = other[1].weights[1, 1]
        return w

    assert float((got - model.by_hand(x, [{}, {"weights": patched}])).abs().max()) < EXACT


@torch.no_grad()
def test_a_longer_run_by_position(model: Stack) -> None:
    """The first positions of a longer sequence, whose later keys are hidden from them."""
    long = data(5, t=9)
    got = hookattn.edited(model, data(4), edit.freeze(hookattn.trace(model, long))).output
    patterns = [c.weights[:, :, :T, :T] for c in hookattn.trace(model, long)]
    changes = [{"weights": lambda _, w=w: w} for w in patterns]
    assert float((got - model.by_hand(data(4), changes)).abs().max()) < EXACT


@torch.no_grad()
def test_one_entry_for_all(model: Stack) -> None:
    one = hookattn.trace(model, data(5, batch=1))
    got = hookattn.edited(model, data(4), edit.patch("output", one, layer=0)).output
    changes: list[dict[str, Any]] = [{"output": lambda z: one[0].output.expand_as(z)}, {}]
    assert float((got - model.by_hand(data(4), changes)).abs().max()) < EXACT


@torch.no_grad()
def test_frozen_by_itself() -> None:
    """In float32: beyond 1e-6 nothing changes, whatever explicit math rounds otherwise."""
    torch.manual_seed(1)
    model, x = Stack(), draw(2, T, 16, seed=4)
    clean = hookattn.trace(model, x)
    got = hookattn.edited(model, x, edit.freeze(clean))
    assert float((got.output - clean.output).abs().max()) < 1e-6


@torch.no_grad()
def test_what_is_upstream_moves_no_frozen_pattern(model: Stack) -> None:
    """So that what passes is linear: the effect of two steerings is the sum of theirs."""
    x, clean = data(4), hookattn.trace(model, data(4))
    for layer in model.layers:
        assert isinstance(layer, Fused)
        layer.finish = lambda z, out=layer.out: out(z.transpose(1, 2).flatten(2))  # type: ignore[method-assign]
    clean = hookattn.trace(model, x)
    a, b = draw(8, seed=1, dtype=torch.float64), draw(8, seed=2, dtype=torch.float64)

    def effect(*vectors: Tensor) -> Tensor:
        steered = [edit.add("output", v, layer=0, heads=1) for v in vectors]
        out: Tensor = hookattn.edited(model, x, edit.freeze(clean), *steered).output
        return out - clean.output

    assert float((effect(a, b) - effect(a) - effect(b)).abs().max()) < EXACT
    assert float(effect(a).abs().max()) > 1e-3


@pytest.mark.parametrize("field", ["q", "k", "v", "output"])
@torch.no_grad()
def test_the_mean_of_a_corpus(model: Stack, field: str) -> None:
    """Over batch entries, steps and positions of any number."""
    with hookattn.tracing(model) as corpus:
        model(data(5, t=4))
        model(data(6, batch=3, t=9))
    x = data(4)
    got = hookattn.edited(model, x, edit.mean(field, corpus, layer=1, heads=[0, 2])).output
    both = [c.get(field) for c in corpus.select(layer=1)]
    vectors = torch.cat([v.transpose(1, 2).flatten(0, 1) for v in both if v is not None])  # n H D

    def ablated(y: Tensor) -> Tensor:
        y = y.clone()
        y[:, [0, 2]] = vectors.mean(0)[[0, 2]][None, :, None]
        return y

    assert float((got - model.by_hand(x, [{}, {field: ablated}])).abs().max()) < EXACT


@torch.no_grad()
def test_the_mean_pattern_of_a_corpus(model: Stack) -> None:
    corpus, x = hookattn.trace(model, data(5, batch=5)), data(4)
    got = hookattn.edited(model, x, edit.mean("weights", corpus, layer=0))
    mean = corpus[0].weights.mean(0, keepdim=True)
    expected = model.by_hand(x, [{"weights": lambda w: mean.expand_as(w)}, {}])
    assert float((got.output - expected).abs().max()) < EXACT
    assert torch.allclose(got[0].weights.sum(-1), torch.ones((), dtype=torch.float64))


@torch.no_grad()
def test_the_mean_pattern_of_a_call_sees_nothing_that_is_hidden(model: Stack) -> None:
    x = data(4)
    got = hookattn.edited(model, x, edit.mean("weights", layer=0, heads=1))[0]
    clean = hookattn.trace(model, x)[0].weights[:, 1]
    mean = clean.mean(1, keepdim=True) * causal(T)
    expected = mean / mean.sum(-1, keepdim=True)
    assert float((got.weights[:, 1] - expected).abs().max()) < EXACT
    assert bool((got.weights[:, 1][:, ~causal(T)] == 0).all())


@pytest.mark.parametrize("field", ["v", "weights", "output"])
@torch.no_grad()
def test_samples(model: Stack, field: str) -> None:
    """Each is one that is there, of another entry, or of a corpus; the same seed draws the same."""
    x, corpus = data(4, batch=3), hookattn.trace(model, data(5, batch=4))
    clean = hookattn.trace(model, x)[1]
    for over, pool in (("batch", clean.get(field)), (corpus, corpus[1].get(field))):
        assert pool is not None
        seen = set()
        for seed in range(6):
            made = hookattn.edited(model, x, edit.resample(field, over, seed=seed, layer=1))[1].get(field)
            again = hookattn.edited(model, x, edit.resample(field, over, seed=seed, layer=1))[1].get(field)
            assert made is not None and again is not None and same_bits(made, again)
            found = [
                [i for i, one in enumerate(pool) if torch.allclose(one, entry, atol=1e-12)] for entry in made.unbind(0)
            ]
            assert all(len(one) == 1 for one in found)
            seen.add(tuple(one[0] for one in found))
            if over == "batch":
                assert all(i != one[0] for i, one in enumerate(found)), "another's, never its own"
        assert len(seen) > 1


@torch.no_grad()
def test_positions_in_another_order(model: Stack) -> None:
    x = data(4)
    made = hookattn.edited(model, x, edit.resample("output", "positions", seed=1, layer=1, heads=2))[1].output
    clean = hookattn.trace(model, x)[1].output
    assert torch.allclose(made[:, 2].sort(1).values, clean[:, 2].sort(1).values, atol=EXACT)
    assert not torch.allclose(made[:, 2], clean[:, 2])
