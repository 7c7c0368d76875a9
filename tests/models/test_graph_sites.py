"""Sites in graphs of torch.fx: the module that a node was made from, or else the node."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import hookattn
from hookattn.models import graph_sites
from tests.reference import draw, paths

B, T, E, H = 2, 5, 16, 2
X = draw(B, T, E, seed=3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).unflatten(-1, (3, H, E // H)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(y[0], y[1], y[2]).transpose(1, 2).flatten(2)


class Twice(nn.Module):
    """One attention of its own, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), nn.Sequential(Attention())])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x + self.blocks[1](x)


PATHS = ["blocks.0", "blocks.1.0", "blocks.1.0"]


def graph(**leaves: Any) -> fx.GraphModule:
    torch.manual_seed(0)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, leaves.get("leaf", nn.Linear))

    m = Twice().eval()
    return fx.GraphModule(m, Tracer().trace(m))


def sites(m: nn.Module) -> list[tuple[str, str]]:
    return [(c.site.path, c.site.module) for c in hookattn.trace(m, X)]


def test_the_module_that_a_node_was_made_from() -> None:
    g = graph()
    trace = hookattn.trace(g, X)
    assert sites(g) == [(path, "Attention") for path in PATHS] and not trace.notes
    for call, reference in zip(trace, hookattn.trace(Twice().eval(), X), strict=True):
        assert call.shape == reference.shape
    inner = hookattn.trace(nn.Sequential(nn.Identity(), g), X)  # a graph's paths begin where it stands
    assert paths(inner.calls) == [f"1.{path}" for path in PATHS]


def test_a_module_that_is_a_node_itself() -> None:
    assert sites(graph(leaf=Attention)) == [(path, "Attention") for path in PATHS]


def test_a_graph_that_a_graph_calls() -> None:
    """A module that happens to be a graph: its own paths count from its place."""
    outer = graph(leaf=Attention)
    inner = fx.symbolic_trace(nn.Sequential(outer.get_submodule("blocks.0")))
    outer.get_submodule("blocks").register_module("0", inner)
    assert paths(hookattn.trace(outer, X).calls) == ["blocks.0.0", *PATHS[1:]]


def test_a_graph_that_does_not_say_is_named_by_its_nodes() -> None:
    g = graph()
    for node in g.graph.nodes:
        node.meta.clear()
    trace = hookattn.trace(g, X)
    name = "scaled_dot_product_attention"
    assert paths(trace.calls) == [name, f"{name}_1", f"{name}_2"] and trace.notes == [graph_sites.UNKNOWN]
    assert [c.site.layer for c in trace] == [0, 1, 2]  # as they ran
    assert paths(hookattn.trace(nn.Sequential(g), X).calls)[1] == f"0.{name}_1"


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("L['self'].blocks.0", "blocks.0"),
        ("L['self'].blocks[0]", "blocks.0"),
        ("L__self__.blocks.0", "blocks.0"),
        ("blocks.0@1", "blocks.0"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("kind", [Attention, "a.module.Attention"])
def test_spellings_of_a_path(spelled: str, path: str, kind: Any) -> None:
    g = graph()
    for node in g.graph.nodes:
        node.meta["nn_module_stack"] = {"outer": ("", "Model"), "inner": (spelled, kind)}
    assert set(sites(g)) == {(path, "Attention")}


@pytest.mark.parametrize("stack", [None, 7, {}, {"key": ("no path!", "Kind")}, {"key": "blocks.0"}, {"key": ()}])
def test_what_cannot_be_read_names_nothing(stack: Any) -> None:
    g = graph()
    for node in g.graph.nodes:
        node.meta["nn_module_stack"] = stack
    assert hookattn.trace(g, X)[0].site.path == "scaled_dot_product_attention"


def test_a_graph_that_is_not_the_code_any_more() -> None:
    """The graph was changed and not compiled again: what has no node there has no name but the graph's own."""
    g = graph()
    for node in g.graph.nodes:
        node.name = f"other_{node.name}"
    trace = hookattn.trace(g, X)
    assert paths(trace.calls) == [""] * 3 and trace.notes == [graph_sites.UNKNOWN]
    g.recompile()
    assert paths(hookattn.trace(g, X).calls) == PATHS
    assert paths(hookattn.trace(copy.deepcopy(g), X).calls) == PATHS
