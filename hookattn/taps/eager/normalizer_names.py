"""What made weights of scores, told from the operations between the two."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...attention.normalizers import normalized, normalizer_of
from .states import Step

NONE = "none"
_SAME = {"square": ("pow", 2.0), "clip": ("clamp", None), "true_divide": ("div", None), "divide": ("div", None)}
_DUNDER = {
    "truediv": "div",
    "itruediv": "div",
    "rmul": "mul",
    "imul": "mul",
    "radd": "add",
    "iadd": "add",
    "ipow": "pow",
}
# What says nothing of how large a weight is: masks, casts, and a guard against 0/0.
_SILENT = frozenset(
    ("masked_fill", "where", "where_method", "tril", "triu", "nan_to_num", "add", "sub", "rsub", "setitem")
)
# Weights that a threshold made such that their rows sum to 1.
_THRESHOLDED = {"relu": "sparsemax", "relu^2": "entmax"}


def name_of_steps(steps: Sequence[Step]) -> str:
    """One name for all operations between scores and weights: ``relu^2``, ``sigmoid``, ``elu, over their sum``."""
    words: list[str] = []
    for step in steps:
        name, by = _SAME.get(step.name, (_DUNDER.get(step.name, step.name), step.by))
        if (name == "clamp" and by == 0) or (name == "clamp_min" and by == 0):
            name = "relu"
        if name == "relu" and "relu" in words[-1:]:
            continue
        if step.of_rows and name in ("div", "mul"):
            words.append("over their sum")
        elif name == "pow" and words and by is not None:
            words[-1] = f"{words[-1]}^{by:g}"
        elif name in ("mul", "div"):
            if by is None:
                words.append("times a factor")
        elif name not in _SILENT:
            words.append(name)
    return ", ".join(words) or NONE


def verified_name(name: str, weights: Tensor, scores: Tensor | None, mask: Tensor | None, tolerance: float) -> str:
    """The name under which weights follow from scores, if they do; else one that nobody takes them to follow from.

    Args:
        name: what :func:`name_of_steps` gave.
        weights: B H T S, the model's own.
        scores: B H T S; None: there are none to compare with.
        mask: bool, broadcastable to B H T S, True = may attend; None: all may.
        tolerance: the relative difference that is rounding.
    """
    if name in _THRESHOLDED and bool(((weights.sum(-1) - 1).abs() < 1e-3).all()):
        name = _THRESHOLDED[name]
    if scores is None or not normalizer_of(name).known:
        return name
    scores, weights = scores.detach(), weights.detach()
    derived = normalized(name, scores, mask)
    assert derived is not None
    bound = tolerance * max(1.0, scores.abs().amax().item(), weights.abs().amax().item())
    if (derived.to(weights.dtype) - weights).abs().amax().item() <= bound:
        return name
    return f"scaled {name}" if name != NONE else "other"
