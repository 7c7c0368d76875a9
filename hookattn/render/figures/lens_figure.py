"""Why a weight is what it is: score, mask and weight of one query, key by key, and which of them decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...calls.part import Where
from ...calls.verdicts import ATTENDED, DRAINED, EDITED, HIDDEN, OUTSCORED, Verdicts, check_softmax, verdicts
from ...traces import TraceLike, as_trace
from ..palette import FAINT, GRID, HATCH, INK, MAY, SINK, WEIGHT
from .base import Heading, empty_sheet, in_own_style, name_artist, text_at
from .colours import show_masked
from .fitting import Width, fitted, text_width, title_of, width_in_inches
from .row import QueryRow, draw_bars, key_axes, key_label_width, label_keys, query_row
from .ticks import font_size

_SCORE, _MASK, _WEIGHT, _WHY, _GAP = 1.9, 0.36, 1.5, 1.0, 0.2
_TONES = {ATTENDED: INK, OUTSCORED: FAINT, DRAINED: SINK, HIDDEN: FAINT, EDITED: INK}


@in_own_style
def lens(trace: TraceLike, *, width: Width = None, title: str | bool = True, **where: Unpack[Where]) -> Figure:
    """One query of one head: score → mask → weight, and a word for each key. The words are those of
    :class:`hookattn.calls.verdicts.Verdicts`; :func:`hookattn.analyze.explain` has the same as a table.

    The dashed line is the log of the softmax's denominator: a weight is exp(score − line), so each unit to the left of
    it is a factor of e.

    Args:
        trace: in memory, loaded, or compact, with scores, mask and weights (or what these are derived from).
        width, title: as for :func:`hookattn.render.heatmap`.
        **where: what is drawn: :class:`hookattn.calls.part.Where`; ``heads`` and ``queries`` name one each, and
            without ``queries`` it is the last one.

    Returns:
        A figure.

    Raises:
        SelectionError: no one call, head or query; or weights that are no softmax, in which keys outscore each other.
        FieldNotCaptured: a field is not in the trace; names the ``capture=``.
        RenderError: it can't be so narrow.
    """
    wide = width_in_inches(width)
    found = query_row(as_trace(trace), "lens", **where)
    title = title_of(title, found.title)
    part = found.part
    check_softmax(part, "lens")
    hidden = None if found.hidden is None else torch.from_numpy(found.hidden)
    judged = verdicts(part, found.query, torch.from_numpy(found.weights), hidden)
    words, drain = judged.words, _drain(judged)
    return fitted(wide, lambda room: _draw(found, words, drain, title, room))


def _draw(found: QueryRow, words: Sequence[str], drain: Sequence[str], title: str, room: float | None) -> Figure:
    heading = Heading.of([found.part], title, [*found.notes, *drain]).within(room)
    left = 0.1 + key_label_width(found, room)
    score, weight, gap, why = _SCORE, _WEIGHT, _GAP, _WHY
    if room is not None:
        gap, why = 0.1, max(text_width(word, font_size(found.spacing), "bold") for word in words) + 0.05
        spare = max(0.7, room - left - _MASK - why - 4 * gap)
        score, weight = (part / (_SCORE + _WEIGHT) * spare for part in (_SCORE, _WEIGHT))
    top = heading.height + 0.25
    figure = empty_sheet(left + score + _MASK + weight + why + 4 * gap, top + found.height + 0.3)
    heading.draw(figure)
    label_keys(figure, left - 0.05, top, found, room)
    x = left
    _draw_scores(figure, x, top, found, score)
    x += score + gap
    _draw_mask(figure, x, top, found)
    x += _MASK + gap
    draw_bars(key_axes(figure, x, top, weight, found, "weight"), found, found.weights, "weight", WEIGHT)
    x += weight + gap
    text_at(figure, x, top - 0.05, "why", va="bottom", fontsize=6.8)
    for n, j in enumerate(found.keys):
        bold = "bold" if words[j] == ATTENDED else "normal"
        text_at(
            figure, x, top + (n + 0.5) * found.spacing, words[j], va="center", color=_TONES[words[j]],
            fontsize=font_size(found.spacing), fontweight=bold,
        )  # fmt: skip
    return figure


def _drain(judged: Verdicts) -> list[str]:
    """What goes elsewhere than to the keys that could use it, in words."""
    if not judged.allowed:
        return ["nothing to attend to"]
    said = [f"{judged.learned:.0%} goes to the learned sink"] if judged.learned else []
    return said + ([f"{judged.first:.0%} goes to the first key"] if DRAINED in judged.words and judged.first else [])


def _draw_scores(figure: Figure, x: float, y: float, found: QueryRow, across: float) -> None:
    """A dot for each score, and the log of the denominator."""
    axes = key_axes(figure, x, y, across, found, "score")
    hidden = np.zeros(len(found.scores), bool) if found.hidden is None else found.hidden
    away, scores = found.listed(hidden), found.listed(found.scores)
    at = np.arange(len(scores))
    for chosen, colour, name in ((~away, INK, "scores"), (away, HATCH, "masked-scores")):
        name_artist(axes.scatter(scores[chosen], at[chosen], s=8, color=colour, linewidth=0), name)
    logits = list(found.scores[~hidden])
    sink = found.part.learned_sink(found.query)
    if sink is not None:
        logits.append(sink)
    if logits:
        total = float(np.logaddexp.reduce(logits))
        line = axes.axvline(total, color=WEIGHT, linestyle=(0, (3, 2)), linewidth=0.8)
        name_artist(line, "log-of-the-denominator")
        said = f"dashed: ln of the softmax's denominator, {total:.2f}"
        text_at(figure, x, y + found.height + 0.04, said, fontsize=6.0, color=WEIGHT)
    for n in range(len(scores)):
        axes.axhline(n, color=GRID, linewidth=0.3, zorder=0)
    axes.margins(x=0.06)


def _draw_mask(figure: Figure, x: float, y: float, found: QueryRow) -> None:
    """A square for each key: filled where it may be attended to, hatched where it is masked."""
    axes = key_axes(figure, x, y, _MASK, found, "mask")
    axes.set_xlim(0, 1)
    if found.hidden is None:
        return
    for n, away in enumerate(found.listed(found.hidden)):
        square = axes.add_patch(Rectangle((0.05, n - 0.4), 0.6, 0.8, facecolor=MAY, linewidth=0))
        if away:
            show_masked(square)
