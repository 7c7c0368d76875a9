"""``plan``: how many bytes a trace will take, told before it runs, from a forward on shapes alone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from os import PathLike
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from .api import _arguments, _check_fit
from .attention import compute_dtype
from .call import Call
from .errors import ModelError, NoAttentionError, SelectionError
from .hollow import Rules, hollow
from .inspection import make_plan
from .keeper import Keeper
from .planned import MemoryPlan, PlannedCall, free_disk, free_memory, size_of, smaller
from .record import FIELDS, KernelCall
from .selection import Selection, restrict
from .session import Session
from .site import Site
from .statistics.positions import query_positions
from .taps.watch import Watch
from .trace import Trace

_IMPOSSIBLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
_TAP = Watch._try.__code__
_CPU = torch.device("cpu")
_Entry = tuple[tuple[int, ...], torch.dtype, Tensor | None]


def plan(
    model: nn.Module,
    inputs: Any,
    *,
    capture: Iterable[str] | str | None = None,
    layers: Any = None,
    heads: Any = None,
    queries: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    to: str | PathLike[str] | None = None,
) -> MemoryPlan:
    """Predict what ``hookattn.trace`` with the same arguments will keep, without running attention.

    One forward runs on shapes alone, in a copy of the model without weights; the model itself is not touched, and may
    be on the meta device. Hooks that somebody put on it are left out. The bytes are those of the trace's tensors, each
    counted once; a file also has a header of 1 MiB or more, and stores masks of equal content once.

    Args:
        model, inputs, capture, layers, heads, queries, dtype, device, to: as in :func:`hookattn.trace`.

    Returns:
        A MemoryPlan; its ``repr`` is a table.

    Raises:
        ModelError: the forward decides by values that there are none of (routing, a loop until convergence), or runs an
            operation that has no rule for shapes; NoAttentionError: no attention ran.
        InputError, SelectionError: as in :func:`hookattn.trace`.
    """
    selection = Selection.of(capture, layers, heads, queries, dtype, device)
    if not isinstance(model, nn.Module):
        make_plan(model)  # says what is wrong with it
    args, kwargs = _arguments(inputs)
    seen = _observe(model, args, kwargs)
    made = _made(seen, selection, *_sizes(seen, selection), to)
    if not made.fits:
        made.advice.extend(_advice(seen, selection, to is not None, "run.safetensors" if to is None else to))
    return made


@dataclass
class _Seen:
    """The calls of a forward on shapes."""

    calls: list[tuple[KernelCall, Site, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    device: torch.device = _CPU

    def note(self, text: str) -> None:
        """What cannot be told exactly; said once."""
        if text not in self.notes:
            self.notes.append(text)


class _Shapes(Keeper):
    """Takes kernel calls as they come, and keeps nothing of their values."""

    def __init__(self, seen: _Seen):
        super().__init__(Selection.of(), "off", wait=False)
        self.seen = seen

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of a tensor whose values nobody knows: a bias and a mask, at most."""
        if not isinstance(additive, FakeTensor):
            return super().split(additive)
        known = self._shared.get(id(additive))
        if known is None:
            self.seen.note(
                "additive masks that depend on weights are counted as a bias and a mask; a trace may keep one"
            )
            known = self._shared[id(additive)] = additive, (additive, additive != 0), None
        return known[1]

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        """Note a call."""
        self.seen.calls.append((call, site, step))
        self.seen.device = call.q.device
        return Call(site, step, index, call.tap, call.q.dtype, 1.0)


def _observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Seen:
    seen = _Seen()
    copy, args, kwargs = hollow(model, args, kwargs)
    session = Session(make_plan(copy), Trace(), Selection.of(), "off", False)
    session.keeper = _Shapes(seen)

    def may_guess() -> bool:
        """A tap may, where it looks for masks in what the model computed; the model may not."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _TAP:
            frame = frame.f_back
        if frame is not None:
            seen.note(
                f"{session.where() or 'the model'}: masks and biases are told by values, so that these are guessed"
            )
        return frame is not None

    try:
        session.start()
        try:
            with warnings.catch_warnings(), Rules(may_guess):  # in the caller's grad mode: fused layers look at it
                # A tap asks where tensors lie in memory, which fake ones do nowhere.
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
                copy(*args, **kwargs)
        except TypeError:
            _check_fit(copy, args, kwargs)
            raise
        except _IMPOSSIBLE as error:
            raise ModelError(_impossible(model, str(error), session.where())) from error
        except Exception as error:
            error.add_note("hookattn: raised while the forward ran on shapes alone, for a plan.")
            raise
        finally:
            session.stop()
        session.finish()
        seen.skipped = [(s.path, s.reason) for s in session.trace.skipped]
    finally:
        session.close()
    for path, reason in seen.skipped:
        if any(error.__name__ in reason for error in _IMPOSSIBLE):
            raise ModelError(_impossible(model, reason, path))
    if not seen.calls and not seen.skipped:
        raise NoAttentionError(f"no attention ran in {type(model).__name__}, so there is nothing to plan.")
    return seen


def _impossible(model: nn.Module, what: str, where: str | None) -> str:
    return (
        f"{type(model).__name__} cannot be planned: {where or 'its forward'} needs values, not shapes alone ({what}). "
        'Trace a short input with capture=("q", "k") and scale its sizes, or stream with to="run.safetensors".'
    )


# Sizes


def _sizes(seen: _Seen, selection: Selection) -> tuple[list[PlannedCall], int]:
    """What a selection keeps of the calls, and how many bytes of it several calls share."""
    last: dict[tuple[str, str], int] = {}
    for _, site, _ in seen.calls:
        last[site.stack, site.kind] = max(last.get((site.stack, site.kind), 0), site.layer or 0)
    masks: dict[Any, Tensor] = {}
    known: dict[Any, Tensor] = {}
    rows = []
    for given, site, step in seen.calls:
        numbered = replace(site, layers=site.layers or last[site.stack, site.kind] + 1)
        if not selection.takes_layer(numbered):
            continue
        call = replace(given, mask=_complete(given, step, masks))
        h, t = call.q.shape[1:3]
        restrict(call, selection.head_index(h, site.label), selection.query_index(t, site.label))
        shapes, sizes = {}, {}
        entries = {name: _entry(call, name) for name in FIELDS if name in selection.capture}
        for name, entry in {**entries, **_statistics(given, call, site, selection)}.items():
            if entry is None:
                continue
            shape, dtype, x = entry
            if selection.dtype is not None and dtype.is_floating_point:
                dtype = selection.dtype
            shapes[name] = shape
            sizes[name] = torch.Size(shape).numel() * dtype.itemsize
            if x is not None:
                key = name, step, x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()
                sizes[name] = 0 if key in known else sizes[name]
                known[key] = x
        rows.append(PlannedCall(site, step, call.tap, shapes, sizes))
    absent = [i for i in selection.layers or () if not any(i in (s.layer, _back(s, last)) for _, s, _ in seen.calls)]
    if absent:
        raise SelectionError(f"layers={list(selection.layers or ())}: there is no layer {absent[0]}; last: {last}.")
    shared = sum(x.numel() * x.element_size() for x in known.values())
    return rows, shared


def _back(site: Site, last: dict[tuple[str, str], int]) -> int:
    return (site.layer or 0) - (site.layers or last[site.stack, site.kind] + 1)


def _complete(call: KernelCall, step: int, masks: dict[Any, Tensor]) -> Tensor:
    """A stand-in of a call's complete mask, which calls with the same arguments have in common."""
    own, t, s = call.mask, call.q.shape[2], call.k.shape[2]
    key: tuple[Any, ...] = step, t, s, call.offset, call.window, call.causal, call.q.device
    if own is not None:
        key = *key, own.untyped_storage()._cdata, own.storage_offset(), own.shape, own.stride(), own.dtype
    if key not in masks:
        shape = torch.Size((1, 1, 1, 1)) if own is None else own.shape
        if call.causal or call.window is not None:
            shape = torch.Size(max(pair) for pair in zip(shape, (1, 1, t, s), strict=True))
        masks[key] = torch.empty(shape, dtype=torch.bool, device="meta")
    return masks[key]


def _statistics(given: KernelCall, call: KernelCall, site: Site, selection: Selection) -> dict[str, _Entry]:
    """The same of the statistics of a call, which is restricted to what is kept of the given one."""
    made: dict[str, _Entry] = {}
    placed = not selection.statistics or query_positions(replace(given, mask=None), site.kind) is not None
    dtype = compute_dtype(call.dtype if call.scores is None else call.scores.dtype)
    b, h, t, s = *call.q.shape[:3], call.k.shape[2]
    for statistic in selection.statistics:
        if placed or not statistic.positional:
            for name, x in statistic.allocate((b, h, t, s), dtype, torch.device("meta")).items():
                made[name] = tuple(x.shape), x.dtype, None
    return made


def _entry(call: KernelCall, name: str) -> _Entry | None:
    """Shape and dtype of a field as it is kept, and the tensor that calls may have in common; None: it has none."""
    x: Tensor | None = getattr(call, name)
    if name in ("scores", "weights") and x is None:
        (b, h, t), s = call.q.shape[:3], call.k.shape[2]
        return (b, h, t, s), compute_dtype(call.dtype) if name == "scores" else call.dtype, None
    if x is None:
        return None
    return tuple(x.shape), x.dtype, x if name in ("mask", "bias", "sinks") else None


def _made(
    seen: _Seen, selection: Selection, calls: list[PlannedCall], shared: int, to: str | PathLike[str] | None
) -> MemoryPlan:
    total, biggest = sum(c.total for c in calls), max((c.total for c in calls), default=0)
    return MemoryPlan(
        calls,
        total,
        total if to is None else min(total, 3 * biggest + shared),
        free_memory(selection.device or seen.device),
        None if to is None else free_disk(to),
        notes=seen.notes,
        skipped=seen.skipped,
    )


# Advice


def _advice(seen: _Seen, selection: Selection, streamed: bool, to: str | PathLike[str]) -> list[str]:
    """What of the smaller traces fits."""
    found = []
    for text, less, to_file in smaller(selection, streamed):
        calls, shared = _sizes(seen, less)
        one = _made(seen, less, calls, shared, to if to_file else None)
        if one.fits:
            found.append(f"{text}: {size_of(one.total)}")
    return found or ["none of the usual selections fits; take layers= one at a time, or a shorter input"]
