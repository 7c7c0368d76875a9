"""``check_trace``: the promises about the fields of a call, in explicit float64 math."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..attention.kernel_call import FIELD_SPECS, FIELDS
from ..calls.call import Call
from ..calls.certificate import tolerance
from ..calls.edits import edited_entries
from ..calls.extents import per_query_head
from ..traces import Trace, TraceLike, as_trace
from .failure import Failure, require
from .oracle import NORMALIZERS, column, defined_output, defined_scores, defined_weights

_NOTHING = 1e-30  # what a masked entry may weigh: exp(-100) is not 0 in float32


def check_trace(trace: TraceLike) -> None:
    """Check every promise about the fields of a call that the captured fields allow to check.

    Shapes and dtypes fit; scores are finite, and are scale·q·kᵀ, soft-capped, plus bias; weights are the softmax of the
    scores where the mask is True, with the sinks; masked entries weigh nothing; a causal kernel's mask hides later
    keys; weights times v is the kernel's output (without dropout, and where nothing mixed the weights); no certificate
    is unfaithful; whatever was skipped has a reason.

    Raises:
        AssertionError: with everything that is not so.
        InputError, TraceFileError: ``trace`` is none; see :func:`hookattn.traces.as_trace`.
    """
    trace = as_trace(trace)
    require(trace_failures(trace))


def trace_failures(trace: Trace) -> Iterator[Failure]:
    """What :func:`check_trace` finds, one by one."""
    if not len(trace):
        yield Failure("the trace", "holds no calls", mend="name the modules that attend in `attention`")
    for call in trace:
        where = f"{call.site.label} (call {call.index}, step {call.step}, {call.tap})"
        own = replace(call)  # what is derived for the check goes with it
        values = {name: own.get(name) if own.has(name) else None for name in FIELDS}
        sizes: dict[str, int] = {}
        bad = [*_shape_failures(call, values, sizes, where), *_dtype_failures(call, values, trace, where)]
        yield from bad
        if not bad:
            yield from _math_failures(call, values, sizes, where)
        if call.certificate.status == "unfaithful":
            yield Failure(where, "the certificate", "faithful", str(call.certificate))
    for skipped in trace.skipped:
        if not skipped.reason or not skipped.steps:
            yield Failure(skipped.path or "<model>", "skipped without a reason or a step")


def _dtype_failures(call: Call, values: Mapping[str, Tensor | None], trace: Trace, where: str) -> Iterator[Failure]:
    """Each product has one dtype: q·k that of the kernel, weights·v that of its output."""
    output = values["output"]
    product = {"q": call.dtype, "k": call.dtype} | ({} if output is None else {"v": output.dtype})
    for name, x in values.items():
        if x is None:
            continue
        if x.requires_grad:
            yield Failure(where, f"{name} is not detached")
        boolean = FIELD_SPECS[name].boolean
        if (x.dtype == torch.bool) is not boolean:
            yield Failure(where, f"{name} is {x.dtype}", "torch.bool" if boolean else "a floating dtype")
        elif not trace.selection.get("dtype") and x.dtype != product.get(name, x.dtype):
            yield Failure(where, f"{name} is {x.dtype}, its product {product[name]}")


def _shape_failures(
    call: Call, values: Mapping[str, Tensor | None], sizes: dict[str, int], where: str
) -> Iterator[Failure]:
    for name, spec in FIELD_SPECS.items():
        x = values[name]
        if x is None or spec.broadcast:
            continue
        if x.dim() != 4:
            yield Failure(where, f"the shape of {name}", " ".join(spec.axes), str(tuple(x.shape)))
            continue
        for letter, n in zip(spec.axes, x.shape, strict=True):
            known = sizes.setdefault(letter, n)
            if known != n:
                yield Failure(where, f"{name} of shape {tuple(x.shape)} has {letter}={n}, others have {known}")
    heads, groups = sizes.get("H"), sizes.get("G")
    if heads and groups and call.kv_heads is None and heads % groups:
        yield Failure(where, f"{heads} query heads over {groups} key heads", "a whole number for each")
    elif heads and groups and call.kv_heads is not None:
        if len(call.kv_heads) != heads:
            yield Failure(where, f"kv_heads={call.kv_heads} for {heads} heads")
        if max(call.kv_heads) >= groups:
            yield Failure(where, f"kv_heads={call.kv_heads} for {groups} key heads")
    if {"B", "H", "T", "S"} <= sizes.keys():
        full = [sizes[letter] for letter in "BHTS"]
        for name, spec in FIELD_SPECS.items():
            x, target = values[name], [sizes.get(letter, 1) for letter in spec.axes]
            if x is not None and spec.broadcast and not _broadcasts(column(x) if spec.is_column else x, target):
                yield Failure(where, f"{name} of shape {tuple(x.shape)} for B H T S = {full}")


def _broadcasts(x: Tensor, full: list[int]) -> bool:
    return x.dim() == len(full) and all(n in (1, m) for n, m in zip(x.shape, full, strict=True))


def _math_failures(
    call: Call, values: Mapping[str, Tensor | None], sizes: Mapping[str, int], where: str
) -> Iterator[Failure]:
    wide = {name: x if x is None or FIELD_SPECS[name].boolean else x.double() for name, x in values.items()}
    q, k, bias, applied = (wide[name] for name in ("q", "k", "bias", "applied"))
    scores, mask, sinks, weights = (wide[name] for name in ("scores", "mask", "sinks", "weights"))
    floating = [x.dtype for x in values.values() if x is not None and x.is_floating_point()]
    unit = max(map(tolerance, (call.dtype, *floating)))
    if scores is not None and not _finite(scores, q, k, call, sizes):
        yield Failure(where, "scores are not finite", mend="put what hides an entry into the mask")
    if bias is not None and not bias.isfinite().all():
        yield Failure(where, "bias is not finite", mend="put what hides an entry into the mask")
    if mask is not None and call.causal and call.queries is None and {"T", "S"} <= sizes.keys():
        yield from _causal_failures(call, mask, sizes["T"], sizes["S"], where)
    was_set = _entries_set(call, sizes, "weights", mask)
    if weights is not None and mask is not None:
        yield from _use_failures(call, values, weights if applied is None else applied, mask, unit, sizes, where)
    if scores is None or mask is None:
        return
    mask = mask.expand_as(scores)
    seen = scores.abs()[mask]
    size = max(1.0, seen.max().item()) if seen.numel() else 1.0
    if q is not None and k is not None and call.scale is not None and "scores" in call.derivable:
        own = defined_scores(q, per_query_head(call, k, sizes["H"]), call.scale, call.softcap, bias)
        mend = "look at the scale, the rotation and the norms of q and k, the order of the heads, and the bias"
        yield from _apart(own, scores, mask, unit * size, where, "scale·q·kᵀ, soft-capped, plus bias == scores", mend)
    if weights is None:
        return
    live = mask.any(-1, keepdim=True)
    if call.normalizer in NORMALIZERS:
        expected = defined_weights(scores, mask, sinks, call.normalizer)
        what = f"{call.normalizer}(where(mask, scores, -inf), sinks) == weights"
        mend = "look at the mask (True = may attend), at causal, at the sinks, and at the normalizer"
        bound = unit * max(1.0, size / 10) * _size(weights[live.expand_as(mask)])
        yield from _apart(expected, weights, live.expand_as(mask) & ~was_set, bound, where, what, mend)
    hidden = weights.abs()[~mask & live & ~was_set]
    if hidden.numel() and not hidden.max() <= _NOTHING:
        yield Failure(where, "a masked entry weighs", "0", f"{hidden.max().item():.3g}")


def _use_failures(
    call: Call,
    values: Mapping[str, Tensor | None],
    used: Tensor,
    mask: Tensor,
    unit: float,
    sizes: Mapping[str, int],
    where: str,
) -> Iterator[Failure]:
    """What met the values makes the output: that can be told of any score and any normalizer."""
    v, output = values["v"], values["output"]
    hidden = values["applied"] is None and (call.dropout or call.mixed)
    if v is None or output is None or hidden:
        return
    live = mask.any(-1, keepdim=True) & ~_entries_set(call, sizes, "output", mask)
    made = defined_output(used, per_query_head(call, v, sizes["H"]))
    finite = v[v.isfinite()].abs()  # the value of a key that nobody attends to may be anything
    sums = torch.where(live, used.abs(), 0.0).sum(-1)
    bound = unit * max(finite.max().item() if finite.numel() else 0.0, 1e-3) * _size(sums)
    mend = "look at v, at the order of the heads, and at what was taken for the kernel's output"
    what = "weights @ v == output" if values["applied"] is None else "applied @ v == output"
    yield from _apart(made, output.double(), live.expand_as(output), bound, where, what, mend)


def _entries_set(call: Call, sizes: Mapping[str, int], field: str, mask: Tensor | None) -> Tensor:
    """What edits have set of a field, which follows from nothing: bool, broadcastable to it."""
    device = None if mask is None else mask.device
    found = None
    if call.edits and {"B", "H", "T", "S"} <= sizes.keys():
        b, h, t, s = (sizes[letter] for letter in "BHTS")
        found = edited_entries(call.edits, field, (b, h, t, s), device or torch.device("cpu"), call.heads, call.queries)
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device) if found is None else found


def _size(x: Tensor) -> float:
    """The largest absolute value, where it is more than 1."""
    return max(1.0, x.abs().max().item()) if x.numel() else 1.0


def _causal_failures(call: Call, mask: Tensor, t: int, s: int, where: str) -> Iterator[Failure]:
    """A kernel that hides later keys has a mask that does; where its first query stands is not recorded."""
    later = torch.arange(s) - torch.arange(t)[:, None]
    seen = mask.cpu().expand(-1, -1, t, s).flatten(0, 1).any(0)
    if t > 1 and all(bool(seen[later > first].any()) for first in range(max(s - t, 0) + 1)):
        yield Failure(where, "causal", "no later key that may be attended to", "a mask that has some")


def repeated_heads(trace: Trace) -> Iterator[Failure]:
    """Keys or values that were recorded after they were repeated for grouped queries."""
    for call in trace:
        for name in ("k", "v"):
            x = call.get(name) if call.has(name) else None
            if x is not None and (times := _repeated(x)) > 1:
                where = f"{call.site.label} (call {call.index}, step {call.step}, {call.tap})"
                mend = "record it as it is before it is repeated for grouped queries"
                yield Failure(where, f"the heads of {name}", "each once", f"each {times} times", mend)


def _repeated(x: Tensor) -> int:
    """How many neighbouring heads are the same, everywhere."""
    g = x.shape[1]
    if not x.numel() or not bool((x != 0).any()):
        return 1
    divisors = (n for n in range(g, 1, -1) if g % n == 0)
    return next((n for n in divisors if torch.equal(x, x[:, ::n].repeat_interleave(n, 1))), 1)


def _finite(scores: Tensor, q: Tensor | None, k: Tensor | None, call: Call, sizes: Mapping[str, int]) -> bool:
    """Wherever q and k are: a model that makes NaN of a row with nothing to attend to goes on with it."""
    finite = scores.isfinite()
    if q is not None and k is not None and not bool(finite.all()):
        keys = per_query_head(call, k, sizes["H"]).isfinite().all(-1)
        finite |= ~q.isfinite().all(-1)[..., None] | ~keys[..., None, :]
    return bool(finite.all())


def _apart(
    a: Tensor, b: Tensor, at: Tensor, tolerance: float, where: str, what: str, mend: str = ""
) -> Iterator[Failure]:
    gap = torch.where(at, a - b, 0.0).abs()
    worst = gap.max().item() if gap.numel() else 0.0
    if not worst <= tolerance:  # NaN too
        yield Failure(where, what, f"within {tolerance:.3g}", f"off by {worst:.3g}", mend)
