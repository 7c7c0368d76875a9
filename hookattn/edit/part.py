"""Some batch entries, heads, queries and keys of the tensors of one call: taken out, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.kernel_call import FIELD_SPECS
from ..attention.places import exchanged
from ..torch_internals.allocation import laid_as

Places = tuple[int, ...] | None

_AXES = {name: spec.axes for name, spec in FIELD_SPECS.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """Places along the axes of a call; None: all.

    Attributes:
        batch: of B.
        heads: of H; of G for a field of key heads.
        rows: of T.
        keys: of S.
    """

    batch: Places = None
    heads: Places = None
    rows: Places = None
    keys: Places = None

    def of(self, axes: str) -> list[Places]:
        """The places along each of some axes."""
        by_letter = {"B": self.batch, "H": self.heads, "G": self.heads, "T": self.rows, "S": self.keys}
        return [by_letter.get(letter) for letter in axes]

    def shape(self, axes: str, extents: dict[str, int]) -> list[int]:
        """That of the part of a field."""
        return [
            extents[letter] if places is None else len(places)
            for letter, places in zip(axes, self.of(axes), strict=True)
        ]

    @property
    def empty(self) -> bool:
        """Whether nothing is in it."""
        return () in (self.batch, self.heads, self.rows, self.keys)

    def take(self, x: Tensor, axes: str) -> Tensor:
        """The part of a tensor; an axis of size 1 that the call has more of stands for all its places."""
        for dim, (letter, places) in enumerate(zip(axes, self.of(axes), strict=True)):
            if places is None or (x.shape[dim] == 1 and letter != "D" and max(places, default=0) > 0):
                continue
            if places == tuple(range(places[0], places[-1] + 1)):
                x = x.narrow(dim, places[0], len(places))
            else:
                x = x.index_select(dim, torch.tensor(places, device=x.device))
        return x

    def put(self, x: Tensor, axes: str, new: Tensor) -> Tensor:
        """A tensor with the part exchanged; all other entries keep their bits, and where gradients go."""
        every = self.of(axes)
        if all(places is None for places in every):
            return laid_as(new.to(x.dtype).expand(x.shape), x)
        return exchanged(x, every, new)

    def within(self, whole: Part) -> Part:
        """The places counted in a part that this one is in."""
        return Part(
            *(
                mine if theirs is None else tuple(range(len(theirs))) if mine is None else _among(mine, theirs)
                for mine, theirs in zip(
                    (self.batch, self.heads, self.rows, self.keys),
                    (whole.batch, whole.heads, whole.rows, whole.keys),
                    strict=True,
                )
            )
        )


def _among(mine: Sequence[int], theirs: Sequence[int]) -> tuple[int, ...]:
    place = {number: i for i, number in enumerate(theirs)}
    return tuple(place[number] for number in mine)


def union(parts: Iterable[Part]) -> Part:
    """The smallest part that all of some are in; its keys are all."""
    parts = list(parts)

    def both(several: Sequence[Places]) -> Places:
        if not several or None in several:
            return None
        return tuple(sorted({i for places in several for i in places or ()}))

    return Part(both([p.batch for p in parts]), both([p.heads for p in parts]), both([p.rows for p in parts]))


def axes_of(field: str) -> str:
    """The letters of a field's axes."""
    return _AXES[field]
