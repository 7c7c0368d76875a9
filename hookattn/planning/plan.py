"""``plan``: how many bytes a trace will take, told before it runs, from a forward on shapes alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..attention.kernel_call import KernelCall
from ..attention.masks import split_additive
from ..calls.call import Call
from ..calls.site import Site
from ..calls.trace_data import TraceData
from ..errors import ModelError, NoAttentionError, TraceWriteError
from ..models.discovery import make_watch_plan
from ..recording.forward_inputs import arguments, check_fit
from ..recording.layouts import Layouts
from ..recording.selection import Selection
from ..recording.session import Recorder, Session, Sink
from ..torch_internals.devices import free_memory, plain_reason, size_of
from ..torch_internals.fake_tensors import IMPOSSIBLE, FakeTensor
from ..torch_internals.isolation import isolated
from ..torch_internals.tensor_memo import TensorMemo
from .byte_counts import SeenCalls, field_bytes
from .fake_model import Rules, fake_copy
from .memory_plan import MemoryPlan, PlannedCall, free_disk, smaller


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
    layout: Mapping[str, str] | None = None,
) -> MemoryPlan:
    """Predict what ``hookattn.trace`` with the same arguments will keep, without running attention.

    One forward runs on shapes alone, in a copy of the model without weights; the model itself is not touched, and may
    be on the meta device. Hooks that somebody put on it are left out. The bytes are those of what the trace holds, each
    tensor counted once; what is derived when it is read is told apart. A file holds all that was asked for, has a
    header of 1 MiB or more, and stores masks of equal content once.

    Args:
        model, inputs, capture, layers, heads, queries, dtype, device, to, layout: as in :func:`hookattn.trace`.

    Returns:
        A MemoryPlan; its ``repr`` is a table.

    Raises:
        ModelError: the forward decides by values that there are none of (routing, a loop until convergence), or runs an
            operation that has no rule for shapes; NoAttentionError: no attention ran.
        InputError, SelectionError: as in :func:`hookattn.trace`.
    """
    selection = Selection.of(capture, layers, heads, queries, dtype, device)
    if to is not None:
        checks.path("to", to, TraceWriteError)
        if os.path.isdir(to):
            raise checks.wrong("to", os.fspath(to), "the path of a file, and this is a folder", TraceWriteError)
    if not isinstance(model, nn.Module):
        make_watch_plan(model)  # says what is wrong with it
    return plan_with_advice(calls_on_shapes(model, *arguments(inputs), layout), selection, to)


_WHILE_PLANNING = "hookattn: raised while the forward ran on shapes alone, for a plan."


class ShapeRecorder(Recorder):
    """Takes kernel calls as they come, and keeps nothing of their values.

    Args:
        seen: gets the calls.
    """

    def __init__(self, seen: SeenCalls):
        self.seen = seen
        self._memo = TensorMemo()

    def wants(self, field: str) -> bool:
        """Every field: what a selection leaves out is left out of the sizes later."""
        return True

    def forget(self) -> None:
        """A new forward begins."""
        self._memo.forget()

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of a tensor whose values nobody knows: a bias and a mask, at most."""
        if not isinstance(additive, FakeTensor):
            with isolated(additive):
                return self._memo("split", additive, lambda: split_additive(additive))  # type: ignore[no-any-return]

        def guessed() -> tuple[Tensor, Tensor]:
            self.seen.note(
                "additive masks that depend on weights are counted as a bias and a mask; a trace may keep one"
            )
            return additive, additive != 0

        return self._memo(("split", id(additive)), None, guessed)  # type: ignore[no-any-return]

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        """Note a call."""
        self.seen.calls.append((call, site, step))
        self.seen.device = call.device
        return Call(site, step, index, call.tap, call.dtype, 1.0)

    def deliver(self, call: Call, sink: Sink) -> None:
        """Nothing is stored."""

    def complete(self, calls: Sequence[Call]) -> None:
        """Nothing waits."""

    def drop(self) -> None:
        """Let go of what was made of masks."""
        self._memo.forget()


def calls_on_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Mapping[str, str] | None = None
) -> SeenCalls:
    """The calls of a forward on shapes; raises as :func:`plan` does."""
    seen = SeenCalls()
    copy, args, kwargs, wrapped_by = fake_copy(model, args, kwargs)
    watched = make_watch_plan(copy)
    layouts = None if layout is None else Layouts(layout, watched.paths.values())
    session = Session(
        watched, TraceData(), Selection.of(), ShapeRecorder(seen), strict=False, shapes_only=True, layouts=layouts
    )

    def may_guess() -> bool:
        """A tap may, where it looks for masks in what the model computed; the model may not."""
        # Of this session alone: the follower of a trace that asked for this plan may be at work further out.
        guesses = session.interpreting
        if guesses:
            seen.note(
                f"{session.where() or 'the model'}: masks and biases are told by values, so that these are guessed"
            )
        return guesses

    try:
        session.start()
        try:
            with warnings.catch_warnings(), Rules(may_guess):  # in the caller's grad mode: fused layers look at it
                # A tap asks where tensors lie in memory, which fake ones do nowhere.
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
                copy(*args, **kwargs)
        except TypeError as error:
            check_fit(copy, args, kwargs)
            if wrapped_by:
                raise ModelError(_unprepared(copy, error, wrapped_by)) from error
            error.add_note(_WHILE_PLANNING)
            raise
        except IMPOSSIBLE as error:
            raise ModelError(_impossible(copy, str(error), session.where())) from error
        except Exception as error:
            if wrapped_by:
                raise ModelError(_unprepared(copy, error, wrapped_by)) from error
            error.add_note(_WHILE_PLANNING)
            raise
        finally:
            session.stop()
        session.finish()
        seen.skipped = [(s.path, s.reason) for s in session.trace.skipped]
    finally:
        session.close()
    for path, reason in seen.skipped:
        if any(error.__name__ in reason for error in IMPOSSIBLE):
            raise ModelError(_impossible(copy, reason, path))
    if not seen.calls and not seen.skipped:
        raise NoAttentionError(f"no attention ran in {type(copy).__name__}, so there is nothing to plan.")
    if why := plain_reason(seen.device):
        seen.note(f"scores, weights and statistics are derived by torch's own operations on {seen.device.type}: {why}")
    return seen


def _unprepared(copy: nn.Module, error: Exception, prepared_by: str) -> str:
    return (
        f"{type(copy).__name__} cannot be planned: without {prepared_by} its forward raises {type(error).__name__} "
        f"({error}). Plan a model of the same configuration before it is made ready for running, on the meta device "
        'say; or stream the trace, to="run.safetensors".'
    )


def _impossible(model: nn.Module, what: str, where: str | None) -> str:
    return (
        f"{type(model).__name__} cannot be planned: {where or 'its forward'} needs values, not shapes alone ({what}). "
        'Trace a short input with capture=("q", "k") and scale its sizes, or stream with to="run.safetensors".'
    )


def plan_with_advice(seen: SeenCalls, selection: Selection, to: str | PathLike[str] | None) -> MemoryPlan:
    """The plan of a trace that keeps a selection of these calls, with what would fit if it does not."""
    made = _plan_without_advice(seen, selection, *field_bytes(seen, selection, to is not None), to)
    if not made.fits:
        made.advice.extend(_what_would_fit(seen, selection, to is not None, "run.safetensors" if to is None else to))
    return made


def _plan_without_advice(
    seen: SeenCalls, selection: Selection, calls: list[PlannedCall], shared: int, to: str | PathLike[str] | None
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


def _what_would_fit(seen: SeenCalls, selection: Selection, streamed: bool, to: str | PathLike[str]) -> list[str]:
    """What of the smaller traces fits."""
    found = []
    for text, less, to_file in smaller(selection, streamed):
        calls, shared = field_bytes(seen, less, to_file)
        one = _plan_without_advice(seen, less, calls, shared, to if to_file else None)
        if one.fits:
            found.append(f"{text}: {size_of(one.total)}")
    return found or ["none of the usual selections fits; take layers= one at a time, or a shorter input"]
