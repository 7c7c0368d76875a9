"""A trace as CircuitsVis takes attention patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np

from .. import checks
from ..calls.choose import parts_of_one_stack
from ..calls.part import Part, Where
from ..calls.trace_data import TraceData
from ..errors import SelectionError


def attention_heads(trace: TraceData, options: dict[str, Any] | None = None, **where: Unpack[Where]) -> Any:
    """``circuitsvis.attention.attention_heads`` of a trace.

    Args:
        trace: as for :func:`to_circuitsvis`.
        options: of ``attention_heads``: ``max_value``, ``positive_color``, …
        **where: what is shown: :class:`hookattn.calls.part.Where`.

    Raises:
        ModuleNotFoundError: circuitsvis is not installed.
        SelectionError, FieldNotCaptured: as :func:`to_circuitsvis`.
    """
    from circuitsvis.attention import attention_heads as view

    if options is not None:
        checks.one_of("options", options, Mapping, "a mapping of options of circuitsvis")
    return view(**{**to_circuitsvis(trace, **where), **(options or {})})


def to_circuitsvis(trace: TraceData, **where: Unpack[Where]) -> dict[str, Any]:
    """The arguments of ``circuitsvis.attention.attention_heads``: all heads of all layers that fit.

    Args:
        trace: self-attention of one stack and step.
        **where: what is shown: :class:`hookattn.calls.part.Where`.

    Returns:
        ``attention`` (heads T S, float32, numpy), ``tokens`` (T labels), ``attention_head_names`` ("L0H3"), and
        ``mask_upper_tri``, whether no query may attend to a later key.

    Raises:
        SelectionError: several stacks, kinds or steps, layers of different lengths, or queries that are not the keys.
        FieldNotCaptured: the weights were not kept.
    """
    parts = parts_of_one_stack(trace, "CircuitsVis", **where)
    sizes = {(len(part.rows), len(part.columns)) for part in parts}
    if len(sizes) > 1 or any(part.places is None or part.rows != part.columns for part in parts):
        raise SelectionError(
            f"CircuitsVis has one list of tokens for queries and keys, and queries × keys are {sorted(sizes)}; give "
            "one layer, no queries or keys, or put the steps of a generation together with trace.stitch()."
        )
    shown = [
        one.tensor("weights").float().numpy()[0][np.ix_(part.rows, part.columns)]
        for part in parts
        for one in part.each_head()
    ]
    return {
        "attention": np.stack(shown),
        "tokens": parts[0].column_labels,
        "attention_head_names": [f"L{part.call.site.layer}H{head}" for part in parts for head in part.heads],
        "mask_upper_tri": all(map(_hides_later_keys, parts)),
    }


def _hides_later_keys(part: Part) -> bool:
    if not part.call.has("mask"):
        return False
    mask = part.call.mask
    whole = mask.expand(1, mask.shape[1], len(part.queries), len(part.keys))
    return not bool(whole.triu(1).any())
