"""Every attention can be changed: an edit that changes nothing leaves every bit, and one that does is what it says.

The references are two ways to the same end that have no code in common: weights of 0 and an output of 0; a knock-out
and the weights that explicit math makes of the clean run's scores; the gradient that a trace keeps and that of gates
which multiply the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import edit
from ..api import TracingOptions, editing
from ..calls.call import Call
from ..calls.certificate import tolerance
from ..calls.extents import per_query_head
from ..edit.base import Edit
from ..errors import EditError
from ..models.registry import using
from ..traces import Trace
from .case import Case, NotApplicable, same, tensors
from .failure import Failure
from .oracle import defined_weights

_MEND = "name the axes in the adapter's `layout`, or the module in whose forward the kernel runs in `attention`"


def edits(case: Case) -> Iterator[Failure]:
    """Weights and outputs of a head, edges, and patterns of a clean run; every bit where nothing is changed."""
    model = case.model()
    with torch.no_grad():
        plain = list(tensors(case.run(model)))
        clean = case.trace(model)
        yield from _unchanged(case, model, plain)
        yield from _frozen(case, model, clean, plain)
        for call in _one_of_each(clean):
            yield from _zeroed(case, model, call)
            yield from _knocked_out(case, model, call)


def weight_gradients(case: Case) -> Iterator[Failure]:
    """The gradient of the weights that a trace keeps, against that of gates of 1 which multiply them."""
    model = case.model()
    with torch.no_grad():
        clean = case.trace(model)
    for call in _one_of_each(clean):
        if call.normalizer not in ("softmax", "softmax1") or call.mixed:
            continue
        gates = torch.ones(call.weights.shape, dtype=call.weights.dtype, requires_grad=True)
        where = _place(call)
        trace = _edited(case, model, [edit.scale("weights", gates, path=call.site.path, kind=call.site.kind)])
        roots = _roots(trace.output)
        try:
            (expected,) = torch.autograd.grad(torch.stack(roots).sum(), gates, allow_unused=True)
        except RuntimeError as error:
            raise NotApplicable(f"no backward pass: {error}") from error
        kept = _edited(case, model, [], gradients=True)
        torch.stack(_roots(kept.output)).sum().backward()  # type: ignore[no-untyped-call]
        mine = next(c for c in kept if (c.site.path, c.site.kind) == (call.site.path, call.site.kind))
        if expected is None:
            continue
        got = mine.weights * mine.grad("weights")
        size = max(float(expected.abs().max()), 1e-6)
        worst = float((got - expected).abs().max()) / size
        if not worst <= 1e-3:
            yield Failure(where, "weights·gradient", "that of gates on them, within 1e-3", f"off by {worst:.3g}", _MEND)


def _roots(output: Any) -> list[Tensor]:
    """Sums of what has a gradient, that no normalisation makes constant."""
    found = [(x.float() * _wave(x)).sum() for x in tensors(output) if x.requires_grad]
    if not found:
        raise NotApplicable("the output has no gradient")
    return found


def _wave(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), device=x.device, dtype=torch.float32).cos().view(x.shape)


def _one_of_each(trace: Trace) -> list[Call]:
    """A call of each stack and kind, the first: what is before it is as in the clean run."""
    found = {(c.site.stack, c.site.kind): c for c in reversed(trace.calls)}
    return [c for c in reversed(found.values()) if sum(d.site.path == c.site.path for d in trace) == 1]


def _place(call: Call) -> str:
    return f"{call.site.label} (call {call.index}, {call.tap})"


def _edited(case: Case, model: nn.Module, several: Sequence[Edit], **options: Any) -> Trace:
    given: TracingOptions = {"verify": "full", **options}  # type: ignore[typeddict-item]
    with using(case.adapter, *case.beside), editing(model, *several, **given) as trace:
        trace.output = case.run(model)
    return trace


def _try(case: Case, model: nn.Module, one: Edit) -> Trace:
    try:
        return _edited(case, model, [one])
    except EditError as error:
        raise NotApplicable(f"it cannot be edited: {error}") from error


def _unchanged(case: Case, model: nn.Module, plain: list[Tensor]) -> Iterator[Failure]:
    for field in edit.FIELDS:
        try:
            made = _edited(case, model, [edit.call(lambda c: c.value, field)])
        except EditError as error:
            if field in ("weights", "output"):
                raise NotApplicable(f"it cannot be edited: {error}") from error
            continue  # no product of queries and keys has neither
        if not all(map(same, plain, tensors(made.output))):
            yield Failure(type(model).__name__, f"an edit of {field} that returns what it got", "every bit", "others")


def _frozen(case: Case, model: nn.Module, clean: Trace, plain: list[Tensor]) -> Iterator[Failure]:
    paths = [c.site.path for c in clean]
    if len(set(paths)) < len(paths):
        return  # one site, several calls: which is whose cannot be said
    made = _try(case, model, edit.freeze(clean))
    for a, b in zip(plain, tensors(made.output), strict=True):
        if not a.is_floating_point() or not a.numel():
            continue
        size = max(1.0, float(a.nan_to_num(0, 0, 0).abs().max()))
        worst = float((a - b).nan_to_num(0, 0, 0).abs().max()) / size
        bound = 10 * tolerance(a.dtype)
        if not worst <= bound:
            yield Failure(
                type(model).__name__,
                "the run with its own patterns frozen",
                f"within {bound:.3g}",
                f"off by {worst:.3g}",
                _MEND,
            )
            return


def _zeroed(case: Case, model: nn.Module, call: Call) -> Iterator[Failure]:
    """A head without a pattern, and one without an output, are the same; the other heads keep their bits."""
    where = _place(call)
    if call.mixed:
        return
    at = {"path": call.site.path, "kind": call.site.kind, "heads": 0}
    first = _try(case, model, edit.zero("weights", **at))  # type: ignore[arg-type]
    second = _try(case, model, edit.zero("output", **at))  # type: ignore[arg-type]
    a, b = (
        next(c for c in t if (c.site.path, c.site.kind) == (call.site.path, call.site.kind)) for t in (first, second)
    )
    if not (call.dropout or same(a.output[:, 1:], call.output[:, 1:])):
        yield Failure(where, "the output of heads that were not edited", "every bit", "others", _MEND)
    if bool((a.output[:, 0] != 0).any()) or bool((a.weights[:, 0] != 0).any()):
        yield Failure(where, "head 0 with zero('weights')", "0", "something else", _MEND)
    for x, y in zip(tensors(first.output), tensors(second.output), strict=True):
        if x.is_floating_point() and not torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True):
            yield Failure(where, "zero('weights') of a head", "what zero('output') does", "something else", _MEND)
            return
    if not b.certificate.faithful or not a.certificate.faithful:
        yield Failure(where, "the certificate of an edited call", "faithful", str(a.certificate))


def _knocked_out(case: Case, model: nn.Module, call: Call) -> Iterator[Failure]:
    """The last query without the first key it sees: by explicit math from the clean run's scores."""
    if call.normalizer not in ("softmax", "softmax1") or call.mixed or not call.has("scores") or call.dropout:
        return
    where, shape = _place(call), call.weights.shape
    seen = call.mask.expand(shape)[:, :, -1]
    keys = seen.all(1).all(0).nonzero().flatten()
    if len(keys) < 2:
        return
    key = int(keys[0])
    one = edit.knockout(path=call.site.path, kind=call.site.kind, queries=-1, keys=key)
    made = _try(case, model, one)
    mine = next(c for c in made if (c.site.path, c.site.kind) == (call.site.path, call.site.kind))
    mask = call.mask.expand(shape).clone()
    mask[:, :, -1, key] = False
    sinks = None if call.sinks is None else call.sinks.double()
    expected = defined_weights(call.scores.double(), mask, sinks, call.normalizer)
    out = expected @ per_query_head(call, call.v, expected.shape[1]).double()
    unit = 10 * tolerance(call.dtype)
    for what, got, want in (("weights", mine.weights, expected), ("output", mine.output, out)):
        live = mask.any(-1, keepdim=True).expand(want.shape)
        worst = float(torch.where(live, got.double() - want, 0.0).abs().max())
        if not worst <= unit * max(1.0, float(call.v.abs().max())):
            yield Failure(
                where, f"the {what} with an edge knocked out", f"within {unit:.3g}", f"off by {worst:.3g}", _MEND
            )
