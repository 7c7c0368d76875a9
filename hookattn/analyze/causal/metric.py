"""What a metric is: a function of what a model returns, whose value is one number with a graph. And two of them.

Analyses of this package ask what attention is worth to a metric. One that is a mean over batch entries has effects
that are means, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...errors import GradientError, InputError

Metric = Callable[[Any], Tensor]
"""Takes what the model's forward returned; returns a scalar tensor."""

_WHAT = "a function of the model's output that returns a scalar tensor"


def checked_metric(metric: Any, name: str = "metric") -> Metric:
    """A metric that a caller gives.

    Raises:
        InputError: it can't be called.
    """
    return checks.function(name, metric, _WHAT)


def metric_value(metric: Metric, output: Any, gradient: bool = False) -> Tensor:
    """The value of a metric, a tensor of no axes.

    Args:
        metric: of :func:`checked_metric`.
        output: what the model's forward returned.
        gradient: whether a gradient will be asked for.

    Raises:
        InputError: it returned something else than one real number.
        GradientError: no gradient can be taken of it, and ``gradient``.
    """
    value = metric(output)
    name = getattr(metric, "__qualname__", type(metric).__name__)
    if not gradient and not isinstance(value, Tensor):
        with suppress(InputError):
            value = torch.tensor(checks.amount("metric", value))
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else checks.printed(value)
        raise InputError(f"metric {name}: expected {_WHAT}; it returned {got}. Sum or average it (.mean()).")
    if gradient and not value.requires_grad:
        raise GradientError(
            f"metric {name} has no gradient: what it returned is in no graph. It has to be computed of the output that "
            "it is given, with torch, outside of torch.no_grad() and without .detach() or .item()."
        )
    return value.reshape(())


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: itself, its ``logits``, or the first of a tuple; B … V.

    Raises:
        InputError: there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) and output else None)
    if not isinstance(found, Tensor) or found.dim() not in (1, 2, 3) or not found.is_floating_point():
        raise InputError(
            f"the metric reads logits, B T V or B V, and the model returned {type(output).__name__} without such; "
            "write a function of its output that returns a scalar tensor."
        )
    return found


def logit_difference(
    right: int | Sequence[int] | Tensor, wrong: int | Sequence[int] | Tensor, position: int = -1
) -> Metric:
    """The metric ``logit(right) − logit(wrong)``, the mean over the batch (Wang et al. 2022, "Interpretability in the
    wild").

    Args:
        right: the index of a token or class, or one for each batch entry.
        wrong: likewise.
        position: of logits B T V the position T that is read; of B V there is none, and it is of no account.

    Returns:
        A function of a model's output: of the tensor itself, of one with ``logits``, or of a tuple that begins with
        them. It raises InputError for an output without them, or with fewer tokens, positions or batch entries.

    Raises:
        InputError: a token or position is no int.
    """
    tokens = {"right": _tokens("right", right), "wrong": _tokens("wrong", wrong)}
    position = checks.whole("position", position, error=InputError)

    def metric(output: Any) -> Tensor:
        logits = _at(logits_of(output), position)
        return (_of(logits, tokens["right"], "right") - _of(logits, tokens["wrong"], "wrong")).mean()

    metric.__qualname__ = f"logit_difference({right}, {wrong}, position={position})"
    return metric


def log_probability(token: int | Sequence[int] | Tensor, position: int = -1) -> Metric:
    """The metric ``log softmax(logits)[token]``, the mean over the batch, in nats.

    Args:
        token: the index of a token or class, or one for each batch entry.
        position: as in :func:`logit_difference`.

    Returns, Raises:
        As :func:`logit_difference`.
    """
    tokens = _tokens("token", token)
    position = checks.whole("position", position, error=InputError)

    def metric(output: Any) -> Tensor:
        logits = _at(logits_of(output), position)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return _of(wide.log_softmax(-1), tokens, "token").mean()

    metric.__qualname__ = f"log_probability({token}, position={position})"
    return metric


def _tokens(name: str, value: Any) -> list[int]:
    what = "the index of a token, counted from 0, or one for each batch entry"
    found = checks.several_ints(name, value, what, InputError)
    if not found or min(found) < 0 or max(found) > checks.LARGEST:
        raise checks.wrong(name, value, what)
    return found


def _at(logits: Tensor, position: int) -> Tensor:
    """B V of logits B T V, B V or V."""
    if logits.dim() == 3:
        if not -logits.shape[1] <= position < logits.shape[1]:
            raise InputError(f"position={position}: the model returned logits of {logits.shape[1]} positions.")
        return logits[:, position]
    return logits if logits.dim() == 2 else logits[None]


def _of(values: Tensor, tokens: list[int], name: str) -> Tensor:
    """B: the value of each entry's token."""
    b, size = values.shape
    if len(tokens) not in (1, b):
        raise InputError(f"{name} has {len(tokens)} tokens, and the model returned logits of {b} batch entries.")
    if max(tokens) >= size:
        raise InputError(f"{name}={max(tokens)}: the model returned logits of {size} tokens, counted from 0.")
    index = torch.tensor(tokens, device=values.device).expand(b)
    return values.gather(1, index[:, None])[:, 0]


def batch_parts(output: Any, whole: int, parts: int) -> list[Any]:
    """What a model returned for a batch of several equal parts, as it would have been returned for each of them.

    Args:
        output: tensors, or tuples, lists and mappings of such. Those whose first axis is not the batch are in every
            part as they are.
        whole: batch entries of all parts.
        parts: how many there are.

    Returns:
        One for each part, of the same types, in the graph of ``output``.
    """
    size = whole // parts
    return [_batch_part(output, whole, slice(i * size, (i + 1) * size)) for i in range(parts)]


def _batch_part(x: Any, whole: int, part: slice) -> Any:
    if isinstance(x, Tensor):
        return x[part] if x.dim() and x.shape[0] == whole else x
    if isinstance(x, Mapping):
        made = {key: _batch_part(value, whole, part) for key, value in x.items()}
        return made if type(x) is dict else type(x)(**made)
    if isinstance(x, (tuple, list)):
        several = [_batch_part(value, whole, part) for value in x]
        return type(x)(*several) if hasattr(x, "_fields") else type(x)(several)
    return x
