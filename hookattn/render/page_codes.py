"""Numbers of a page in 8 bits: weights, queries and keys as codes, and weights as what queries and keys leave open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.functional import dot_scores, finish_scores, softmax_weights
from ..attention.normalizers import is_softmax
from ..calls.call import Call

SQRT8, STEPS8, SQRT8_LESS = "sqrt8", "steps8", "sqrt8-less-qk"
"""The kinds of codes, as ``coding`` in the header names them; docs/viewer.md says what each means."""

FINE = 12
"""Steps of the codes of q and k in the root mean square of a head: gzip leaves 5.7 bits of a code of such numbers."""
_MOST = 127
_TIE = 1e-9


def sqrt8(weights: Tensor) -> Tensor | None:
    """Weights as 8-bit codes, U8 of the same shape: round(255·√w), so that small ones are told apart.

    None where something is no weight: below 0, above 1 by more than rounding, or not finite.
    """
    if weights.numel() and not bool(((weights >= 0) & (weights <= 1 + 1e-2)).all()):
        return None
    # A step of the code at w is 2·√w / 255: at most 0.008, so that a weight is off by at most 0.004, and small weights,
    # which are most of a matrix, by far less. Codes of w itself would make 0 of all below 0.002.
    return weights.float().clamp(max=1).sqrt().mul(255).round().to(torch.uint8)


def half_floats(x: Tensor) -> tuple[Tensor, float]:
    """A tensor of 32- or 64-bit floats as 16-bit ones, and the largest absolute error; any other one as it is.

    It stays as it is, too, where a number is too large for 16 bits.
    """
    if x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return x, 0.0
    half = x.to(torch.float16)
    finite = x.isfinite()
    if bool((half.isinf() & finite).any()):
        return x, 0.0
    return half, float(torch.where(finite, half.to(x.dtype) - x, 0.0).abs().max())


def steps8(x: Tensor) -> tuple[Tensor, dict[str, Any]] | None:
    """q or k, B H T D, as 8-bit codes, and what they mean: I8, and ``step``, ``doubled`` of docs/viewer.md.

    A code counts steps. A head has one step, the more exact the smaller its numbers are; a column with numbers that are
    too large for that has it doubled so often that they fit. None where a number is not finite.
    """
    exact = x.double()
    if x.ndim != 4 or not bool(exact.isfinite().all()):
        return None
    if not exact.numel():
        return exact.to(torch.int8), {"step": [1.0] * x.shape[1], "doubled": []}
    level = exact.square().mean((0, 2, 3)).sqrt() / FINE
    steps = [float(f"{step:.4g}") if step > 0 else 1.0 for step in level.tolist()]
    step = torch.tensor(steps, dtype=torch.float64, device=x.device)[:, None]
    over = exact.abs().amax((0, 2)) / (step * _MOST)
    times = over.clamp(min=1).log2().ceil()
    codes = (exact / (step * times.exp2())[:, None]).round().clamp(-_MOST, _MOST).to(torch.int8)
    doubled = [[h, d, int(times[h, d])] for h, d in times.nonzero().tolist()]
    return codes, {"step": steps, "doubled": doubled}


def from_steps8(codes: Tensor, coding: dict[str, Any]) -> Tensor:
    """What codes of :func:`steps8` mean, float64."""
    step = torch.tensor(coding["step"], dtype=torch.float64).to(codes.device)[:, None].repeat(1, codes.shape[-1])
    for head, column, times in coding["doubled"]:
        step[head, column] *= 2**times
    return codes.double() * step[:, None]


def follow_weights(call: Call) -> bool:
    """Whether the weights of a call are, up to rounding, what the viewer makes of q, k, bias, mask and sinks."""
    dot = "scores" in call.derivable and "weights" in call.derivable and not call.own_scores
    return dot and is_softmax(call.normalizer) and isinstance(call.scale, (int, float))


def followed(call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the viewer makes of q and k as they are in a page: the scores, B H T S in float64, and what
    :func:`sqrt8` would make of their softmax, in int16.

    The second is None where rounding is so near that a reader who sums in another order may get another code.
    """
    bias, mask, sinks = (call.get(name) if call.has(name) else None for name in ("bias", "mask", "sinks"))
    bias, sinks = (None if x is None else half_floats(x)[0].double() for x in (bias, sinks))
    assert isinstance(call.scale, (int, float))
    scores = finish_scores(dot_scores(q, k, call.scale), call.softcap, bias)
    place = softmax_weights(scores, mask, sinks).sqrt().mul(255)
    near = (place.frac() - 0.5).abs() < _TIE
    return scores, None if bool(near.any()) else place.round().to(torch.int16)
