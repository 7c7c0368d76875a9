"""Where the queries and keys of a call are in their sequence, while it goes on from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..attention.kernel_call import KernelCall
from ..attention.positions import query_positions
from ..attention.whole import Place
from ..calls.site import Site
from ..errors import EditError
from .where import UNNUMBERED


class _Step(NamedTuple):
    """What a step has shown of a site.

    Attributes:
        last: the position of its last query, counted in its keys.
        queries: how many it had.
    """

    last: int
    queries: int


@dataclass(frozen=True)
class Here:
    """The positions of one call.

    Attributes:
        queries: T, of its queries in the sequence.
        end: one behind the last query of the whole attention, of which this call may be a piece.
        lost: why no position counted from the front can be trusted; empty: it can.
        differ: whether the batch entries have different ones.
        unknown: whether other processes have other queries of the call, and nobody knows which.
    """

    queries: tuple[int, ...]
    end: int
    lost: str = ""
    differ: bool = False
    unknown: bool = False

    def check(self, wanted: tuple[int, ...] | slice, name: str, label: str) -> None:
        """Whether what is wanted can be told here.

        Raises:
            EditError: it cannot; says why.
        """
        if self.unknown and name == "queries":
            raise EditError(f"{label}: {UNNUMBERED}.")
        ends = [wanted.start, wanted.stop] if isinstance(wanted, slice) else list(wanted)
        if self.lost and any(i is not None and i >= 0 for i in ends):
            raise EditError(f"{label}: {self.lost}; count {name} from the end, with negative numbers.")
        if self.differ and name == "queries":
            raise EditError(
                f"{label}: the queries of the batch entries are at different positions of their sequences; edit one "
                "batch entry at a time, in a batch of its own."
            )


class Positions:
    """Follows the positions of every site of one block."""

    def __init__(self) -> None:
        self._steps: dict[str, dict[int, _Step]] = {}
        self._of_self: dict[tuple[str, int, int], tuple[int, ...]] = {}  # stack, step and T -> those of self-attention

    def of(self, call: KernelCall, site: Site, step: int) -> Here:
        """Those of a call."""
        _, _, t, s = call.shape
        rows = Place.of(call).rows
        if rows.first is None or rows.of is None:
            return Here(tuple(range(t)), t, unknown=True)
        first, whole = rows.first, rows.of
        if site.crosses:
            # Keys of another sequence tell nothing; the self-attention of the same step has the same queries.
            queries = self._of_self.get((site.stack, step, t), tuple(range(first, first + t)))
            return Here(queries, _end(queries, first, whole))
        differ = False
        if whole != t:
            queries = tuple(first + i + max(s - whole, 0) for i in range(t))
        else:
            found = query_positions(call, site.kind)
            differ = found is not None and bool((found != found[:1]).any())
            queries = tuple(range(t)) if found is None else tuple(found[0].tolist())
        self._of_self[site.stack, step, t] = queries
        steps = self._steps.setdefault(site.path, {})
        before = max((i for i in steps if i < step), default=None)
        steps[step] = _Step(max(queries, default=0), t)
        lost = ""
        if before is not None and t < s and whole == t and queries and queries[0] < steps[before].last + 1:
            lost = (
                f"keys of earlier steps are gone from the cache (query {queries[0]} of its keys comes after query "
                f"{steps[before].last} of step {before}), so that positions cannot be counted from the front"
            )
        return Here(queries, _end(queries, first, whole), lost, differ)


def _end(queries: tuple[int, ...], first: int, whole: int) -> int:
    """One behind the last query of an attention of ``whole`` of them, of which these are those from ``first`` on."""
    return max(queries, default=-1) + 1 + whole - first - len(queries)
