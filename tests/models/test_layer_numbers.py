"""The numbers of layers where no adapter says them: models that stack their parts in one list, in several hands."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.models.registry import using
from hookattn.models.running_numbers import RunningNumbers
from hookattn.models.site_names import site_of_path

D = 8


@pytest.fixture(autouse=True)
def no_adapters() -> Any:
    with using():
        yield


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Msa(Attention):
    """Named like nothing."""


class CrossAttn(Attention):
    pass


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))


class PreNorm(nn.Module):
    def __init__(self, **held: nn.Module) -> None:
        super().__init__()
        self.norm, (self.name,) = nn.LayerNorm(D), held
        self.add_module(self.name, *held.values())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_submodule(self.name)(self.norm(x))


class Block(nn.Module):
    """A norm and an attention, or with ``net`` a whole layer; without ``attn`` what is left of one."""

    def __init__(self, attn: nn.Module | None = None, net: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.attn, self.net = nn.LayerNorm(D), attn, net

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attn is None else x + self.attn(self.norm(x))
        return x if self.net is None else x + self.net(x)


class AttentionBlock(Block):
    pass


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(D, D, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Model(nn.Module):
    def __init__(self, *entries: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(entries)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def numbers(model: nn.Module, **options: Any) -> list[tuple[str, int | None, int | None]]:
    torch.manual_seed(0)
    trace = hookattn.trace(model, torch.randn(2, 5, D), **options)
    return [(call.site.kind, call.site.layer, call.site.layers) for call in trace]


def alternating(*kinds: Any, n: int = 3) -> list[nn.Module]:
    return [kind() for _ in range(n) for kind in kinds]


THREE = [("self", i, 3) for i in range(3)]


@pytest.mark.parametrize(
    "kinds",
    [
        (Attention, Mlp),
        (Mlp, Attention),
        (Msa, Mlp),
        (lambda: nn.LayerNorm(D), Attention, lambda: nn.LayerNorm(D), Mlp),
        (lambda: PreNorm(fn=Attention()), lambda: PreNorm(fn=Mlp())),
        (lambda: Block(attn=Msa()), lambda: Block(net=Mlp())),
        (Attention, lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU())),
        (lambda: AttentionBlock(attn=Attention()), Mlp),
        (lambda: nn.Sequential(nn.LayerNorm(D), Attention()), Mlp),
    ],
)
def test_what_holds_attention_is_counted(kinds: Any) -> None:
    assert numbers(Model(*alternating(*kinds))) == THREE
    assert numbers(nn.Sequential(*alternating(*kinds))) == THREE


def test_of_each_kind_alone() -> None:
    parts = (lambda: PreNorm(attn=Attention()), lambda: PreNorm(cross_attn=CrossAttn()), lambda: PreNorm(net=Mlp()))
    assert numbers(Model(*alternating(*parts, n=2))) == [(kind, i, 2) for i in range(2) for kind in ("self", "cross")]
    parts = (Attention, Attention, Mlp)  # nothing tells these apart
    assert numbers(Model(*alternating(*parts, n=2))) == [("self", i, 4) for i in range(4)]


def test_layers_are_selected_by_these_numbers() -> None:
    model = Model(*alternating(Attention, Mlp))
    assert numbers(model, layers=[1, -1]) == [THREE[1], THREE[2]]
    with pytest.raises(hookattn.SelectionError, match="no layer 4"):
        numbers(model, layers=4)


def whole() -> nn.Module:
    return AttentionBlock(Attention(), Mlp())


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([whole() for _ in range(3)], [0, 1, 2]),
        ([Block(net=Mlp()), whole(), Block(net=Mlp()), whole()], [1, 3]),  # a layer that lost its own
        ([nn.Linear(D, D), whole(), whole(), nn.LayerNorm(D)], [1, 2]),
        ([Recurrent(), Recurrent(), Attention(), Recurrent(), Recurrent(), Attention()], [2, 5]),
        ([nn.Embedding(4, D).requires_grad_(False), Attention(), Mlp(), Attention()], [1, 3]),
        ([Attention(), Msa(), Attention()], [0, 1, 2]),
        ([PreNorm(fn=Attention()), PreNorm(fn=Msa()), PreNorm(fn=Attention())], [0, 1, 2]),
        ([Attention(), Block(Msa(), Mlp()), Attention()], [0, 1, 2]),
        ([Block(Msa(), Mlp()), *(Block(Msa(), nn.Linear(D, D)) for _ in range(2))], [0, 1, 2]),
    ],
    ids=[
        "blocks",
        "pruned",
        "pipeline",
        "hybrid",
        "embedding",
        "two classes",
        "two classes and norms",
        "two classes and a net",
        "two kinds of net",
    ],
)
def test_where_every_entry_is_a_layer_the_index_is_its_number(entries: list[nn.Module], found: list[int]) -> None:
    model = Model(*entries)
    model.forward = lambda x: [x := m(x) for m in model.layers if not isinstance(m, nn.Embedding)][-1]  # type: ignore[method-assign]
    assert numbers(model) == [("self", i, len(entries)) for i in found]


def test_names_that_are_no_places() -> None:
    assert numbers(nn.Sequential(OrderedDict({"5": Attention()}))) == [("self", 5, 1)]
    assert numbers(nn.Sequential(OrderedDict({"5": Attention(), "6": Mlp(), "7": Attention()}))) == [
        ("self", 0, 2),
        ("self", 1, 2),
    ]
    model = Model(*alternating(Attention, Mlp, n=2))
    model.layers.append(None)  # type: ignore[arg-type]
    model.forward = lambda x: [x := m(x) for m in model.layers if m is not None][-1]  # type: ignore[method-assign]
    assert numbers(model) == [("self", 0, 2), ("self", 1, 2)]


# ------------------------------------------------------------------------------------------------ stages


def layer() -> Block:
    return Block(attn=Attention(), net=Mlp())


def pipeline(*stages: int) -> nn.Module:
    """One Sequential, whose every second entry is a stage."""
    parts: list[nn.Module] = [nn.Linear(D, D)]
    for n in stages:
        parts += [nn.Sequential(*(layer() for _ in range(n))), nn.LayerNorm(D)]
    return nn.Sequential(*parts)


class Stage(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.blocks, self.down = nn.ModuleList(layer() for _ in range(n)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.down(x)


class Towers(nn.Module):
    """Two that have their own layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.answer = Model(layer(), layer()), Model(layer(), layer())

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) + self.answer(x)


def by_path(model: nn.Module, **options: Any) -> list[tuple[str, int | None]]:
    return [(call.site.path, call.site.layer) for call in hookattn.trace(model, torch.randn(2, 5, D), **options)]


@pytest.mark.parametrize("make", [pipeline, lambda *n: Model(*(Stage(i) for i in n))], ids=["pipeline", "stages"])
def test_layers_of_stages_are_numbered_as_they_run(make: Any) -> None:
    model = make(2, 1, 3)
    assert [layer for _, layer in by_path(model)] == [0, 1, 2, 3, 4, 5]
    assert [layer for _, layer in by_path(model, layers=[-1])] == [5]
    assert [layer for _, layer in by_path(model, layers=[0, -2])] == [0, 4]
    trace = hookattn.trace(model, torch.randn(2, 5, D))
    assert [c.site.layer for c in trace.select(layer=-1)] == [5]
    with hookattn.tracing(model) as twice:
        model(torch.randn(2, 5, D)), model(torch.randn(2, 5, D))
    assert [c.site.layer for c in twice] == [*range(6)] * 2


def test_two_attentions_of_a_layer_in_a_stage_have_its_number() -> None:
    def block() -> nn.Module:
        return Block(attn=nn.Sequential(Msa(), Msa()), net=Mlp())

    model = Model(*(nn.Sequential(block(), block()) for _ in range(2)))
    assert [layer for _, layer in by_path(model)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_layers_that_are_nested_in_one_place_alone_have_their_own_numbers() -> None:
    model = nn.Sequential(nn.Linear(D, D), Stage(3))
    assert numbers(model) == THREE


def test_numbers_within_a_layer_are_not_those_of_layers() -> None:
    heads = Model(*(Block(attn=nn.Sequential(Attention(), Attention()), net=Mlp()) for _ in range(2)))
    assert numbers(heads) == [("self", i, 2) for i in (0, 0, 1, 1)]
    pairs = Model(*(nn.Sequential(PreNorm(fn=Attention()), PreNorm(fn=Mlp())) for _ in range(3)))
    assert numbers(pairs) == THREE


def test_each_tower_has_its_own_numbers() -> None:
    assert [layer for _, layer in by_path(Towers())] == [0, 1, 0, 1]


class Graph(nn.Module):
    """Plain modules in the place of containers, as a graph has them."""

    def __init__(self, *stages: int) -> None:
        super().__init__()
        self.features = nn.Module()
        for i, n in enumerate(stages):
            self.features.add_module(str(i), stage := nn.Module())
            for j in range(n):
                stage.add_module(str(j), block := nn.Module())
                block.attn, block.net = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.features.children():
            for block in stage.children():
                x = block.net(block.attn(x))
        return x


def test_plain_modules_with_numbers_are_containers() -> None:
    assert [layer for _, layer in by_path(Graph(2, 2))] == [0, 1, 2, 3]
    assert numbers(Graph(3)) == [("self", i, 3) for i in range(3)]


def test_places_that_are_no_modules() -> None:
    """What a graph says of where an operation came from may be gone from it."""
    model = nn.Module()
    assert site_of_path("blocks.2.attn", model).layer == 2
    sites = [site_of_path(path, model) for path in ("features.1.0.attn", "features.1.1.attn", "features.3.0.attn")]
    assert [(site.layer, site.layers, site.module) for site in sites] == [(None, None, "Module")] * 3
    order = RunningNumbers(lambda: model)
    assert [order.numbered(site).layer for site in (*sites, *sites)] == [0, 1, 2, 0, 1, 2]
