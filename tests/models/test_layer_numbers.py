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
