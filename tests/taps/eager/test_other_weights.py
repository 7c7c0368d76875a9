"""Attention of any score and any normalizer: weights, values and output are recorded, and q and k where they score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hookattn.errors import FieldAbsent
from tests.reference import assert_close, draw, trace_checked
from tests.zoo.other_weights import NORMALIZER, OTHER_WEIGHTS, SAID, SCORE, B, E, T


def traced(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    import hookattn

    with torch.no_grad():
        return trace_checked(hookattn.trace, model.eval(), x, verify="full", **options)


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_recorded_with_all_there_is(name: str) -> None:
    torch.manual_seed(3)
    model = OTHER_WEIGHTS[name]().double()
    trace = traced(model, draw(B, T, E, std=1.5, dtype=torch.float64))
    said = {field: x() if callable(x) else x for field, x in SAID.items()}
    assert [item.reason for item in trace.skipped] == []
    assert len(trace) == 1
    call = trace[0]
    assert call.certificate.status == "faithful"
    assert (call.score, call.normalizer) == (SCORE[name], NORMALIZER[name])
    for field in ("weights", "v", "output"):
        assert_close(getattr(call, field), said[field].expand_as(getattr(call, field)), 1e-9, field)
        assert getattr(call, field).shape == said[field].shape, field
    if call.score == "dot":
        assert_close(call.q, said["q"], 1e-9, "q")
        assert_close(call.k, said["k"], 1e-9, "k")
    else:
        for field in ("q", "k"):
            with pytest.raises(FieldAbsent):
                getattr(call, field)
        assert call.scores is not None
    if "scores" in said:
        assert_close(call.scores, said["scores"], 1e-9, "scores")
    mask = said.get("mask")
    if mask is not None:
        assert torch.equal(call.mask.expand_as(call.weights), mask.expand_as(call.weights))
