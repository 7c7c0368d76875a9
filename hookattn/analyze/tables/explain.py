"""Why each key weighs what it does: the lens of the figures and of the viewer, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from ...calls.part import Part, Where, parts_of
from ...calls.verdicts import check_softmax, verdicts
from ...traces import as_trace
from ..frame import place_columns, table_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


def explain(trace: TraceLike, **where: Unpack[Where]) -> DataFrame:
    """Why a query gives each key the weight that it gives it: a word for each key, and the numbers behind it.

    The words are those of :class:`hookattn.calls.verdicts.Verdicts`: attended, drained, outscored, masked, edited.

    ::

        table = hookattn.analyze.explain(trace, layer=1, heads=2, queries=-1)
        print(table.nlargest(5, "weight")[["target", "weight", "verdict", "score", "rival", "rival_score"]])

    Args:
        trace: with scores and weights, or what these are derived from, and the mask.
        **where: which rows: :class:`hookattn.calls.part.Where`. Without ``queries`` it is the last one, in every call
            and head that fits. ``keys`` are those that are listed; all of them are reasons.

    Returns:
        A DataFrame: the columns of the call, ``head``, ``query`` and ``token`` (its place and label), ``key`` and
        ``target`` likewise, ``score``, ``allowed`` (False: the mask hides the key; missing: no mask was kept),
        ``weight``, ``verdict``, ``rank`` (of the score among the keys that are allowed, from 1; of one that is masked,
        which it would be), ``rival`` and ``rival_score`` (the allowed key other than this one that scores most; missing
        where there is none), ``softmax`` (``exp(score) / Σ exp(score)`` over the allowed keys and a learned sink, of a
        masked key as if it were one of them), and, alike for a row, ``equal_share`` (1/n), ``first_key`` (what the
        first key takes, where that is an equal share or more) and ``learned_sink`` (what that takes).
        ``attrs["units"]`` has the units.

    Raises:
        SelectionError: nothing fits; or weights that are no softmax, in which keys do not outscore each other.
        FieldNotCaptured: scores or weights are not in the trace; names the ``capture=``.
    """
    import pandas as pd

    if where.get("queries") is None:
        where["queries"] = -1
    frames = []
    for part in parts_of(as_trace(trace), **where):
        check_softmax(part, "explain")
        frames += [table_of(_columns(one, query)) for one in part.each_head() for query in part.rows]
    table = pd.concat(frames, ignore_index=True)
    shares = ("weight", "softmax", "equal_share", "first_key", "learned_sink")
    logarithms = dict.fromkeys(("score", "rival_score"), "ln of a weight")
    table.attrs["units"] = {**logarithms, **dict.fromkeys(shares, "share")}
    return table


def _columns(part: Part, query: int) -> dict[str, Any]:
    """One query of one head, a row for each key that is listed."""
    # Of this query alone: the other rows of a long call are many times as much.
    weights, scores = (part.tensor(name, query)[0, 0] for name in ("weights", "scores"))
    hidden = part.hidden(query)
    away = None if hidden is None else hidden[0, 0]
    judged = verdicts(part, query, weights, away)
    rank, rival, softmax = _standing(scores, away, part.learned_sink(query))
    keys = list(part.columns)
    rivals = [None if j < 0 else j for j in rival[keys].tolist()]
    return {
        **place_columns(part.call),
        "head": part.heads[0],
        "query": (part.call.queries or range(query + 1))[query],
        "token": part.queries[query],
        "key": keys,
        "target": [part.keys[j] for j in keys],
        "score": scores[keys].numpy(),
        "allowed": None if away is None else (~away)[keys].numpy(),
        "weight": weights[keys].numpy(),
        "verdict": [judged.words[j] for j in keys],
        "rank": rank[keys].numpy(),
        "rival": [None if j is None else part.keys[j] for j in rivals],
        "rival_score": [torch.nan if j is None else float(scores[j]) for j in rivals],
        "softmax": softmax[keys].numpy(),
        "equal_share": 1 / judged.allowed if judged.allowed else torch.nan,
        "first_key": judged.first,
        "learned_sink": judged.learned,
    }


def _standing(scores: Tensor, away: Tensor | None, sink: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """S each: the rank among the allowed keys, the strongest other one (−1: there is none), and the softmax."""
    allowed = torch.ones_like(scores, dtype=torch.bool) if away is None else ~away
    among = torch.where(allowed, scores, -torch.inf)
    # A rank is one more than how many allowed scores are larger; of equal ones all have the same.
    larger = len(scores) - torch.searchsorted(among.sort().values, scores, right=True)
    rank = larger + 1
    rival = torch.full((len(scores),), -1)
    order = torch.where(allowed)[0][scores[allowed].argsort(descending=True, stable=True)]
    if len(order):
        rival[:] = order[0]
        rival[order[0]] = order[1] if len(order) > 1 else -1
    lse = torch.logsumexp(among if sink is None else torch.cat([among, among.new_tensor([sink])]), 0)
    softmax = torch.where(allowed, (scores - lse).exp(), torch.sigmoid(scores - lse))
    return rank, rival, softmax
