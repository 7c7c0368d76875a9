"""Attention whose scores are no product of queries and keys: recorded with what there is of it, in B H T S.

A softmax over what a network made of each position, of each pair of positions, or of a sequence alone, and values that
are summed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...attention.kernel_call import KernelCall
from ...attention.masks import FILL, MASKED
from . import axis_history
from .assemble import output_factors, values_arrangement
from .axis_history import Origin
from .decisions import version_then
from .products import Arrangement, LayoutError, arrange, arrangement
from .score_side import NAME, expanded, operations_note
from .states import ValueProduct, Weights
from .value_roles import ValueRoles

_FEATURES = (
    "weights made of keys' features, position by position, and summed before a query meets them: linear attention"
)
_CONVOLUTION = "a convolution whose weights are made of the data"


class PlainCall(NamedTuple):
    """A call, and where its values and its output lie in the model.

    Attributes:
        call: the call; without an output where the values are not met yet.
        values: how the values are brought to B G S E.
        extents: B and G of them, as they are of the model's own.
    """

    call: KernelCall
    values: Arrangement
    extents: Sequence[int]


def plain_call(state: Weights, use: ValueProduct) -> PlainCall | str | None:
    """The call; or why there is none, if positions are mixed by data all the same; None: there is nothing to tell.

    Args:
        state: the weights; their ``scores`` are None.
        use: their product with the values.

    Raises:
        LayoutError: the axes can't be told apart.
    """
    roles = ValueRoles(use)
    if any(a.birth == "parameter" for a in roles.keys):
        return None
    if any(a.birth == "feature" for a in roles.keys):
        # A weight for each of a number of features. Of positions, in a model for so many of them; or of taps, of
        # experts, of a vocabulary: then the values have an axis of these.
        if not roles.values or any(a.birth != "data" for a in roles.values):
            return None
        others = {
            a.root
            for label, dim in zip(use.v_labels, use.v_origin.layout(), strict=True)
            for a in dim
            if label in use.out_labels
        }
        if any(a.root in others for a in roles.values):
            return _CONVOLUTION
    if use.v_origin.birth == "parameter":
        return None
    widths = [a for a in roles.own if a.birth == "feature" and a.parent is not None]
    if widths and any(
        a.parent is b.parent for a in widths for dim in use.weights_origin.layout() for b in dim if b is not a
    ):
        return _FEATURES  # heads and their width: keys, and no weights of queries
    weights = arrange(use.weights, roles.factors(use.weights_origin.layout()), "BHTS")
    own = weights if state.own is None else arrange(state.own[0], roles.factors(state.own[1].layout()), "BHTS")
    b, h = own.shape[:2]
    values = values_arrangement(use, roles)
    v = values(use.v)
    extents, v = v.shape[:2], expanded(v, b)
    of_output = None if use.out is None else arrangement(use.out.shape, output_factors(use, roles), "BHTD")
    output = None if use.out is None or of_output is None else of_output(use.out)
    call = KernelCall.of_weights(own, v, output, NAME, score=_score(state.scores_origin), normalizer=state.normalizer)
    call.basis, call.dropout, call.softmax_dtype = roles.basis, state.dropout, state.dtype
    call.mixed = bool(state.mixed)
    call.result, call.result_form = use.out, of_output
    if weights is not own:
        call.applied = weights
    if state.mixed:
        call.notes.append(f"weights changed after the softmax by {operations_note(state.mixed)}")
    apart = output is not None and output.shape[:3] != weights.shape[:3]
    if apart or v.shape[2] != weights.shape[3] or h % v.shape[1]:
        raise LayoutError(f"the shapes do not fit: weights {tuple(weights.shape)}, v {tuple(v.shape)}")
    _scores(call, state, roles)
    call.notes.append("the scores are no product of queries and keys")
    return PlainCall(call, values, extents)


def _score(origin: Origin | None) -> str:
    """What the scores are, as far as it can be told: sums of a number for each query and one for each key, say."""
    return "additive" if origin is not None and origin.how is axis_history.broadcast else "other"


def _scores(call: KernelCall, state: Weights, roles: ValueRoles) -> None:
    """The scores, and a mask that is read off them."""
    x, origin = state.scores_tensor, state.scores_origin
    if x is None or origin is None or version_then(x) != state.read:
        return
    try:
        scores: Tensor = arrange(x, roles.factors(origin.layout()), "BHTS")
    except LayoutError:
        return
    assert call.weights is not None
    if scores.shape != call.weights.shape:
        return
    hidden = (scores <= MASKED) | ((scores <= FILL) & (call.weights == 0))
    if bool(hidden.any()):
        call.mask = ~hidden
        scores = torch.where(hidden, 0.0, scores)
    call.scores = scores
