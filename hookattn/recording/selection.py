"""What of a forward is kept: fields, layers, heads, queries, dtype, device. Applied before anything large is formed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..attention.functional import sink_column
from ..attention.kernel_call import DERIVED, FIELD_SPECS, FIELDS, SOURCES, TENSOR_SPECS, KernelCall, asked_for
from ..attention.normalizers import SOFTMAX, is_softmax
from ..attention.whole import Axis, Place
from ..cached import cached_property
from ..calls.layer_counts import names_layer
from ..calls.site import Site
from ..errors import SelectionError
from ..statistics.base import Statistic
from ..statistics.registry import STATISTICS, named

# Asked of the table once, and not for each of a call's tensors.
_COLUMNS = tuple(name for name, spec in TENSOR_SPECS.items() if spec.is_column)
_OF_KEY_HEADS = tuple(name for name, spec in TENSOR_SPECS.items() if spec.per_key_head)
_OF_HEADS = tuple(name for name in TENSOR_SPECS if name not in _OF_KEY_HEADS)
_OF_QUERIES = tuple(name for name, spec in TENSOR_SPECS.items() if spec.per_query)
_BROADCAST = frozenset(name for name, spec in TENSOR_SPECS.items() if spec.broadcast)


_UNNUMBERED = (
    "{0}={1}: of {2} this process has a part, and the numbers of its {0} in the whole model are not known; say them "
    "with shard=hookattn.Shard({3!r}, start=…, of=…), or trace without {0}=."
)


@dataclass(frozen=True)
class Selection:
    """What is kept of every call. What follows from it is worked out once, and traces may share one (0.5 % of a toy).

    Attributes:
        capture: fields, a subset of :data:`~hookattn.attention.kernel_call.FIELDS`.
        statistics: computed beside the kernel, see :mod:`hookattn.statistics`.
        layers: layer indices in each stack, negative ones from its end; None: all.
        heads: query heads, negative ones from the end; None: all.
        queries: a slice or indices of query positions; None: all.
        dtype: floating fields are stored in it; None: as the kernel has them.
        device: where fields are stored; None: where they are.
    """

    capture: frozenset[str]
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    queries: slice | tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    statistics: tuple[Statistic, ...] = ()

    @classmethod
    def of(
        cls,
        capture: Iterable[str | Statistic] | str | Statistic | None = None,
        layers: Any = None,
        heads: Any = None,
        queries: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Selection:
        """Checked and normalised.

        Raises:
            SelectionError: an unknown field, something that is no index, or an empty selection.
        """
        fields, statistics = _captured(capture)
        fields += [f for f, spec in FIELD_SPECS.items() if spec.kept_with in fields]
        dtype = floating(dtype)
        queries = checks.int_slice("queries", queries) if isinstance(queries, slice) else _indices("queries", queries)
        chosen = _indices("layers", layers), _indices("heads", heads)
        return cls(frozenset(fields), *chosen, queries, dtype, device_here(device), statistics)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields that are kept, in the order of all."""
        return tuple(f for f in FIELDS if f in self.capture)

    @cached_property
    def derivable(self) -> tuple[str, ...]:
        """The fields that can be derived from those that are kept, of a softmax over q·k."""
        return DERIVED if self.capture.issuperset(SOURCES) else ()

    @cached_property
    def keeps_all(self) -> bool:
        """Whether every field is kept, of all calls as they are, and nothing beside."""
        unchanged = self.dtype is None and self.device is None and not self.statistics
        return unchanged and len(self.capture) == len(FIELDS)

    def derivable_of(self, call: KernelCall) -> tuple[str, ...]:
        """The same of any call, as whoever reads a file can derive them: what else makes weights of scores has to be
        known by its name, and what else makes scores is not known at all."""
        if call.normalizer == SOFTMAX and call.is_product:
            return self.derivable
        if not call.is_product:
            return ()
        return tuple(f for f in self.derivable if f != "weights" or is_softmax(call.normalizer))

    def keeps_as_it_is(self, device: torch.device) -> bool:
        """Whether a call on a device is kept as it is: then what else was asked for follows when somebody reads it."""
        unchanged = self.dtype is None and self.device in (None, device)
        return unchanged and self.capture.issuperset(("q", "k", "v"))

    def takes_layer(self, site: Site) -> bool | None:
        """Whether a site's layer is selected; None if that isn't known until the forward is over."""
        if self.layers is None:
            return True
        if site.layer is None:
            return None
        named = {names_layer(i, site.layer, site.layers) for i in self.layers}
        return True if True in named else None if None in named else False

    def head_index(self, heads: int, where: str) -> list[int] | None:
        """The selected heads of a call that has ``heads``; None: all."""
        if self.heads is None:
            return None
        bad = [h for h in self.heads if not -heads <= h < heads]
        if bad:
            raise SelectionError(f"heads={list(self.heads)}: {where} has {heads} heads, so there is no head {bad[0]}.")
        return [h % heads for h in self.heads]

    def query_index(self, t: int, where: str) -> list[int] | slice | None:
        """The selected query rows of a call that has ``t``; None: all."""
        if self.queries is None:
            return None
        if isinstance(self.queries, slice):
            rows = range(*self.queries.indices(t))
            if not rows:
                raise SelectionError(f"queries={self.queries}: {where} has {t} queries, of which none is selected.")
            return self.queries if rows.step > 0 else list(rows)
        bad = [i for i in self.queries if not -t <= i < t]
        if bad:
            raise SelectionError(
                f"queries={list(self.queries)}: {where} has {t} queries, so there is no query {bad[0]}."
            )
        return [i % t for i in self.queries]

    def within(self, call: KernelCall, where: str) -> tuple[list[int] | None, list[int] | slice | None]:
        """The selected heads and queries of a call, by their places in it; None: all, and an empty list: none of them.

        What is selected is counted in the whole attention that a call may be a part of.

        Raises:
            SelectionError: a selected head or query is not there, or the call has parts of several batch entries.
        """
        _, h, t, _ = call.shape
        if call.piece is None and call.cuts is None:
            return self.head_index(h, where), self.query_index(t, where)
        place = Place.of(call)
        heads = None if self.heads is None else self._heads_on(place.heads, call, where)
        axis, queries = place.rows, None
        if self.queries is not None:
            if axis.first is None or axis.of is None:
                raise SelectionError(_UNNUMBERED.format("queries", self.queries, where, "T"))
            queries = self.query_index(axis.of, where)
            if not axis.whole:
                rows = range(axis.of)[queries] if isinstance(queries, slice) else queries or ()
                queries = [i - axis.first for i in rows if axis.has(i)]
        return heads, queries

    def _heads_on(self, axis: Axis, call: KernelCall, where: str) -> list[int]:
        assert self.heads is not None
        if axis.first is None and axis.elsewhere and (call.piece is None or call.piece.place("H", axis.count)):
            raise SelectionError(_UNNUMBERED.format("heads", list(self.heads), where, "H"))
        if axis.first is None:
            raise SelectionError(
                f"heads={list(self.heads)}: {where} computes some heads of one batch entry together with some of "
                "another; trace it without heads= and take them from the call with call.at(heads=…)."
            )
        if axis.of is None:  # then nothing is known of an end either
            raise SelectionError(_UNNUMBERED.format("heads", list(self.heads), where, "H"))
        return [i - axis.first for i in self.head_index(axis.of, where) or () if axis.has(i)]

    def takes_piece(self, call: KernelCall, where: str) -> bool:
        """Whether a call that is a part of an attention has any of what is selected."""
        return [] not in self.within(call, where)

    def to_json(self) -> dict[str, Any]:
        """As plain data, which is the caller's own."""
        return {key: x.copy() if isinstance(x, (list, dict)) else x for key, x in self._json.items()}

    @cached_property
    def _json(self) -> dict[str, Any]:
        q = self.queries
        statistics = {s.key: s.parameters for s in self.statistics}
        return {
            **({"statistics": statistics} if statistics else {}),
            "capture": [*asked_for(self.capture)] + [s.key for s in self.statistics],
            "layers": self.layers,
            "heads": self.heads,
            "queries": [q.start, q.stop, q.step] if isinstance(q, slice) else {"indices": q} if q is not None else None,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }


def _captured(capture: Any) -> tuple[list[str], tuple[Statistic, ...]]:
    """The fields and the statistics that ``capture=`` names."""
    if capture is None:
        return list(FIELDS), ()
    if isinstance(capture, (str, Statistic)):
        capture = (capture,)
    known = f"choose among {', '.join(FIELDS)}, and the statistics {', '.join(STATISTICS)}"
    items = checks.items_of(capture)
    if items is None:
        raise checks.wrong("capture", capture, f"a list of fields; {known}", SelectionError)
    fields: list[str] = []
    statistics: dict[str, Statistic] = {}
    for item in items:
        if isinstance(item, str) and item in FIELDS:
            fields.append(item)
            continue
        found = item if isinstance(item, Statistic) else named(item) if isinstance(item, str) else None
        if found is None and isinstance(item, str) and item in STATISTICS:
            raise SelectionError(
                f"capture={capture!r}: {item!r} has no defaults; give {STATISTICS[item].__name__}(…) "
                "of hookattn.statistics."
            )
        if found is None:
            raise SelectionError(f"capture={capture!r}: there is no field {item!r}; {known}.")
        if statistics.setdefault(found.key, found) != found:
            raise SelectionError(f"capture={capture!r}: two different statistics would be named {found.key!r}.")
    if not fields and not statistics:
        raise SelectionError(f"capture is empty: nothing would be kept; {known}.")
    return fields, tuple(statistics.values())


def _indices(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    items = tuple(checks.several_ints(name, value))
    if not items:
        raise SelectionError(f"{name}=[] selects nothing; leave it out to keep all {name}.")
    return items


def floating(dtype: Any) -> torch.dtype | None:
    """A dtype that fields can be stored in; None: none was named.

    Raises:
        SelectionError: it is no floating dtype.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise checks.wrong("dtype", dtype, "a floating torch.dtype such as torch.float16", SelectionError)


def device_here(device: Any) -> torch.device | None:
    """A device that this machine has, by its name or otherwise; None: none was named.

    Raises:
        SelectionError: there is no such device.
    """
    if device is None:
        return None
    if not isinstance(device, (str, torch.device, int)) or isinstance(device, bool):
        raise checks.wrong("device", device, "a torch.device, or its name such as 'cpu'", SelectionError)
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        shown = checks.printed(device)
        raise SelectionError(f"device={shown}: there is no such device here: {reason}") from error
    if found.type == "meta":
        raise SelectionError("device='meta': expected a device that holds values; hookattn.plan tells sizes alone.")
    return found


def restrict(call: KernelCall, heads: Sequence[int] | None, queries: Sequence[int] | slice | None) -> list[int] | None:
    """Keep the selected heads and queries of a call, in place and as views where possible.

    Returns:
        For each kept head the index of its group among the kept ``k`` and ``v``; None if no head was left out.
    """
    groups = None
    device = call.device
    if heads is not None:
        per_group = call.shape[1] // call.v.shape[1]
        wanted = sorted({h // per_group for h in heads})
        groups = [wanted.index(h // per_group) for h in heads]
        for name in _COLUMNS:
            if (x := getattr(call, name)) is not None:
                setattr(call, name, sink_column(x))  # a number for each head has no axis of queries yet
        _cut(call, _OF_HEADS, 1, _index(heads, device))
        _cut(call, _OF_KEY_HEADS, 1, _index(wanted, device))
    if queries is not None:
        _cut(call, _OF_QUERIES, 2, queries if isinstance(queries, slice) else _index(queries, device))
    return groups


def _index(positions: Sequence[int], device: torch.device) -> slice | Tensor:
    """Positions as what tensors are indexed with; made once for all tensors of a call. One alone gives a view."""
    if len(positions) == 1:
        return slice(positions[0], positions[0] + 1)
    return torch.tensor(positions, device=device)


def _cut(call: KernelCall, names: Sequence[str], dim: int, index: slice | Tensor) -> None:
    """Keep some positions of an axis of some tensors of a call; those that have the same for all positions stay."""
    for name in names:
        x = getattr(call, name)
        if isinstance(x, Tensor) and x.dim() == 4 and (x.shape[dim] > 1 or name not in _BROADCAST):
            if isinstance(index, slice):
                x = x[(slice(None),) * dim + (index,)]
            else:
                x = x.index_select(dim, index if index.device == x.device else index.to(x.device))
            setattr(call, name, x)


def grouped(call: KernelCall, groups: Sequence[int] | None) -> KernelCall:
    """A call whose heads, after a selection, can be computed with: uneven groups are spelled out."""
    if groups is None:
        return call
    h, g = call.shape[1], call.v.shape[1]
    if h % g == 0 and list(groups) == [i // (h // g) for i in range(h)]:
        return call
    index = torch.tensor(list(groups), device=call.device)
    whole = {name: x for name in _OF_KEY_HEADS if (x := getattr(call, name)) is not None}
    return replace(call, **{name: x.index_select(1, index) for name, x in whole.items()})
