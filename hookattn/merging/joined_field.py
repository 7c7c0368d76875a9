"""A field of a call whose parts are in the calls of several ranks: put together when it is read, of the parts alone
that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor

from ..attention.functional import sink_column, with_four_axes
from ..attention.kernel_call import FIELD_SPECS
from ..calls.call import Call
from ..calls.deriving import derive_field, shape_and_dtype
from ..calls.fields import DERIVED, Derived, Field, InFile, PartOf, Place, dtype_of, shape_of, tensor_of
from ..calls.key_history import Continued, KeyHistory, Link
from ..calls.output_gradient import OutputGradient

NAME = "whole"
"""What a joined field is called as a file of one tensor."""
_Slice = slice  # which in a class with a method of that name is the method


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What one call has of a field.

    Attributes:
        call: the call.
        name: of the field.
        place: where it is in the call; None: it has none, which counts as zeros.
        shape: its own, with all its axes: B H T S, and so on.
        dtype: its own.
    """

    call: Call
    name: str
    place: Field
    shape: Size
    dtype: torch.dtype

    @classmethod
    def of(cls, call: Call, name: str, held: str = "fields") -> Source:
        """That of a field that the call has, or that follows from its others; nothing is read for it.

        Args:
            call, name: which.
            held: ``beside`` for a field that was not asked for.
        """
        place: Field = getattr(call, held).get(name, DERIVED)
        if place is None:
            return cls(call, name, None, Size(()), torch.float32)
        if not isinstance(place, Derived):
            return cls.at(call, name, place)
        return cls(call, name, place, *shape_and_dtype(call, name))

    @classmethod
    def at(cls, call: Call, name: str, place: Place) -> Source:
        """That of a field that is at a place of its own: the gradient of the output, the scale."""
        return cls(call, name, place, _all_axes(name, shape_of(place)), dtype_of(place))

    @property
    def own_axes(self) -> int:
        """How many axes the field has where it is."""
        return 4 if self.place is None or isinstance(self.place, Derived) else len(shape_of(self.place))

    def by_head(self) -> Source:
        """The same of sinks that are a number for each head, with that axis alone."""
        return replace(self, shape=self.shape[1:2])

    def read(self, index: Sequence[slice]) -> Tensor:
        """What ``index`` says of each of its axes; an axis of size 1 is read whole."""
        index = tuple(slice(None) if n == 1 else i for i, n in zip(index, self.shape, strict=True))
        if isinstance(self.place, Derived):
            return self._derived(index)
        assert self.place is not None
        if self.own_axes == len(self.shape):
            return PartOf(self.place, index)()
        whole = tensor_of(self.place)
        assert whole is not None
        return (sink_column(whole) if self.name == "sinks" else with_four_axes(whole))[index]

    def _derived(self, index: tuple[slice, ...]) -> Tensor:
        # Of the call the part alone is derived.
        numbers = [None if i == slice(None) else range(n)[i] for i, n in zip(index, self.shape, strict=True)]
        batch, heads, queries = numbers[:3]
        call = self.call
        if heads is not None:
            heads = [h if call.heads is None else call.heads[h] for h in heads]  # type: ignore[assignment]
        if queries is not None:
            queries = [t if call.queries is None else call.queries[t] for t in queries]  # type: ignore[assignment]
        return derive_field(call.at(heads=heads, queries=queries, batch=batch), self.name)[..., index[3]]


def _has_fewer_axes(name: str) -> bool:
    """Whether a field may have fewer axes than it has letters."""
    return name == "scale" or (name in FIELD_SPECS and FIELD_SPECS[name].broadcast)


def _all_axes(name: str, shape: Size) -> Size:
    if name == "sinks" and len(shape) == 1:
        return Size((1, shape[0], 1, 1))
    return Size((1,) * (4 - len(shape)) + tuple(shape)) if _has_fewer_axes(name) else shape


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some positions, along the axis that is put together, of what one call has.

    Attributes:
        source: what that is.
        first: the first of these positions in the source.
        count: how many they are.
    """

    source: Source
    first: int
    count: int


@dataclass(eq=False)
class JoinedField:
    """A field of several calls, as a file of one tensor (:class:`~hookattn.calls.fields.File`).

    Attributes:
        pieces: in their order along the axis; or, where they are added up, what is added.
        dim: the axis; None: the pieces are added up.
        whole: the shape of the field.
    """

    pieces: Sequence[Piece]
    dim: int | None
    whole: Size

    def shape(self, name: str) -> Size:
        """Its shape; nothing is read for it."""
        return self.whole

    def dtype(self, name: str) -> torch.dtype:
        """That of the first piece that is there."""
        return next(p.source.dtype for p in self.pieces if p.source.place is not None)

    def tensor(self, name: str) -> Tensor:
        """The whole field."""
        return self.slice(name, ())

    def slice(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """What ``index`` says of its first axes; of the pieces no more is read than that."""
        full = (*index, *[slice(None)] * (len(self.whole) - len(index)))
        if self.dim is None:
            added = [self._read(piece, full) for piece in self.pieces]
            return torch.stack([x.to(added[0].device) for x in added]).sum(0)
        wanted = range(*full[self.dim].indices(self.whole[self.dim]))
        found: list[Tensor] = []
        start = 0
        for piece in self.pieces:
            own = _within(wanted, start, start + piece.count)
            if own:
                shift = piece.first - start
                local = slice(own[0] + shift, own[-1] + shift + 1, own.step)
                found.append(self._read(piece, (*full[: self.dim], local, *full[self.dim + 1 :]), len(own)))
            start += piece.count
        if not found:  # nothing is asked for
            counts = [len(range(*i.indices(n))) for i, n in zip(full, self.whole, strict=True)]
            return torch.empty(counts, dtype=self.dtype(name))
        return found[0] if len(found) == 1 else torch.cat([x.to(found[0].device) for x in found], self.dim)

    def _read(self, piece: Piece, index: tuple[_Slice, ...], along: int = 0) -> Tensor:
        counts = [len(range(*i.indices(n))) for i, n in zip(index, self.whole, strict=True)]
        if self.dim is not None:
            counts[self.dim] = along
        if piece.source.place is None:
            return torch.zeros(counts, dtype=self.dtype(NAME))
        x = piece.source.read(index)
        return x.expand(counts) if list(x.shape) != counts else x


def _within(wanted: range, start: int, stop: int) -> range:
    """Those from ``start`` to before ``stop`` of evenly spaced positions that go up."""
    first = max(0, -(-(start - wanted.start) // wanted.step))
    end = max(first, -(-(stop - wanted.start) // wanted.step))
    return wanted[first:end]


class JoinedHistory(KeyHistory):
    """The keys, or values, of a generation, of which each rank has some key heads, so that what steps have in common is
    written once.

    Args:
        pieces: the history of each rank, and which of its key heads are taken.
    """

    def __init__(self, pieces: Sequence[tuple[KeyHistory, slice]]):
        self.pieces = list(pieces)

    def __len__(self) -> int:
        return min(len(history) for history, _ in self.pieces)

    def link(self, step: int) -> Link | None:
        """See :meth:`KeyHistory.link`: that of all ranks; None: they differ, and so the step does not go on."""
        links = [history.link(step) for history, _ in self.pieces]
        return links[0] if all(link == links[0] for link in links) else None

    def own(self, step: int) -> Tensor:
        """See :meth:`KeyHistory.own`."""
        return torch.cat([history.own(step)[:, heads] for history, heads in self.pieces], 1)

    def keys(self, step: int) -> Tensor:
        """See :meth:`KeyHistory.keys`."""
        return torch.cat([history.keys(step)[:, heads] for history, heads in self.pieces], 1)

    def shape(self, step: int) -> Size:
        """See :meth:`KeyHistory.shape`."""
        b, _, s, d = self.pieces[0][0].shape(step)
        return Size((b, sum(heads.stop - heads.start for _, heads in self.pieces), s, d))

    @property
    def dtype(self) -> torch.dtype:
        """That of the keys."""
        return self.pieces[0][0].dtype


class JoinedHistories:
    """Makes one history of the same histories, whichever step is asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, int, int], ...], JoinedHistory] = {}

    def take(self, pieces: Sequence[Piece]) -> Place | None:
        """Where the keys are that several ranks have parts of; None: they are no steps of histories."""
        places = [piece.source.place for piece in pieces]
        steps = [place for place in places if isinstance(place, Continued)]
        if len(steps) < len(places) or len({place.step for place in steps}) > 1:
            return None
        key = tuple((id(s.history), p.first, p.count) for s, p in zip(steps, pieces, strict=True))
        if key not in self._made:
            parts = [(s.history, slice(p.first, p.first + p.count)) for s, p in zip(steps, pieces, strict=True)]
            self._made[key] = JoinedHistory(parts)
        history, step = self._made[key], steps[0].step
        alike = len({s.history.shape(step)[2] for s in steps}) == 1
        return Continued(history, step) if alike else None


@dataclass(eq=False)
class JoinedGradient(OutputGradient):
    """The gradient of the output of a call that is put together, now and after further backward passes.

    Attributes:
        calls: the parts.
        dim: the axis that they are put together along.
    """

    calls: Sequence[Call] = ()
    dim: int = 1

    @property
    def there(self) -> Place | None:
        """Where it is; None: there is none, or none of some part."""
        places = [None if c.gradient is None else c.gradient.there for c in self.calls]
        sources = [Source.at(c, "output_grad", p) for c, p in zip(self.calls, places, strict=True) if p is not None]
        if len(sources) < len(places):
            return None
        pieces = [Piece(source, 0, source.shape[self.dim]) for source in sources]
        whole = list(sources[0].shape)
        whole[self.dim] = sum(piece.count for piece in pieces)
        return InFile(JoinedField(pieces, self.dim, Size(whole)), NAME)
