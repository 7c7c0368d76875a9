"""Tables of edges: from a query to a key, in one head of one call, the largest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import checks
from ...traces import Trace
from ..call_view import View
from ..frame import call_columns, table_of
from ..labels import named_keys, named_queries

if TYPE_CHECKING:
    from pandas import DataFrame

BY = ("head", "edge")


def checked_top(top: Any) -> int:
    """How many edges are wanted.

    Raises:
        SelectionError: no number of them.
    """
    return checks.whole("top", top, 1, "how many edges, an int from 1")


def edge_table(trace: Trace, values: Mapping[str, Sequence[Tensor | None]], top: int) -> DataFrame:
    """The edges with the largest magnitudes of all calls.

    Args:
        trace: whose calls they are.
        values: column → for each call B H T S; the first column ranks. None: the call is left out.
        top: how many rows.

    Returns:
        A pandas DataFrame with ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``head``, ``example``,
        ``query`` and ``token`` (its position and text), ``key`` and ``target`` (its position and text), and the
        columns; text is missing where there is none.
    """
    import pandas as pd

    first = next(iter(values))
    frames = []
    for i, call in enumerate(trace.calls):
        ranked = values[first][i]
        if ranked is None:
            continue
        places = ranked.abs().flatten().topk(min(top, ranked.numel())).indices
        b, h, t, s = (x.tolist() for x in torch.unravel_index(places, ranked.shape))
        view = View(call, trace)
        keys, queries = named_keys(view), named_queries(view)
        heads = call.heads or range(ranked.shape[1])
        rows = view.positions
        at = [list(view.queries)] * len(queries) if rows is None else rows.expand(len(queries), -1).tolist()
        made: dict[str, Any] = {
            **call_columns(view),
            "head": [heads[n] for n in h],
            "example": b,
            "query": [at[e][q] for e, q in zip(b, t, strict=True)],
            "token": [queries[e][q] for e, q in zip(b, t, strict=True)],
            "key": s,
            "target": [None if isinstance(keys, str) else keys[e][k] for e, k in zip(b, s, strict=True)],
        }
        for name, several in values.items():
            x = several[i]
            assert x is not None
            made[name] = x.detach().double().flatten()[places].cpu().numpy()
        frames.append(table_of(made))
    table = pd.concat(frames, ignore_index=True)
    order = table[first].abs().sort_values(ascending=False, kind="stable").index[:top]
    return table.loc[order].reset_index(drop=True)
