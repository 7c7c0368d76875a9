"""Statistics of transformers models, whose scores, masks and sinks the same trace holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hookattn
from hookattn import statistics as st
from tests import tiny_models as tiny
from tests.statistics import test_statistics as plain

EVERYTHING = (*plain.ALL, *hookattn.FIELDS)


def check(trace: hookattn.Trace, start: Callable[[hookattn.Call], int | None]) -> None:
    """Each call against float64 from its own scores; ``start``: the key position of the first query, None: none."""
    assert len(trace)
    for call in trace:
        first = start(call)
        at = None if first is None else first + torch.arange(call.q.shape[2]).unsqueeze(0)
        mask = call.mask.expand(call.scores.shape)
        plain.check(call.get, plain.explicit(call.scores, mask, call.sinks, at), mask)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "gpt_oss", "gemma2", "bloom", "t5"])
def test_models(name: str) -> None:
    inputs: dict[str, Any] = tiny.padded("right" if name == "bert" else "left")
    if name == "t5":
        inputs = {"input_ids": tiny.ids(7), "decoder_input_ids": tiny.ids(5)}
    with torch.no_grad():
        trace = hookattn.trace(getattr(tiny, name)(), inputs, capture=EVERYTHING, strict=True)
    check(trace, lambda call: None if call.site.kind == "cross" else 0)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_generate(name: str, cache: dict[str, Any]) -> None:
    model = getattr(tiny, name)()
    with torch.no_grad(), hookattn.tracing(model, capture=EVERYTHING) as trace:
        model.generate(tiny.ids(7), max_new_tokens=5, do_sample=False, **cache)

    def start(call: hookattn.Call) -> int:
        last = 6 if call.step == 0 else 6 + call.step
        return min(last, call.k.shape[2] - 1) - call.q.shape[2] + 1  # a sliding window forgets the first keys

    check(trace, start)
    if name == "llama":
        [first, _] = st.merge(trace)
        assert first.get("entropy").shape == (2, 4, 11)  # type: ignore[union-attr]
    else:
        with pytest.raises(hookattn.StitchError, match="fell out of the cache"):
            st.merge(trace)
