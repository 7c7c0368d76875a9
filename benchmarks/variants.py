"""What hookattn does with a forward, and what is read of it afterwards, from the least to the most.

A trace keeps q, k, v and output; what is asked for is derived and measured then. So each row that captures has one
beside it in which everything that was captured is read, and held.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hookattn
from hookattn import Trace, analyze, edit
from hookattn.edit import Edit
from hookattn.taps.active import paused

from .clock import Variant
from .models import sibling
from .peers import OUTPUT_ATTENTIONS, generating_peer, peers, same_fields

BASE = "untraced, sdpa"
EAGER = "untraced, eager"
UNTRACED = "untraced"
IDLE = "hooks installed, idle"
TAP = "tap only, in a block"
TAP_ONCE = "tap only"
QKV_BLOCK = "q k v, in a block"
BLOCK = "trace, in a block"
QKV_OFF = "q k v, no certificate"
QKV = "q k v"
QKV_READ = "q k v + read"
WEIGHTS = "weights"
WEIGHTS_READ = "weights + read"
TRACE = "trace"
CERTIFIED = "trace + certificates"
ONE_HEAD = "trace + one head"
ALL = "trace + all weights"
READ = "trace + all fields"
REPORT = "trace + report"
SAVED = "trace + save"
COMPACT = "trace + save, compact"
HOST = "trace, to the host"
DISK = "trace, to disk"
AFTER = "untraced, after all of these"
TRAINED = "untraced, forward and backward"
GRADIENTS = "trace with gradients, forward and backward"
GRADIENTS_READ = "the same + the gradient of all weights"
ATTACHED = "trace attached, forward and backward"
NO_EDITS = "edited, by nothing"
ONE_PATTERN = "edited: the pattern of one head is 0"
ONE_OUTPUT = "edited: the output of one head is 0"
ONE_EDGE = "edited: one edge of one layer is cut"
ALL_PATTERNS = "edited: all patterns of another run"

__all__ = ["OUTPUT_ATTENTIONS"]
_QKV = ("q", "k", "v")
_BARS = {BASE, BLOCK, TRACE, ALL, AFTER, OUTPUT_ATTENTIONS}


def fused_rows(model: nn.Module, x: Tensor, ends: bool = True) -> list[Variant]:
    """Every row of a case. The first runs a model of the same weights that is never traced; the last the traced one.

    *Idle* is a forward inside an open ``tracing()`` block whose hooks and patches are all in place and find, each, that
    nothing is traced. *Tap only* sees every kernel's arguments and makes a call of them that keeps nothing (``sinks``,
    which these models have none of). *In a block* leaves out what it costs to begin and end a trace.

    Args:
        ends: whether there are these rows, which tell where the time of a small forward goes.
    """
    fresh = sibling(model)
    rows = [Variant(BASE, lambda: fresh(x))]
    eager = sibling(model, "eager") if hasattr(model, "set_attn_implementation") else None
    if eager is not None:
        rows.append(Variant(EAGER, lambda: eager(x)))
    if ends:
        rows += [
            Variant(IDLE, lambda: model(x), lambda: _idle(model)),
            Variant(TAP, lambda: model(x), lambda: _block(model, x, capture="sinks", verify="off"), kept=0),
            Variant(QKV_BLOCK, lambda: model(x), lambda: _block(model, x, capture=_QKV)),
            Variant(BLOCK, lambda: model(x), lambda: _block(model, x)),
            _traced(TAP_ONCE, model, x, capture="sinks", verify="off"),
        ]
    rows += [
        _traced(QKV_OFF, model, x, capture=_QKV, verify="off"),
        _traced(QKV, model, x, capture=_QKV),
        _traced(QKV_READ, model, x, every_field, capture=_QKV),
        _traced(WEIGHTS, model, x, capture="weights"),
        _traced(WEIGHTS_READ, model, x, every_field, capture="weights"),
        *_traces(model, x),
    ]
    if x.is_cuda:
        rows.append(_traced(HOST, model, x, device="cpu"))
    rows += [_to_disk(model, x), Variant(AFTER, lambda: model(x))]
    if eager is not None:
        rows += peers(sibling(model), eager, x)
    return _with_context(rows)


def eager_rows(model: nn.Module, x: Tensor, ends: bool = True) -> list[Variant]:
    """Those of a model of transformers in eager: its scores and weights are its own.

    Args:
        ends: whether there is the row that leaves out what it costs to begin and end a trace.
    """
    fresh = sibling(model)
    rows = [
        Variant(EAGER, lambda: fresh(x)),
        *([Variant(BLOCK, lambda: model(x), lambda: _block(model, x))] if ends else ()),
        _traced(QKV, model, x, capture=_QKV),
        _traced(TRACE, model, x),
        _traced(ALL, model, x, all_weights),
        Variant(AFTER, lambda: model(x)),
        *same_fields(sibling(model), x),
    ]
    return _with_context(rows, {QKV, BLOCK, TRACE, ALL, AFTER})


def plain_rows(model: nn.Module, x: Any) -> list[Variant]:
    """Those of any model; ``x`` is its argument, or a tuple of several."""
    fresh, given = sibling(model), _arguments(x)
    rows = [
        Variant(UNTRACED, lambda: fresh(*given)),
        Variant(BLOCK, lambda: model(*given), lambda: _block(model, x)),
        _traced(TRACE, model, x),
        _traced(ALL, model, x, all_weights),
        Variant(AFTER, lambda: model(*given)),
    ]
    return _with_context(rows, {TRACE, AFTER})


def training_rows(model: nn.Module, x: Tensor) -> list[Variant]:
    """Those of a forward and a backward; what it leaves on the parameters is removed after the clock has stopped."""
    fresh = sibling(model)

    def row(name: str, of: nn.Module, then: Callable[[Trace], Any] | None = None, **options: Any) -> Variant:
        def run() -> Any:
            with torch.enable_grad():
                trace = hookattn.trace(of, x, **options) if then is not None else None
                out = of(x) if trace is None else trace.output
                out.logits.square().mean().backward()
                return trace, None if trace is None or then is None else then(trace)

        return Variant(name, run, after=partial(of.zero_grad, set_to_none=True))

    def as_it_is(trace: Trace) -> Trace:
        return trace

    rows = [
        row(TRAINED, fresh),
        row(TRACE, model, as_it_is),
        row(GRADIENTS, model, as_it_is, gradients=True),
        row(GRADIENTS_READ, model, all_gradients, gradients=True),
        row(ATTACHED, model, as_it_is, attached=True),
        row(AFTER, model),
    ]
    return _with_context(rows, {GRADIENTS, AFTER})


def edited_rows(model: nn.Module, x: Tensor) -> list[Variant]:
    """Those of a forward whose attention is changed; each makes the trace that ``hookattn.edited`` returns."""
    fresh, other = sibling(model), x.flip(-1)
    clean = hookattn.trace(model, other, capture="weights")
    layer = len(clean) // 3

    def row(name: str, *edits: Edit) -> Variant:
        return Variant(name, lambda: hookattn.edited(model, x, *edits))

    rows = [
        Variant(BASE, lambda: fresh(x)),
        Variant(TRACE, lambda: hookattn.trace(model, x)),
        row(NO_EDITS),
        row(ONE_OUTPUT, edit.zero("output", layer=layer, heads=1)),
        row(ONE_PATTERN, edit.zero("weights", layer=layer, heads=1)),
        row(ONE_EDGE, edit.knockout(layer=layer, queries=-1, keys=0)),
        row(ALL_PATTERNS, edit.freeze(clean)),
        Variant(AFTER, lambda: model(x)),
    ]
    return _with_context(rows, {ONE_PATTERN, AFTER})


def eager_generation_rows(model: nn.Module, x: Tensor, steps: int) -> list[Variant]:
    """Those of greedy generation in eager, each a whole ``generate()``."""
    fresh = sibling(model)
    run, traced = _generating(model, x, steps)
    rows = [
        Variant(EAGER, lambda: run(fresh)),
        Variant(QKV, lambda: traced(capture=_QKV)),
        Variant(TRACE, traced),
        Variant(ALL, lambda: traced(all_weights)),
        Variant(AFTER, lambda: run(model)),
        generating_peer(lambda **options: run(fresh, **options)),
    ]
    return _with_context(rows, {TRACE, AFTER})


def generation_rows(model: nn.Module, x: Tensor, steps: int) -> list[Variant]:
    """Those of greedy generation after a prompt, each a whole ``generate()``."""
    fresh, eager = sibling(model), sibling(model, "eager")
    run, traced = _generating(model, x, steps)
    rows = [
        Variant(BASE, lambda: run(fresh)),
        Variant(QKV_OFF, lambda: traced(capture=_QKV, verify="off")),
        Variant(QKV, lambda: traced(capture=_QKV)),
        Variant(TRACE, traced),
        Variant(CERTIFIED, lambda: traced(certificates)),
        Variant(ONE_HEAD, lambda: traced(one_head)),
        Variant(ALL, lambda: traced(all_weights)),
        Variant(READ, lambda: traced(every_field)),
        Variant(AFTER, lambda: run(model)),
        generating_peer(lambda **options: run(eager, **options)),
    ]
    return _with_context(rows)


# What is read of a trace; each returns what is held of it


def certificates(trace: Trace) -> Trace:
    """No number of any field: how faithful each call is."""
    return trace.certify()


def one_head(trace: Trace) -> Tensor:
    """The weights of one head of the last call."""
    return trace[-1].at(heads=0).weights


def all_weights(trace: Trace) -> Any:
    """What ``output_attentions=True`` returns."""
    return [call.weights for call in trace]


def every_field(trace: Trace) -> Any:
    """Every field that was captured, scores and weights included."""
    return [[call.get(name) for name in call.fields] for call in trace]


def all_gradients(trace: Trace) -> Any:
    """Of the weights of every call."""
    return [call.grad("weights") for call in trace]


def _traces(model: nn.Module, x: Tensor) -> list[Variant]:
    """The default trace, and what is done with it next."""
    weights = hookattn.plan(model, x, capture="weights").total
    derived = sum(call.derived for call in hookattn.plan(model, x).calls)
    return [
        _traced(TRACE, model, x),
        _traced(CERTIFIED, model, x, certificates),
        _traced(ONE_HEAD, model, x, one_head),
        _traced(ALL, model, x, all_weights, weights),
        _traced(READ, model, x, every_field, derived),
        _traced(REPORT, model, x, analyze.report),
        _saved(SAVED, model, x, compact=False),
        _saved(COMPACT, model, x, compact=True),
    ]


def _traced(
    name: str,
    model: nn.Module,
    x: Any,
    then: Callable[[Trace], Any] = lambda trace: trace,
    held: int = 0,
    **options: Any,
) -> Variant:
    """A trace, and something that is done with it, of which ``held`` more bytes are held."""
    kept = hookattn.plan(model, x, **{k: v for k, v in options.items() if k != "verify"}).in_memory + held
    there = _arguments(x)[0].is_cuda and options.get("device") == "cpu"

    def run() -> Any:
        trace = hookattn.trace(model, x, **options)
        return trace, then(trace)

    return Variant(name, run, kept=0 if there else kept, host=there * kept)


def _saved(name: str, model: nn.Module, x: Tensor, compact: bool) -> Variant:
    path, gone = _file()
    size = 0 if compact else hookattn.plan(model, x, to=path).total
    made = _traced(name, model, x, lambda trace: trace.save(path, compact=compact))
    return replace(made, after=gone, disk=size)


def _to_disk(model: nn.Module, x: Tensor) -> Variant:
    path, gone = _file()
    size = hookattn.plan(model, x, to=path).total
    return Variant(DISK, lambda: hookattn.trace(model, x, to=path), after=gone, kept=0, disk=size)


def _file() -> tuple[str, Callable[[], None]]:
    """A path, and a function that removes the file; its folder goes with the function."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "trace.safetensors")

    def gone() -> None:
        assert folder.name
        path.unlink(missing_ok=True)

    return os.fspath(path), gone


def _generating(model: nn.Module, x: Tensor, steps: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two functions: one runs ``generate()`` of the model it is given, the other that of ``model`` in a block."""

    def run(model: Any, **options: Any) -> Any:
        return model.generate(x, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, use_cache=True, **options)

    def traced(then: Callable[[Trace], Any] = lambda trace: trace, **options: Any) -> Any:
        with hookattn.tracing(model, **options) as trace:
            run(model)
        return trace, then(trace)

    return run, traced


def _with_context(rows: list[Variant], told: Collection[str] = _BARS) -> list[Variant]:
    """Bars are about the first row, which the others are compared with, and about those that are ``told``."""
    return [rows[0], *(replace(row, context=row.name not in told) for row in rows[1:])]


def _arguments(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@contextmanager
def _block(model: nn.Module, x: Any, **options: Any) -> Iterator[None]:
    given = _arguments(x)
    with hookattn.tracing(model, **options):
        model(*given)  # the first forward of a block looks things up
        if given[0].is_cuda:
            torch.cuda.synchronize()
        yield


@contextmanager
def _idle(model: nn.Module) -> Iterator[None]:
    with warnings.catch_warnings(), suppress(hookattn.NoAttentionError):  # what a block says that saw nothing
        warnings.simplefilter("ignore", hookattn.SkippedWarning)
        with hookattn.tracing(model, capture="sinks", verify="off"), paused():
            yield
