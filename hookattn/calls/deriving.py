"""What a fused kernel never forms, derived of a recorded call when it is read: its scores and weights."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Size, Tensor

from ..attention.derivation import derive
from ..attention.functional import compute_dtype
from ..attention.normalizers import is_softmax, normalized
from ..errors import FieldNotCaptured, TraceTooLargeError
from ..torch_internals import devices
from ..torch_internals.isolation import isolated
from .extents import KeptCall, evenly_grouped, extents_of
from .fields import DERIVED, Derived, Field, dtype_of, shape_of, tensor_of
from .mask_rule import MaskRule
from .site import Site

# Up to so many bytes nobody asks how much memory is free.
_LARGE = 1 << 28


class SourceCall(KeptCall, Protocol):
    """What else is asked of a :class:`~hookattn.calls.call.Call` here."""

    site: Site
    dtype: torch.dtype
    scale: float | Tensor | None
    softcap: float | None
    normalizer: str
    notes: tuple[str, ...]
    attached: bool

    def place(self, name: str) -> Field:
        """Where a field is."""


def derive_field(call: SourceCall, name: str) -> Tensor:
    """The scores, B H T S in float32 (float64 of a kernel in that), or the weights, B H T S in the kernel's dtype.

    Args:
        call: its q and k were kept, and for weights mask, bias and sinks as well; or its own scores, mask and sinks.
        name: ``"scores"`` or ``"weights"``.

    Raises:
        FieldNotCaptured: one of these was not kept.
        TraceTooLargeError: there is no memory for it; says which part would fit.
    """
    own = own_field(call, "scores") if name == "weights" else None
    try:
        if own is not None:
            with isolated(own, but=call.attached):
                return _of_scores(call, own)
        q, k = _tensor(call, "q"), evenly_grouped(call, _tensor(call, "k"))
        _check_room(call, name, q, k)
        with isolated(q, but=call.attached):
            if name == "scores" or is_softmax(call.normalizer):
                return _of_q_and_k(call, name, q, k)
            return _of_scores(call, _of_q_and_k(call, "scores", q, k))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise TraceTooLargeError(
                f"{call.site.label}: memory ran out while its {name} were derived. {_ADVICE}"
            ) from error
        raise


def shape_and_dtype(call: SourceCall, name: str) -> tuple[Size, torch.dtype]:
    """Those of a field that a call has or that follows from others; nothing is read or derived for it.

    Raises:
        FieldNotCaptured: it follows from what was not kept.
    """
    place = call.fields.get(name, DERIVED)
    if place is None or not isinstance(place, Derived):
        return (Size((0,)), torch.uint8) if place is None else (shape_of(place), dtype_of(place))
    known = extents_of(call, "BHTS").known("BHTS")
    if len(known) < 4:
        raise FieldNotCaptured(f"{call.site.label}: nothing that was captured tells the extents of its {name}.")
    return Size(known.values()), compute_dtype(call.dtype) if name == "scores" else call.dtype


_ADVICE = "Read a part of it: call.at(heads=0), call.at(queries=slice(-1, None))."


def _of_scores(call: SourceCall, scores: Tensor) -> Tensor:
    """The weights that the normalizer of a call makes of its scores."""
    mask, empty = _mask(call)
    weights = normalized(call.normalizer, scores, mask, _source(call, "sinks"), empty)
    if weights is None:
        raise FieldNotCaptured(
            f"{call.site.label}: its weights were not captured, and do not follow from its scores, as nobody knows its "
            f"normalizer {call.normalizer!r}; trace again with 'weights' in capture=."
        )
    return weights.to(call.dtype)


def _of_q_and_k(call: SourceCall, name: str, q: Tensor, k: Tensor) -> Tensor:
    notes: list[str] = []
    wants_weights = name == "weights"
    mask, empty, diagonal, rows, sinks = None, False, None, None, None
    if wants_weights:
        sinks = _source(call, "sinks")
        rule = placed(call, "mask")
        if isinstance(rule, MaskRule) and rule.given is None and rule.diagonal.hides_any:
            diagonal, rows, empty = rule.diagonal, rule.rows, rule.leaves_empty()
        else:
            mask, empty = _mask(call)
    assert call.scale is not None
    scores, weights = derive(
        q,
        k,
        call.scale,
        softcap=call.softcap,
        bias=_source(call, "bias"),
        mask=mask,
        sinks=sinks,
        empty=empty,
        want_scores=not wants_weights,
        want_weights=wants_weights,
        diagonal=diagonal,
        rows=rows,
        notes=notes,
    )
    call.notes = (*call.notes, *(n for n in notes if n not in call.notes))
    made = weights if wants_weights else scores
    assert made is not None
    return made.to(call.dtype) if wants_weights else made


def _mask(call: SourceCall) -> tuple[Tensor | None, bool]:
    """The complete mask of a call, None if it hides nothing; and whether it may have rows with nothing to attend to."""
    place = placed(call, "mask")
    if isinstance(place, MaskRule):
        complete = place.complete()
        return complete.real, complete.empty
    mask = _source(call, "mask")
    hides = mask is not None and not (mask.numel() == 1 and bool(mask))
    return (mask, True) if hides else (None, False)


def placed(call: SourceCall, name: str) -> Field:
    """Where a field is; None: the call has none, or it was not kept."""
    try:
        return call.place(name)
    except FieldNotCaptured:
        return None


def own_field(call: SourceCall, name: str) -> Tensor | None:
    """A field as it was kept; None: the call has none, it was not kept, or it is derived."""
    place = placed(call, name)
    return None if isinstance(place, Derived) else tensor_of(place)


def _source(call: SourceCall, name: str) -> Tensor | None:
    try:
        place = call.place(name)
    except FieldNotCaptured:
        raise FieldNotCaptured(
            f"{call.site.label}: what is read follows from {name!r}, which was not captured; trace again with it in "
            "capture=."
        ) from None
    assert not isinstance(place, Derived)
    return tensor_of(place)


def _tensor(call: SourceCall, name: str) -> Tensor:
    found = _source(call, name)
    if found is None:
        raise FieldNotCaptured(f"{call.site.label} has no {name}, so that nothing can be derived of it.")
    return found


def _check_room(call: SourceCall, name: str, q: Tensor, k: Tensor) -> None:
    """Whether there is memory for what is about to be derived.

    Raises:
        TraceTooLargeError: there is not; says which part would fit.
    """
    (b, h, t), s = q.shape[:3], k.shape[2]
    one = t * s * compute_dtype(q.dtype).itemsize
    if b * h * one <= _LARGE:
        return
    # What is not derived block by block is formed once more on the way, and so is what is narrowed at the end.
    plain = q.device.type == "cpu" and isinstance(call.scale, int | float) and placed(call, "sinks") is None
    per_head = one if plain and (name == "scores" or call.dtype == compute_dtype(q.dtype)) else 2 * one
    free = devices.free_memory(q.device)
    if free is None or b * h * per_head <= free:
        return
    fits = free // per_head
    if fits:
        part = f"call.at(heads=range({min(fits, h)}))" if fits >= b else "call.at(batch=0, heads=0)"
    else:
        part = f"call.at(heads=0, batch=0, queries=slice({-max(1, free * t // per_head)}, None))"
    raise TraceTooLargeError(
        f"{call.site.label}: its {name} ({b} batch entries, {h} heads, {t} queries, {s} keys) would take "
        f"{devices.size_of(b * h * per_head)}, and {devices.size_of(free)} of memory are free. What would fit: {part}."
    )
