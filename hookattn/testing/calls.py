"""``check_trace``: the promises about the fields of a call, in explicit float64 math."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..attention import sink_column
from ..certificate import TOLERANCE
from ..record import FIELDS
from ..trace import Call, Trace

_LETTERS = {"q": "BHTD", "k": "BGSD", "v": "BGSE", "scores": "BHTS", "weights": "BHTS", "output": "BHTE"}
_NOTHING = 1e-30  # what a masked entry may weigh: exp(-100) is not 0 in float32


def check_trace(trace: Trace) -> None:
    """Check every promise about the fields of a call that the captured fields allow to check.

    Shapes and dtypes fit; scores are finite, and are scale·q·kᵀ, soft-capped, plus bias; weights are the softmax of the
    scores where the mask is True, with the sinks; masked entries weigh nothing; weights times v is the kernel's output
    (without dropout); no certificate is unfaithful; whatever was skipped has a reason.
    """
    assert len(trace), "the trace holds no calls"
    for call in trace:
        where = f"{call.site.label} (call {call.index}, step {call.step}, {call.tap})"
        values = {name: call.get(name) if call.has(name) else None for name in FIELDS}
        sizes = _check_shapes(call, values, where)
        if not trace.selection.get("dtype"):
            for name in ("q", "k", "v", "output"):
                x = values[name]
                assert x is None or x.dtype == call.dtype, f"{where}: {name} is {x.dtype}, the kernel {call.dtype}"
        _check_math(call, values, sizes, where)
        assert call.certificate.status != "unfaithful", f"{where}: {call.certificate}"
    for skipped in trace.skipped:
        assert skipped.reason and skipped.steps, f"{skipped.path}: skipped without a reason or a step"


def _check_shapes(call: Call, values: Mapping[str, Tensor | None], where: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, x in values.items():
        if x is None:
            continue
        assert not x.requires_grad, f"{where}: {name} is not detached"
        assert (x.dtype == torch.bool) is (name == "mask"), f"{where}: {name} is {x.dtype}"
        if name in _LETTERS:
            letters = _LETTERS[name]
            assert x.dim() == 4, f"{where}: {name} of shape {tuple(x.shape)}, expected {' '.join(letters)}"
            for letter, n in zip(letters, x.shape, strict=True):
                known = sizes.setdefault(letter, n)
                assert known == n, f"{where}: {name} of shape {tuple(x.shape)} has {letter}={n}, others have {known}"
    heads, groups = sizes.get("H"), sizes.get("G")
    if heads and groups and call.kv_heads is None:
        assert heads % groups == 0, f"{where}: {heads} query heads over {groups} key heads"
    elif heads and groups and call.kv_heads is not None:
        assert len(call.kv_heads) == heads, f"{where}: kv_heads={call.kv_heads} for {heads} heads"
        assert max(call.kv_heads) < groups, f"{where}: kv_heads={call.kv_heads} for {groups} key heads"
    if {"B", "H", "T", "S"} <= sizes.keys():
        full = [sizes[letter] for letter in "BHTS"]
        for name, target in (("bias", full), ("mask", full), ("sinks", [*full[:3], 1])):
            x = values[name]
            if x is not None:
                shape = (sink_column(x) if name == "sinks" else x).shape
                assert _broadcasts(shape, target), f"{where}: {name} of shape {tuple(x.shape)} for B H T S = {full}"
    return sizes


def _broadcasts(shape: torch.Size, full: list[int]) -> bool:
    return len(shape) == len(full) and all(n in (1, m) for n, m in zip(shape, full, strict=True))


def _check_math(call: Call, values: Mapping[str, Tensor | None], sizes: Mapping[str, int], where: str) -> None:
    q, k, v, bias, scores, mask, sinks, weights, output = (
        x if x is None or x.dtype == torch.bool else x.double() for x in (values[name] for name in FIELDS)
    )
    unit = max(
        TOLERANCE.get(x, TOLERANCE[torch.float16])
        for x in (call.dtype, *(x.dtype for x in values.values() if x is not None and x.is_floating_point()))
    )
    assert scores is None or _finite(scores, q, k, call, sizes), f"{where}: scores are not finite: is a mask in them?"
    assert bias is None or bias.isfinite().all(), f"{where}: bias is not finite: is a mask in it?"
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
        _close(own, scores, mask, unit * size, f"{where}: scale·q·kᵀ, soft-capped, plus bias == scores")
    if weights is None:
        return
    live = mask.any(-1, keepdim=True)
    masked = torch.where(mask, scores, -torch.inf)
    if sinks is None:
        expected = torch.softmax(masked, -1)
    else:
        joined = torch.cat([masked, sink_column(sinks).expand(*scores.shape[:3], 1)], -1)
        expected = torch.softmax(joined, -1)[..., :-1]
    _close(
        expected,
        weights,
        live.expand_as(mask),
        unit * max(1.0, size / 10),
        f"{where}: softmax(where(mask, scores, -inf), sinks) == weights",
    )
    hidden = weights.abs()[~mask & live]
    assert not hidden.numel() or hidden.max() <= _NOTHING, f"{where}: a masked entry weighs {hidden.max().item():.3g}"
    if v is not None and output is not None and not call.dropout:
        largest = max(v.abs().max().item(), 1e-3)
        _close(
            weights @ _repeat(v, call, sizes),
            output,
            live.expand_as(output),
            unit * largest,
            f"{where}: weights @ v == output",
        )


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


def _close(actual: Tensor, expected: Tensor, at: Tensor, tolerance: float, what: str) -> None:
    gap = torch.where(at, actual - expected, 0.0).abs()
    worst = gap.max().item() if gap.numel() else 0.0
    assert worst <= tolerance, f"{what}: off by {worst:.3g}, {tolerance:.3g} allowed"  # NaN fails
