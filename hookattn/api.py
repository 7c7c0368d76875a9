"""``trace`` and ``tracing``: the two ways in.

``trace`` is one forward inside ``tracing``, which puts together what a trace needs: what to watch
(:mod:`hookattn.models.discovery`), what to keep (:mod:`hookattn.recording.selection`), who makes calls of kernels
(:mod:`hookattn.recording.recorder`), and the session that runs it (:mod:`hookattn.recording.session`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import nn

from . import checks
from .calls.shard import Shard
from .calls.token_lists import stacked_tokens
from .edit.base import Edit
from .edit.editor import Editor
from .errors import GuessedAxesWarning, HookattnError, InputError, SkippedWarning, TraceWriteError, UnfitTokensWarning
from .models.description import describe_model
from .models.discovery import check_meta, make_watch_plan
from .planning.room import RoomGuard
from .recording.forward_inputs import arguments, check_text, run_forward, tokens_of
from .recording.layouts import Layouts
from .recording.nothing import Nothing
from .recording.recorder import CallRecorder
from .recording.selection import Selection
from .recording.session import Session
from .recording.sharding import sharding_of
from .recording.token_fit import unfit_tokens
from .statistics.base import Statistic
from .torch_internals.frames import level_outside
from .torch_internals.lazy_copies import LAZY_COPIES
from .torch_internals.undo import mark, undo_since
from .traces import Trace

if TYPE_CHECKING:
    from .store.stream import Stream

ShardLike = Shard | Sequence[Shard] | Mapping[str, Shard | Sequence[Shard]]

_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("capture", "layers", "heads", "queries", "dtype", "device", "to", "tokens", "layout", "shard")),
    "verify": "sample",
    "strict": False,
    "copy": False,
    "gradients": False,
    "attached": False,
}
_VERIFY = ("sample", "full", "off")
# So many paths are named in a warning.
_NAMED = 3


def trace(
    model: nn.Module,
    inputs: Any,
    *,
    capture: Iterable[str | Statistic] | str | Statistic | None = None,
    layers: Any = None,
    heads: Any = None,
    queries: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    to: str | PathLike[str] | None = None,
    tokens: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    verify: str = "sample",
    strict: bool = False,
    copy: bool = False,
    layout: Mapping[str, str] | None = None,
    gradients: bool = False,
    attached: bool = False,
    shard: ShardLike | None = None,
) -> Trace:
    """Run one forward of ``model`` and return what its attention did.

    The model runs as it is: the same kernels, grad mode, train or eval mode, and bit-identical outputs (the forward's
    return value is ``trace.output``). Nothing stays attached to it.

    Args:
        model: any ``nn.Module``.
        inputs: a tensor or other single argument, a tuple of arguments, or a mapping of keyword arguments (a
            tokenizer's BatchEncoding, say).
        capture: fields to keep, of q, k, v, bias, scores, mask, sinks, weights, output; all by default. Also statistics
            by name, or as objects of :mod:`hookattn.statistics`.
        layers: layer indices of each stack, negative ones from its end; all by default.
        heads: query heads; all by default.
        queries: query positions, a slice or indices; all by default.
        dtype: floating fields are stored in this dtype; by default as the kernel has them.
        device: fields are stored on this device; by default where they are.
        to: stream to this file, call by call, instead of holding the fields in memory. In a group of several processes
            each of which has a part of the attention, it is a file for each: ``run.rank00-of-02.safetensors``; what
            it is stands in ``trace.path``.
        tokens: token strings, one list for all batch entries or one each; taken from a BatchEncoding if it has them. Or
            such lists for each stack that reads a sequence of its own: ``{"encoder": source, "decoder": target}``.
            Given ones that fit no call are told by an UnfitTokensWarning.
        verify: ``"sample"`` checks some query rows of every call against the model's own kernel, ``"full"`` all rows,
            ``"off"`` none.
        strict: raise if a call is not faithful, instead of warning. All calls are measured as soon as the model has
            run; else each when it is first read.
        copy: copy what is kept at once, and not when somebody writes to it: for a model whose tensors are written to by
            their raw addresses (by way of an array that numpy made of one before, say).
        layout: module path, or a pattern of paths with ``*``, to the axes of q as it enters the dot product there, a
            letter each: ``{"blocks.0.attn": "BTHD"}`` (B batch, H heads, T queries, D width; ``"THD"``: no batch). For
            attention written out by hand whose axes would else be guessed, which a trace warns of.
        gradients: keep the gradient of each call's output when a ``backward()`` brings one, in the traced block or
            after it: then ``call.grad("weights")`` and its kin are there (:meth:`hookattn.Call.grad`). It is selected
            as the output is. With ``to=``, one that comes after the block is not in that file; ``trace.save`` writes
            it.
        attached: leave the captured fields in the model's graph, so that a loss on ``call.weights`` (or q, k, v,
            scores, output) trains the model, also where the kernel is fused and the weights are derived. They are the
            model's tensors as they were, whatever it wrote to these afterwards. The trace holds the graph as long as it
            lives; not with ``to=``, ``dtype=``, ``device=`` or statistics, which are in no graph.
        shard: which part of the model's attention this process computes, where nothing can be seen that tells it: a
            :class:`hookattn.Shard`, several of different axes, or a mapping of module paths (or patterns with ``*``) to
            these. It counts before what parameters and tensors tell by themselves, axis by axis. Heads and queries are
            then selected, edited and counted by their numbers in the whole model; see docs/distributed.md.

    Returns:
        A Trace.

    Raises:
        ModelError: a scripted module, parameters on the meta device; NoAttentionError: no attention ran.
        InputError: the inputs do not fit the forward's signature; or ``tokens``, a flag or a path is none, or
            ``attached`` together with what it excludes.
        SelectionError: an unknown field, layer or head, an empty selection, a ``layout`` of no module or no axes, or a
            ``shard`` that a call cannot be.
        UnfaithfulError: with ``strict``.
        TraceTooLargeError: there is no room for it; raised at the first large call, and says what would fit.
        TraceWriteError: the file of ``to`` could not be written.
    """
    return _forward(
        model,
        inputs,
        None,
        capture=capture,
        layers=layers,
        heads=heads,
        queries=queries,
        dtype=dtype,
        device=device,
        to=to,
        tokens=tokens,
        verify=verify,
        strict=strict,
        copy=copy,
        layout=layout,
        gradients=gradients,
        attached=attached,
        shard=shard,
    )


def _forward(model: nn.Module, inputs: Any, listener: Editor | None, **options: Any) -> Trace:
    """One forward, in a block with all options."""
    args, kwargs = arguments(inputs)
    if any(isinstance(a, (str, list)) for a in (*args, *kwargs.values())) and isinstance(model, nn.Module):
        check_text(model, args, kwargs)  # before the run: a forward may choke on text deep inside
    block = _traced(model, listener, **options)
    try:
        with block as running:
            if running.tokens is None:  # none were given, or for other stacks alone
                running.tokens = tokens_of(inputs)
            running.output = run_forward(model, args, kwargs)
    finally:
        block.gen.close()  # an interrupt can hit the first line of what ends a block, and then that never runs
    return running


def tracing(
    model: nn.Module,
    *,
    capture: Iterable[str | Statistic] | str | Statistic | None = None,
    layers: Any = None,
    heads: Any = None,
    queries: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    to: str | PathLike[str] | None = None,
    tokens: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    verify: str = "sample",
    strict: bool = False,
    copy: bool = False,
    layout: Mapping[str, str] | None = None,
    gradients: bool = False,
    attached: bool = False,
    shard: ShardLike | None = None,
) -> AbstractContextManager[Trace]:
    """Trace every forward of ``model`` in the block (each is one step), ``generate()`` included.

    A part of the model that is called alone is a step, too; ``call.entry`` is its path. ``with trace.step():`` makes
    one step of several forwards.

    The Trace is complete when the block ends; a field can be read before, with ``to=`` from the unfinished file. While
    the model's own forward runs, calls that it has made may be missing still.
    Arguments and errors are those of :func:`trace`. If the block raises, the model is left clean and no file is left.
    """
    return _traced(
        model,
        None,
        capture=capture,
        layers=layers,
        heads=heads,
        queries=queries,
        dtype=dtype,
        device=device,
        to=to,
        tokens=tokens,
        verify=verify,
        strict=strict,
        copy=copy,
        layout=layout,
        gradients=gradients,
        attached=attached,
        shard=shard,
    )


class TracingOptions(TypedDict, total=False):
    """The options of :func:`tracing`, for what takes them all."""

    capture: Iterable[str | Statistic] | str | Statistic | None
    layers: Any
    heads: Any
    queries: Any
    dtype: torch.dtype | None
    device: torch.device | str | None
    to: str | PathLike[str] | None
    tokens: Sequence[Any] | Mapping[str, Sequence[Any]] | None
    verify: str
    strict: bool
    copy: bool
    layout: Mapping[str, str] | None
    gradients: bool
    attached: bool
    shard: ShardLike | None


def editing(
    model: nn.Module, *edits: Edit | Iterable[Edit], **options: Unpack[TracingOptions]
) -> AbstractContextManager[Trace]:
    """Trace every forward of ``model`` in the block, with what its attention does changed.

    ::

        with hookattn.editing(model, edit.zero("weights", layer=3, heads=[1])) as trace:
            logits = model(**inputs).logits

    The model's own kernels run, with other arguments where an edit is one of queries, keys, values, masks or biases; of
    the heads and rows whose scores, weights or output are edited, what the kernel returned is replaced. All else keeps
    its bits, and gradients go through. The trace is of the edited run: ``call.edits`` says what was done.

    Args:
        model: any ``nn.Module``.
        edits: of :mod:`hookattn.edit`. They are done where the field that they change is made: queries, keys and values
            first, then scores, weights and the output; of one field in the order in which they are given.
        options: those of :func:`tracing`.

    Raises:
        EditError: an edit cannot be done where it is meant to be, or its values do not fit, which is raised before the
            model goes on; or, at the end of the block, an edit met nothing.
        InputError: ``edits`` are none; and the errors of :func:`trace`.
    """
    return _traced(model, Editor(_edits(edits)), **_with_defaults(options))


def edited(model: nn.Module, inputs: Any, *edits: Edit | Iterable[Edit], **options: Unpack[TracingOptions]) -> Trace:
    """Run one forward of ``model`` with what its attention does changed, and return the trace of it, as :func:`trace`
    does; ``trace.output`` is what the edited model returned.

    Args:
        model, inputs: as :func:`trace` takes them.
        edits, options: as :func:`editing` takes them.

    Raises:
        EditError, InputError: as in :func:`editing`; and the errors of :func:`trace`.
    """
    return _forward(model, inputs, Editor(_edits(edits)), **_with_defaults(options))


def unrecorded(model: nn.Module, *edits: Edit | Iterable[Edit]) -> AbstractContextManager[Trace]:
    """:func:`editing` for what the model returns alone: no call is recorded, and nothing that was skipped is warned of.
    For analyses that run a model many times.

    Args, Raises: as :func:`editing`, which has options beside them.
    """
    return _traced(model, Editor(_edits(edits)), **_DEFAULTS, record=False)


def _with_defaults(options: TracingOptions) -> dict[str, Any]:
    """All options of :func:`tracing`.

    Raises:
        InputError: one that there is none of.
    """
    unknown = [name for name in options if name not in _DEFAULTS]
    if unknown:
        raise checks.wrong("options", unknown[0], f"options among {', '.join(_DEFAULTS)}")
    return {**_DEFAULTS, **options}


def _edits(edits: Iterable[Any]) -> list[Edit]:
    """Edits, and those in lists, in one list."""
    found: list[Edit] = []
    for one in edits:
        if isinstance(one, Edit):
            found.append(one)
        else:
            found += checks.several("edits", one, Edit, "edits of hookattn.edit, or lists of them")  # type: ignore[type-abstract]
    return found


@contextmanager
def _traced(
    model: nn.Module,
    listener: Editor | None,
    *,
    capture: Iterable[str | Statistic] | str | Statistic | None,
    layers: Any,
    heads: Any,
    queries: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    to: str | PathLike[str] | None,
    tokens: Sequence[Any] | Mapping[str, Sequence[Any]] | None,
    verify: str,
    strict: bool,
    copy: bool,
    layout: Mapping[str, str] | None,
    gradients: bool,
    attached: bool,
    shard: ShardLike | None,
    record: bool = True,
) -> Iterator[Trace]:
    """:func:`tracing`; ``listener``: changes what attention does; ``record``: whether calls are made of what runs."""
    checks.word("verify", verify, _VERIFY)
    checks.flag("strict", strict)
    checks.flag("copy", copy)
    checks.flag("gradients", gradients)
    checks.flag("attached", attached)
    if to is not None:
        checks.path("to", to, TraceWriteError)
    hashable = capture is None or (isinstance(capture, tuple) and all(type(x) is str for x in capture))
    if hashable and all(x is None for x in (layers, heads, queries, dtype, device)):
        selection = _selection_of_fields(capture)  # type: ignore[arg-type]
    else:
        selection = Selection.of(capture, layers, heads, queries, dtype, device)
    if attached:
        _check_attached(selection, to)
    plan = make_watch_plan(model)
    layouts = None if layout is None else Layouts(layout, plan.paths.values())
    sharding = sharding_of(plan, shard)
    own, named = stacked_tokens(tokens)
    about = describe_model(plan.inner, plan.model_class, plan.wrapped_by)
    trace = Trace(tokens=own, stack_tokens=named, model=about, selection=selection.to_json())
    stream: Stream | None = None
    session: Session | None = None
    began = mark(), get_ident()
    # Twice, one around the other: an exception can hit the end of the block itself, which is then done once more.
    try:
        try:
            failure: BaseException | None = None
            try:
                if to is not None:
                    from .store.stream import Stream

                    stream = Stream(to, trace, sharding is not None and sharding.may_meet_any)
                sink = None if stream is None else stream.add
                recorder = CallRecorder(selection, verify, sink is not None, copy, not strict, gradients, attached)
                room = RoomGuard(selection, to) if record else None
                holder = recorder if record and not (gradients or attached) else None
                session = Session(
                    plan,
                    trace,
                    selection,
                    recorder if record else Nothing(),
                    strict,
                    sink,
                    room,
                    listener=listener,
                    layouts=layouts,
                    holder=holder,
                    gradients=gradients,
                    attached=attached,
                    sharding=sharding,
                )
                session.start()
                yield trace
            except BaseException as error:
                failure = error
                raise
            finally:
                if session is not None:
                    session.stop()
                if isinstance(failure, Exception):
                    _explain(failure, model)
                failure = None  # it knows this frame: a circle would keep both
            session.finish()
            unfit = [] if tokens is None else unfit_tokens(trace, named)
            trace.notes += unfit
            session.check_found()
            if listener is not None:
                listener.check_met()
            unused = [] if layouts is None else layouts.unused({call.site.path for call in trace.calls})
            if sharding is not None:
                trace.notes += sharding.unused()
            trace.notes.extend(f"layout= names {path!r}, where no attention was recorded" for path in unused)
            if stream is not None:
                stream.finish([] if sharding is None else list(sharding.met))
        finally:
            _end(session, stream, began)
    finally:
        _end(session, stream, began)
    if record:
        _warn(trace, unused, unfit)


def _check_attached(selection: Selection, to: Any) -> None:
    """Raises InputError: something was asked for that takes fields out of their graph."""
    given = {"to": to, "dtype": selection.dtype, "device": selection.device, "capture": selection.statistics or None}
    for name, value in given.items():
        if value is not None:
            shown = f"{name}={checks.printed(value)}" if name != "capture" else f"the statistic {value[0].key!r}"
            raise InputError(
                f"attached=True keeps fields in the model's graph, and {shown} takes them out of it; leave one of the "
                "two out, and cast, move, save or sum up what is read (call.weights.half(), trace.save(…))."
            )


def _end(session: Session | None, stream: Stream | None, began: tuple[int, int]) -> None:
    """Detach everything, remove what is unfinished, and put back what was changed since; can be called again."""
    try:
        changes, thread = began
        if thread == get_ident():
            undo_since(changes)
        if session is not None:
            session.close()  # before the stream: copies on their way from a GPU end in it
    finally:
        if stream is not None:
            stream.close()


def _explain(error: Exception, model: nn.Module) -> None:
    """Say beside an error of the model or the block what is true of the trace, once it is detached."""
    if isinstance(error, HookattnError):
        return
    check_meta(model)  # weights without values are the reason, where there are any
    error.add_note("hookattn: raised by the model or the traced block itself; nothing is left on the model.")
    if LAZY_COPIES in str(error):
        error.add_note(
            "hookattn: memory was resized after it was recorded, and torch writes to none that a lazy copy shares; "
            "trace with copy=True."
        )


# Cached: 0.1 µs in place of 3 a trace.
@functools.lru_cache(maxsize=64)
def _selection_of_fields(capture: tuple[str, ...] | None) -> Selection:
    return Selection.of(capture)


def _warn(trace: Trace, unused: Sequence[str], unfit: Sequence[str]) -> None:
    """Say once, at the end, what could not be read or was guessed, and which ``layout`` or ``tokens`` fit none."""
    # The stack level is that of the with statement, or of the call of trace().
    if trace.skipped:
        first = trace.skipped[0]
        warnings.warn(
            f"{len(trace.skipped)} attention site(s) could not be read, for example {first.path or '<model>'}: "
            f"{first.reason}; see trace.skipped",
            SkippedWarning,
            stacklevel=4,
        )
    guessed = list({call.site.path: call for call in trace.calls if "guessed" in call.basis.values()}.values())
    if guessed:
        few = ", ".join(f"{call.site.label} ({' '.join(call.guessed)})" for call in guessed[:_NAMED])
        more = f" and {len(guessed) - _NAMED} more" if len(guessed) > _NAMED else ""
        path = guessed[0].site.path
        warnings.warn(
            f"which axis is which was guessed by convention in {few}{more}; certificates cannot tell. Say it with "
            f'layout={{{path!r}: "BTHD"}}, the axes of q as it enters the dot product, or write an adapter '
            "(docs/adapters.md); call.basis has what is known of each axis",
            GuessedAxesWarning,
            stacklevel=level_outside(__package__),
        )
    for line in unfit:
        warnings.warn(line, UnfitTokensWarning, stacklevel=level_outside(__package__))
    if unused:
        warnings.warn(
            f"layout= names {', '.join(map(repr, unused[:_NAMED]))}, where no attention was recorded; "
            "call.site.path says where each call was",
            GuessedAxesWarning,
            stacklevel=level_outside(__package__),
        )
