"""The attention that goes to given sets of keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..errors import SelectionError
from .base import Out, Statistic
from .block import Block


@dataclass(frozen=True, init=False)
class SegmentMass(Statistic):
    """``Σ_{j ∈ set} w_j`` for each of N named sets of key positions, B H T N in the order of the names.

    A key position that a call does not have (yet) takes nothing; the call has a note.

    Args:
        sets: name → key positions, from 0, the same for all batch entries; they may overlap.

    Raises:
        SelectionError: no sets, a name that is no text, or positions that are no ints from 0.
    """

    name: ClassVar[str] = "segment_mass"
    axes: ClassVar[str] = "BHT*"
    sets: tuple[tuple[str, tuple[int, ...]], ...]

    def __init__(self, sets: Mapping[str, Iterable[int]]) -> None:
        if not isinstance(sets, Mapping) or not sets:
            what = "a name and key positions for each set of keys"
            raise checks.wrong("SegmentMass: sets", sets, what, SelectionError)
        made = []
        for name, keys in sets.items():
            if not isinstance(name, str) or not name:
                raise SelectionError(f"SegmentMass: {name!r}: expected a name for a set of keys.")
            where = f"SegmentMass: {name}"
            items = {
                checks.whole(where, i, 0, "key positions, ints from 0")
                for i in checks.several_ints(where, keys, "key positions, ints from 0")
            }
            made.append((name, tuple(sorted(items))))
        object.__setattr__(self, "sets", tuple(made))

    @property
    def key(self) -> str:
        """See :class:`Statistic`."""
        return f"{self.name}({','.join(name for name, _ in self.sets)})"

    @property
    def parameters(self) -> dict[str, Any]:
        """Each set as runs of positions, ``[start, stop]`` without the stop."""
        made: dict[str, list[list[int]]] = {}
        for name, keys in self.sets:
            runs: list[list[int]] = []
            for i in keys:
                if runs and runs[-1][1] == i:
                    runs[-1][1] = i + 1
                else:
                    runs.append([i, i + 1])
            made[name] = runs
        return {"sets": made}

    def allocate(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Out:
        """See :class:`Statistic`."""
        return {self.key: torch.zeros(*shape[:3], len(self.sets), dtype=dtype, device=device)}

    def columns(self) -> int:
        """One a set."""
        return len(self.sets)

    def fill(self, columns: Tensor, keys: slice, reach: tuple[int, int] | None) -> None:
        """1 for each key of a set: the product with the weights is their sum."""
        if reach is None:
            for row, (_, chosen) in zip(columns, self.sets, strict=True):
                row[[i - keys.start for i in chosen if keys.start <= i < keys.stop]] = 1

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        out[self.key][block.place] = sums * block.factor

    def problem(self, s: int) -> str | None:
        """Sets that go beyond the keys."""
        beyond = [name for name, keys in self.sets if keys and keys[-1] >= s]
        return f"{self.name}: {', '.join(beyond)} has positions beyond the {s} keys" if beyond else None
