"""Attention by the book, with every field open to changes: what edits are held against. None of it is hookattn's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookattn import edit

Change = Callable[[Tensor], Tensor]
NOTHING: Mapping[str, Change] = {}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    changes: Mapping[str, Change] = NOTHING,
    weights_made: list[Tensor] | None = None,
) -> Tensor:
    """Softmax attention, B H T E, with each field changed as it is made.

    Args:
        q: B H T D.
        k, v: B G S D and B G S E.
        mask: bool, broadcastable to B H T S.
        bias: likewise, floating.
        scale: by default one over the root of D.
        changes: field → what is made of it.
        weights_made: gets the changed weights.
    """

    def changed(name: str, x: Tensor) -> Tensor:
        return changes[name](x) if name in changes else x

    q, k, v = changed("q", q), changed("k", k), changed("v", v)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = changed("scores", scores if bias is None else scores + bias)
    seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    seen = changed("mask", seen)
    top = scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    raised = (scores - torch.where(top.isinf(), 0.0, top)).exp().masked_fill(~seen, 0.0)
    total = raised.sum(-1, keepdim=True)
    weights = changed("weights", raised / torch.where(total == 0, 1.0, total))
    if weights_made is not None:
        weights_made.append(weights)
    return changed("output", torch.einsum("bhts,bhse->bhte", weights, v))


def at(change: Callable[[Tensor], Tensor | float], *index: object) -> Change:
    """Change some entries: ``x[index] = change(x[index])``, index by index as numpy's ``ix_`` does."""

    def made(x: Tensor) -> Tensor:
        x = x.clone()
        lists = [range(n) if isinstance(i, slice) else i for i, n in zip(index, x.shape, strict=False)]
        grids = torch.meshgrid(*(torch.tensor(list(i)) for i in lists), indexing="ij")  # type: ignore[call-overload]
        x[grids] = change(x[grids])  # type: ignore[assignment]
        return x

    return made


ALL = slice(None)


@dataclass(frozen=True)
class Case:
    """One edit, and the same by hand.

    Attributes:
        name: of the case.
        make: the function of :mod:`hookattn.edit`.
        args: its own arguments.
        where: its selection.
        field: what is changed by hand.
        change: what is made of the entries.
        index: which these are, an item for each axis: a list, or all.
    """

    name: str
    make: Callable[..., edit.Edit]
    args: tuple[Any, ...]
    where: dict[str, Any]
    field: str
    change: Callable[[Tensor], Tensor | float]
    index: tuple[Any, ...] = ()

    def edit(self, **where: Any) -> edit.Edit:
        """The edit, with more to its selection."""
        return self.make(*self.args, **self.where, **where)

    @property
    def changes(self) -> dict[str, Change]:
        """What is done by hand."""
        return {self.field: at(self.change, *self.index) if self.index else self.change}  # type: ignore[dict-item]

    @property
    def others(self) -> list[int]:
        """Of four query heads those that it does not touch."""
        touched = self.index[1] if len(self.index) > 1 and self.field not in ("k", "v") else ALL
        return [] if touched == ALL else [h for h in range(4) if h not in touched]

    def __str__(self) -> str:
        return self.name


_VECTOR = torch.arange(8, dtype=torch.float64).cos()
_GATES = _VECTOR[:4].view(1, 4, 1, 1)
_SQUARE, _FLIP = (lambda c: c.value.square()), (lambda c: c.value.flip(-1))


def _zero(x: Tensor) -> float:
    return 0.0


def _mean(dim: int) -> Change:
    return lambda x: x.mean(dim, keepdim=True).expand_as(x)


def _plus(y: Tensor | float) -> Change:
    return lambda x: x + y


CASES = [
    Case("zero a pattern", edit.zero, ("weights",), {"heads": [1]}, "weights", _zero, (ALL, [1])),
    Case("zero outputs", edit.zero, ("output",), {"heads": [0, 3]}, "output", _zero, (ALL, [0, 3])),
    Case("zero queries", edit.zero, ("q",), {"heads": 2, "queries": [1, -1]}, "q", _zero, (ALL, [2], [1, 5])),
    Case("zero keys", edit.zero, ("k",), {"heads": 0, "keys": slice(1, 3)}, "k", _zero, (ALL, [0], [1, 2])),
    Case("zero values", edit.zero, ("v",), {"keys": [2]}, "v", _zero, (ALL, ALL, [2])),
    Case("zero an edge", edit.zero, ("weights",), {"queries": -1, "keys": 1}, "weights", _zero, (ALL, ALL, [5], [1])),
    Case("zero in an entry", edit.zero, ("weights",), {"batch": 1, "heads": [-1]}, "weights", _zero, ([1], [3])),
    Case("set", edit.set, ("scores", 2.0), {"heads": 1, "keys": 0}, "scores", lambda x: 2, (ALL, [1], ALL, [0])),
    Case("scale scores", edit.scale, ("scores", 0.5), {"heads": [1, 2]}, "scores", lambda x: x / 2, (ALL, [1, 2])),
    Case("add", edit.add, ("scores", 2.0), {"heads": [2], "keys": 0}, "scores", _plus(2), (ALL, [2], ALL, [0])),
    Case("add a row", edit.add, ("scores", _VECTOR[:6]), {}, "scores", _plus(_VECTOR[:6])),
    Case("steer", edit.add, ("output", _VECTOR), {"heads": 2, "queries": 5}, "output", _plus(_VECTOR), (ALL, [2], [5])),
    Case("gate outputs", edit.scale, ("output", _VECTOR[:4]), {}, "output", lambda x: x * _GATES),
    Case("gate weights", edit.scale, ("weights", _VECTOR[:4]), {}, "weights", lambda x: x * _GATES),
    Case("cut", edit.knockout, (), {"queries": [-1], "keys": [0, 2]}, "mask", _zero, (ALL, ALL, [5], [0, 2])),
    Case(
        "cut in heads", edit.knockout, (), {"heads": [1, 3], "queries": [4, 5], "keys": 2}, "mask", _zero,
        (ALL, [1, 3], [4, 5], [2]),
    ),
    Case("cut in one", edit.knockout, (), {"heads": 0, "batch": 0, "keys": [1]}, "mask", _zero, ([0], [0], ALL, [1])),
    Case("cut all of a query", edit.knockout, (), {"heads": 1, "queries": 3}, "mask", _zero, (ALL, [1], [3])),
    Case("mean", edit.mean, ("output",), {"heads": [1]}, "output", _mean(2), (ALL, [1])),
    Case("mean of a batch", edit.mean, ("output", "batch"), {"heads": [1]}, "output", _mean(0), (ALL, [1])),
    Case("square scores", edit.call, (_SQUARE, "scores"), {"heads": [0]}, "scores", lambda x: x * x, (ALL, [0])),
    Case("turn weights", edit.call, (_FLIP, "weights"), {"heads": [0]}, "weights", lambda x: x.flip(-1), (ALL, [0])),
]  # fmt: skip
