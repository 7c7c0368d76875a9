"""What figures, pages and exporters derive of a trace: what they show, and no more of it at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

pytest.importorskip("matplotlib")

import hookattn
from hookattn import render
from hookattn.calls.choose import part_of_one_call
from hookattn.calls.fields import InFile
from hookattn.render.by_distance import mean_by_distance
from hookattn.render.trace_files import trace_file
from hookattn.render.values import drawn_values
from tests.derivations import Derived, derivations

HEADS, T = 4, 24


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        return x + sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.fixture
def trace() -> hookattn.Trace:
    torch.manual_seed(0)
    made = hookattn.trace(nn.Sequential(Attention(), Attention()), torch.randn(2, T, 16))
    made.tokens = [[f"w{i % 5}" for i in range(T)]] * 2
    return replace(made, calls=[replace(c, site=replace(c.site, layer=i)) for i, c in enumerate(made)])


@pytest.mark.parametrize("draw", [render.heatmap, render.heads, render.layers, render.distance, render.plotly])
def test_a_figure_of_one_head_derives_that_head(draw: Callable[..., Any], trace: hookattn.Trace) -> None:
    with derivations() as found:
        draw(trace, layer=1, heads=2, batch=1)
    assert found and set(found) == {Derived(1, 1, T, T)}


@pytest.mark.parametrize("draw", [render.lens, render.neuron])
def test_a_figure_of_one_query_derives_that_query(draw: Callable[..., Any], trace: hookattn.Trace) -> None:
    with derivations() as found:
        draw(trace, layer=1, heads=2, queries=5)
    assert found and set(found) == {Derived(1, 1, 1, T)}


@pytest.mark.parametrize("draw", [render.heatmap, render.heads, render.distance])
def test_heads_are_derived_one_by_one(draw: Callable[..., Any], trace: hookattn.Trace) -> None:
    with derivations() as found:
        draw(trace, layer=1)
    assert found == [Derived(1, 1, T, T)] * HEADS


def test_one_by_one_they_are_what_they_are_together(trace: hookattn.Trace) -> None:
    part, call = part_of_one_call(trace, "x", layer=1, batch=1), trace[1]
    weights, mask = call.weights[1].double(), call.mask.expand(2, HEADS, T, T)[1]
    found = drawn_values(part)
    torch.testing.assert_close(torch.from_numpy(found.data.data), weights, rtol=1e-6, atol=1e-7)
    assert found.masked and torch.equal(torch.from_numpy(found.data.mask), ~mask)
    assert found.largest == pytest.approx(weights.max().item())
    at, means = mean_by_distance(part)
    for head in range(HEADS):
        for n, distance in enumerate(map(int, at)):
            assert means[head, n] == pytest.approx(weights[head].diagonal(-distance).mean().item(), abs=1e-7)


def test_a_page_narrows_a_call_at_a_time(trace: hookattn.Trace) -> None:
    with derivations() as found:
        render.page(trace, fields=("weights",))
    assert found and set(found) == {Derived(2, HEADS, T, T)}
    assert all(call.made == {} for call in trace), "what a page shows is in the page, and not held by the trace"


def test_what_is_drawn_is_not_held(trace: hookattn.Trace) -> None:
    render.heatmap(trace, layer=1)
    render.layers(trace)
    assert all(call.made == {} for call in trace)


class Elsewhere:
    """A source of fields that is not the trace's file."""

    def __init__(self, x: torch.Tensor):
        self.x = x

    def tensor(self, name: str) -> torch.Tensor:
        return self.x.clone()

    def slice(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        return self.x[index].clone()

    def shape(self, name: str) -> torch.Size:
        return self.x.shape

    def dtype(self, name: str) -> torch.dtype:
        return self.x.dtype


def test_a_trace_whose_fields_are_elsewhere_is_not_taken_for_its_file(trace: hookattn.Trace, tmp_path: Path) -> None:
    loaded = hookattn.load(trace.save(tmp_path / "x.safetensors"))
    with trace_file(loaded) as path:
        assert path == loaded.path
    changed = InFile(Elsewhere(2 * loaded[0].q), "q")
    loaded.calls[0] = replace(loaded[0], fields={**loaded[0].fields, "q": changed})
    with trace_file(loaded) as path:
        assert path != loaded.path and torch.equal(hookattn.load(path)[0].q, 2 * trace[0].q)
