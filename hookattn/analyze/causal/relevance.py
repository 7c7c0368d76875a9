"""Attention rolled through the layers, each pattern weighted by what its gradient says of a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import checks
from ...calls.call import Call
from ...errors import InputError, MeasureError
from .backward import BackwardRun
from .head_table import Column, head_table
from .metric import Metric
from .nodes import Patched

if TYPE_CHECKING:
    from pandas import DataFrame

_UNSEEN = "keys of "


@dataclass(frozen=True)
class Relevance:
    """What :func:`relevance` returns.

    Attributes:
        maps: (stack, other) → B T S: how relevant token j of the other stack's input is to token i of a stack, for the
            metric; (stack, stack): of its own input.
        heads: a pandas DataFrame as of :func:`hookattn.analyze.report`: the columns of a call, ``head``, and
            ``relevance``, the sum of ``(∂m/∂A ⊙ A)⁺`` over all edges of the head.
    """

    maps: Mapping[tuple[str, str], Tensor]
    heads: DataFrame


def relevance(model: nn.Module, inputs: Any, metric: Metric, *, keys: Mapping[str, str] | None = None) -> Relevance:
    """Gradient × attention rollout (Chefer, Gur & Wolf 2021, "Generic attention-model explainability for interpreting
    bi-modal and encoder-decoder transformers").

    Each call's heads become ``Ā = E_h[(∂m/∂A ⊙ A)⁺]``, and relevance is rolled through the calls in their order, from
    ``R^ss = I``, ``R^sq = 0``. Self-attention of a stack s: ``R^sx ← R^sx + Ā R^sx`` for every x. Attention from s to
    keys of q: ``R^sq ← R^sq + (R̄^ss)ᵀ Ā R̄^qq`` and ``R^ss ← R^ss + Ā R^qs``, where R̄ is ``(R − I)`` with each row over
    its sum (a row of 0 stays 0) plus I. Two such calls in a row that go both ways between the stacks of a layer
    (co-attention) are one step: both read what was there before.

    Args:
        model: any module whose attention can be edited, see :func:`hookattn.editing`; in eval mode.
        inputs: as :func:`hookattn.trace` takes them; one forward without a cache.
        metric: a function of the model's output that returns a scalar tensor: the logit of a class, say. Relevance is
            not linear in it, as I has no units: a metric that is a mean over B batch entries has gradients that are B
            times smaller; give one input at a time, or a sum.
        keys: stack → the stack whose outputs its cross-attention reads, where the number of keys does not tell.

    Returns:
        The maps and the table of heads. Of a causal language model the row of the position that the metric reads,
        ``maps["decoder", "decoder"][:, -1]``, is what the metric has of each token; of a classifier that of its class
        token.

    Raises:
        InputError: the metric returned no scalar, or ``keys`` is none.
        GradientError: the metric has no gradient, or no attention leads to it.
        EditError: the output of an attention call can't be edited; says which and why.
        MeasureError: a call is no such layer (several forwards, a cache, windows or another batch, several stacks that
            its keys may be of); says which and why.
    """
    if keys is not None:
        good = isinstance(keys, Mapping) and all(isinstance(x, str) for pair in keys.items() for x in pair)
        if not good:
            raise checks.wrong("keys", keys, "a mapping of stacks to the stacks that they read", InputError)
    run = BackwardRun(model, inputs, metric)
    weighted: list[Tensor] = []
    for call, gradient in zip(run.trace, run.gradients(), strict=True):
        own = Patched(call)
        with torch.no_grad():
            weighted.append((own.of_weights(gradient) * own.weights).clamp_min(0).double())
    rolled = _Rolled(dict(keys or {}))
    calls = list(run.trace)
    i = 0
    while i < len(calls):
        step = [(calls[i], weighted[i].mean(1))]
        if i + 1 < len(calls) and rolled.both_ways(calls[i], calls[i + 1]):
            step.append((calls[i + 1], weighted[i + 1].mean(1)))
        rolled.roll(step)
        i += len(step)
    rolled.check_keys()
    column = Column(
        "relevance",
        "metric",
        "The sum of a head's weights times their gradients, where that is positive (Chefer et al. 2021).",
        [x.sum((0, 2, 3)) for x in weighted],
    )
    return Relevance(rolled.maps, head_table(run.trace, [column], notes={"metric": run.value.item()}))


@dataclass
class _Rolled:
    """Relevance so far.

    Attributes:
        keys: stack → the stack that it reads, as a caller says.
        maps: (stack, other) → B T S; what is not there is 0, and of a stack that is new I.
        sizes: stack → its number of tokens.
        read: the stacks of which a call has read another.
    """

    keys: dict[str, str]
    maps: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    step: int | None = None

    def both_ways(self, call: Call, after: Call) -> bool:
        """Whether two calls go both ways between two stacks of one layer."""
        if not (call.site.crosses and after.site.crosses) or call.site.stack == after.site.stack:
            return False
        if call.site.layer != after.site.layer or call.step != after.step:
            return False
        t, s = _extents(call)
        return _extents(after) == (s, t)

    def roll(self, several: Sequence[tuple[Call, Tensor]]) -> None:
        """One step: a call, or two that go both ways; each with its Ā, B T S."""
        added: dict[tuple[str, str], Tensor] = {}
        for call, a in several:
            self._check(call, a)
            stack = call.site.stack
            self._begin(call, stack, a.shape[1], a)
            if not call.site.crosses:
                found = {pair: a @ r for pair, r in self.maps.items() if pair[0] == stack}
            else:
                self.read.add(stack)
                other = self._read_by(call, a.shape[2], [c.site.stack for c, _ in several if c is not call])
                self._begin(call, other, a.shape[2], a)
                own, theirs = self.maps[stack, stack], self.maps[other, other]
                found = {(stack, other): _normalised(own).mT @ a @ _normalised(theirs)}
                if (other, stack) in self.maps:
                    found[stack, stack] = a @ self.maps[other, stack]
            for pair, more in found.items():
                added[pair] = more if pair not in added else added[pair] + more
        for pair, more in added.items():
            before = self.maps.get(pair)
            self.maps[pair] = more if before is None else before + more

    def check_keys(self) -> None:
        """Raises InputError: a stack was named that reads no other."""
        for stack in self.keys:
            if stack not in self.read:
                there = ", ".join(sorted(self.read)) or "none"
                raise checks.wrong("keys", self.keys, f"stacks that read another: here {there}")

    def _begin(self, call: Call, stack: str, size: int, a: Tensor) -> None:
        known = self.sizes.setdefault(stack, size)
        if known != size:
            raise MeasureError(
                f"{call.site.label}: it has {size} tokens of the stack {stack}, and calls before it had {known}; "
                "relevance is rolled over tokens that stay the same."
            )
        if (stack, stack) not in self.maps:
            self.maps[stack, stack] = torch.eye(size, dtype=a.dtype, device=a.device).repeat(a.shape[0], 1, 1)

    def _read_by(self, call: Call, size: int, partners: Sequence[str]) -> str:
        """The stack that the keys of a call are of."""
        stack = call.site.stack
        if stack in self.keys:
            return self.keys[stack]
        if partners:
            return partners[0]
        fitting = [name for name, n in self.sizes.items() if name != stack and n == size]
        if len(fitting) > 1:
            raise MeasureError(
                f"{call.site.label}: its {size} keys may be of {' or '.join(fitting)}; say which with "
                f"keys={{{stack!r}: …}}."
            )
        # Keys that no attention was seen on: of a convolution, say.
        return fitting[0] if fitting else _UNSEEN + stack

    def _check(self, call: Call, a: Tensor) -> None:
        """Raises MeasureError: relevance can't be rolled through a call."""
        why = None
        if self.step not in (None, call.step):
            why = "it is in another forward; run one, without a cache"
        elif self.maps and a.shape[0] != (b := next(iter(self.maps.values())).shape[0]):
            why = f"it has {a.shape[0]} batch entries and calls before it {b}, as where windows are folded into them"
        elif not call.site.crosses and a.shape[1] != a.shape[2]:
            why = f"it has {a.shape[1]} queries and {a.shape[2]} keys, as where there is a cache"
        if why is not None:
            raise MeasureError(f"relevance is rolled through the layers of one forward; {call.site.label}: {why}.")
        self.step = call.step


def _extents(call: Call) -> tuple[int, int]:
    """T and S."""
    _, _, t, s = call.weights.shape
    return t, s


def _normalised(r: Tensor) -> Tensor:
    """R̄: what has come to I, each row over its sum, plus I."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    more = r - eye
    total = more.sum(-1, keepdim=True)
    return more / total.masked_fill(total == 0, 1) + eye
