"""How many bytes a selection keeps of calls, from their shapes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.functional import compute_dtype
from ..attention.kernel_call import DERIVED, DOT, FIELD_SPECS, FIELDS, KernelCall
from ..attention.positions import query_positions
from ..calls.layer_counts import LayerCounts
from ..calls.site import Site
from ..errors import SelectionError
from ..recording.selection import Selection, restrict
from ..torch_internals.tensor_identity import storage_of
from .memory_plan import PlannedCall

_CPU = torch.device("cpu")
_Entry = tuple[tuple[int, ...], torch.dtype, Tensor | None]


@dataclass
class SeenCalls:
    """The calls of a forward on shapes."""

    calls: list[tuple[KernelCall, Site, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    device: torch.device = _CPU

    def note(self, text: str) -> None:
        """What cannot be told exactly; said once."""
        if text not in self.notes:
            self.notes.append(text)


def field_bytes(seen: SeenCalls, selection: Selection, streamed: bool) -> tuple[list[PlannedCall], int]:
    """What a selection keeps of the calls, and how many bytes of it several calls share.

    Args:
        seen: the calls.
        selection: what is kept of each.
        streamed: whether it goes to a file, which holds what follows from other fields as well.
    """
    counts = LayerCounts(site for _, site, _ in seen.calls)
    masks: dict[Any, Tensor] = {}
    known: dict[Any, Tensor] = {}
    rows = []
    for given, site, step in seen.calls:
        numbered = replace(site, layers=counts.of(site))
        if not selection.takes_layer(numbered):
            continue
        lazy = not streamed and selection.keeps_as_it_is(seen.device)
        call = replace(given, mask=_complete(given, step, masks))
        _, h, t, _ = call.shape
        if call.cuts is None:
            chosen = selection.head_index(h, site.label), selection.query_index(t, site.label)
        else:  # of the whole model's heads and queries this process may have none
            chosen = selection.within(call, site.label)
            if [] in chosen:
                continue
        own_mask, whole_mask = replace(given), _complete(given, step, masks)
        restrict(own_mask, *chosen)
        restrict(call, *chosen)
        shapes, taken, later = {}, {}, 0
        entries = {name: _entry(call, name) for name in FIELDS if name in selection.capture}
        for name, entry in {**entries, **_statistics(given, call, site, selection)}.items():
            if entry is None:
                continue
            shape, dtype, x = entry
            if selection.dtype is not None and dtype.is_floating_point:
                dtype = selection.dtype
            shapes[name] = shape
            taken[name] = torch.Size(shape).numel() * dtype.itemsize
            own = name == "scores" and not given.is_product
            follows = name == "mask" or (name in DERIVED and getattr(given, name) is None and not own)
            if lazy and follows:
                later += taken[name]
                # Of a mask, what the kernel was given is held.
                taken[name] = 0 if name != "mask" or own_mask.mask is None else own_mask.mask.numel()
            if x is not None:
                # Layers that are given one mask keep one, of the same heads and queries.
                of = whole_mask if lazy and name == "mask" else x
                key = name, step, storage_of(of), of.storage_offset(), of.shape, of.stride()
                taken[name] = 0 if key in known else taken[name]
                known[key] = x
        if lazy and (beside := _certificate_bytes(replace(call, mask=own_mask.mask), given, selection, step, known)):
            taken["certificate"] = beside
        rows.append(PlannedCall(site, step, call.tap, shapes, taken, later))
    asked = selection.layers or ()
    absent = set(asked).difference(*(counts.naming(asked, site) for _, site, _ in seen.calls))
    if absent:
        first = next(i for i in asked if i in absent)
        raise SelectionError(f"layers={list(asked)}: there is no layer {first}; the last layers are {counts}.")
    shared = sum(x.numel() * x.element_size() for x in known.values())
    return rows, shared


def _certificate_bytes(
    call: KernelCall, given: KernelCall, selection: Selection, step: int, known: dict[Any, Tensor]
) -> int:
    """What is held for a certificate that is measured later, beside the fields that were asked for."""
    if (given.weights is not None and "weights" not in selection.capture) or (
        given.applied is not None and "applied" not in selection.capture
    ):
        return 0  # measured at once: a matrix that nobody asked for is not held for it
    size = 0
    for name in ("bias", "mask", "sinks", "output"):
        x: Tensor | None = getattr(call, name)
        if name in selection.capture or x is None:
            continue
        of: Tensor = getattr(given, name)
        key = "beside", name, step, storage_of(of), of.storage_offset(), of.shape, of.stride()
        if name == "output" or key not in known:
            size += x.numel() * x.element_size()
            known[key] = x
    return size


def _complete(call: KernelCall, step: int, masks: dict[Any, Tensor]) -> Tensor:
    """A stand-in of a call's complete mask, which calls with the same arguments have in common."""
    own, (_, _, t, s) = call.mask, call.shape
    key: tuple[Any, ...] = step, t, s, call.diagonal, call.device
    if own is not None:
        key = *key, storage_of(own), own.storage_offset(), own.shape, own.stride(), own.dtype
    if key not in masks:
        shape = torch.Size((1, 1, 1, 1)) if own is None else own.shape
        if call.diagonal.hides_any:
            shape = torch.Size(max(pair) for pair in zip(shape, (1, 1, t, s), strict=True))
        masks[key] = torch.empty(shape, dtype=torch.bool, device="meta")
    return masks[key]


def _statistics(given: KernelCall, call: KernelCall, site: Site, selection: Selection) -> dict[str, _Entry]:
    """The same of the statistics of a call, which is restricted to what is kept of the given one."""
    made: dict[str, _Entry] = {}
    placed = not selection.statistics or query_positions(replace(given, mask=None), site.kind) is not None
    dtype = compute_dtype(call.dtype if call.scores is None else call.scores.dtype)
    shape = call.shape
    for statistic in selection.statistics:
        if placed or not statistic.positional:
            for name, x in statistic.allocate(shape, dtype, torch.device("meta")).items():
                made[name] = tuple(x.shape), x.dtype, None
    return made


def _entry(call: KernelCall, name: str) -> _Entry | None:
    """Shape and dtype of a field as it is kept, and the tensor that calls may have in common; None: it has none."""
    x: Tensor | None = getattr(call, name)
    if name in DERIVED and x is None and (name == "weights" or call.score == DOT):
        return call.shape, compute_dtype(call.dtype) if name == "scores" else call.dtype, None
    if x is None:
        return None
    return tuple(x.shape), x.dtype, x if FIELD_SPECS[name].shared else None
