"""``Trace`` and ``load``: what a trace holds, with the ways to a file and to other shapes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, Self

import torch

from . import checks
from .calls.converting import converted
from .calls.token_lists import are_token_lists, stacked_tokens, token_lists
from .calls.trace_data import TraceData
from .errors import (
    MergeError,
    ModelError,
    SelectionError,
    TraceFileError,
    TraceWriteError,
    UnfitTokensWarning,
)
from .recording.selection import device_here, floating
from .recording.session import Session
from .recording.token_fit import unfit_tokens
from .taps.active import current


class Trace(TraceData):
    """Calls in execution order, and what is needed to read them.

    Attributes:
        calls: the calls.
        skipped: attention that ran and could not be read, with the reason.
        tokens: one list of token strings per batch entry, or None.
        output: what the traced forward returned (of the last one; not saved).
        model: class name of the model, its configuration, and the versions of the libraries that ran it.
        notes: what holds for the whole trace.
        selection: what was asked for.
        path: the file it is in, if it is in one.
        stack_tokens: stack → token strings of the sequence that it reads, in the form of ``tokens``, where they were
            given stack by stack: of the decoder of a translation, say, whose encoder reads ``tokens``.
        segments: of a pair of texts, for each of ``tokens`` the number of the text that it is of, from 0, or −1 for
            padding; None: separators among the tokens tell, or there is no pair.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """As any attribute; what is set as ``tokens`` or ``stack_tokens`` is taken in the forms that ``tokens=`` takes.

        Raises:
            InputError: it is none of these. Lists that fit no call of the trace are told by an UnfitTokensWarning.
        """
        if name not in ("tokens", "stack_tokens"):
            return super().__setattr__(name, value)
        if name == "stack_tokens" and not isinstance(value, Mapping):
            raise checks.wrong("stack_tokens", value, "lists of token strings by the names of stacks")
        named: Mapping[str, Any] = {}
        if isinstance(value, Mapping):
            own, named = stacked_tokens(value)
            super().__setattr__("stack_tokens", named)
        else:
            own = value if are_token_lists(value) else token_lists(value)
        if name == "tokens":
            super().__setattr__("tokens", own)
        # While a trace is being made there is nothing yet that they could fit.
        if vars(self).get("calls") and value and "segments" in vars(self):
            for line in unfit_tokens(self, named):
                warnings.warn(line, UnfitTokensWarning, stacklevel=2)

    @contextmanager
    def step(self) -> Iterator[int]:
        """What the model runs in the block is one step, whatever runs there and how often; gives its number.

        ::

            with hookattn.tracing(model) as trace:
                for picture, text in pairs:
                    with trace.step():
                        model.encode_image(picture)
                        model.encode_text(text)

        Raises:
            ModelError: this trace does not run in this thread; or inside another such block, or while the model runs.
        """
        running = current()
        if not isinstance(running, Session) or running.trace is not self:
            raise ModelError("trace.step() is for the block of the tracing() that gave this trace, in its own thread.")
        with running.step() as number:
            yield number

    def stitch(self, *, beams: Any = None, length: int | None = None) -> Self:
        """One T×S picture of a generation for each site: all its steps put together, as one forward would have them.

        Args:
            beams: ``beam_indices`` of a beam search; False: rows were never reordered, which is checked where keys were
                captured; None: the keys tell.
            length: how many positions are kept; for assisted decoding one less than the final sequence has.

        Raises:
            StitchError, FieldNotCaptured: see :func:`hookattn.generation.stitch.stitch`, which has the whole story.
        """
        from .generation.stitch import stitch

        return stitch(self, beams=beams, length=length)

    def split(self, by: str = "request") -> dict[str, Self]:
        """One trace for each request of a server whose batches have several; each stitches by itself.

        Of every call it has the batch entries of its request alone, without what fills these up to the longest of the
        batch, as parts that are read when they are asked for (a certificate is that of the whole call). Steps keep the
        numbers that they have in this trace, so that they say when a request ran; steps in which it took no part are
        not there, and calls are numbered anew. Tokens are those of its entry, where it was the same one in all steps.

        Args:
            by: ``"request"``, by ``call.requests``: what vLLM's tap records, and
                :func:`hookattn.serving.requests_of_batch` says.

        Returns:
            The name of each request, in the order in which they first ran, with its trace.

        Raises:
            SelectionError: there are no calls, some say no request, or ``by`` is something else.
            FieldNotCaptured: how long each entry of a batch is was not recorded, and its mask was not captured.
        """
        from .generation.split import split

        return split(self, by)

    def to(
        self, device: str | torch.device | torch.dtype | int | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The trace on another device, in another dtype, or both: ``trace.to("cpu")``, ``trace.to(torch.float16)``.

        Certificates are those of the trace itself: all are measured now, on the numbers that the kernel had. A narrower
        dtype rounds what is read, which they say nothing of; ``selection["dtype"]`` says it, as with ``dtype=`` of
        :func:`hookattn.trace`. With a dtype, scores and weights are derived first and rounded then, and not derived of
        rounded q and k. Masks and what counts (of top keys, say) keep their dtypes, and ``call.dtype`` that the kernel
        ran in.

        Args:
            device: a device or its name; or a floating dtype; by default each tensor stays where it is.
            dtype: a floating dtype for all floating fields; by default each keeps its own.

        Returns:
            A trace of the same calls; this one is left as it is. What is in memory is copied there now (tensors that
            are there already are shared), what is in a file is brought there when it is read. ``output``, what the
            forward returned, stays with this one.

        Raises:
            SelectionError: there is no such device, the dtype is no floating one, or neither is given.
            TraceTooLargeError: there is no memory to derive a call's scores or weights.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise SelectionError(f"to({device}, dtype={checks.printed(dtype)}): expected one dtype.")
            device, dtype = None, device
        if device is None and dtype is None:
            raise SelectionError("to(): expected a device, a floating dtype, or both.")
        return converted(self, device_here(device), floating(dtype))

    def to_pandas(self, field: str = "weights", *, masked: bool = False) -> Any:
        """A long table: one row for each weight, or for each number of another field.

        Args:
            field: ``weights``, ``applied``, ``scores`` or ``mask``, or a statistic that was captured.
            masked: whether pairs that the mask hides have rows, too.

        Returns:
            A pandas DataFrame: ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``batch``, ``head``,
            ``query`` and ``query_token``, ``key`` and ``key_token`` (those that the field has; None where nobody knows
            a token), ``value``. Heads and queries have the model's own numbers.

        Raises:
            SelectionError: no such field, no calls, or more than twenty million rows; ``trace.select(…)`` takes a part.
            FieldNotCaptured: it is not in the trace. ModuleNotFoundError: pandas is missing.
        """
        from .interop.tables import to_pandas

        return to_pandas(self, field, masked)

    def to_xarray(self, field: str = "weights") -> Any:
        """The weights of all layers, or another field, as one labelled array.

        Args:
            field: as in :meth:`to_pandas`.

        Returns:
            An ``xarray.DataArray``: layer, batch, head, query, key (those axes that the field has), with the model's
            numbers as coordinates, ``path`` of each layer, and ``query_token`` and ``key_token`` where there are any.

        Raises:
            SelectionError: no such field; or calls of several stacks, kinds, steps or shapes, which
                ``trace.select(stack=…, kind=…, step=…)`` tells apart.
            FieldNotCaptured: it is not in the trace. ModuleNotFoundError: xarray is missing.
        """
        from .interop.tables import to_xarray

        return to_xarray(self, field)

    def to_transformer_lens(self, model: Any = None, *, rotary: bool | None = None) -> Any:
        """An ``ActivationCache`` with transformer-lens' hook names: ``blocks.0.attn.hook_pattern`` and its kin.

        Args:
            model: the bridge that was traced; it says whether positions are rotary.
            rotary: the same, in a word.

        Raises:
            ImportError, SelectionError: see :func:`hookattn.interop.transformer_lens.to_transformer_lens`.
        """
        from .interop.transformer_lens import to_transformer_lens

        return to_transformer_lens(self, model, rotary=rotary)

    def save(self, path: str | PathLike[str], *, compact: bool = False) -> str:
        """Write the trace to one safetensors file.

        Args:
            path: the file; an older one is replaced only when the new one is complete.
            compact: leave out scores and weights that can be derived from the other fields; they are derived on access
                (to within rounding, where the model formed them itself).

        Returns:
            The path.

        Raises:
            TraceWriteError: the file could not be written; nothing is left under its name.
            InputError: ``path`` is no path, or ``compact`` no flag.
            TraceTooLargeError: there is no memory to derive one call's scores or weights; likewise. ``compact=True``
                derives none.
        """
        checks.path("path", path, TraceWriteError)
        checks.flag("compact", compact)
        from .store.document import save

        return save(self, path, compact=compact)


def load(path: str | PathLike[str]) -> Trace:
    """Open a trace file. Fields are memory-mapped: reading one head reads the bytes of one head.

    Raises:
        CorruptFileError: damaged or cut short.
        ForeignFileError: not a trace.
        NewerFormatError: written in a newer format than this version reads.
        TraceFileError: cannot be opened.
        InputError: ``path`` is no path.
    """
    checks.path("path", path, TraceFileError)
    from .store.restore import load as restored

    return restored(path, Trace)


def merge(traces: TraceLike | Iterable[TraceLike], *, steps: str | None = None) -> Trace:
    """One trace of those of the ranks of a sharded model, equal to that of the model in one process.

    Calls are paired by path, step and their number in it; ``call.shards`` says which part each rank has. Heads (tensor
    parallelism), query rows (context parallelism) and batch entries (data parallelism) are put together in the order of
    the model, key heads that several ranks have a copy of once. Sites that are on some ranks alone (the stages of a
    pipeline) are all there, layer after layer. A merged call has no ``shards``, and ``heads=None`` where all heads are
    there; its certificate is the worst of the ranks'. What the traced forwards returned is not kept.

    Of files nothing but the headers is read: a field is read, and put together, when it is asked for, and of a part
    (``call.at``) that part alone. ``save`` writes it call by call. The files have to stay as long as the trace is used.

    Args:
        traces: of all ranks, in any order, or the paths of their files; one trace alone for ``steps="batches"``.
        steps: ``"batches"``: steps are microbatches, whose batch entries are put one after the other, so that each site
            has one call; None: steps stay steps.

    Raises:
        MergeError: a rank is missing or there twice, ranks overlap or are of different runs, where a part belongs is
            not known, or nothing is sharded; says which, and what to do.
        InputError: ``traces`` is something else.
        SelectionError: ``steps`` is another word.
        TraceFileError: a file is no trace, or cannot be opened.
    """
    from .merging.merge import merge as merged

    batches = steps is not None and checks.word("steps", steps, ("batches",)) == "batches"
    several = [traces] if isinstance(traces, (Trace, str, PathLike)) else None
    if several is None and not isinstance(traces, Mapping):
        several = checks.items_of(traces)
    expected = "traces, or paths of trace files, of all ranks"
    if several is None:
        raise checks.wrong("traces", traces, expected)
    if not several:
        raise MergeError("traces is empty: expected " + expected + ".")
    return merged([as_trace(trace, "traces") for trace in several], batches=batches)


def concat(traces: Iterable[TraceLike], *, dim: str) -> Trace:
    """One trace of several of one model over different inputs; what is in a file is read when it is asked for.

    - ``dim="batch"``: their calls are the same (paths, steps, numbers of queries and keys), and each becomes one call
      with the batch entries of all, in the order of the traces. Tokens, requests, lengths and edits are of these
      entries; a certificate is the worst of theirs.
    - ``dim="step"``: all calls of the first, then all of the second, and so on. Steps are numbered anew, without gaps.
      Inputs may have any lengths. Tokens are kept where all have the same: a trace has none of its own for each step.

    Skipped sites and notes are joined, with the name of the trace where not all have a note. ``output`` is not kept.
    Files have to stay as long as the trace is used; ``save`` writes it call by call.

    Args:
        traces: traces, or the paths of their files; at least one. They are left as they are.
        dim: ``"batch"`` or ``"step"``.

    Raises:
        MergeError: they are of different models or selections, or do not fit along ``dim``; names the traces, the call
            and the field, and what to do.
        InputError: ``traces`` is something else, or empty.
        SelectionError: ``dim`` is another word.
        TraceFileError: a file is no trace, or cannot be opened.
    """
    from .merging.concat import DIMS
    from .merging.concat import concat as joined

    checks.word("dim", dim, DIMS)
    several = None if isinstance(traces, (Trace, Mapping)) else checks.items_of(traces)
    if not several:
        raise checks.wrong("traces", traces, "several traces, or paths of trace files")
    return joined([as_trace(trace, "traces") for trace in several], dim)


TraceLike = Trace | str | PathLike[str]
"""What takes a trace takes the path of its file as well."""


def as_trace(trace: TraceLike, name: str = "trace") -> Trace:
    """A trace, or the one in a file: what every function begins with that reads one.

    Args:
        trace: either.
        name: of the argument.

    Raises:
        InputError: neither.
        TraceFileError: the file is no trace, or cannot be opened.
    """
    if isinstance(trace, Trace):
        return trace
    if isinstance(trace, (str, PathLike)):
        return load(trace)
    raise checks.wrong(name, trace, "a Trace, or the path of a trace file")
