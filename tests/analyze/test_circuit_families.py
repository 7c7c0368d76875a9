"""Whose weights are found, over the families of transformers: all, but where what lies between is not linear."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import hookattn
from hookattn.analyze.circuits.find_weights import circuit

families = pytest.importorskip("tests.families")

BETWEEN = {
    "deepseek": "k",  # k is put together of two projections
    "deepseek_v2": "k",
    "cohere": "qk",  # a norm of q and k, by their options
    "phi": "qk",
    "gemma3": "qk",
    "olmo2": "qk",
    "olmo3": "qk",
    "olmoe": "qk",
    "qwen3": "qk",
    "qwen3_moe": "qk",
    "olmo": "qkv",  # clipped, by its option
}
NAMES = [*families.FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in families.ALIKE)]


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str) -> None:
    family = {**families.FAMILIES, **families.ALIKE}[name]
    model, inputs = family.build(family.implementations[0]), family.inputs()
    found = circuit(model, inputs)
    assert found
    for one in found:
        assert "".join(one.missing) == BETWEEN.get(name, ""), one
    given = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
    with torch.no_grad(), hookattn.tracing(model, capture=("v", "output")) as trace:
        model(**given)
    for one, call in zip(found, trace, strict=True):
        assert one.site == call.site
        assert (one.heads, one.kv_heads) == (call.output.shape[1], call.v.shape[1])
        assert one.W_O.shape[:2] == (one.heads, call.output.shape[3])
        if one.v is not None:
            assert one.v.weight.shape[::2] == (one.kv_heads, call.v.shape[3])
