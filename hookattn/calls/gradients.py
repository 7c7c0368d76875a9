"""``call.grad``: the gradient of any field, derived when it is read of that of the kernel's own output.

No kernel runs and none is asked for anything: what was recorded says what each derivative is
(:mod:`hookattn.attention.gradients`). What it does not say is an error with the reason.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..attention.functional import compute_dtype, dot_scores
from ..attention.gradients import (
    applied_gradient,
    keys_gradient,
    queries_gradient,
    scores_gradient,
    uncapped_gradient,
    undropped_gradient,
    values_gradient,
)
from ..attention.kernel_call import DOT
from ..attention.normalizers import normalizer_of
from ..errors import GradientError
from ..torch_internals.isolation import isolated
from .deriving import SourceCall
from .edits import AppliedEdit, edited_entries, edits_in_words
from .extents import evenly_grouped
from .output_gradient import NOT_ASKED_FOR, OutputGradient

NAMES = ("weights", "applied", "scores", "q", "k", "v", "output")
"""What has a gradient."""


class GradedCall(SourceCall, Protocol):
    """What else is asked of a :class:`~hookattn.calls.call.Call` here."""

    dropout: float
    mixed: bool
    own_scores: bool
    score: str
    edits: tuple[AppliedEdit, ...]
    gradient: OutputGradient | None

    def get(self, name: str) -> Tensor | None:
        """A field."""


def gradient_of(call: GradedCall, name: str) -> Tensor:
    """See :meth:`hookattn.calls.call.Call.grad`."""
    where = call.site.label
    if call.gradient is None:
        raise GradientError(f"{where} has no gradient: {NOT_ASKED_FOR}.")
    of_output = call.gradient.tensor(where)
    if name == "output":
        return of_output
    with isolated(of_output):
        return _Gradients(call, of_output).get(name)


class _Gradients:
    """The gradients of one call.

    Args:
        call: the call.
        of_output: B H T E.
    """

    def __init__(self, call: GradedCall, of_output: Tensor):
        self.call, self.where = call, call.site.label
        self.of_output = of_output.to(compute_dtype(of_output.dtype))
        self.device = of_output.device

    def get(self, name: str) -> Tensor:
        """One of them, in float32 at the least."""
        if name == "weights":
            return self.of_weights()
        if name == "applied":
            return self.of_applied()
        if name == "scores":
            return self.of_scores()
        if name == "v":
            return self.of_values()
        return self.of_operand(name)

    # What is read

    def field(self, name: str) -> Tensor:
        """A field that there has to be; ``k`` and ``v`` with a head for each query head where groups are uneven."""
        found = self.call.get(name)
        if found is None:
            raise GradientError(f"{self.where} has no {name}, so that no gradient follows from it.")
        found = found.to(self.device)
        return evenly_grouped(self.call, found) if name in ("k", "v") else found

    def applied(self) -> Tensor:
        """B H T S: what met the values."""
        if self.call.dropout or self.call.mixed:
            found = self.call.get("applied")
            if found is None:
                raise GradientError(
                    f"{self.where}: its kernel dropped weights out (p = {self.call.dropout}) and hands out neither "
                    "these nor its mask, so that their gradient is not known, nor any that follows from it. Put the "
                    "model into eval mode or its dropout to 0, or let it form its weights "
                    '(attn_implementation="eager").'
                )
            return found.to(self.device)
        return self.field("weights")

    def uncut(self, name: str) -> None:
        """Raises GradientError: ``k`` and ``v`` are read by queries or heads that were not kept."""
        if self.call.heads is not None or self.call.queries is not None:
            cut = "heads" if self.call.heads is not None else "queries"
            raise GradientError(
                f"{self.where}: the gradient of {name} is a sum over all queries and over all query heads that read "
                f"it, and of this call some {cut} alone were kept; read it of the whole call: trace without {cut}=, "
                "and without at()."
            )

    def unedited(self, field: str, name: str, s: int = 1) -> None:
        """Raises GradientError: an edit has set some of a field, and how it did so is not recorded.

        Args:
            field: ``weights`` or ``output``.
            name: what does not follow then.
            s: S, of weights.
        """
        call = self.call
        shape = (*self.of_output.shape[:3], s if field == "weights" else self.of_output.shape[3])
        found = edited_entries(call.edits, field, shape, self.device, call.heads, call.queries)
        if found is not None and bool(found.any()):
            told = edits_in_words(edit for edit in call.edits if edit.field == field)
            raise GradientError(
                f"{self.where}: not all of its {field} is what the rest makes ({told}), and how a gradient goes back "
                f"through that is not recorded, so that there is none of {name}; read it of heads, queries and batch "
                "entries that were not edited: call.at(…)."
            )

    # What follows

    def of_applied(self) -> Tensor:
        """Of what met the values."""
        self.unedited("output", "what it is made of")
        return applied_gradient(self.of_output, self.field("v"))

    def of_weights(self) -> Tensor:
        """Of the weights before dropout."""
        call = self.call
        if call.mixed:
            raise GradientError(
                f"{self.where}: the model changed its weights before they met the values ({'; '.join(call.notes)}), "
                "and how a gradient goes back through that is not known; grad('applied') is that of what met the "
                "values."
            )
        if not call.dropout:
            return self.of_applied()
        return undropped_gradient(self.of_applied(), self.applied(), call.dropout)

    def of_scores(self) -> Tensor:
        """Of the scores."""
        call, of_weights = self.call, self.of_weights()
        self.unedited("weights", "the scores", of_weights.shape[3])
        mask, scores = self.field("mask"), None
        if normalizer_of(call.normalizer).slope is not None:
            scores = self.field("scores")
        found = scores_gradient(call.normalizer, self.field("weights"), of_weights, scores, mask)
        if found is None:
            raise GradientError(
                f"{self.where}: the derivative of its normalizer {call.normalizer!r} is not known, so that there is no "
                "gradient of its scores; grad('weights') is that of its weights."
            )
        return found

    def of_operand(self, name: str) -> Tensor:
        """Of q or k."""
        call = self.call
        if call.score != DOT or call.own_scores or call.scale is None:
            why = f"are no product of queries and keys ({call.score})" if call.score != DOT else "are more than q·k"
            raise GradientError(
                f"{self.where}: its scores {why}, and how a gradient goes back through that is not known; "
                "grad('scores') is that of its scores."
            )
        if name == "k":
            self.uncut(name)
        of_scores, q, k = self.of_scores(), self.field("q"), self.field("k")
        if call.softcap is not None:
            of_scores = uncapped_gradient(of_scores, dot_scores(q, k, call.scale), call.softcap)
        if name == "q":
            return queries_gradient(of_scores, k, call.scale)
        return keys_gradient(of_scores, q, call.scale, k.shape[1])

    def of_values(self) -> Tensor:
        """Of v."""
        self.uncut("v")
        self.unedited("output", "v")
        return values_gradient(self.applied(), self.of_output, self.field("v").shape[1])
