"""Exponentials of scores that meet the values before they are divided by their sum, for all keys at once or by blocks.

``exp(z) @ v / exp(z).sum()``, and attention over blocks of keys whose outputs are merged: by a running maximum, as a
fused kernel does it, or by the logsumexp of each block. Sums of values are followed as :class:`~.states.Unnormalized`
while they are only scaled and added. Once something else is done with one it is the output, if it is what the softmax
over all the keys gives; that is computed for a few rows, since how a model scales its blocks is nobody's to tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...attention.functional import dot_scores, finish_scores, weighted_values
from ...attention.kernel_call import DOT, KernelCall
from ...attention.normalizers import SOFTMAX, normalized
from ...torch_internals.tensor_identity import address_of, storage_of
from .assemble import CallBuilder
from .products import LayoutError
from .score_side import slack_of
from .states import Unnormalized, ValueProduct, Weights

_ROWS = 16
_NOT_SOFTMAX = (
    "exponentials of scores were multiplied with values and summed, and the sum is no softmax over their keys"
)


def unnormalized_call(state: Unnormalized, out: Tensor) -> KernelCall:
    """The call of all keys that ``out`` is the output of.

    Raises:
        LayoutError: it is not what a softmax over all the keys gives, or the axes can't be told apart.
    """
    _, use = state.parts[0]
    whole = state.normalized and len(state.parts) == 1
    if whole and not state.scaled:
        return CallBuilder(state.parts, out).call()
    try:
        return _of_all_keys(state, out)
    except LayoutError:
        if not whole:
            raise
    # Not a block that was to be merged with others: an output whose rows were multiplied by something, a gate say.
    call = CallBuilder(state.parts, use.out).call()
    _check_sum(call)
    return call


def _of_all_keys(state: Unnormalized, out: Tensor) -> KernelCall:
    """The call of what was scaled and added up, if that is what a softmax over all the keys gives."""
    weights, use = state.parts[0]
    scores = weights.scores
    if len(state.parts) == 1 and scores is not None and (scores.score != DOT or scores.opaque):
        return _of_formed(weights, use, state.sink, out)
    calls = [_part(weights, use, out) for weights, use in _in_order(state.parts)]
    call = calls[0]
    if len(calls) > 1:
        _join(call, calls)
    if state.sink is not None:
        if state.sink.dim():
            call.sinks = CallBuilder(state.parts, out, formed=False).sinks(state.sink, call.shape[1])
        else:
            call.sinks = state.sink.reshape(1, 1, 1, 1)
    for name in (SOFTMAX, *(("exp",) if len(state.parts) == 1 and not state.scaled else ())):
        if _gives_output(call, name):
            call.normalizer = name
            if name != SOFTMAX:
                call.weights = CallBuilder(state.parts, out).call().weights
            return call
    raise LayoutError(_NOT_SOFTMAX)


def _of_formed(weights: Weights, use: ValueProduct, sink: Tensor | None, out: Tensor) -> KernelCall:
    """The call of scores that do not follow from q and k: its weights are the exponentials over their sum."""
    dim = [i for i, label in enumerate(use.weights_labels) if label not in use.out_labels]
    if sink is not None or len(dim) != 1:
        raise LayoutError(_NOT_SOFTMAX)
    made = use.weights / use.weights.sum(dim[0], keepdim=True)
    call = CallBuilder([(weights, replace(use, weights=made, out=out))], out).call()
    _check_sum(call)
    return call


def _check_sum(call: KernelCall) -> None:
    """Raises LayoutError: the output is not what the weights make of the values."""
    assert call.weights is not None and call.output is not None
    applied = call.weights if call.applied is None else call.applied
    if not _sums_to(applied, call.v, call.output):
        raise LayoutError(_NOT_SOFTMAX)


def _part(weights: Weights, use: ValueProduct, out: Tensor) -> KernelCall:
    assert weights.scores is not None
    # Numbers for each row are what blocks are scaled back by.
    terms = [t for t in weights.scores.terms if not _of_rows(t.tensor, weights)]
    plain = replace(weights, scores=weights.scores.but(shifts=[], terms=terms))
    call = CallBuilder([(plain, replace(use, out=out))], out, formed=False).call()
    if call.score != DOT or call.opaque or call.sinks is not None:
        raise LayoutError(_NOT_SOFTMAX)
    return call


def _of_rows(x: Tensor, weights: Weights) -> bool:
    """Whether a tensor that was added to scores has one number for each row."""
    assert weights.scores_origin is not None
    shape = weights.scores_origin.shape
    at = weights.dim - len(shape) + x.dim()
    return shape[weights.dim] > 1 and (at < 0 or x.shape[at] == 1)


def _in_order(parts: Sequence[tuple[Weights, ValueProduct]]) -> list[tuple[Weights, ValueProduct]]:
    """Blocks in the order in which their values lie in memory, if they are of one tensor."""
    if len({storage_of(use.v) for _, use in parts}) == 1:
        return sorted(parts, key=lambda part: address_of(part[1].v))
    return list(parts)


def _join(call: KernelCall, calls: Sequence[KernelCall]) -> None:
    """Put the keys of all blocks into one call."""
    for one in calls[1:]:
        alike = one.scale is call.scale or one.scale == call.scale
        if not alike or one.softcap != call.softcap or one.q.shape != call.q.shape or not torch.equal(one.q, call.q):
            raise LayoutError("blocks of keys whose queries or scales are not the same")
    b, g = (max(one.k.shape[i] for one in calls) for i in (0, 1))
    if any(one.k.shape[:2] != (b, g) or one.v.shape[:2] != (b, g) for one in calls):
        raise LayoutError("blocks of keys with different numbers of heads")
    for name, nothing in (("bias", 0.0), ("mask", True)):
        tensors = [getattr(one, name) for one in calls]
        some = next((x for x in tensors if x is not None), None)
        if some is None:
            continue
        shape = [max(x.shape[i] for x in tensors if x is not None) for i in range(3)]
        laid = [
            (some.new_tensor(nothing) if x is None else x).expand(*shape, one.shape[3])
            for one, x in zip(calls, tensors, strict=True)
        ]
        setattr(call, name, torch.cat(laid, 3))
    call.k, call.v = (torch.cat([getattr(one, name) for one in calls], 2) for name in ("k", "v"))
    call.scores = None
    call.notes.append("the model merged blocks of keys: its weights were never formed whole")


def _gives_output(call: KernelCall, name: str) -> bool:
    """Whether a normalizer's weights give the output, on a few rows."""
    t = call.shape[2]
    rows = torch.linspace(0, t - 1, min(_ROWS, t), device=call.device).long()
    cut = {x: y if (y := getattr(call, x)) is None or y.shape[2] == 1 else y[:, :, rows] for x in ("bias", "mask")}
    assert call.output is not None
    scores = finish_scores(dot_scores(call.q[:, :, rows], call.k, call.scale), call.softcap, cut["bias"])
    sinks = call.sinks
    if sinks is not None and sinks.dim() == 4 and sinks.shape[2] > 1:
        sinks = sinks[:, :, rows]
    weights = normalized(name, scores, cut["mask"], sinks)
    assert weights is not None
    return _sums_to(weights, call.v, call.output[:, :, rows])


def _sums_to(weights: Tensor, v: Tensor, output: Tensor) -> bool:
    """Whether weights, B H T S, make an output, B H T E, of the values, as far as its dtype tells."""
    difference = (weighted_values(weights, v) - output.to(weights.dtype)).detach().abs().nan_to_num(0.0)
    return float(difference.amax()) <= 100 * slack_of(output.dtype) * max(1.0, float(v.detach().abs().amax()))
