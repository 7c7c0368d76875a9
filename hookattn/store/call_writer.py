"""Writes the fields of calls to a file, one call after the other, so that no more than one is in memory for it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..attention.kernel_call import FIELDS, OUTPUT_GRADIENT
from ..calls.call import Call
from ..calls.deriving import derive_field
from ..calls.fields import Derived, Place, tensor_of
from ..calls.key_history import Continued
from .links import LINKED, StoredLink, WrittenSteps
from .names import SHARED, Names, own_name
from .writer import StreamWriter

_TOGETHER = 1 << 26
"""Bytes of scores up to which the weights are derived of them; larger ones are let go, and q·kᵀ is formed anew."""


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """What the document says of where a call's tensors are.

    Attributes:
        number: of the call, from 0, in the order in which they were written.
        fields: the name of each field's tensor; None: the call has none.
        links: how a field goes on from that of an earlier call.
        scale: the name of the scale's tensor; None: it is a number.
        gradient: the name of the tensor of the output's gradient; None: there is none.
    """

    number: int
    fields: dict[str, str | None] = field(default_factory=dict)
    links: dict[str, StoredLink] = field(default_factory=dict)
    scale: str | None = None
    gradient: str | None = None


class CallWriter:
    """Writes the calls of one trace, and what they have in common once.

    Args:
        writer: the file.
        linked: whether keys and values may go on from those of an earlier call; else each call has them whole.
    """

    def __init__(self, writer: StreamWriter, linked: bool = True):
        self.steps = WrittenSteps()
        self._writer, self._linked = writer, linked
        self._names, self._count = Names(), 0

    def write(self, call: Call, left_out: Container[str] = ()) -> WrittenCall:
        """Write the fields of a call, what is derived as well.

        Args:
            call: the call.
            left_out: fields that are not written.

        Raises:
            TraceTooLargeError: there is no memory to derive one of them. TraceWriteError: as :class:`StreamWriter`.
        """
        number, self._count = self._count, self._count + 1
        of_scale = stored_scale(call)
        done = WrittenCall(number, scale=None if of_scale is None else own_name(number, call.site.path, "scale"))
        if of_scale is not None and done.scale is not None:
            self._writer.add(done.scale, of_scale)
        scores = None
        for name in (*FIELDS, *(f for f in call.fields if f not in FIELDS)):
            if name not in call.fields or name in left_out:
                continue
            place = call.fields[name]
            if isinstance(place, Derived):
                scores = self._write_derived(done, call, name, scores)
            elif place is None:
                done.fields[name] = None
            elif name in SHARED:
                done.fields[name] = self._write_shared(name, place)
            elif not (isinstance(place, Continued) and self._write_continued(done, call, name, place)):
                done.fields[name] = self._write_own(done, call, name, _content(place))
        return self.write_gradient(call, done)

    def write_gradient(self, call: Call, done: WrittenCall) -> WrittenCall:
        """Write the gradient of a call's output, if it has come by now; returns what the document says then."""
        place = None if call.gradient is None else call.gradient.there
        if place is None:
            return done
        return replace(done, gradient=self._write_own(done, call, OUTPUT_GRADIENT.name, _content(place)))

    def _write_own(self, done: WrittenCall, call: Call, name: str, x: Tensor) -> str:
        written = own_name(done.number, call.site.path, name)
        self._writer.add(written, x)
        return written

    def _write_derived(self, done: WrittenCall, call: Call, name: str, scores: Tensor | None) -> Tensor | None:
        """Write what follows from others; returns the scores, as long as they are to be held."""
        made = _derived(call, name, scores)
        done.fields[name] = self._write_own(done, call, name, made)
        return made if name == "scores" and made.nbytes <= _TOGETHER else None

    def _write_shared(self, name: str, place: Place) -> str:
        known = self._names.known(name, place)
        if known is not None:
            return known
        content = _content(place)
        written, new = self._names.name(name, place, content)
        if new:
            self._writer.add(written, content)
        return written

    def _write_continued(self, done: WrittenCall, call: Call, name: str, place: Continued) -> bool:
        """Write what a step has itself; False: it has to be written whole."""
        if not self._linked or name not in LINKED:
            return False
        found = self.steps.linked(place, done.number)
        if found is None:
            self.steps.whole(place, done.number)
            return False
        before, link = found
        own = self._write_own(done, call, name, place.history.own(place.step)) if link.count else None
        done.links[name] = StoredLink(before, link.batch, link.dropped, link.at, own)
        return True


def stored_scale(call: Call) -> Tensor | None:
    """The scale of a call as a tensor, where it is one, or where it is infinite, undefined or beyond float32, which is
    no number of the document; None: the document says it."""
    scale = call.scale
    if scale is None or isinstance(scale, Tensor):
        return scale
    return None if abs(scale) <= torch.finfo(torch.float32).max else torch.tensor(scale, dtype=torch.float64)


def _content(place: Place) -> Tensor:
    found = tensor_of(place)
    assert found is not None
    return found


def _derived(call: Call, name: str, scores: Tensor | None) -> Tensor:
    """A field that follows from others. It is not put with what is held for readers, as nobody may read it.

    Args:
        call: the call.
        name: ``"scores"`` or ``"weights"``.
        scores: those of the call, derived; None: they are not at hand.
    """
    found = call.made.get(name)
    if isinstance(found, Tensor):
        return found
    # On a GPU one kernel makes the weights of q and k, and not to the same bit.
    if scores is not None and scores.device == torch.device("cpu"):
        call = replace(call, fields={**call.fields, "scores": scores})
    return derive_field(call, name)
