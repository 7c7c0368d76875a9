"""Does the edits of one traced block: finds those that a call is meant by, and sees to it that none is lost.

It is the listener of a :class:`~hookattn.recording.session.Session`. A selection is looked at while the model runs, and
what it names that never came is an error at the end: an ablation that met nothing must not look like a head that does
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..attention.kernel_call import KernelCall
from ..attention.whole import Place
from ..calls.site import Site
from ..errors import EditError
from ..taps.base import Change
from .base import Edit
from .doing import Doing
from .part import Part
from .positions import Here, Positions
from .where import chosen, places_on


@dataclass
class _Met:
    """What one edit has met so far.

    Attributes:
        calls: that it was done in.
        elsewhere: whether it may have met others in other processes, which have the other heads or queries of a call.
        layers, steps, queries, keys: their numbers.
    """

    calls: int = 0
    elsewhere: bool = False
    layers: set[int] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)
    queries: set[int] = field(default_factory=set)
    keys: set[int] = field(default_factory=set)


class Editor:
    """The edits of one block.

    Args:
        edits: in the order in which they are done, of one field; of several fields in the order in which one is made of
            the other.
    """

    def __init__(self, edits: Sequence[Edit]):
        self.edits = tuple(edits)
        self._met = [_Met() for _ in self.edits]
        self._seen: dict[tuple[str, str, int | None], set[int]] = {}  # stack, kind and layer of what ran -> steps
        self._positions = Positions()
        self._by_position = any(
            e.by_position or e.where.queries is not None or e.where.keys is not None for e in self.edits
        )
        for edit in self.edits:
            edit.begin()

    # What a session asks

    def before(self, call: KernelCall, site: Site, step: int, changeable: frozenset[str]) -> Change | None:
        """See :class:`~hookattn.recording.session.Listener`."""
        found = self._edited(call, site, step)
        return None if found is None else found.before(changeable)

    def formed(self, call: KernelCall, site: Site, step: int) -> Tensor | None:
        """Likewise."""
        found = self._edited(call, site, step)
        return None if found is None else found.formed()

    def after(self, call: KernelCall, site: Site, step: int) -> Tensor | None:
        """Likewise."""
        found = self._edited(call, site, step)
        return None if found is None else found.after()

    def missed(self, site: Site, step: int, reason: str) -> None:
        """Likewise.

        Raises:
            EditError: an edit was meant for it.
        """
        for edit in self.edits:
            if edit.where.takes(site, step):
                raise EditError(f"{site.label} (step {step}): {edit!r} cannot be done here: {reason}")

    def check_met(self) -> None:
        """Whether every edit met what it was meant for, at the end of the block.

        Raises:
            EditError: one did not.
        """
        for edit, met in zip(self.edits, self._met, strict=True):
            where = edit.where
            if not met.calls and not met.elsewhere:
                raise EditError(f"{edit!r} met no attention call; {self._what_ran()}.")
            for name, wanted, found in (
                ("layer", where.layer, met.layers),
                ("step", where.step, met.steps),
                ("queries", None if met.elsewhere else where.queries, met.queries),
                ("keys", where.keys, met.keys),
            ):
                missing = [i for i in wanted if i >= 0 and i not in found] if isinstance(wanted, tuple) else []
                if missing:
                    raise EditError(f"{edit!r}: {name} {missing[0]} was in no call that it met; {self._what_ran()}.")

    def _what_ran(self) -> str:
        if not self._seen:
            return "no attention ran that can be edited"
        parts = []
        for stack, kind in dict.fromkeys((stack, kind) for stack, kind, _ in self._seen):
            layers = sorted({n for s, k, n in self._seen if (s, k) == (stack, kind) and n is not None})
            parts.append(f"{stack} {kind} with layers {_runs(layers)}")
        steps = sorted(set().union(*self._seen.values()))
        return f"what ran is {', '.join(parts)}, in steps {_runs(steps)}"

    # Which edits a call is meant by

    def _edited(self, call: KernelCall, site: Site, step: int) -> Doing | None:
        if isinstance(call.edits, Doing):
            call.edits.call = replace(call)
            return call.edits
        self._seen.setdefault((site.stack, site.kind, site.layer), set()).add(step)
        positions = self._positions.of(call, site, step) if self._by_position else None
        several = []
        for i, edit in enumerate(self.edits):
            if not edit.where.takes(site, step):
                continue
            met = self._met[i]
            met.steps.add(step)
            if site.layer is not None:
                met.layers |= {site.layer} | ({site.layer - site.layers} if site.layers is not None else set())
            part = self._part(edit, call, site, positions, met)
            if not part.empty:
                met.calls += 1
                several.append((edit, part))
        if not several:
            return None
        call.edits = found = Doing(call, site, step, several, Place.of(call), positions)
        return found

    def _part(self, edit: Edit, call: KernelCall, site: Site, positions: Here | None, met: _Met) -> Part:
        """The entries of a call that an edit is of."""
        where, s = edit.where, call.shape[3]
        place, label = Place.of(call), f"{site.label}: {edit!r}"
        batch = places_on(place.batch, where.batch, "batch", label)
        axis = place.key_heads if edit.field in ("k", "v") else place.heads
        heads = places_on(axis, where.heads, "heads", label)
        met.elsewhere |= (heads == () and axis.elsewhere) or (where.queries is not None and place.rows.elsewhere)
        rows = keys = None
        if where.queries is not None:
            assert positions is not None
            positions.check(where.queries, "queries", label)
            rows = chosen("queries", where.queries, positions.queries, False, label, positions.end)
            met.queries |= {positions.queries[i] for i in rows or ()}
        if where.keys is not None:
            assert positions is not None
            positions.check(where.keys, "keys", label)
            keys = chosen("keys", where.keys, range(s), False, label)
            met.keys |= set(keys or ())
        return Part(batch, heads, rows, keys)


def _runs(numbers: Sequence[int]) -> str:
    """``0 to 11``, or the numbers themselves where they do not follow one another."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
