"""Which calls an edit is for: by stack, kind, layer, path and step, as a trace selects them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hookattn
from hookattn import edit
from tests import tiny_models as tiny

pytest.importorskip("transformers")
IDS = torch.arange(12).view(2, 6) + 3

SELECTIONS: dict[str, tuple[dict[str, Any], Callable[[hookattn.Site], bool]]] = {
    "all": ({}, lambda s: True),
    "a stack": ({"stack": "encoder"}, lambda s: s.stack == "encoder"),
    "a kind": ({"kind": "cross"}, lambda s: s.kind == "cross"),
    "a stack and a kind": ({"stack": "decoder", "kind": "self"}, lambda s: s.stack == "decoder" and s.kind == "self"),
    "a layer": ({"layer": 1}, lambda s: s.layer == 1),
    "layers": ({"layer": [0, 1], "kind": "self"}, lambda s: s.kind == "self"),
    "a layer from the end": ({"layer": -1}, lambda s: s.layer == 1),
    "layers to the end": ({"layer": slice(1, None)}, lambda s: s.layer == 1),
    "layers but the last": ({"layer": slice(None, -1)}, lambda s: s.layer == 0),
    "a path": (
        {"path": "decoder.block.1.layer.1.EncDecAttention"},
        lambda s: s.path == "decoder.block.1.layer.1.EncDecAttention",
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name: str, implementation: str) -> None:
    where, takes = SELECTIONS[name]
    model = tiny.t5(implementation).eval()
    with torch.no_grad():
        trace = hookattn.edited(
            model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}, edit.zero("output", heads=1, **where)
        )
    assert len(trace) == 6
    for call in trace:
        assert bool(call.edits) is takes(call.site), call.site
        assert bool((call.output[:, 1] == 0).all()) is takes(call.site)


def test_steps() -> None:
    model = tiny.gpt2().eval()
    with torch.no_grad(), hookattn.editing(model, edit.zero(step=[0, 2], layer=1)) as trace:
        for _ in range(3):
            model(IDS)
    assert [(c.step, c.site.layer) for c in trace if c.edits] == [(0, 1), (2, 1)]
