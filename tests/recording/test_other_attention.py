"""Attention that is no softmax of q·k: scores without a product, other normalizers, weights that were changed.

The taps say what was seen; here a module says it itself, and every number is held against its own math in float64.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.attention.kernel_call import KernelCall
from hookattn.attention.normalizers import NORMALIZERS, normalized
from hookattn.taps.active import current
from hookattn.testing import check_trace, oracle, recheck
from tests.reference import causal, draw

B, T, S, E, H, G = 2, 5, 5, 8, 4, 2


class Additive(nn.Module):
    """``v·tanh(a(x_i) + b(x_j))`` through a normalizer; G key heads."""

    def __init__(self, normalizer: str = "softmax", formed: bool = True, wrong: float = 0.0) -> None:
        super().__init__()
        self.normalizer, self.formed, self.wrong = normalizer, formed, wrong
        self.a, self.b, self.v = (nn.Linear(E, n * 3, bias=False) for n in (H, H, G))
        self.change: Any = None

    def forward(self, x: Tensor) -> Tensor:
        watch = current()
        with contextlib.nullcontext() if watch is None else watch.aside():
            a, b = (f(x).unflatten(-1, (H, 3)).transpose(1, 2) for f in (self.a, self.b))
            v = self.v(x).unflatten(-1, (G, 3)).transpose(1, 2)
            scores = 3 * torch.tanh(a.unsqueeze(3) + b.unsqueeze(2)).sum(-1)
            mask = causal(T)[None, None]
            weights = normalized(self.normalizer, scores, mask)
            if weights is None:  # somebody's own
                weights = torch.where(mask, scores.abs() ** 0.5, 0.0)
            applied = weights if self.change is None else self.change(weights)
            out = applied @ v.repeat_interleave(H // G, 1)
            if watch is not None:
                call = KernelCall.of_weights(
                    weights + self.wrong,
                    v,
                    out,
                    "told",
                    score="additive",
                    normalizer=self.normalizer,
                    scores=scores if self.formed else None,
                )
                call.mask, call.mixed = mask, self.change is not None
                call.applied = None if self.change is None else applied
                watch.record(call)
        return out.transpose(1, 2).flatten(2)

    def math(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """B H T S in float64: scores, and weights of a known normalizer."""
        x = x.double()
        a, b = ((x @ f.weight.double().T).unflatten(-1, (H, 3)).transpose(1, 2) for f in (self.a, self.b))
        scores = 3 * torch.tanh(a[:, :, :, None] + b[:, :, None]).sum(-1)
        return scores, oracle.defined_weights(scores, causal(T)[None, None], None, self.normalizer)


def model(*args: Any, **kwargs: Any) -> Additive:
    torch.manual_seed(0)
    made = Additive(*args, **kwargs)
    for p in made.parameters():
        p.data.mul_(2)
    return made.requires_grad_(False)


X = draw(B, T, E, seed=1)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weights_and_scores_without_queries_and_keys(normalizer: str) -> None:
    attention = model(normalizer)
    scores, weights = attention.math(X)
    trace = hookattn.trace(attention, X, verify="full")
    (call,) = trace
    assert (call.score, call.normalizer, call.scale) == ("additive", normalizer, None)
    assert call.own_scores and call.derivable == ()
    torch.testing.assert_close(call.weights.double(), weights, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(call.scores.double(), scores, atol=1e-4, rtol=1e-5)
    assert call.dtype == torch.float32 and call.shape == f"B{B} H{H} T{T} S{S}"
    assert call.certificate.faithful and call.certificate.weights_error is not None
    check_trace(trace)
    checked = recheck.recheck(call)
    assert all(check.passed in (True, None) for check in checked.values())
    assert checked["weights"].passed and checked["output"].passed and checked["masked"].passed
    assert checked["rows"].passed is (True if normalizer in oracle.SUM_TO_ONE else None)


def test_what_a_call_has_not_says_why() -> None:
    (call,) = hookattn.trace(model(), X)
    for name in ("q", "k"):
        assert call.get(name) is None and not call.has(name) and not hasattr(call, name)
        with pytest.raises(hookattn.FieldAbsent, match=rf"has no {name}: its scores are no product.*'additive'"):
            getattr(call, name)
    assert call.bias is None and call.has("bias") and call.has("scores") and call.applied is None
    (call,) = hookattn.trace(model(formed=False), X)
    with pytest.raises(hookattn.FieldAbsent, match=r"has no scores.*the model formed none that are finite"):
        _ = call.scores
    assert not call.has("scores") and call.get("scores") is None and call.weights.shape == (B, H, T, S)
    with pytest.raises(hookattn.FieldNotCaptured):
        _ = hookattn.trace(model(), X, capture=("weights",))[0].q


SELECTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "one head": {"heads": [3]},
    "heads": {"heads": [0, 3]},
    "uneven": {"heads": [0, 1, 2]},
    "queries": {"queries": slice(-2, None)},
    "weights": {"capture": ("weights",)},
    "no weights": {"capture": ("v", "scores", "mask", "output")},
    "dtype": {"dtype": torch.float16},
    "device": {"device": "cpu"},
    "off": {"verify": "off"},
    "copy": {"copy": True},
}


@pytest.mark.parametrize("arguments", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("normalizer", ["sigmoid", "somebody's own"])
@pytest.mark.parametrize("streamed", [False, True])
def test_any_selection_is_a_part_of_the_whole(
    tmp_path: Path, arguments: dict[str, Any], normalizer: str, streamed: bool
) -> None:
    attention = model(normalizer)
    (whole,) = hookattn.trace(attention, X)
    path = tmp_path / "run.safetensors"
    trace = hookattn.trace(attention, X, **arguments, **({"to": path} if streamed else {}))
    if not streamed:
        trace.save(path, compact=True)
    heads = arguments.get("heads", range(H))
    rows = range(T)[arguments["queries"]] if "queries" in arguments else range(T)
    for found in (trace, hookattn.load(path)):
        (call,) = found
        assert (call.score, call.normalizer, call.scale) == ("additive", normalizer, None)
        assert call.certificate.status == ("unverified" if "verify" in arguments else "faithful")
        for name in call.fields:
            value, own = call.get(name), whole.get(name)
            if value is None:
                assert own is None
                continue
            expected = whole.at(heads=list(heads), queries=list(rows)).get(name)
            assert expected is not None
            torch.testing.assert_close(value.float(), expected.float(), atol=2e-3, rtol=2e-3)
        if "capture" not in arguments:
            assert call.weights.shape == (B, len(heads), len(rows), S)
            part = call.at(heads=heads[-1], queries=rows[-1], batch=1)
            assert torch.equal(part.weights, call.weights[1:, -1:, -1:])
            assert part.v.shape == (1, 1, S, 3)
            check_trace(found)


def test_a_copy_and_a_pickle_are_the_same() -> None:
    trace = hookattn.trace(model("relu^2"), X)
    for other in (copy.deepcopy(trace), pickle.loads(pickle.dumps(trace))):
        assert torch.equal(other[0].weights, trace[0].weights) and other[0].certificate == trace[0].certificate


def test_a_compact_file_has_the_weights_that_no_reader_can_derive(tmp_path: Path) -> None:
    class Dot(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            watch = current()
            with contextlib.nullcontext() if watch is None else watch.aside():
                q = x.unflatten(-1, (2, -1)).transpose(1, 2)
                weights = torch.sigmoid(q @ q.mT * 0.5)
                if watch is not None:
                    call = KernelCall(q, q, q, weights @ q, 0.5, "told", weights=weights, normalizer="sigmoid")
                    watch.record(call)
                return weights @ q

    trace = hookattn.trace(Dot(), X)
    assert trace[0].derivable == ("scores",) and trace[0].certificate.faithful
    assert trace[0].certificate.weights_error is not None
    back = hookattn.load(trace.save(tmp_path / "run.safetensors", compact=True))
    assert "scores" not in back[0].fields and back[0].has("scores")
    assert torch.equal(back[0].weights, trace[0].weights)
    torch.testing.assert_close(torch.sigmoid(back[0].scores), trace[0].weights)
    check_trace(back)


def test_a_kernel_of_a_known_normalizer_need_not_form_weights() -> None:
    """Small calls of a softmax are measured together, and this is none of them; what it has is derived of q and k."""

    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            watch = current()
            with contextlib.nullcontext() if watch is None else watch.aside():
                q = x.unflatten(-1, (2, -1)).transpose(1, 2)
                out = torch.relu(q @ q.mT * 0.5).square() @ q
                if watch is not None:
                    watch.record(KernelCall(q, q, q, out, 0.5, "told", normalizer="relu^2"))
                return out

    for arguments in ({}, {"dtype": torch.float64}, {"heads": [1]}):
        (call,) = hookattn.trace(Fused(), X, **arguments)
        q = X.double().unflatten(-1, (2, -1)).transpose(1, 2)[:, arguments.get("heads", [0, 1])]
        expected = torch.relu(q @ q.mT * 0.5).square()
        torch.testing.assert_close(call.weights.double(), expected, atol=1e-4, rtol=1e-5)
        assert call.certificate.faithful and call.certificate.row_sum_error == 0
        assert call.derivable == ("scores",)


def test_the_softmax_with_an_extra_one_has_a_sink_of_nothing() -> None:
    trace = hookattn.trace(model("softmax1"), X)
    (call,) = trace
    assert call.sinks is not None and not call.sinks.any()
    scores = torch.cat([call.scores.masked_fill(~call.mask, -torch.inf), torch.zeros(B, H, T, 1)], -1)
    torch.testing.assert_close(torch.softmax(scores, -1)[..., :S], call.weights)
    check_trace(trace)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu^2", "none"])
def test_weights_that_do_not_follow_from_the_scores_are_unfaithful(normalizer: str) -> None:
    attention = model(normalizer, wrong=0.05)
    with pytest.warns(hookattn.UnfaithfulWarning):
        (call,) = hookattn.trace(attention, X)
        assert call.certificate.status == "unfaithful"
    assert call.certificate.weights_error == pytest.approx(0.05, rel=0.02)


def test_of_an_unknown_normalizer_the_output_alone_is_checked() -> None:
    trace = hookattn.trace(model("somebody's own"), X)
    (call,) = trace
    assert call.certificate.faithful and call.certificate.weights_error is None
    assert call.certificate.row_sum_error == 0 and "the model's own weights" in call.certificate.basis
    check_trace(trace)
    checked = recheck.recheck(call)
    assert checked["output"].passed and checked["weights"].passed is checked["rows"].passed is None
    assert "somebody's own" in checked["weights"].reason
    with pytest.warns(hookattn.UnfaithfulWarning):
        (call,) = hookattn.trace(model("somebody's own", wrong=0.5), X)
        assert call.certificate.status == "unfaithful"


def test_the_output_is_held_against_how_much_the_weights_sum_to() -> None:
    """Weights of some hundreds make an output of some hundreds of values, and round as much."""
    attention = model("exp")
    trace = hookattn.trace(attention, 3 * X)
    assert trace[0].weights.max() > 1e3
    assert trace[0].certificate.faithful
    check_trace(trace)


@pytest.mark.parametrize("capture", [None, ("weights",), ("applied",), ("v", "output")])
def test_weights_that_were_changed_are_there_beside_those_of_the_softmax(tmp_path: Path, capture: Any) -> None:
    attention = model()
    attention.change = lambda weights: weights * torch.linspace(0.2, 1.5, H).view(1, H, 1, 1)
    trace = hookattn.trace(attention, X, capture=capture)
    path = trace.save(tmp_path / "run.safetensors", compact=True)
    for found in (trace, hookattn.load(path)):
        (call,) = found
        assert call.mixed and call.certificate.faithful
        assert call.has("applied") is (capture != ("v", "output"))
        if not call.has("applied"):
            with pytest.raises(hookattn.FieldNotCaptured, match="capture="):
                _ = call.applied
            continue
        _, weights = attention.math(X)
        expected = attention.change(weights)
        assert call.applied is not None
        torch.testing.assert_close(call.applied.double(), expected, atol=1e-5, rtol=1e-5)
        assert call.at(heads=1).applied.shape == (B, 1, T, S)  # type: ignore[union-attr]
        if capture != ("applied",):
            torch.testing.assert_close(call.weights.double(), weights, atol=1e-5, rtol=1e-5)
            check_trace(found)
    if capture is None:
        assert recheck.recheck(trace[0])["output"].passed
    assert "applied" not in trace.selection["capture"] or capture == ("applied",)


def test_dropout_is_there_too() -> None:
    class Dropped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weights = torch.softmax(x @ x.mT, -1)
            return torch.dropout(weights, 0.5, True) @ x

    (call,) = hookattn.trace(Dropped(), X, capture=("weights",))
    assert call.applied is not None and call.dropout == 0.5
    kept = call.applied != 0
    torch.testing.assert_close(call.applied[kept], 2 * call.weights[kept])
    assert 0.2 < kept.float().mean() < 0.8 and call.certificate.faithful


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1"])
def test_statistics_of_the_softmax_of_scores_of_any_kind(normalizer: str) -> None:
    attention = model(normalizer)
    (whole,) = hookattn.trace(attention, X)
    (call,) = hookattn.trace(attention, X, capture=("entropy", "received", "first_mass"), heads=[3, 1])
    weights = attention.math(X)[1][:, [3, 1]]
    torch.testing.assert_close(call.get("received").double(), weights.sum(2), atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    if normalizer == "softmax":
        entropy = -(weights * weights.clamp_min(1e-300).log()).sum(-1)
        torch.testing.assert_close(call.get("entropy").double(), entropy, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    assert call.certificate.faithful and whole.certificate.faithful


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"normalizer": "sigmoid"}, r"entropy, top_k.*not defined here, as its weights are no softmax.*'sigmoid'"),
        ({"formed": False}, r"entropy, top_k.*not defined here, as its scores are no product.*'additive'"),
    ],
)
def test_statistics_that_are_not_defined_say_so(tmp_path: Path, arguments: dict[str, Any], why: str) -> None:
    trace = hookattn.trace(model(**arguments), X, capture=("entropy", "top_k", "weights"), to=tmp_path / "f")
    (call,) = trace
    assert call.get("entropy") is None and call.get("top_k_keys") is None and call.weights.shape == (B, H, T, S)
    assert any(re.search(why, note) for note in call.notes)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "somebody's own"])
def test_what_is_not_finite_is_said_and_the_model_goes_on(normalizer: str) -> None:
    attention = model(normalizer)
    x = X.clone()
    x[0, 2] = torch.nan
    plain = attention(x)
    with pytest.warns(hookattn.UnfaithfulWarning, match="not finite"):
        trace = hookattn.trace(attention, x)
        assert trace[0].certificate.status == "unfaithful"
    assert torch.equal(trace.output.nan_to_num(), plain.nan_to_num())
    assert trace[0].weights.isnan().any()


def test_a_plan_has_the_same_bytes() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model("sigmoid")

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x)

    layer = Layer()
    trace = hookattn.trace(layer, X)
    planned = hookattn.plan(layer, X)
    held = {n: x.nbytes for n in trace[0].fields if (x := trace[0].get(n)) is not None and n != "mask"}
    assert {n: size for n, size in planned.calls[0].bytes.items() if n in held} == held
    assert "q" not in planned.calls[0].shapes
