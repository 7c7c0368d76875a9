"""A GPT as five people write it: whoever did, the record is the attention that float64 arithmetic gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hookattn
from tests.field.common import examine, gap, ids
from tests.field.five_hands import (
    HEADS,
    LAYERS,
    AfterThePaper,
    Compact,
    Einsums,
    OneByOne,
    PlainFunctions,
    Weights,
    reference,
    weights,
)

B = 2

# name: (model, calls, from the weights of all calls to L B H T T)
HANDS: dict[str, tuple[Callable[[Weights], nn.Module], int, Callable[[Tensor], Tensor]]] = {
    "after_the_paper": (AfterThePaper, LAYERS, lambda x: x),
    "compact": (lambda w: Compact(w, flash=False), LAYERS, lambda x: x),
    "compact_fused": (Compact, LAYERS, lambda x: x),
    "einsums": (Einsums, LAYERS, lambda x: x),
    "one_by_one": (OneByOne, LAYERS * HEADS, lambda x: x[:, :, 0].unflatten(0, (LAYERS, HEADS)).transpose(1, 2)),
    "plain_functions": (
        PlainFunctions,
        B * LAYERS * HEADS,
        lambda x: x[:, 0, 0].unflatten(0, (B, LAYERS, HEADS)).transpose(0, 1),
    ),
}


@pytest.mark.parametrize("hand", HANDS)
def test_the_record_is_the_attention_of_plain_arithmetic(hand: str) -> None:
    make, calls, together = HANDS[hand]
    w, tokens = weights(), ids(B, 9)
    logits, expected = reference(w, tokens)
    trace = examine(make(w).eval(), tokens, calls=calls)
    assert gap(trace.output, logits) < 1e-3
    assert gap(together(torch.stack([call.weights for call in trace])), expected) < 1e-5
    for call in trace:
        assert torch.equal(call.mask.expand_as(call.weights)[0, 0], torch.ones(9, 9).tril().bool())
        rebuilt = call.scale * (call.q @ call.k.mT)
        assert gap(rebuilt, call.scores) < 1e-4


@pytest.mark.parametrize("hand", ["after_the_paper", "compact", "compact_fused", "one_by_one"])
def test_training_records_the_weights_before_dropout(hand: str) -> None:
    make, calls, _ = HANDS[hand]
    trace = examine(make(weights()).train(), ids(B, 9), calls=calls)
    for call in trace:
        assert call.dropout == pytest.approx(0.1)
        assert gap(call.weights.sum(-1), torch.ones_like(call.weights[..., 0])) < 1e-5


def test_the_weights_it_keeps_itself_are_the_same() -> None:
    model = AfterThePaper(weights()).eval()
    trace = hookattn.trace(model, ids(B, 9))
    for call, module in zip(trace, model.self_attn, strict=True):
        assert torch.equal(call.weights, module.attn)


def test_layers_are_told_from_the_path() -> None:
    for hand in ("after_the_paper", "compact", "einsums"):
        assert [call.site.layer for call in hookattn.trace(HANDS[hand][0](weights()).eval(), ids(B, 9))] == [0, 1]
