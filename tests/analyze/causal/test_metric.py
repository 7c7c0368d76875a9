"""What a metric may be, and the two that there are."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hookattn.analyze import log_probability, logit_difference
from hookattn.analyze.causal.metric import batch_parts, metric_value
from hookattn.errors import InputError

LOGITS = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_logit_difference() -> None:
    assert logit_difference(3, 4)(LOGITS) == (LOGITS[:, -1, 3] - LOGITS[:, -1, 4]).mean()
    wanted = (LOGITS[0, 1, 3] - LOGITS[0, 1, 0] + LOGITS[1, 1, 2] - LOGITS[1, 1, 6]) / 2
    assert float(logit_difference([3, 2], torch.tensor([0, 6]), position=1)(LOGITS)) == pytest.approx(float(wanted))
    assert logit_difference(3, 4)(LOGITS[:, 0]) == (LOGITS[:, 0, 3] - LOGITS[:, 0, 4]).mean()


def test_log_probability() -> None:
    p = LOGITS.exp() / LOGITS.exp().sum(-1, keepdim=True)
    assert float(log_probability(6)(LOGITS)) == pytest.approx(float(p[:, -1, 6].log().mean()), abs=1e-14)
    found = log_probability([0, 6], position=-2)((LOGITS, None))
    assert float(found) == pytest.approx(float((p[0, 3, 0].log() + p[1, 3, 6].log()) / 2), abs=1e-14)
    half = log_probability(6)(SimpleNamespace(logits=LOGITS.half()))
    assert half.dtype == torch.float32
    assert float(log_probability(6)({"logits": LOGITS})) == float(log_probability(6)(LOGITS))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: logit_difference(3, -1), "wrong=-1"),
        (lambda: logit_difference("a", 2), "right='a'"),
        (lambda: log_probability([]), r"token=\[\]"),
        (lambda: log_probability(1, position=0.5), "position=0.5"),
        (lambda: log_probability(10**20), "token=1000"),
        (lambda: log_probability(7)(LOGITS), "logits of 7 tokens"),
        (lambda: log_probability([1, 2, 3])(LOGITS), "3 tokens, and the model returned logits of 2"),
        (lambda: log_probability(1, position=5)(LOGITS), "logits of 5 positions"),
        (lambda: log_probability(1)(SimpleNamespace(last_hidden_state=LOGITS)), "reads logits"),
        (lambda: log_probability(1)(LOGITS.long()), "reads logits"),
        (lambda: log_probability(1)({"hidden": LOGITS}), "reads logits"),
        (lambda: log_probability(1)(()), "reads logits"),
    ],
)
def test_what_is_none(make: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()  # type: ignore[operator]


def test_a_number_is_a_value_without_a_gradient() -> None:
    assert float(metric_value(lambda y: 2.5, None)) == 2.5
    assert float(metric_value(lambda y: np.float32(2.5), None)) == 2.5
    assert math.isnan(float(metric_value(lambda y: math.nan, None)))
    with pytest.raises(InputError, match="returned array"):
        metric_value(lambda y: np.ones(1), None)
    with pytest.raises(InputError, match=r"returned 2\.5"):
        metric_value(lambda y: 2.5, None, gradient=True)
    with pytest.raises(InputError, match="returned True"):
        metric_value(lambda y: True, None)  # type: ignore[arg-type, return-value]


def test_parts_of_a_batch() -> None:
    x, loss, cache = torch.arange(12).view(6, 2), torch.tensor(1.0), object()
    parts = batch_parts({"logits": x, "loss": loss, "many": (x + 1, [x + 2]), "cache": cache}, 6, 3)
    assert len(parts) == 3
    assert torch.equal(parts[1]["logits"], x[2:4])
    assert torch.equal(parts[2]["many"][1][0], x[4:6] + 2)
    assert parts[0]["loss"] is loss
    assert parts[0]["cache"] is cache
