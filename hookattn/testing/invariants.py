"""``check_trace``: the promises about the fields of a call, in explicit float64 math."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..attention.kernel_call import FIELDS
from ..calls.call import Call
from ..calls.certificate import TOLERANCE
from ..traces import Trace
from .failure import Failure, require

_LETTERS = {"q": "BHTD", "k": "BGSD", "v": "BGSE", "scores": "BHTS", "weights": "BHTS", "output": "BHTE"}
_NOTHING = 1e-30  # what a masked entry may weigh: exp(-100) is not 0 in float32


def check_trace(trace: Trace) -> None:
    """Check every promise about the fields of a call that the captured fields allow to check.

    Shapes and dtypes fit; scores are finite, and are scale·q·kᵀ, soft-capped, plus bias; weights are the softmax of the
    scores where the mask is True, with the sinks; masked entries weigh nothing; a causal kernel's mask hides later
    keys; weights times v is the kernel's output (without dropout, and where nothing mixed the weights); no certificate
    is unfaithful; whatever was skipped has a reason.

    Raises:
        AssertionError: with everything that is not so.
    """
    require(trace_failures(trace))


def trace_failures(trace: Trace) -> Iterator[Failure]:
    """What :func:`check_trace` finds, one by one."""
    if not len(trace):
        yield Failure("the trace", "holds no calls", mend="name the modules that attend in `attention`")
    for call in trace:
        where = f"{call.site.label} (call {call.index}, step {call.step}, {call.tap})"
        values = {name: call.get(name) if call.has(name) else None for name in FIELDS}
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
        if (x.dtype == torch.bool) is not (name == "mask"):
            yield Failure(where, f"{name} is {x.dtype}", "torch.bool" if name == "mask" else "a floating dtype")
        elif not trace.selection.get("dtype") and x.dtype != product.get(name, x.dtype):
            yield Failure(where, f"{name} is {x.dtype}, its product {product[name]}")


def _shape_failures(
    call: Call, values: Mapping[str, Tensor | None], sizes: dict[str, int], where: str
) -> Iterator[Failure]:
    for name, letters in _LETTERS.items():
        x = values[name]
        if x is None:
            continue
        if x.dim() != 4:
            yield Failure(where, f"the shape of {name}", " ".join(letters), str(tuple(x.shape)))
            continue
        for letter, n in zip(letters, x.shape, strict=True):
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
        for name, target in (("bias", full), ("mask", full), ("sinks", [*full[:3], 1])):
            x = values[name]
            if x is not None and not _broadcasts(_column(x) if name == "sinks" else x, target):
                yield Failure(where, f"{name} of shape {tuple(x.shape)} for B H T S = {full}")


def _broadcasts(x: Tensor, full: list[int]) -> bool:
    return x.dim() == len(full) and all(n in (1, m) for n, m in zip(x.shape, full, strict=True))


def _column(sinks: Tensor) -> Tensor:
    return sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks


def _math_failures(
    call: Call, values: Mapping[str, Tensor | None], sizes: Mapping[str, int], where: str
) -> Iterator[Failure]:
    q, k, v, bias, scores, mask, sinks, weights, output = (
        x if x is None or x.dtype == torch.bool else x.double() for x in (values[name] for name in FIELDS)
    )
    unit = max(
        TOLERANCE.get(x, TOLERANCE[torch.float16])
        for x in (call.dtype, *(x.dtype for x in values.values() if x is not None and x.is_floating_point()))
    )
    if scores is not None and not _finite(scores, q, k, call, sizes):
        yield Failure(where, "scores are not finite", mend="put what hides an entry into the mask")
    if bias is not None and not bias.isfinite().all():
        yield Failure(where, "bias is not finite", mend="put what hides an entry into the mask")
    if mask is not None and call.causal and call.queries is None and {"T", "S"} <= sizes.keys():
        yield from _causal_failures(call, mask, sizes["T"], sizes["S"], where)
    if scores is None or mask is None:
        return
    mask = mask.expand_as(scores)
    seen = scores.abs()[mask]
    size = max(1.0, seen.max().item()) if seen.numel() else 1.0
    if q is not None and k is not None and "scores" in call.derivable:
        own = q @ _repeat(k, call, sizes).mT * call.scale
        if call.softcap is not None:
            own = call.softcap * torch.tanh(own / call.softcap)
        own = own if bias is None else own + bias
        mend = "look at the scale, the rotation and the norms of q and k, the order of the heads, and the bias"
        yield from _apart(own, scores, mask, unit * size, where, "scale·q·kᵀ, soft-capped, plus bias == scores", mend)
    if weights is None:
        return
    live = mask.any(-1, keepdim=True)
    joined = torch.where(mask, scores, -torch.inf)
    if sinks is not None:
        joined = torch.cat([joined, _column(sinks).expand(*scores.shape[:3], 1)], -1)
    mass = torch.exp(joined - joined.amax(-1, keepdim=True))
    expected = (mass / mass.sum(-1, keepdim=True))[..., : scores.shape[-1]]
    what = "softmax(where(mask, scores, -inf), sinks) == weights"
    mend = "look at the mask (True = may attend), at causal, and at the sinks"
    yield from _apart(expected, weights, live.expand_as(mask), unit * max(1.0, size / 10), where, what, mend)
    hidden = weights.abs()[~mask & live]
    if hidden.numel() and not hidden.max() <= _NOTHING:
        yield Failure(where, "a masked entry weighs", "0", f"{hidden.max().item():.3g}")
    if v is not None and output is not None and not call.dropout and not call.mixed:
        mixed = weights @ _repeat(v, call, sizes)
        finite = v[v.isfinite()].abs()  # the value of a key that nobody attends to may be anything
        bound = unit * max(finite.max().item() if finite.numel() else 0.0, 1e-3)
        mend = "look at v, at the order of the heads, and at what was taken for the kernel's output"
        yield from _apart(mixed, output, live.expand_as(output), bound, where, "weights @ v == output", mend)


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
        finite |= ~q.isfinite().all(-1)[..., None] | ~_repeat(k, call, sizes).isfinite().all(-1)[..., None, :]
    return bool(finite.all())


def _repeat(x: Tensor, call: Call, sizes: Mapping[str, int]) -> Tensor:
    if call.kv_heads is not None:
        return x[:, list(call.kv_heads)]
    return x.repeat_interleave(sizes["H"] // sizes["G"], 1) if "H" in sizes else x


def _apart(
    a: Tensor, b: Tensor, at: Tensor, tolerance: float, where: str, what: str, mend: str = ""
) -> Iterator[Failure]:
    gap = torch.where(at, a - b, 0.0).abs()
    worst = gap.max().item() if gap.numel() else 0.0
    if not worst <= tolerance:  # NaN too
        yield Failure(where, what, f"within {tolerance:.3g}", f"off by {worst:.3g}", mend)
