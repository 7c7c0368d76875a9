"""What is derived while something is read: how many scores at once, and of which heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from hookattn.attention import derivation
from hookattn.calls import deriving


class Derived(NamedTuple):
    """One derivation: its extents."""

    b: int
    h: int
    t: int
    s: int

    @property
    def scores(self) -> int:
        """How many scores it has."""
        return self.b * self.h * self.t * self.s


@contextmanager
def derivations() -> Iterator[list[Derived]]:
    """The list of all scores and weights of calls that are derived in the block, in their order."""
    found: list[Derived] = []

    def watched(q: Tensor, k: Tensor, *given: Any, **more: Any) -> Any:
        b, h, t, _ = q.shape
        found.append(Derived(b, h, t, k.shape[2]))
        return derivation.derive(q, k, *given, **more)

    with mock.patch.object(deriving, "derive", watched):
        yield found
