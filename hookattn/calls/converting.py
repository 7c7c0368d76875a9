"""A trace on another device, or in another dtype: :meth:`hookattn.Trace.to`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Size, Tensor

from .call import Call
from .deriving import shape_and_dtype
from .fields import Derived, EditedRows, Field, InFile, PartOf, Place, dtype_of, shape_of
from .key_history import Continued, KeyHistory, Link, joined
from .mask_rule import MaskRule
from .output_gradient import OutputGradient
from .trace_data import TraceData

Whole = TypeVar("Whole", bound=TraceData)

_NAME = "converted"
"""What a converted field is called as a file of one tensor."""
_Slice = slice  # which in a class with a method of that name is the method


@dataclass(frozen=True)
class Target:
    """Where tensors go to.

    Attributes:
        device: the device; None: where each is.
        dtype: of floating tensors; None: as each has it.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def dtype_from(self, dtype: torch.dtype) -> torch.dtype:
        """What becomes of a dtype."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def of(self, x: Tensor) -> Tensor:
        """The tensor there; itself, where it is there already."""
        return x.to(device=self.device or x.device, dtype=self.dtype_from(x.dtype))


def converted(trace: Whole, device: torch.device | None, dtype: torch.dtype | None) -> Whole:
    """See :meth:`hookattn.Trace.to`.

    Args:
        trace: is left as it is.
        device: None: where each tensor is.
        dtype: a floating one; None: as each tensor has it.
    """
    conversion = _Conversion(Target(device, dtype))
    made = replace(
        trace,
        calls=[conversion.call(call) for call in trace.calls],
        output=None,  # it is the model's, and stays with the trace that it was made for
        notes=list(trace.notes),
        selection=_selection(trace.selection, dtype),
        path=None,
    )
    return made


def _selection(selection: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    # Where `dtype=` of a trace is said, so that a reader finds what the fields are in at one place.
    return {**selection, **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})}


class _Conversion:
    """One conversion of a whole trace: what calls share is converted once."""

    def __init__(self, target: Target):
        self.target = target
        self._done: dict[
            int, tuple[Any, Any]
        ] = {}  # with what it was made of, whose identity is its own while it lives

    def call(self, call: Call) -> Call:
        _ = call.certificate  # measured on the numbers that the kernel had, and not on what these are rounded to
        made = replace(call, fields={}, beside={})
        made.fields = {name: self._field(call, name, place) for name, place in call.fields.items()}
        if self.target.dtype is None:
            made.beside = {name: self._field(call, name, place) for name, place in call.beside.items()}
        else:
            # What follows from others follows from what these were, as it does with `dtype=` of a trace.
            lacking = [name for name in call.derivable if name not in call.fields]
            made.fields |= {name: self._derived(call, name) for name in lacking}
        if isinstance(call.scale, Tensor):
            made.scale = call.scale.to(self.target.device or call.scale.device)
        if call.gradient is not None:
            whole = call.gradient
            made.gradient = ConvertedGradient(
                why_none=whole.why_none, passes=whole.passes, whole=whole, target=self.target
            )
        return made

    def _field(self, call: Call, name: str, place: Field) -> Field:
        if place is None:
            return None
        if isinstance(place, Derived):
            return place if self.target.dtype is None else self._derived(call, name)
        key = id(place)
        if key not in self._done:
            self._done[key] = place, self._place(place)
        return self._done[key][1]  # type: ignore[no-any-return]

    def _derived(self, call: Call, name: str) -> Place:
        if any(_is_read(place) for place in (*call.fields.values(), *call.beside.values())):
            return InFile(ConvertedField(_OfCall(call, name), self.target), _NAME)
        return self.target.of(call.derived(name))

    def _place(self, place: Place) -> Place:
        target = self.target
        if isinstance(place, MaskRule):
            return self._mask_rule(place)
        if isinstance(place, Continued):
            return Continued(self._history(place.history), place.step)
        if _is_read(place):
            return InFile(ConvertedField(place, target), _NAME)
        if isinstance(place, EditedRows) and target.dtype is None and isinstance(place.of, Call):
            return replace(place, of=self.call(place.of), rows=target.of(place.rows))
        return target.of(place if isinstance(place, Tensor) else place())

    def _mask_rule(self, rule: MaskRule) -> MaskRule:
        device = self.target.device
        if device is None or device == rule.device:
            return rule
        given = None if rule.given is None else rule.given.to(device)
        rows = None if rule.rows is None else rule.rows.to(device)
        return MaskRule(given, rule.t, rule.s, rule.diagonal, device, rows)

    def _history(self, history: KeyHistory) -> KeyHistory:
        key = id(history)
        if key not in self._done:
            made: KeyHistory = ConvertedHistory(history, self.target)
            if type(history) is KeyHistory:  # it is in memory
                links = [(link, made.own(i)) for i in range(1, len(history)) if (link := history.link(i)) is not None]
                made = joined(made.keys(0), links)
            self._done[key] = history, made
        return self._done[key][1]  # type: ignore[no-any-return]


def _is_read(place: Field) -> bool:
    """Whether a field is read from somewhere when it is asked for, and so is converted then."""
    if isinstance(place, PartOf):
        return _is_read(place.whole)
    if isinstance(place, Continued):
        return type(place.history) is not KeyHistory
    return isinstance(place, InFile)


@dataclass(frozen=True, slots=True, eq=False)
class _OfCall:
    """A field that follows from others of a call, as one that is read."""

    call: Call
    name: str

    def __call__(self) -> Tensor:
        return self.call.derived(self.name)


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedField:
    """A field that is brought elsewhere each time it is read, as a file of one tensor
    (:class:`~hookattn.calls.fields.File`).

    Attributes:
        whole: where it is read.
        target: where it goes to.
    """

    whole: Place | _OfCall
    target: Target

    def tensor(self, name: str) -> Tensor:
        """The whole of it; the caller may write to it."""
        found = self.whole if isinstance(self.whole, Tensor) else self.whole()
        made = self.target.of(found)
        # What is derived is held for the next reader.
        return made.clone() if made is found and isinstance(self.whole, _OfCall) else made

    def slice(self, name: str, index: tuple[_Slice, ...]) -> Tensor:
        """What ``index`` says of its first axes; little more is read, or derived."""
        if not isinstance(self.whole, _OfCall):
            return self.target.of(PartOf(self.whole, index)())
        shape = self.shape(name)
        axes = [None if i == slice(None) or n == 1 else list(range(n)[i]) for i, n in zip(index, shape, strict=False)]
        batch, heads, queries = (*axes, None, None, None)[:3]
        call = self.whole.call
        if [] in (batch, heads, queries):
            return self.tensor(name)[index]
        if heads is not None and call.heads is not None:
            heads = [call.heads[i] for i in heads]
        if queries is not None and call.queries is not None:
            queries = [call.queries[i] for i in queries]
        part = call.at(batch=batch, heads=heads, queries=queries).derived(self.whole.name)
        return self.target.of(part[(slice(None),) * 3 + tuple(index[3:])])

    def shape(self, name: str) -> Size:
        """Its shape; nothing is read or derived for it."""
        if isinstance(self.whole, _OfCall):
            return shape_and_dtype(self.whole.call, self.whole.name)[0]
        return shape_of(self.whole)

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype there; nothing is read or derived for it."""
        if isinstance(self.whole, _OfCall):
            return self.target.dtype_from(shape_and_dtype(self.whole.call, self.whole.name)[1])
        return self.target.dtype_from(dtype_of(self.whole))


class ConvertedHistory(KeyHistory):
    """Keys, or values, of a generation that are brought elsewhere each time they are read.

    Args:
        whole: where they are read.
        target: where they go to.
    """

    def __init__(self, whole: KeyHistory, target: Target):
        self.whole, self.target = whole, target

    def __len__(self) -> int:
        return len(self.whole)

    def link(self, step: int) -> Link | None:
        """See :meth:`KeyHistory.link`."""
        return self.whole.link(step)

    def own(self, step: int) -> Tensor:
        """See :meth:`KeyHistory.own`."""
        return self.target.of(self.whole.own(step))

    def keys(self, step: int) -> Tensor:
        """See :meth:`KeyHistory.keys`."""
        return self.target.of(self.whole.keys(step))

    def shape(self, step: int) -> Size:
        """See :meth:`KeyHistory.shape`."""
        return self.whole.shape(step)

    @property
    def dtype(self) -> torch.dtype:
        """That of the keys, there."""
        return self.target.dtype_from(self.whole.dtype)


@dataclass(eq=False)
class ConvertedGradient(OutputGradient):
    """The gradient of an output elsewhere, now and after further backward passes.

    Attributes:
        whole: that gradient.
        target: where it goes to.
    """

    whole: OutputGradient | None = None
    target: Target = Target()

    @property
    def there(self) -> Place | None:
        """Where it is; None: there is none."""
        found = None if self.whole is None else self.whole.there
        return None if found is None else InFile(ConvertedField(found, self.target), _NAME)
