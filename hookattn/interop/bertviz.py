"""A trace as BertViz takes attention: its head view and its model view."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..calls.part import Part, parts_of
from ..calls.trace_data import TraceData
from ..errors import SelectionError


def head_view(trace: TraceData, *, batch: int = 0, **options: Any) -> Any:
    """``bertviz.head_view`` of a trace.

    Args:
        trace: as for :func:`to_bertviz`.
        batch: which batch entry.
        options: of ``bertviz.head_view``: ``layer``, ``heads``, ``sentence_b_start``, ``html_action``, …; ``tokens``,
            ``encoder_tokens`` and ``decoder_tokens`` take the place of the trace's labels.

    Raises:
        ModuleNotFoundError: bertviz is not installed.
        SelectionError, FieldNotCaptured: as :func:`to_bertviz`.
    """
    from bertviz import head_view as view

    return view(**{**to_bertviz(trace, batch=batch), **options})


def model_view(trace: TraceData, *, batch: int = 0, **options: Any) -> Any:
    """``bertviz.model_view`` of a trace; everything else as for :func:`head_view`.

    Raises:
        ModuleNotFoundError: bertviz is not installed.
        SelectionError, FieldNotCaptured: as :func:`to_bertviz`.
    """
    from bertviz import model_view as view

    return view(**{**to_bertviz(trace, batch=batch), **options})


def to_bertviz(trace: TraceData, *, batch: int = 0) -> dict[str, Any]:
    """The arguments of ``bertviz.head_view`` and ``bertviz.model_view``.

    Args:
        trace: one step; one stack of self-attention, or any of an encoder's, a decoder's and their cross-attention.
        batch: which batch entry.

    Returns:
        ``attention`` (a list of 1 H T S, float32, one a layer) and ``tokens``; or ``encoder_attention``,
        ``decoder_attention`` and ``cross_attention``, what there is of them, with ``encoder_tokens`` and
        ``decoder_tokens``; and ``prettify_tokens=False``, as the labels are readable already.

    Raises:
        SelectionError: several steps, stacks that these views have no place for, layers of different shapes, or
            queries that are not the keys (a step with a cache: ``trace.stitch()`` puts steps together).
        FieldNotCaptured: the weights were not kept.
    """
    parts = parts_of(trace, batch=batch)  # checks both
    steps = sorted({part.call.step for part in parts})
    if len(steps) > 1:
        raise SelectionError(f"BertViz shows one step, and there are {steps}; select(step=…) or stitch() first.")
    crosses = [part for part in parts if part.call.site.crosses]
    others = [part for part in parts if part not in crosses]
    if not crosses:
        stacks = {(part.call.site.stack, part.call.site.kind) for part in others}
        if len(stacks) > 1:
            raise SelectionError(f"BertViz shows one stack, and there are {sorted(stacks)}; select(stack=…) one first.")
        return {"attention": _layers(others), "tokens": list(others[0].keys), "prettify_tokens": False}
    encoder = [part for part in others if part.call.site.stack == "encoder"]
    decoder = [part for part in others if part.call.site.stack == crosses[0].call.site.stack]
    if len(encoder) + len(decoder) < len(others):
        extra = sorted({part.call.site.stack for part in others if part not in encoder and part not in decoder})
        raise SelectionError(f"BertViz has no place for the stack {extra[0]!r} beside a cross-attention; leave it out.")
    made: dict[str, Any] = {"cross_attention": _layers(crosses, square=False), "prettify_tokens": False}
    made |= {"encoder_attention": _layers(encoder)} if encoder else {}
    made |= {"decoder_attention": _layers(decoder)} if decoder else {}
    queries = decoder[0].keys if decoder else crosses[0].queries
    return {**made, "encoder_tokens": list(crosses[0].keys), "decoder_tokens": list(queries)}


def _layers(parts: list[Part], square: bool = True) -> list[Tensor]:
    """The weights of each layer, all of one shape."""
    shapes = {(1, len(part.heads), len(part.queries), len(part.keys)) for part in parts}
    if len(shapes) > 1:
        raise SelectionError(f"BertViz stacks all layers, and these are of shapes {sorted(shapes)}; select some first.")
    t, s = next(iter(shapes))[2:]
    if square and t != s:
        raise SelectionError(
            f"BertViz has one list of tokens for queries and keys, and there are {t} queries and {s} keys; "
            "trace without queries=, or put the steps of a generation together with trace.stitch()."
        )
    # Of a call of its own each time, so that what was derived is held in the result alone.
    return [part.call.at().weights.detach().float().cpu() for part in parts]
