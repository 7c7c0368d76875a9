"""``trace`` and ``tracing``: the two ways in."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .describe import describe_model
from .errors import (
    HookattnError,
    InputError,
    NoAttentionError,
    SelectionError,
    SkippedWarning,
    UnfaithfulWarning,
)
from .guard import Guard
from .inspection import check_meta, make_plan
from .selection import Selection
from .session import Session
from .statistics.base import Statistic
from .traces import Trace

_VERIFY = ("sample", "full", "off")


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
    tokens: Sequence[Any] | None = None,
    verify: str = "sample",
    strict: bool = False,
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
        to: stream to this file, call by call, instead of holding the fields in memory.
        tokens: token strings, one list for all batch entries or one each; taken from a BatchEncoding if it has them.
        verify: ``"sample"`` checks some query rows of every call against the model's own kernel, ``"full"`` all rows,
            ``"off"`` none.
        strict: raise if a call is not faithful, instead of warning.

    Returns:
        A Trace.

    Raises:
        ModelError: a scripted module, parameters on the meta device; NoAttentionError: no attention ran.
        InputError: the inputs do not fit the forward's signature.
        SelectionError: an unknown field, layer or head, or an empty selection.
        UnfaithfulError: with ``strict``.
        TraceTooLargeError: there is no room for it; raised at the first large call, and says what would fit.
        TraceWriteError: the file of ``to`` could not be written.
    """
    args, kwargs = _arguments(inputs)
    if any(isinstance(a, (str, list)) for a in (*args, *kwargs.values())) and isinstance(model, nn.Module):
        _check_fit(model, args, kwargs)  # text, which a forward may choke on much later
    with tracing(
        model,
        capture=capture,
        layers=layers,
        heads=heads,
        queries=queries,
        dtype=dtype,
        device=device,
        to=to,
        tokens=tokens if tokens is not None else _tokens_of(inputs),
        verify=verify,
        strict=strict,
    ) as made:
        try:
            made.output = model(*args, **kwargs)
        except TypeError:
            _check_fit(model, args, kwargs)
            raise
    return made


@contextmanager
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
    tokens: Sequence[Any] | None = None,
    verify: str = "sample",
    strict: bool = False,
) -> Iterator[Trace]:
    """Trace every forward of ``model`` in the block (each is one step), ``generate()`` included.

    The Trace is complete when the block ends. Arguments and errors are those of :func:`trace`. If the block raises, the
    model is left clean and no file is left.
    """
    if verify not in _VERIFY:
        raise SelectionError(f"verify={verify!r}: expected one of {', '.join(map(repr, _VERIFY))}.")
    plain = capture is None or (isinstance(capture, tuple) and all(type(x) is str for x in capture))
    if plain and all(x is None for x in (layers, heads, queries, dtype, device)):
        selection = _fields_alone(capture)  # type: ignore[arg-type]
    else:
        selection = Selection.of(capture, layers, heads, queries, dtype, device)
    plan = make_plan(model)
    made = Trace(tokens=_token_lists(tokens), model=describe_model(model), selection=selection.to_json())
    stream = None
    if to is not None:
        from .store.stream import Stream

        stream = Stream(to, made)
    sink = None if stream is None else stream.add
    session = Session(plan, made, selection, verify, strict, sink, Guard(selection, to))
    try:
        session.start()
        try:
            yield made
        except Exception as error:
            if not isinstance(error, HookattnError):
                check_meta(model)  # the reason, then
                error.add_note(
                    "hookattn: raised by the model or the traced block itself; nothing is left on the model."
                )
            raise
        finally:
            session.stop()
        session.finish()
        _check_result(session)
        if stream is not None:
            stream.finish()
    finally:
        session.close()
        if stream is not None:
            stream.close()
    _warn(made)


@functools.lru_cache(maxsize=64)
def _fields_alone(capture: tuple[str, ...] | None) -> Selection:
    return Selection.of(capture)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    return (inputs,), {}


def _check_fit(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [*args, *kwargs.values()]
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit {type(model).__name__}.forward{signature}: {error}; got {_shape_of(args, kwargs)}. "
            "Pass a tensor, a tuple of arguments, or a dict of keyword arguments."
        ) from error
    text = [a for a in given if isinstance(a, str) or (isinstance(a, (list, tuple)) and a and _strings(a))]
    if text and len(text) == len(given) and not any("str" in str(p.annotation) for p in signature.parameters.values()):
        raise InputError(f"the inputs hold text ({str(text[0])[:40]!r}); tokenize it first and pass the tensors.")


def _shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def one(x: Any) -> str:
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__

    return ", ".join([one(a) for a in args] + [f"{k}={one(v)}" for k, v in kwargs.items()]) or "nothing"


def _tokens_of(inputs: Any) -> list[list[str]] | None:
    encodings = getattr(inputs, "encodings", None)
    return [list(e.tokens) for e in encodings] if encodings else None


def _token_lists(tokens: Sequence[Any] | None) -> list[list[str]] | None:
    if tokens is None:
        return None
    rows = [tokens] if _strings(tokens) else tokens
    if isinstance(rows, str) or not isinstance(rows, Iterable) or not all(map(_strings, rows)):
        raise InputError(
            "tokens has to be a list of strings, one for each position, or one such list for each batch "
            f"entry; got {str(tokens)[:60]!r}."
        )
    return [list(row) for row in rows]


def _strings(x: Any) -> bool:
    return isinstance(x, Iterable) and not isinstance(x, str) and all(isinstance(t, str) for t in x)


def _check_result(session: Session) -> None:
    made = session.trace
    absent = [i for i in session.selection.layers or () if i not in session.matched]
    if session.recorded and absent:
        raise SelectionError(
            f"layers={list(session.selection.layers or ())}: there is no layer {absent[0]}; of the {session.recorded} "
            f"attention calls that ran, the last layers are {session.numbering}."
        )
    if made.calls:
        return
    if session.recorded == 0 and not made.skipped:
        check_meta(session.plan.model)
        if session.step < 0 and not session.ran:
            raise NoAttentionError("the model was never called while it was traced.")
        raise NoAttentionError(
            f"no attention ran in {type(session.plan.model).__name__}: no scaled_dot_product_attention, multi-head or "
            "flex attention, and no softmax over a product. A compiled extension "
            "that attends can't be seen."
        )


def _warn(made: Trace) -> None:
    bad = [c for c in made.calls if c.certificate.status == "unfaithful"]
    for call in bad[:3]:
        warnings.warn(
            f"{call.site.label} (step {call.step}, tap {call.tap}) is {call.certificate}",
            UnfaithfulWarning,
            stacklevel=4,
        )
    if len(bad) > 3:
        warnings.warn(f"{len(bad) - 3} more calls are unfaithful", UnfaithfulWarning, stacklevel=4)
    if made.skipped:
        first = made.skipped[0]
        warnings.warn(
            f"{len(made.skipped)} attention site(s) could not be read, for example {first.path or '<model>'}: "
            f"{first.reason}; see trace.skipped",
            SkippedWarning,
            stacklevel=4,
        )
