"""From pieces of words to words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from torch import Tensor

from ...attention.functional import compute_dtype
from ...calls.certificate import UNVERIFIED
from ...calls.edits import AppliedEdit
from ...errors import MeasureError
from ...tokens.words import Words, given_words, split_words
from ...traces import as_trace
from ..call_view import View
from ..frame import views
from ..labels import PADDING, Rows, as_label_rows, key_labels

if TYPE_CHECKING:
    from ...traces import Trace, TraceLike


def pool_words(trace: TraceLike, words: Any = None) -> Trace:
    """A trace of words: attention to a word is the sum over its pieces, from a word the mean (Clark et al. 2019).

    Args:
        trace: with weights, each call with all queries and keys of one sequence (a generation: ``trace.stitch()``).
        words: for each token the id of its word, as ``BatchEncoding.word_ids()`` has it (None: a special token, a word
            of its own); one list, or one for each batch entry; None: found from the trace's tokens, see
            :mod:`hookattn.tokens.words`.

    Returns:
        A trace of as many calls, with ``weights`` (B H W W, float32, or float64 for a model in that; rows sum to what
        those of the pieces do), ``mask`` (where some piece may attend to some piece) and the words as tokens. A batch
        entry of fewer words than W has ``[PAD]`` at its end, which nothing may attend to.

    Raises:
        MeasureError: the words don't fit a call, or a call has not all queries and keys of one sequence.
        FieldNotCaptured: the weights were not kept.
    """
    trace = as_trace(trace)
    given = None if words is None else as_label_rows(words, "words")
    calls, texts = [], None
    for view in views(trace):
        found = words_of(view, given)
        weights, mask = word_weights(view, found)
        w = weights.shape[-1]
        texts = [[*x.texts, *[PADDING] * (w - len(x.texts))] for x in found]
        calls.append(
            replace(
                view.call,
                fields={"weights": weights, "mask": mask},
                beside={},
                derivable=(),
                kv_heads=None,
                queries=None,
                of_queries=None,
                keys=None,
                certificate=UNVERIFIED,
                edits=tuple(map(_of_words, view.call.edits)),
                notes=(*view.call.notes, "weights of words, pooled from those of their pieces"),
            )
        )
    return replace(trace, calls=calls, tokens=texts, path=None)


def _of_words(edit: AppliedEdit) -> AppliedEdit:
    """An edit of pieces, whose numbers no words have."""
    if edit.queries is edit.keys is None:
        return edit
    note = f"{edit.note}, of some queries or keys".removeprefix(", ")
    return replace(edit.numbered(queries=None, keys=None), note=note)


def words_of(view: View, given: Rows | None = None) -> list[Words]:
    """The words of each batch entry of a call.

    Args:
        view: the call.
        given: ids of words for each token; None: found from the trace's tokens.

    Raises:
        MeasureError: there are no tokens, or they don't fit.
    """
    found = key_labels(view, given, "tokens" if given is None else "words")
    if isinstance(found, str):
        raise MeasureError(f"words of {view.where}: {found}.")
    if given is None:
        return [split_words(row) for row in found]
    tokens = key_labels(view)
    texts: Sequence[Any] = [None] * len(found) if isinstance(tokens, str) else tokens
    return [given_words(text, row) for text, row in zip(texts, found, strict=True)]


def word_weights(view: View, words: Sequence[Words]) -> tuple[Tensor, Tensor]:
    """The weights of words, B H W W, and where they may attend, bool, B (1 or H) W W; W is that of the longest entry.

    Args:
        view: the call.
        words: of each batch entry.

    Raises:
        MeasureError: the call has not all queries and keys of one sequence.
    """
    b, _, t, s = view.shape
    places = view.positions
    if places is None or t != s or bool((places.cpu() != torch.arange(s)).any()):
        raise MeasureError(
            f"words of {view.where}: its {t} queries are not the tokens of its {s} keys; trace self-attention with all "
            "queries, and put a generation together with trace.stitch() first."
        )
    of = torch.tensor([x.of for x in words], device=view.mask.device)
    numbers = torch.arange(max(len(x.texts) for x in words), device=of.device)
    # To a word: the sum over its pieces; from a word: their mean. Both are products with which piece is of which word.
    member = (of.unsqueeze(-1) == numbers).to(compute_dtype(view.call.dtype))  # B S W
    mean = member / member.sum(1, keepdim=True).clamp_min(1)
    mask = view.mask.expand(b, -1, t, s).to(member.dtype)
    weights = torch.cat([_between_words(part.weights, member, mean) for part in view.parts()], 1)
    return weights, _between_words(mask, member, member) > 0


def _between_words(x: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """B H W W of B H T S, by which piece is of which word, B S W, and B T W."""
    to_words = einsum(x, to.to(x.dtype), "b h t s, b s w -> b h t w")
    made: Tensor = einsum(of.to(x.dtype), to_words, "b t source, b h t target -> b h source target")
    return made
