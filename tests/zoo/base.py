"""What an entry of the zoo is: a small model, its inputs, and what plain code says its attention is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tests.reference import draw, merge

B, T, S, E, H = 2, 5, 7, 16, 4
D = E // H


@dataclasses.dataclass
class Expected:
    """One attention call in B H T D layout, from plain code on the same weights."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | Tensor = 1.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0  # in train mode
    path: str = ""  # below the entry's own path
    masked_scores: bool = True  # what the scores would be at masked positions can be told

    def reference_args(self) -> dict[str, Any]:
        """The arguments of reference_attention."""
        names = ("q", "k", "v", "scale", "bias", "mask", "softcap", "sinks")
        return {name: getattr(self, name) for name in names}


class Entry(nn.Module):
    """A module of the zoo. ``forward`` is what somebody wrote; ``expected`` and ``finish`` say what it means."""

    out: str = ""  # the attribute that holds the output projection

    def expected(self, *inputs: Tensor) -> Expected | list[Expected]:
        raise NotImplementedError

    def finish(self, outputs: list[Tensor], *inputs: Tensor) -> Tensor:
        """From the kernels' outputs (B H T E each) to what forward returns."""
        merged = merge(outputs[0])
        return getattr(self, self.out)(merged) if self.out else merged

    def calls(self, *inputs: Tensor) -> list[Expected]:
        found = self.expected(*inputs)
        return found if isinstance(found, list) else [found]


@dataclasses.dataclass
class Case:
    """One row of the parametrised tests."""

    name: str
    build: Callable[[], Entry]
    shapes: tuple[tuple[int, ...], ...]
    train: bool = False  # run the trace in train mode, with dropout
    tol: float = 1e-9  # of the reference against the module in float64

    def model(self, dtype: torch.dtype = torch.float32) -> Host:
        """The entry inside a host; weights do not depend on anything but the name."""
        with torch.random.fork_rng():
            torch.manual_seed(sum(map(ord, self.name)))
            entry = self.build()
        host = Host(entry).to(dtype)
        return host.train(self.train)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Large enough that the weights are far from uniform; smaller where the dtype is coarse."""
        std = 0.7 if dtype == torch.bfloat16 else 1.5
        return tuple(draw(*shape, seed=11 + i, std=std, dtype=dtype) for i, shape in enumerate(self.shapes))


class Block(nn.Module):
    """What usually surrounds an attention module."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.attn(*inputs)


class Host(nn.Module):
    """A model of one layer, so that the entry has a path: ``layers.0.attn``."""

    path = "layers.0.attn"

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(entry)])

    @property
    def entry(self) -> Entry:
        entry = self.layers[0].attn
        assert isinstance(entry, Entry)
        return entry

    def forward(self, *inputs: Tensor) -> Tensor:
        for layer in self.layers:
            result = layer(*inputs)
        return result


CASES: list[Case] = []
SELF: tuple[tuple[int, ...], ...] = ((B, T, E),)
CROSS: tuple[tuple[int, ...], ...] = ((B, T, E), (B, S, E))

Kind = TypeVar("Kind", bound=type[Entry])


def zoo(
    name: str, shapes: tuple[tuple[int, ...], ...] = SELF, *, arguments: dict[str, Any] | None = None, **options: Any
) -> Callable[[Kind], Kind]:
    """Add a class to the zoo, under one or several names with the arguments that go with each."""

    def add(kind: Kind) -> Kind:
        assert all(case.name != name for case in CASES), f"two entries named {name}"
        CASES.append(Case(name, lambda: kind(**(arguments or {})), shapes, **options))
        return kind

    return add
