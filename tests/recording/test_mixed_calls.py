"""Calls of many kinds in one forward: the same values when they are read later as when they are made at once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import FieldNotCaptured
from hookattn.recording import certifying
from tests.reference import draw


class Mixed(nn.Module):
    """Calls of several shapes, masks, scales and dtypes, in one forward."""

    def forward(self, x: Tensor) -> list[Tensor]:
        t = x.shape[2]
        band = torch.ones(t, t, dtype=torch.bool).tril(2).triu(-2)
        padding = torch.ones(x.shape[0], 1, 1, t, dtype=torch.bool)
        padding[0, ..., -2:] = False
        blind = band.clone()
        blind[3] = False
        sdpa = F.scaled_dot_product_attention
        return [
            sdpa(x, x, x),
            sdpa(x, x * 2, x + 1, is_causal=True),
            sdpa(x, x, x, band),
            sdpa(x, x, x * 3, band, scale=0.1),
            sdpa(x, x, x, padding),
            sdpa(x, x, -x, padding),
            sdpa(x, x, x, blind),
            sdpa(x[:, :, :3], x, x[..., :5]),
            sdpa(x, x[:, :2], x[:, 2:], enable_gqa=True),
            sdpa(x, x[:, 2:], x[:, :2], is_causal=True, enable_gqa=True),
            sdpa(x.double(), x.double(), x.double()),
            sdpa(x.bfloat16(), x.bfloat16(), x.bfloat16(), is_causal=True),
            sdpa(x, x, x, is_causal=True, scale=2.0),
        ]


X = draw(2, 4, 9, 6, seed=3)


def one_by_one(**options: Any) -> hookattn.Trace:
    return hookattn.trace(Mixed(), X, dtype=torch.float64, **options)  # what is stored in another dtype is made at once


@pytest.mark.parametrize("verify", ["sample", "full", "off"])
@pytest.mark.parametrize("capture", [None, ("q", "k", "v"), ("weights",), ("scores", "mask"), ("output",)])
def test_together_and_one_by_one(capture: Any, verify: str) -> None:
    alone = one_by_one(capture=capture, verify=verify)
    together = hookattn.trace(Mixed(), X, capture=capture, verify=verify)
    assert len(alone) == len(together) == 13
    for a, b in zip(alone, together, strict=True):
        assert list(a.fields) == list(b.fields) and a.derivable == b.derivable
        for name in a.fields:
            x, y = a.get(name), b.get(name)
            assert (x is None) == (y is None), name
            if x is not None and y is not None:
                assert not y.requires_grad and x.dtype in (torch.float64, torch.bool)
                tolerance = 1e-2 if y.dtype == torch.bfloat16 else 1e-6
                torch.testing.assert_close(x, y.to(x.dtype), atol=tolerance, rtol=tolerance)
        assert a.certificate.status == b.certificate.status == ("unverified" if verify == "off" else "faithful")
        if verify != "off":
            assert b.certificate.rows == b.certificate.of_rows == a.q.shape[2] if "q" in a.fields else True


def test_against_float64() -> None:
    for call in hookattn.trace(Mixed(), X, verify="full", strict=True):
        per = call.q.shape[1] // call.k.shape[1]
        k, v = (y.double().repeat_interleave(per, 1) for y in (call.k, call.v))
        scores = call.q.double() @ k.mT * call.scale
        weights = torch.where(call.mask, scores, -torch.inf).softmax(-1).nan_to_num(0.0)
        tolerance = 1e-2 if call.dtype == torch.bfloat16 else 1e-5
        assert (call.weights.double() - weights).abs().max() < tolerance
        assert (call.scores.double() - scores).abs().max() < 20 * tolerance
        live = ~call.empty_rows
        assert ((weights @ v - call.output.double()) * live[..., None]).abs().max() < 5 * tolerance


def test_a_field_is_there_before_the_trace_is_over() -> None:
    model = Mixed()
    with hookattn.tracing(model) as found:
        model(X)
        early = found[1].weights.clone(), found[1].scores.clone()
        model(X)
    assert len(found) == 26 and found.faithful
    assert torch.equal(found[1].weights, early[0]) and torch.equal(found[1].scores, early[1])


@pytest.mark.parametrize(
    "capture", [None, ("weights",), ("q", "k", "v", "weights"), ("q", "k", "mask", "bias", "sinks")]
)
def test_a_block_that_raised_leaves_what_it_traced(capture: Any) -> None:
    with pytest.raises(KeyError), hookattn.tracing(model := Mixed(), capture=capture) as found:
        model(X)
        raise KeyError
    whole = hookattn.trace(model, X)
    assert found.faithful
    for call, want in zip(found, whole, strict=True):
        for name in ("scores", "weights"):
            if call.has(name):
                assert torch.allclose(call.get(name).double(), want.get(name).double(), atol=1e-2)
            else:
                with pytest.raises(FieldNotCaptured, match=f"'{name}' of .* was not captured"):
                    call.get(name)


def test_what_is_measured_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    most, together = [0], certifying.Certifier._measure_together

    def measured(self: Any, several: Any, shape: Any, careful: bool) -> Any:
        most[0] = max(most[0], len(several) * shape.scores)
        return together(self, several, shape, careful)

    monkeypatch.setattr(certifying, "_MOST_SCORES", 2_000)
    monkeypatch.setattr(certifying.Certifier, "_measure_together", measured)
    with hookattn.tracing(model := Mixed(), verify="full") as found:
        for _ in range(4):
            model(X)
    assert found.faithful and 2 * 4 * 9 * 9 < most[0] <= 2_000


@pytest.mark.parametrize("spot", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_a_key_that_is_not_finite_and_not_attended_to(spot: float) -> None:
    """A kernel that leaves hidden keys out is not disturbed by them, and neither is what we derive."""

    class Chosen(nn.Module):
        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = torch.ones(9, 9, dtype=torch.bool)
            mask[:, -1] = False
            weights = torch.where(mask, x @ k.mT, -torch.inf).softmax(-1)
            return weights @ v

    k = X.clone()
    k[:, :, -1] = spot
    found = hookattn.trace(Chosen(), (X, k, X), verify="full")
    assert found[0].certificate.faithful and found[0].weights.isfinite().all()
    for t in (9, 300):  # and a fused one, whatever it makes of it
        x = draw(1, 1, t, 6, seed=1)
        k = x.clone()
        k[:, :, -1] = spot
        mask = torch.ones(t, t, dtype=torch.bool)
        mask[:, -1] = False
        found = hookattn.trace(Fused(), (x, k, mask), verify="full") if spot == 3e38 else None
        if found is not None:
            assert found[0].weights.isfinite().all()


class Fused(nn.Module):
    def forward(self, x: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, k, x, mask)


def test_a_trace_can_be_copied() -> None:
    found = hookattn.trace(Mixed(), X, capture=("weights",))
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(other[3].weights, found[3].weights) and dict(other.model) == dict(found.model)
