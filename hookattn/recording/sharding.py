"""Which part of a whole attention each call of a running trace is, where several processes compute a part each.

What the caller says (``shard=``) counts first; then what the tensors of the call say, where they are distributed; then
what the parameters under its site say. It is looked up once for each site and shape, and only in a process group.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from .. import checks
from ..attention.kernel_call import KernelCall
from ..attention.pieces import Cut
from ..calls.call import Call
from ..calls.extents import extents_of
from ..calls.shard import Shard
from ..calls.site import Site
from ..errors import InputError, SelectionError
from ..models.discovery import WatchPlan
from ..models.sharding import Heads, has_distributed_parameters, shard_of_heads
from ..torch_internals.process_group import world
from .distributed import as_here, cuts_of, is_distributed
from .layouts import fits, own_spelling

_ORDER = "HTB"
_WORDS = {"H": "heads", "T": "query rows", "B": "batch entries"}


class Said:
    """What the caller says of shards.

    Args:
        given: a Shard, several of different axes, or a mapping of module paths (or patterns with ``*``) to these.
        paths: of all modules of the model.

    Raises:
        InputError: something else. SelectionError: the model has no module at a path.
    """

    def __init__(self, given: Any, paths: Collection[str]):
        self._given: dict[str, tuple[Shard, ...]] = {}
        self._used: set[str] = set()
        if not isinstance(given, Mapping):
            self._given["*"] = _several(given)
            return
        for said, shards in given.items():
            if not isinstance(said, str):
                raise checks.wrong("shard", given, _EXPECTED, InputError)
            path = own_spelling(said, paths)
            if path is None:
                raise SelectionError(
                    f"shard={{{said!r}: …}}: the model has no module at {checks.printed(said)} (call.site.path says "
                    "where a call was)."
                )
            self._given[path] = _several(shards)

    def of(self, path: str) -> tuple[Shard, ...]:
        """What is said of the calls at a path."""
        key = path if path in self._given else next((key for key in self._given if fits(key, path)), None)
        if key is None:
            return ()
        self._used.add(key)
        return self._given[key]

    def unused(self) -> list[str]:
        """What was said of no call: paths."""
        return [key for key in self._given if key not in self._used]


_EXPECTED = "a hookattn.Shard, several of different axes, or a mapping of module paths to these"


def _several(given: Any) -> tuple[Shard, ...]:
    if isinstance(given, Shard):
        return (given,)
    items = checks.items_of(given)
    if not items or not all(isinstance(x, Shard) for x in items) or len({x.axis for x in items}) < len(items):
        raise checks.wrong("shard", given, _EXPECTED, InputError)
    return tuple(items)


class _Known(NamedTuple):
    shards: tuple[Shard, ...]
    cuts: Mapping[str, Cut] | None
    note: str


class Sharding:
    """Looks up which part of the whole each call of one trace is.

    Attributes:
        met: the shards of the calls that ran, those that nothing was kept of too.
    """

    def __init__(self, plan: WatchPlan, said: Said | None):
        self._plan, self._said = plan, said
        self._by_parameters = world() is not None and has_distributed_parameters(plan.model)
        self._known: dict[Any, _Known] = {}
        self.met: dict[tuple[Shard, ...], None] = {}

    @property
    def may_meet_any(self) -> bool:
        """Whether any call may be a part of something: no sooner than one has run it is known whether one is."""
        return self._said is not None or self._by_parameters

    def unused(self) -> list[str]:
        """What the caller said of no call, in words."""
        unused = [] if self._said is None else self._said.unused()
        return [f"shard= names {path!r}, where no attention was recorded" for path in unused]

    def find(self, call: KernelCall, site: Site) -> None:
        """Say of a call which part it has (``call.cuts``)."""
        if call.cuts is None:
            call.cuts = self._of(call, site, ()).cuts

    def here(self, call: KernelCall, site: Site) -> tuple[KernelCall, tuple[Shard, ...]]:
        """A call as this process has it, with its cuts; and which part of the whole that is.

        Raises:
            Unreadable: its tensors lie over several processes, and what is here is no attention by itself.
            SelectionError: what the caller says of it cannot be.
        """
        own: tuple[Shard, ...] = ()
        if is_distributed(call.v):
            call, found = as_here(call)
            own = tuple(found)
        known = self._of(call, site, own)
        call.cuts = known.cuts
        if known.note and known.note not in call.notes:
            call.notes = [*call.notes, known.note]
        if known.shards:
            self.met[known.shards] = None
        return call, known.shards

    def _of(self, call: KernelCall, site: Site, own: tuple[Shard, ...]) -> _Known:
        b, h, t, _ = call.shape
        some = next((x for x in (call.k, call.v) if x is not None), None)
        g = h if some is None else some.shape[1]
        widths = tuple(None if x is None else x.shape[-1] for x in (call.q, call.v))
        of = site.path, own, b, h, t, g, widths
        found = self._known.get(of)
        if found is None:
            found = self._known[of] = self._look(site, own, Heads(h, g, *widths), b, t, call.piece is None)
        return found

    def _look(self, site: Site, own: tuple[Shard, ...], heads: Heads, b: int, t: int, alone: bool) -> _Known:
        said = () if self._said is None else self._said.of(site.path)
        note = ""
        by_axis = {shard.axis: shard for shard in own}
        named = {shard.axis for shard in said}
        if self._by_parameters and "H" not in by_axis and "H" not in named and not own:
            told = shard_of_heads(self._plan.unwrapped, site.path, heads)
            note = told.note
            if told.shard is not None:
                by_axis["H"] = told.shard
        for shard in said:
            if alone:
                _check(shard, site, {"B": b, "H": heads.h, "T": t}[shard.axis], heads.g)
            by_axis[shard.axis] = shard
        shards = tuple(by_axis[x] for x in _ORDER if x in by_axis)
        return _Known(shards, cuts_of(list(shards)), note)


def _check(shard: Shard, site: Site, extent: int, groups: int) -> None:
    """Whether a call can be the part that the caller says it is.

    Raises:
        SelectionError: it cannot.
    """
    several = [(_WORDS[shard.axis], shard.start, shard.of, extent)]
    if shard.axis == "H":
        several.append(("key heads", shard.group_start, shard.groups_of, groups))
    for what, start, of, n in several:
        if of is not None and (start or 0) + n > of:
            begins = "" if start is None else f" from {start} on"
            raise SelectionError(
                f"shard=: {site.label} has {n} {what} in this process, which cannot be those{begins} of {of}; say "
                "where its own begin (start=) and how many the whole model has (of=)."
            )


def numbered(call: Call) -> None:
    """Say of a call of which nothing was selected which heads and query rows of the whole it has."""
    for shard in call.shards:
        if shard.start is None:
            continue
        if shard.axis == "H" and call.heads is None and (h := extents_of(call, "H").h) is not None:
            call.heads = tuple(range(shard.start, shard.start + h))
        if shard.axis == "T" and call.queries is None and (t := extents_of(call, "T").t) is not None:
            call.queries, call.of_queries = tuple(range(shard.start, shard.start + t)), shard.of


def sharding_of(plan: WatchPlan, given: Any) -> Sharding | None:
    """What looks up shards for one trace; None: there are none.

    Args:
        plan: of the trace.
        given: what the caller says; None: nothing.

    Raises: as :class:`Said`.
    """
    said = None if given is None else Said(given, plan.paths.values())
    return Sharding(plan, said) if said is not None or world() is not None else None
