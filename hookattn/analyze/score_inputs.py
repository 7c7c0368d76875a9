"""What statistics are computed of, from a recorded call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.functional import sink_column, with_four_axes
from ..attention.normalizers import OF_ONE, is_softmax
from ..attention.score_inputs import ScoreInputs
from ..calls.edits import set_by_edits
from ..calls.extents import evenly_grouped
from ..calls.fields import DERIVED, Derived
from ..calls.mask_rule import MaskRule

if TYPE_CHECKING:
    from ..calls.call import Call


def score_inputs_of(call: Call, positions: Tensor | None) -> ScoreInputs | None:
    """What statistics of a call are computed of: the scores that were kept, its q and k, or its weights; None: none of
    these was kept. Scores that are not there are not derived: a pass over q and k forms a block of them at a time.

    Of weights alone, of those that are a distribution without being a softmax, and of those that an edit has set, see
    :meth:`~hookattn.attention.score_inputs.ScoreInputs.of_weights`.
    """
    of_scores = is_softmax(call.normalizer) and not set_by_edits(call.edits, "weights")
    if of_scores and call.has("scores") and call.has("mask") and call.has("sinks"):
        sinks = call.get("sinks")
        sinks = None if sinks is None else sink_column(sinks)
        if sinks is None and call.normalizer == OF_ONE:
            sinks = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device=call.mask.device)
        if isinstance(call.fields.get("scores", DERIVED), Derived):
            return _inputs_of_q_and_k(call, sinks, positions)
        return ScoreInputs.of_scores(call.scores, with_four_axes(call.mask), sinks, positions)
    if not call.has("weights"):
        return None
    return ScoreInputs.of_weights(call.weights, positions)


def _inputs_of_q_and_k(call: Call, sinks: Tensor | None, positions: Tensor | None) -> ScoreInputs:
    k, bias = evenly_grouped(call, call.k), with_four_axes(call.get("bias"))
    assert call.scale is not None
    made = ScoreInputs(call.q, k, call.scale, call.softcap, bias, sinks=sinks, positions=positions)
    rule = call.fields.get("mask")
    if isinstance(rule, MaskRule):  # the pass leaves out what a diagonal hides, which a mask only hides again
        made.mask, made.rows = with_four_axes(rule.given), rule.rows
        made.causal, made.offset, made.window = rule.diagonal
    else:
        made.mask = with_four_axes(call.mask)
    return made
