"""What a metric is expected to do when a node of a clean run gets its values of another run: to first order, and with
the softmax that it passes through computed exactly.

A node is the output, the queries, the keys or the values of a head, at a position. Letters: B batch, H query heads, G
key heads, T queries, S keys; a prime marks the other run; ``g = ∂m/∂W = dO·vᵀ`` is the gradient of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...attention.functional import dot_scores, finish_scores, with_four_axes
from ...attention.gradients import applied_gradient, scores_gradient, uncapped_gradient
from ...attention.kernel_call import DOT
from ...attention.normalizers import is_softmax, normalized, normalizer_of
from ...cached import cached_property
from ...calls.call import Call
from ...calls.extents import evenly_grouped
from ...errors import MeasureError, SelectionError
from ...traces import Trace

NODES = ("output", "q", "k", "v")
"""What of a head can be patched; each has a value for each query, of ``k`` and ``v`` for each key."""


def checked_nodes(nodes: Any) -> tuple[str, ...]:
    """Nodes that a caller names.

    Raises:
        InputError, SelectionError: they are none, or there are no such.
    """
    several = [nodes] if isinstance(nodes, str) else list(checks.several("nodes", nodes, str, "names of nodes"))
    if not several:
        raise SelectionError(f"nodes=[]: expected some of {', '.join(NODES)}.")
    return tuple(dict.fromkeys(checks.word("nodes", name, NODES) for name in several))


def check_counterparts(clean: Trace, corrupt: Trace) -> None:
    """Whether the calls of two runs have the same shapes.

    Raises:
        MeasureError: they don't; says which call.
    """
    ours, theirs = clean.calls, corrupt.calls
    if len(ours) != len(theirs):
        raise MeasureError(
            f"the clean inputs ran {len(ours)} attention calls, and the corrupt ones {len(theirs)}; both need as many "
            "tokens, batch entries and forwards."
        )
    for a, b in zip(ours, theirs, strict=True):
        for name in ("output", "q", "k", "v"):
            x, y = a.get(name), b.get(name)
            same = (x is None) == (y is None) and (x is None or y is None or x.shape == y.shape)
            if a.site.path != b.site.path or not same:
                shapes = " and ".join("none" if z is None else str(list(z.shape)) for z in (x, y))
                raise MeasureError(
                    f"call {a.index} ({a.site.label}): {name} of the clean and the corrupt inputs are {shapes}, in "
                    f"{b.site.label}; both need as many tokens and batch entries."
                )


def check_deterministic(trace: Trace) -> None:
    """Whether a second run would be the same.

    Raises:
        MeasureError: some call dropped weights out.
    """
    for call in trace.calls:
        if call.dropout:
            raise MeasureError(
                f"{call.site.label}: its kernel dropped weights out (p = {call.dropout}), so that two runs differ by "
                "chance; put the model into eval mode."
            )


class Patched:
    """One call of a clean run, and the same of another run.

    Args:
        clean: with the fields that gradients are derived of.
        corrupt: with q, k, v and output; None: there is none, and edges alone are asked for.

    Raises:
        MeasureError: where a node or a normalizer is asked for that it does not have.
    """

    def __init__(self, clean: Call, corrupt: Call | None = None):
        self.clean, self._corrupt = clean, corrupt
        self.where = f"call {clean.index} ({clean.site.label})"

    @property
    def corrupt(self) -> Call:
        """The call of the other run."""
        assert self._corrupt is not None
        return self._corrupt

    # What both methods read

    def operand(self, call: Call, name: str) -> Tensor:
        """q B H T D, or k, v with a head for each group of query heads."""
        x = call.get(name)
        if x is None:
            raise MeasureError(f"{self.where} has no {name} to patch: its scores are no product ({call.score}).")
        return x if name == "q" else evenly_grouped(call, x)

    @cached_property
    def weights(self) -> Tensor:
        """B H T S."""
        if self.clean.mixed:
            raise MeasureError(
                f"{self.where}: the model changed its weights before they met the values "
                f"({'; '.join(self.clean.notes)}), and what it makes of others is unknown; choose nodes='output'."
            )
        return self.clean.weights

    @cached_property
    def mask(self) -> Tensor:
        """bool, broadcastable to B H T S."""
        return with_four_axes(self.clean.mask)

    def of_weights(self, of_output: Tensor) -> Tensor:
        """g, B H T S: the gradient of the weights, of that of the output."""
        _ = self.weights  # raises where what met the values is something else
        return applied_gradient(of_output, self.operand(self.clean, "v"))

    def raw(self, query: Call, key: Call) -> Tensor:
        """B H T S: scale·q·kᵀ of the queries of one run and the keys of one."""
        call = self.clean
        if call.score != DOT or call.own_scores or call.scale is None:
            raise MeasureError(
                f"{self.where}: its scores are no product of queries and keys alone ({call.score}), so that what "
                "becomes of them with others is not known; choose other nodes, of output and v."
            )
        return dot_scores(self.operand(query, "q"), self.operand(key, "k"), call.scale)

    @cached_property
    def _raw_clean(self) -> Tensor:
        return self.raw(self.clean, self.clean)

    def _finished(self, raw: Tensor) -> Tensor:
        """Scores of the products."""
        return finish_scores(raw.clone(), self.clean.softcap, self.clean.get("bias"))

    def _normalized(self, scores: Tensor) -> Tensor:
        call = self.clean
        made = normalized(call.normalizer, scores, self.mask, call.get("sinks"))
        if made is None:
            raise MeasureError(f"{self.where}: nobody knows how its normalizer ({call.normalizer}) makes weights.")
        return made

    # To first order

    def linear(self, node: str, of_output: Tensor) -> Tensor:
        """``Σ (n′ − n) · ∂m/∂n`` over the width of a node: B H T, of k and v B H S.

        Args:
            node: of :data:`NODES`.
            of_output: B H T E, the metric's gradient at the clean output.
        """
        if node == "output":
            return ((self.corrupt.output - self.clean.output).double() * of_output.double()).sum(-1)
        if node == "v":
            change = self.operand(self.corrupt, "v") - self.operand(self.clean, "v")
            return (self.weights * applied_gradient(of_output, change)).double().sum(2)
        of_raw = self._of_raw(of_output)
        changed = self._with(node)
        return (of_raw * (changed - self._raw_clean)).double().sum(3 if node == "q" else 2)

    def _with(self, node: str) -> Tensor:
        """scale·q·kᵀ with the queries or the keys of the other run."""
        return self.raw(self.corrupt, self.clean) if node == "q" else self.raw(self.clean, self.corrupt)

    def _of_raw(self, of_output: Tensor) -> Tensor:
        call = self.clean
        scores = call.scores if normalizer_of(call.normalizer).slope is not None else None
        found = scores_gradient(call.normalizer, self.weights, self.of_weights(of_output), scores, self.mask)
        if found is None:
            raise MeasureError(f"{self.where}: the derivative of its normalizer ({call.normalizer}) is not known.")
        return found if call.softcap is None else uncapped_gradient(found, self._raw_clean, call.softcap)

    # With the softmax computed exactly

    def exact(self, node: str, of_output: Tensor) -> Tensor:
        """``Σ_s (W(n′) − W)_ts · g_ts``: the weights that the patched node gives, and what is linear in weights after
        that. Of a query it is of its row; of a key of all rows, with this key alone patched.

        Args, Returns:
            As :meth:`linear`; of output and v, which no softmax follows, it is the same.
        """
        if node in ("output", "v"):
            return self.linear(node, of_output)
        g = self.of_weights(of_output).double()
        if node == "q":
            return ((self._patched_query_weights.double() - self.weights.double()) * g).sum(-1)
        if not is_softmax(self.clean.normalizer):
            if normalizer_of(self.clean.normalizer).of_each is None:
                raise MeasureError(
                    f"{self.where}: what a patched key does to the other weights of a row is known of a softmax, and "
                    f"its normalizer is {self.clean.normalizer!r}; choose nodes without k."
                )
            # Each weight is of its own score alone.
            return ((self._normalized(self._key_scores).double() - self.weights.double()) * g).sum(2)
        return self.exchanged(self._key_scores, g).sum(2)

    @cached_property
    def _patched_query_weights(self) -> Tensor:
        return self._normalized(self._finished(self._with("q")))

    @cached_property
    def _key_scores(self) -> Tensor:
        return self._finished(self._with("k"))

    @cached_property
    def _clean_scores(self) -> Tensor:
        """B H T S, float64, −∞ where masked."""
        return torch.where(self.mask, self._finished(self._raw_clean).double(), -torch.inf)

    def exchanged(self, scores: Tensor, g: Tensor) -> Tensor:
        """``Σ_j (W′_tj − W_tj) · g_tj`` when the score of one key s of a row is exchanged, for each s: B H T S.

        With ``a = exp(score′_s − lse)`` and ``ḡ = Σ_j w_j g_j`` it is ``(a − w_s)(g_s − ḡ) / (1 − w_s + a)``, without
        any T S S. Of the largest weight of a row, where 1 − w_s cancels, the row is formed anew.

        Args:
            scores: B H T S, the other scores, finite; or −∞ for a key that is cut off.
            g: B H T S, float64.
        """
        own = self._clean_scores
        weights = self._normalized(self._finished(self._raw_clean).double())
        mean = (weights * g).sum(-1, keepdim=True)
        blind = ~self.mask.any(-1, keepdim=True)
        # The logarithm of the whole denominator, sinks included: that of any key's exp(score) over its weight.
        top = own.argmax(-1, keepdim=True)
        total = own.gather(-1, top) - weights.gather(-1, top).log()
        log_a = (scores.double() - total).nan_to_num(nan=-torch.inf)
        # Both parts of the fraction over max(1, a): nothing overflows.
        shrink = torch.exp(-log_a.clamp_min(0.0))
        a = torch.exp(log_a.clamp_max(0.0))
        made = (a - weights * shrink) * (g - mean) / ((1 - weights) * shrink + a)
        anew = torch.where(
            torch.arange(own.shape[-1], device=own.device) == top, scores.double().expand(own.shape), own
        )
        mask = self.mask & (anew > -torch.inf)
        patched = normalized(self.clean.normalizer, anew.nan_to_num(neginf=0.0), mask, self.clean.get("sinks"))
        assert patched is not None
        made = made.scatter(-1, top, ((patched - weights) * g).sum(-1, keepdim=True))
        return torch.where(self.mask & ~blind, made, 0.0)

    def knocked_out(self, of_output: Tensor) -> Tensor:
        """B H T S: what cutting off each key from a query does to the metric, the rest of the row renormalised, and
        what follows linear: ``−w_s (g_s − ḡ) / (1 − w_s)``; where nothing is left to attend to ``−w_s g_s``."""
        g = self.of_weights(of_output).double()
        if not is_softmax(self.clean.normalizer):
            if normalizer_of(self.clean.normalizer).of_each is None:
                raise MeasureError(
                    f"{self.where}: what its normalizer ({self.clean.normalizer}) makes of a row without one of its "
                    "keys is not computed here; a softmax, or weights that are each of one score, are."
                )
            return -self.weights.double() * g
        return self.exchanged(torch.full_like(g, -torch.inf), g)
