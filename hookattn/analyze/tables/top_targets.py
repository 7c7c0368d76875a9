"""What a token looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import checks
from ... import statistics as st
from ...calls.key_tokens import lists_of_queries
from ...errors import MeasureError, SelectionError
from ...tokens.words import split_words
from ..call_view import View
from ..frame import call_columns, table_of, views
from ..labels import named_keys, named_queries

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


def top_targets(trace: TraceLike, of: str | int, k: int = 5, *, example: int = 0) -> DataFrame:
    """The keys that a token attends to most, in every layer and head.

    Args:
        trace: with weights, or the statistic ``TopK(k)``.
        of: a position, or a text: every token or word that is written so (``"it"``, also where the tokenizer has
            ``"Ġit"``).
        k: how many.
        example: the batch entry.

    Returns:
        A DataFrame: the columns of the call, ``head``, ``query`` and ``token`` (its position and text), ``rank`` from
        1, ``key`` and ``target`` (its position and text) and ``weight``. Keys without any weight are left out; text is
        missing where there is none. In cross-attention a position is that of a query.

    Raises:
        SelectionError: no query is at this position, no token is written so, or there is no such batch entry.
        MeasureError: a text is given, and the trace's tokens don't fit any call.
        FieldNotCaptured: neither weights nor the statistic were kept.
    """
    import pandas as pd

    k, example = checks.whole("k", k, 1), checks.whole("example", example)
    of = of if isinstance(of, str) else checks.whole("of", of, what="a position, or the text of a token")
    frames, why = [], ""
    for view in views(trace):
        if not 0 <= example < view.shape[0]:
            raise SelectionError(f"example={example}: {view.where} has {view.shape[0]} batch entries.")
        found = named_keys(view)
        tokens = None if isinstance(found, str) else found[example]
        if isinstance(of, str) and view.crosses:
            lists = lists_of_queries(view.traced, view.trace)
            names = named_queries(view)[example]
            if not any(names):
                why = why or f"{view.where}: {lists if isinstance(lists, str) else 'the tokens do not fit its queries'}"
                continue
            rows = [(row, view.queries[row]) for row in _written(of, names)]
        elif isinstance(of, str) and tokens is None:
            why = why or f"{view.where}: {found}"
            continue
        else:
            rows = _query_rows(view, example, of, tokens)
        for row, place in rows:
            frames.append(table_of(_target_columns(view, example, row, place, k, tokens)))
    if frames:
        return pd.concat(frames, ignore_index=True)
    if why:
        raise MeasureError(f"top_targets({of!r}): {why}.")
    raise SelectionError(f"top_targets({of!r}): no call of the trace has such a query.")


def _query_rows(
    view: View, example: int, of: str | int, tokens: tuple[str | None, ...] | None
) -> list[tuple[int, int]]:
    """The rows that are asked for, and their positions."""
    places = view.positions
    at = list(view.queries) if places is None else places[0 if len(places) == 1 else example].tolist()
    if isinstance(of, int):
        return [(row, place) for row, place in enumerate(at) if place == of]
    assert tokens is not None
    same = _written(of, tokens)
    return [(row, place) for row, place in enumerate(at) if place in same]


def _written(of: str, tokens: Sequence[str | None]) -> list[int]:
    """The places at which a text stands among tokens, of which the first are known."""
    known = tuple(token for token in tokens if token is not None)  # a prompt's tokens name the first keys
    words = split_words(known)
    # As the tokenizer has it, as the piece reads, or as the whole word that the piece is of.
    pieces = zip(known, words.pieces, words.of, strict=True)
    return [i for i, (token, piece, word) in enumerate(pieces) if of in (token, piece.strip(" "), words.texts[word])]


def _target_columns(
    view: View, example: int, row: int, place: int, k: int, tokens: tuple[str | None, ...] | None
) -> dict[str, Any]:
    weights, keys = _largest_weights(view, example, row, k)
    head = torch.tensor(list(view.heads)).unsqueeze(1).expand_as(keys)
    rank = torch.arange(1, keys.shape[1] + 1).expand_as(keys)
    some = weights != 0
    target = keys[some].tolist()
    return {
        **call_columns(view),
        "head": head[some].numpy(),
        "query": place,
        "token": named_queries(view)[example][row],
        "rank": rank[some].numpy(),
        "key": target,
        "target": [None if tokens is None else tokens[j] for j in target],
        "weight": weights[some].double().numpy(),
    }


def _largest_weights(view: View, example: int, row: int, k: int) -> tuple[Tensor, Tensor]:
    """H k: the largest weights of a row, and their keys."""
    if view.call.has("weights"):
        weights, keys = view.of_query(row, example).weights[0, :, 0].topk(min(k, view.shape[3]), -1)
        return weights.cpu(), keys.cpu()
    top = st.TopK(k)
    return view.stat(top)[example, :, row].cpu(), view.stat(top, field=top.fields[1])[example, :, row].cpu()
