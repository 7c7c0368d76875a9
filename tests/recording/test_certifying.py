"""Certificates are measured no earlier than they are needed, small calls together, and before any number is read."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.recording import certifying
from hookattn.recording.recorder import CallRecorder
from hookattn.recording.stacked import StackedCalls

pytest.importorskip("transformers")

from tests import tiny_models as tiny
from tests.reference import draw, reference_attention

MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], bool]] = {
    # model, inputs, whether its calls are measured together
    "gpt2": (tiny.gpt2, lambda: tiny.ids(7), True),
    "gpt2, one token": (tiny.gpt2, lambda: tiny.ids(1), True),
    "gpt2, scaled by layer": (lambda: tiny.gpt2(scale_attn_by_inverse_layer_idx=True), lambda: tiny.ids(7), False),
    "bert": (tiny.bert, lambda: tiny.ids(7), True),
    "llama, grouped": (tiny.llama, lambda: tiny.ids(7), True),
    "gpt2, padded": (tiny.gpt2, lambda: tiny.padded("right"), True),
    "bert, padded": (tiny.bert, lambda: tiny.padded("right"), True),
    "bert, training": (lambda: tiny.bert().train(), lambda: tiny.ids(7), False),
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets, for each time that certificates are measured, of how many calls they are."""
    counts: list[int] = []
    together, alone = certifying.Certifier._measure_together, certifying.measure

    def counted(self: Any, several: Any, *args: Any) -> Any:
        counts.append(len(several))
        return together(self, several, *args)

    def counted_alone(*args: Any) -> Any:
        counts.append(1)
        return alone(*args)

    monkeypatch.setattr(certifying.Certifier, "_measure_together", counted)
    monkeypatch.setattr(certifying, "measure", counted_alone)
    return counts


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_together_and_alone(name: str, grad: bool, measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs, together = MODELS[name]
    model, x = make(), inputs()
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        quick = hookattn.trace(model, x)
        assert not measured
        _ = quick[0].q
        assert measured == ([2] if together else [1])
        assert quick[1].certificate.faithful and sum(measured) == 2
        monkeypatch.setattr(certifying, "_scores_of", lambda *_: None)
        torch.manual_seed(1)
        slow = hookattn.trace(model, x).certify()
    assert measured[-2:] == [1, 1]
    assert len(quick) == len(slow) == 2
    assert torch.equal(quick.output[0], slow.output[0])
    for a, b in zip(quick, slow, strict=True):
        assert a.certificate.faithful and b.certificate.faithful
        assert a.certificate.rows == b.certificate.rows and a.certificate.basis == b.certificate.basis
        assert abs(a.certificate.output_error - b.certificate.output_error) < 1e-6
        scores, weights, output = reference_attention(a.q, a.k, a.v, scale=a.scale, mask=a.mask)
        torch.testing.assert_close(a.scores.double(), scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.weights.double(), weights, rtol=0, atol=1e-5)
        if not a.dropout:
            torch.testing.assert_close(a.output.double(), output, rtol=0, atol=1e-5)


READS: dict[str, Callable[[hookattn.Trace], Any]] = {
    "q": lambda trace: trace[1].q,
    "weights": lambda trace: trace[1].weights,
    "get": lambda trace: trace[1].get("bias"),
    "a part": lambda trace: trace[1].at(heads=0),
    "repr of a call": lambda trace: repr(trace[1]),
    "repr of a trace": repr,
    "faithful": lambda trace: trace.faithful,
    "certify": lambda trace: trace.certify(),
    "a copy": copy.copy,
}


@pytest.mark.parametrize("what", READS)
def test_no_number_is_handed_out_before_its_certificate(what: str, measured: list[int]) -> None:
    trace = hookattn.trace(tiny.gpt2(), tiny.ids(7))
    len(trace), list(trace), trace.select(layer=1), trace[1].has("q"), trace[1].shape
    assert not measured, "a trace that nobody reads is not measured"
    READS[what](copy.copy(trace[1]) if what == "a copy" else trace)
    assert sum(measured) == 2
    READS[what](trace)
    assert sum(measured) == 2, "once"


def test_strict_measures_at_the_end_of_the_block(measured: list[int]) -> None:
    hookattn.trace(tiny.gpt2(), tiny.ids(7), strict=True)
    assert measured == [2]


def test_verify_off_measures_nothing(measured: list[int]) -> None:
    trace = hookattn.trace(tiny.gpt2(), tiny.ids(7), verify="off").certify()
    assert not measured and [c.certificate.status for c in trace] == ["unverified"] * 2


def test_a_call_that_nobody_holds_is_neither_measured_nor_kept(measured: list[int]) -> None:
    trace = hookattn.trace(tiny.gpt2(), tiny.ids(7))
    gone = weakref.ref(trace.calls.pop(0))
    assert gone() is None and trace[0].certificate.faithful and measured == [1]


def test_steps_with_a_cache() -> None:
    model, x = tiny.gpt2(), tiny.ids(4)
    with hookattn.tracing(model) as made:
        out = model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [c.step for c in made] == [0, 0, 1, 1, 2, 2]
    assert [c.k.shape[2] for c in made] == [4, 4, 5, 5, 6, 6]
    assert made.faithful
    with torch.no_grad():
        whole = hookattn.trace(model, out[:, :-1])
    for step in (1, 2):
        for layer in (0, 1):
            row = made.select(step=step, layer=layer)[0].weights[:, :, 0]
            torch.testing.assert_close(row, whole[layer].weights[:, :, 3 + step, : 4 + step], rtol=0, atol=1e-5)


def test_the_model_may_write_to_what_was_kept() -> None:
    model, x = tiny.gpt2(), tiny.ids(7)
    attention = model.transformer.h[1].attn
    whole: list[Tensor] = []
    handles = [
        attention.c_attn.register_forward_hook(lambda _, __, out: whole.extend([out, out.clone()])),
        attention.c_proj.register_forward_pre_hook(lambda *_: whole[0].zero_() is None or None),
    ]
    try:
        with torch.no_grad():
            made = hookattn.trace(model, x)
    finally:
        for handle in handles:
            handle.remove()
    assert not whole[0].any()
    for name, part in zip("qkv", whole[1].split(32, -1), strict=True):
        assert torch.equal(made[1].get(name), part.unflatten(-1, (4, 8)).transpose(1, 2))
    assert made.faithful


def test_keys_that_the_kernel_was_given_only_in_part() -> None:
    """A static cache is longer than what is attended to."""
    model, x = tiny.llama(num_key_value_heads=4), tiny.ids(4)
    with hookattn.tracing(model) as made:
        model.generate(x, max_new_tokens=2, do_sample=False, cache_implementation="static", disable_compile=True)
    assert made.faithful
    assert [c.k.shape[2] for c in made.select(step=0)] == [4, 4]


def test_what_is_no_plain_call() -> None:
    def scores(*shapes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 4) -> int | None:
        q, k, v, output = map(torch.Size, shapes)
        return certifying._scores_of((q, k, v, output), dtypes)

    q, grouped, wide = (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)
    assert scores(q, grouped, wide, (2, 4, 3, 6)) == 2 * 4 * 3 * 5
    mixed = (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    assert scores(q, (2, 3, 5, 8), (2, 3, 5, 6), (2, 4, 3, 6)) is None, "no groups of heads"
    assert scores(q, (1, 2, 5, 8), (1, 2, 5, 6), (2, 4, 3, 6)) is None, "one batch entry for all"
    assert scores(q, grouped, wide, (2, 4, 3, 8)) is None
    assert scores(q, (2, 2, 5, 7), wide, (2, 4, 3, 6)) is None
    assert scores(q, (2, 2, 0, 8), (2, 2, 0, 6), (2, 4, 3, 6)) is None
    assert scores(q[1:], grouped[1:], wide[1:], (4, 3, 6)) is None
    assert scores(q, grouped, wide, (2, 4, 3, 6), dtypes=mixed) is None
    assert scores((2, 4, 300, 8), (2, 2, 300, 8), (2, 2, 300, 6), (2, 4, 300, 6)) is None, "too many scores"


def test_matrices_that_nobody_asked_for_are_not_held() -> None:
    model, x = tiny.gpt2("eager"), tiny.ids(7)
    for capture in (("q", "k", "v"), ("q", "k", "v", "output"), ("v",), ("output",)):
        for call in hookattn.trace(model, x, capture=capture):
            held = [*call.fields.values(), *call.beside.values()]
            assert all(not isinstance(y, Tensor) or y.shape[-1] != 7 for y in held), capture
            assert call.certificate.faithful and call.certificate.weights_error is not None and not call.beside
    kept = hookattn.trace(model, x, capture=("q", "k", "v"))[0].certificate
    assert kept == hookattn.trace(model, x)[0].certificate, "nothing is lost by it"


def test_where_the_quick_way_finds_fault_the_careful_one_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    weights = StackedCalls.weights

    def wrong(self: Any, scores: Tensor, careful: bool) -> Tensor:
        found = weights(self, scores, careful)
        return found if careful else found * torch.nan

    q, k = draw(2, 2, 9, 8, seed=1), draw(2, 2, 9, 8, seed=2)
    plain = hookattn.trace(Attends(), (q, k))[0].certificate
    monkeypatch.setattr(StackedCalls, "weights", wrong)
    careful = hookattn.trace(Attends(), (q, k))[0].certificate
    assert plain.faithful and careful.faithful and careful.output_error == pytest.approx(plain.output_error, abs=1e-6)


def test_scores_of_the_model_prove_nothing_about_q_and_k(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = CallRecorder.keep

    def wrong(self: Any, call: Any, *args: Any) -> Any:
        call.q = call.q * 1.05
        return keep(self, call, *args)

    monkeypatch.setattr(CallRecorder, "keep", wrong)
    model, x = tiny.gpt2("eager"), tiny.ids(7)
    with pytest.warns(hookattn.UnfaithfulWarning):
        trace = hookattn.trace(model, x).certify()
    assert not any(c.certificate.faithful for c in trace)


def test_small_calls_without_q_k_and_v_wait_for_the_end_of_their_forward(measured: list[int]) -> None:
    model, x = tiny.gpt2(), tiny.ids(7)
    with hookattn.tracing(model, capture="weights") as trace:
        model(x)
        assert not measured and trace[0].weights.shape[-1] == 7 and measured == [2]
        model(x)
        assert measured == [2] and all(isinstance(c.fields["weights"], Tensor) and not c.beside for c in trace[:2])
    assert measured == [2, 2], "together, and as the forward ends"
    assert all(isinstance(c.fields["weights"], Tensor) and not c.beside for c in trace) and trace.faithful
    whole = hookattn.trace(model, x)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(trace[2:], whole, strict=True))


def test_rows_at_other_places_are_not_measured_with_one_mask(measured: list[int]) -> None:
    """The last queries of calls that have as many keys and not as many queries: alike, but for what they may see."""

    class Lengths(nn.Module):
        def forward(self, q: Tensor, short: Tensor, k: Tensor) -> Tensor:
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, k, is_causal=True) + attend(short, k, k, is_causal=True).sum()

    q, short, k = draw(2, 2, 7, 8, seed=1), draw(2, 2, 5, 8, seed=3), draw(2, 2, 7, 8, seed=2)
    trace = hookattn.trace(Lengths(), (q, short, k), queries=slice(-1, None)).certify()
    assert measured == [1, 1] and trace.faithful
    for call, of, row in zip(trace, (q, short), (6, 4), strict=True):
        scores = of[:, :, row : row + 1] @ k[:, :, : row + 1].mT * 8**-0.5
        torch.testing.assert_close(call.weights[..., : row + 1], scores.softmax(-1), rtol=0, atol=1e-6)
        assert not call.weights[..., row + 1 :].any()
