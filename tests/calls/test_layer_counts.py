"""Layers counted from the end mean the same wherever they are named: to ``trace``, to ``plan`` and to ``select``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import Call, SelectionError, Site, Trace
from hookattn.calls.layer_counts import LayerCounts, names_layer


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.scaled_dot_product_attention(x, x, x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def places(trace: Any) -> list[int | None]:
    return [call.site.layer for call in trace]


@pytest.mark.parametrize("index", range(-4, 4))
def test_an_index_names_one_layer_everywhere(index: int) -> None:
    model, x = Model(), torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = [range(4)[index]]
    assert places(hookattn.trace(model, x, layers=[index])) == expected
    assert places(hookattn.plan(model, x, layers=[index]).calls) == expected
    whole = hookattn.trace(model, x)
    assert places(whole.select(layer=index)) == places(whole.select(layer=[index])) == expected


def test_the_end_is_that_of_the_model_and_not_of_what_was_kept() -> None:
    model, x = Model(), torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    part = hookattn.trace(model, x, layers=[0, -1])
    assert places(part) == [0, 3] and places(part.select(layer=-1)) == [3]
    first = hookattn.trace(model, x, layers=[0, 1])
    with pytest.raises(SelectionError, match=r"no call fits .*layer.*-1.*there are layers \[0, 1\]"):
        first.select(layer=-1)
    assert places(first.select(layer=-4)) == [0] and places(first[1:].select(layer=-3)) == [1]


def test_where_the_structure_does_not_tell_the_last_that_was_seen_does() -> None:
    def call(layer: int | None, stack: str = "main") -> Call:
        site = Site(f"{stack}.{layer}", layer, stack)
        return Call(site, 0, 0, "sdpa", torch.float32, 1.0)

    trace = Trace([call(0), call(2), call(None), call(5, "other")])
    assert places(trace.select(layer=-1)) == [2, 5] and places(trace.select(layer=-1, stack="main")) == [2]
    assert str(LayerCounts(c.site for c in trace)) == "2 (main self), 5 (other self)"


def test_an_end_that_is_not_known() -> None:
    assert names_layer(-1, 3, None) is None and names_layer(3, 3, None) and not names_layer(2, 3, None)
