"""A trace made small enough for a page: some fields as 8-bit codes, the rest as 16-bit floats, some fields left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..attention.kernel_call import DERIVED, FIELD_SPECS, FIELDS
from ..calls.call import Call
from ..calls.deriving import shape_and_dtype
from ..calls.extents import extents_of
from ..calls.fields import Field, Later
from ..errors import FieldNotCaptured, PageTooLargeError, SelectionError
from ..traces import Trace
from .page_codes import SQRT8, SQRT8_LESS, STEPS8, follow_weights, followed, from_steps8, half_floats, sqrt8, steps8

ROOM = 4_000_000
"""Bytes of data that a page takes unasked: with base64 and the viewer, six million."""
LIMIT = 180_000_000
"""Bytes of data that a page takes at the most: 240 million in base64, half of the longest text a browser holds."""

_OF_WEIGHTS, _OF_SCORES = (
    tuple(x for x in FIELD_SPECS[name].derived_from if x not in DERIVED) for name in ("weights", "scores")
)
GROUPS = (("weights", *_OF_WEIGHTS), ("applied",), _OF_SCORES, ("scores",), ("v",), ("output",))
"""What is worth most first. What is in one group is of no use alone."""

_WIDTHS = {"weights": 1, "applied": 1, "mask": 1}
# Of q and k as codes gzip leaves so much, and of the weights, once what follows from these is taken off, so much less.
_OF_STEPS, _OFF_WEIGHTS = 0.75, 0.75
# A mask is mostly long runs, which gzip leaves next to nothing of.
_MASK_SHARE = 8


@dataclass
class Narrowed:
    """A trace for a page, and how it differs from the one it was made of.

    Attributes:
        trace: its fields are computed when they are read.
        coding: ``(call, field)`` → ``{"kind", "error", …}``, by the call's place in the trace; complete once every
            field was read, as the error is measured then. The kinds are those of :mod:`.page_codes`.
        rounded: field → the largest absolute error of its 16-bit floats, likewise; exact ones are not in it.
        left_out: fields of the trace that are not in the page.
        in_steps: whether q and k are codes, and the weights what these leave open, as 16 bits have no room.
        score_errors: of each call whose scores follow from such codes, how far these are off at the most, and the mean
            square of it.
    """

    trace: Trace
    coding: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    rounded: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    in_steps: bool = False
    score_errors: list[tuple[float, float]] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What a reader of the page has to know."""
        made = []
        for fields in (("weights", "applied"), ("q",), ("k",)):
            errors = [entry["error"] for (_, name), entry in self.coding.items() if name in fields]
            if errors:
                said = "the weights" if "weights" in fields else fields[0]
                made.append(f"This page holds {said} as 8-bit codes: off by {max(errors):.1e} at the most.")
        if self.score_errors:
            worst, level = max(e for e, _ in self.score_errors), sum(e for _, e in self.score_errors)
            made.append(
                f"Scores follow from these q and k: off by {(level / len(self.score_errors)) ** 0.5:.1e} (root "
                f"mean square), {worst:.1e} at the most. The weights are not made of them."
            )
        if self.rounded:
            said = ", ".join(f"{name} by {error:.1e}" for name, error in self.rounded.items())
            made.append(f"This page holds 16-bit floats: rounded, at the most, are {said}.")
        if self.left_out:
            said = ", ".join(self.left_out)
            made.append(f"This page leaves out {said} for its size; `hookattn view` shows all of a trace file.")
        return made


def narrowed(trace: Trace, fields: Sequence[str] | None = None, limit: int = LIMIT) -> Narrowed:
    """The trace as it goes into a page: as it is where it is small, else narrowed, and without what has no room.

    Args:
        trace: any; it stays as it is, and none of its large tensors is read before the page's size is known.
        fields: what to keep; None: as much as there is room for, the weights and the mask in any case.
        limit: bytes of data that are too many.

    Raises:
        PageTooLargeError: even so it is too large; says how large, and what to do.
        FieldNotCaptured: a field of ``fields`` that no call has.
        SelectionError: a field of ``fields`` that there is not.
    """
    if fields is None and sum(_bytes_of(call, f) for call in trace for f in call.fields) <= ROOM:
        return Narrowed(trace)
    there = [f for f in FIELDS if any(call.has(f) for call in trace)]
    if fields is None:
        kept, in_steps = _fields_that_fit(trace, there)
    else:
        kept, in_steps = _fields_asked_for(trace, there, fields), False
    held = [*kept, *dict.fromkeys(f for call in trace for f in call.fields if f not in FIELDS)]
    size = sum(_bytes_of(call, f, narrow=True) for call in trace for f in held if call.has(f))
    if size > limit:
        raise PageTooLargeError(
            f"a page of this trace would take {size * 4 / 3 / 1e6:,.0f} MB for {', '.join(held)}, and at most "
            f"{limit * 4 / 3 / 1e6:,.0f} MB fit. `hookattn view FILE` (or hookattn.render.serve) shows a trace of any "
            "size, as it reads only what is looked at; or make a page of a part: trace.select(layer=…, step=…), or a "
            "trace of fewer heads or queries."
        )
    made = Narrowed(trace, in_steps=in_steps)
    lost = [f for f in there if f not in kept and not _follows(trace, f, kept)]
    made.left_out = tuple(f for f in lost if any(call.fields.get(f, ...) is not None for call in trace))
    made.trace = replace(trace, calls=[_narrowed_call(call, i, kept, made) for i, call in enumerate(trace)])
    return made


def _fields_asked_for(trace: Trace, there: Sequence[str], fields: Sequence[str]) -> list[str]:
    known = f"a tuple of some of {', '.join(FIELDS)}"
    asked = fields
    fields = checks.items_of(fields) or ()
    if not fields or any(not isinstance(f, str) or f not in FIELDS for f in fields):
        raise checks.wrong("fields", asked, known, SelectionError)
    for f in fields:
        if f not in there:
            raise FieldNotCaptured(
                f"{f!r} was captured of no call of this trace, which has {', '.join(there) or 'no fields'}; trace "
                f"again with {f!r} in capture=, or leave it out of fields=."
            )
    # What no call has any of (bias, sinks) costs nothing, and scores and weights follow only if that is known.
    return [f for f in there if f in fields or not any(_bytes_of(call, f) for call in trace if call.has(f))]


def _fields_that_fit(trace: Trace, there: Sequence[str]) -> tuple[list[str], bool]:
    """The fields that have room, and whether q and k have it as codes alone."""
    # A group is taken whole or not at all, and the first in any case. After one that has no room a smaller may fit.
    kept: list[str] = []
    left, in_steps = float(ROOM), False
    for group in GROUPS:
        wanted = [f for f in group if f in there and not _follows(trace, f, kept)]
        sizes = {f: sum(_bytes_of(call, f, narrow=True) for call in trace if call.has(f)) for f in wanted}
        size: float = sum(sizes.values())
        if group == _OF_SCORES and size > left and _in_steps(trace, [*kept, *wanted]):
            weights = sum(_bytes_of(call, "weights", narrow=True) for call in trace)
            size -= (1 - _OF_STEPS / 2) * (sizes["q"] + sizes["k"]) + _OFF_WEIGHTS * weights
            size = max(size, 0.0)
            in_steps = size <= left
        if size <= left or (wanted and not kept):
            kept += wanted
            left -= size
    return [f for f in FIELDS if f in kept], in_steps


def _in_steps(trace: Trace, kept: Sequence[str]) -> bool:
    """Whether q and k are worth their codes: the weights of all calls are kept, and follow from them."""
    return {"q", "k", "weights"} <= {*kept} and all(
        call.has("q") and "weights" in _derivable(call, kept) and follow_weights(call) for call in trace
    )


def _follows(trace: Trace, name: str, kept: Iterable[str]) -> bool:
    """Whether the viewer derives a field of all calls from what is kept."""
    return all(name in _derivable(call, kept) for call in trace)


def _derivable(call: Call, kept: Iterable[str]) -> tuple[str, ...]:
    """The fields that follow from what is kept of a call."""
    there, found = {*kept}, []
    for name in DERIVED:
        if name in call.derivable and there.issuperset(f for f in FIELD_SPECS[name].derived_from if call.has(f)):
            found.append(name)
            there.add(name)
    return tuple(found)


def _bytes_of(call: Call, name: str, narrow: bool = False) -> int:
    """The bytes of a field that is there or follows, without reading a large one."""
    shape, itemsize = _shape_and_width(call, name)
    if narrow and name in FIELDS:
        itemsize = min(itemsize, _WIDTHS.get(name, 2))
    count = itemsize
    for n in shape:
        count *= n
    return -(-count // _MASK_SHARE) if name == "mask" else count


def _shape_and_width(call: Call, name: str) -> tuple[tuple[int, ...], int]:
    if name in call.fields or (name in call.derivable and extents_of(call, "BHTS").known("BHTS").keys() >= set("BHTS")):
        shape, dtype = shape_and_dtype(call, name)
        return tuple(shape), dtype.itemsize
    axes = FIELD_SPECS[name].axes
    known = extents_of(call, axes).known()
    return tuple(known.get(x, 1) for x in axes), 4


def _narrowed_call(call: Call, place: int, kept: Sequence[str], made: Narrowed) -> Call:
    fields: dict[str, Field] = {}
    for name in kept:
        if call.has(name):
            absent = name in call.fields and call.fields[name] is None
            fields[name] = None if absent else Later(_encoded, call, place, name, made)
    # That a call has no q, k or scores, as its attention is of another kind, costs nothing to say.
    fields |= {n: None for n in FIELDS if n in call.fields and call.fields[n] is None and not FIELD_SPECS[n].optional}
    # Statistics are small, and are what is left of an attention too large to keep.
    fields |= {name: value for name, value in call.fields.items() if name not in FIELDS}
    return replace(call, fields=fields, beside={}, derivable=_derivable(call, kept))


def _encoded(call: Call, place: int, name: str, made: Narrowed) -> Tensor:
    # Of a call of its own: what is derived for the page is held by nobody once it is in there.
    value = replace(call).get(name)
    assert value is not None
    if name in ("weights", "applied"):
        codes = sqrt8(value)
        if codes is not None:
            errors = [_largest_error(*head) for head in zip(codes.flatten(0, 1), value.flatten(0, 1), strict=True)]
            coding: dict[str, Any] = {"kind": SQRT8, "error": max(errors, default=0.0)}
            if name == "weights" and made.in_steps:
                codes, coding = _less_what_follows(call, codes, coding, made)
            made.coding[place, name] = coding
            return codes
    if name in ("q", "k") and made.in_steps:
        found = steps8(value)
        if found is not None:
            codes, meaning = found
            error = float((from_steps8(codes, meaning) - value).abs().max()) if codes.numel() else 0.0
            made.coding[place, name] = {"kind": STEPS8, "error": error, **meaning}
            return codes
    half, error = half_floats(value)
    if error:
        made.rounded[name] = max(error, made.rounded.get(name, 0.0))
    return half


def _less_what_follows(
    call: Call, codes: Tensor, coding: dict[str, Any], made: Narrowed
) -> tuple[Tensor, dict[str, Any]]:
    """Codes of weights, or, where q and k are codes, what these leave open of them: most of it is 0."""
    call = replace(call)
    found = [steps8(call.get(name)) for name in ("q", "k")]  # type: ignore[arg-type]
    if not follow_weights(call) or any(pair is None for pair in found):
        return codes, coding
    scores, follow = followed(call, *(from_steps8(*pair) for pair in found if pair is not None))
    if follow is None:
        return codes, coding
    mask = call.mask if call.has("mask") else None
    off = scores - call.scores if mask is None else (scores - call.scores)[mask.expand(scores.shape)]
    made.score_errors.append((float(off.abs().max()), float(off.square().mean())) if off.numel() else (0.0, 0.0))
    return (codes.to(torch.int16) - follow).bitwise_and(255).to(torch.uint8), {**coding, "kind": SQRT8_LESS}


def _largest_error(codes: Tensor, weights: Tensor) -> float:
    """How far codes of :func:`sqrt8` are from the weights of a head, T S, at the most."""
    return float((codes.double().div(255).square() - weights).abs().max()) if codes.numel() else 0.0
