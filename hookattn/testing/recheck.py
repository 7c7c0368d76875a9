"""The contract's invariants of one stored call, from its fields alone, in float64 and in other words than the tracer's.

Letters: B batch, H query heads, G key/value heads, T queries, S keys, D query/key width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.kernel_call import DERIVED, FIELD_SPECS
from ..calls.call import Call
from ..calls.certificate import tolerance
from ..calls.edits import edited_entries, set_by_edits
from ..calls.extents import extents_of, per_query_head
from ..calls.fields import Field, File, InFile, PartOf
from ..calls.key_history import Continued
from ..store import LazyFile
from ..store.stored_history import StoredHistory
from .oracle import NORMALIZERS, SUM_TO_ONE, column, defined_output, defined_scores, defined_weights

CHECKS = {
    "scores": "softcap(scale·q·kᵀ) + bias = scores, where the mask allows",
    "weights": "softmax(where(mask, scores, −∞), sinks) = weights, or what the normalizer is in its place",
    "masked": "a masked entry weighs 0",
    "rows": "a row of weights sums to 1 (with sinks: to at most 1), where the normalizer sees to it",
    "output": "weights @ v = output, or applied @ v where the weights were changed in between",
}
STORED = "stored"
"""Beside these: whether the bytes that a file has of the call have the checksums that were written with them."""
BUDGET = 1 << 22
"""Entries of B H T S that are looked at in one go."""

_ALL_SET = "edits have set all that it is of"


@dataclass(frozen=True)
class Check:
    """One invariant of one call: the largest error and its bound, or the reason why it could not be checked."""

    error: float = 0.0
    tolerance: float = 0.0
    reason: str = ""

    @property
    def passed(self) -> bool | None:
        """None where it was not checked."""
        return None if self.reason else self.error <= self.tolerance  # NaN fails


def recheck(call: Call, budget: int = BUDGET) -> dict[str, Check]:
    """Check all of :data:`CHECKS` that the stored fields allow, a few query rows at a time; and :data:`STORED`.

    Raises:
        TraceFileError: the call's file cannot be read.
        CorruptFileError: a field is damaged so that it is none.
    """
    own = replace(call)  # what is derived for the check goes with it
    stored = _stored_check(call)
    found = _Recheck(own, {name: own.get(name) for name in own.fields}).run(budget)
    return {**found, STORED: stored}


def _stored_check(call: Call) -> Check:
    """How many of a call's tensors are not what was written."""
    places = [*call.fields.values(), None if call.gradient is None else call.gradient.there]
    tensors = {found for place in places for found in _in_files(place)}
    if not tensors:
        return Check(reason="the call is not read from a file")
    found = [file.intact(name) if isinstance(file, LazyFile) else None for file, name in tensors]
    if None in found:
        return Check(reason="the file has no checksums")
    return Check(error=float(found.count(False)))


def _in_files(place: Field) -> Iterator[tuple[File, str]]:
    """The tensors in files that a field is read from."""
    if isinstance(place, PartOf):
        yield from _in_files(place.whole)
    elif isinstance(place, InFile):
        yield place.file, place.name
    elif isinstance(place, Continued) and isinstance(place.history, StoredHistory):
        yield from ((place.history.file, name) for name in place.history.names(place.step))


class _Recheck:
    """One call, with its fields read once."""

    def __init__(self, call: Call, stored: dict[str, Tensor | None]) -> None:
        self.call, self.stored = call, stored
        self.unit = tolerance(call.dtype)
        self.scores, self.weights, self.v, self.output = (stored.get(n) for n in ("scores", "weights", "v", "output"))
        self.why: dict[str, str] = {}
        self.wide: dict[str, Tensor] = {}
        of_scores, of_weights = (
            [x for x in FIELD_SPECS[name].derived_from if x not in DERIVED] for name in ("scores", "weights")
        )
        self.products = self._has(*of_scores)
        opaque = call.own_scores and not call.own_by_edits
        if self.scores is None or not self.products or opaque:
            self.why["scores"] = (
                "they are the model's own, and more than q·k" if opaque else self._missing("scores", *of_scores)
            )
        formed = self.scores is not None or (self.products and not opaque)
        known = call.normalizer in NORMALIZERS
        if self.weights is None or not formed or not self._has(*of_weights):
            self.why["weights"] = self._missing(*(() if formed else ("scores",)), "weights", *of_weights)
        if not known:
            self.why["weights"] = self.why["rows"] = f"what {call.normalizer!r} makes of scores is not known here"
        elif call.normalizer not in SUM_TO_ONE:
            self.why["rows"] = f"the weights of {call.normalizer!r} need not sum to 1"
        if self.weights is None or not self._has("mask"):
            self.why["masked"] = self._missing("weights", "mask")
        if "rows" not in self.why and (self.weights is None or not self._has(*of_weights)):
            self.why["rows"] = self._missing("weights", *of_weights)
        mixed = "; ".join(call.notes) or "the weights changed after the softmax" if call.mixed else ""
        weighable = self.weights is not None or (formed and known and self._has(*of_weights))
        applied = stored.get("applied") is not None
        if call.dropout > 0 and not applied:
            self.why["output"] = f"dropout of {call.dropout} came between"
        elif mixed and not applied:
            self.why["output"] = mixed
        elif self.v is None or self.output is None or not weighable:
            self.why["output"] = self._missing(*(() if weighable else ("weights",)), "v", "output")
        self.by_edits = set_by_edits(call.edits, "weights")
        if self.by_edits and self.weights is None and "weights" not in self.why:
            self.why["weights"] = self._missing("weights")
        self._leave_out()
        self.reach = 0.0
        if self.products and isinstance(q := stored["q"], Tensor) and isinstance(k := stored["k"], Tensor):
            self.reach = _norm(q) * _norm(k) * _largest(torch.as_tensor(1.0 if call.scale is None else call.scale))

    def _leave_out(self) -> None:
        """Find what edits have set: bool, broadcastable to the field. It follows from nothing; all else is checked."""
        call, edits = self.call, self.call.edits
        self.set_scores: Tensor | None = None
        self.set_weights: Tensor | None = None
        self.set_output: Tensor | None = None
        found = extents_of(call, "BHTS") if edits else None
        if found is None or None in (found.b, found.h, found.t, found.s):
            return
        shape = (found.b or 0, found.h or 0, found.t or 0, found.s or 0)
        v = self.v if self.v is not None else self.weights
        device = torch.device("cpu") if v is None else v.device
        set_of = {x: edited_entries(edits, x, shape, device, call.heads, call.queries) for x in ("weights", "output")}
        self.set_weights, self.set_output = set_of["weights"], set_of["output"]
        if call.own_by_edits:
            self.set_scores = edited_entries(edits, "scores", shape, device, call.heads, call.queries)
            if self.scores is None:  # nobody knows what the weights of these rows were made of
                self.set_weights = _also(self.set_weights, self.set_scores)
        if self.weights is None:  # or what met the values there
            self.set_output = _also(self.set_output, self.set_weights)
        self._nothing_left("scores", self.set_scores, shape)
        for name in ("weights", "masked", "rows"):
            self._nothing_left(name, self.set_weights, shape)
        self._nothing_left("output", self.set_output, shape)

    def _nothing_left(self, name: str, was_set: Tensor | None, shape: tuple[int, int, int, int]) -> None:
        if was_set is None or name in self.why or not shape[3]:
            return
        if name == "rows":
            was_set = was_set.any(-1, keepdim=True)
        if bool(was_set.all()):
            self.why[name] = _ALL_SET

    def _has(self, *names: str) -> bool:
        """Whether fields were kept; of an optional one a call may have none and still have kept that."""
        return all(n in self.stored and (FIELD_SPECS[n].optional or self.stored[n] is not None) for n in names)

    def _missing(self, *names: str) -> str:
        gone = [name for name in names if not self._has(name)]
        return f"{' and '.join(gone)} {'was' if len(gone) == 1 else 'were'} not kept"

    def run(self, budget: int) -> dict[str, Check]:
        """All checks."""
        worst = {name: torch.zeros((), dtype=torch.float64) for name in CHECKS}
        if len(self.why) < len(CHECKS):
            found = extents_of(self.call)
            step = max(1, budget // max(1, (found.b or 1) * (found.h or 1) * (found.s or 1)))
            some = found.b != 0 and found.s != 0  # else there is nothing in any of the rows
            for begin in range(0, (found.t or 0) if some else 0, step):
                for name, error in self._errors(slice(begin, begin + step)).items():
                    worst[name] = torch.maximum(worst[name], error)  # keeps NaN
        return {
            name: Check(reason=self.why[name]) if name in self.why else Check(float(worst[name]), self._tolerance(name))
            for name in CHECKS
        }

    def _errors(self, rows: slice) -> dict[str, Tensor]:
        mask = _rows(self.stored.get("mask"), rows)
        live = torch.ones((), dtype=torch.bool) if mask is None else mask.any(-1, keepdim=True)
        of_weights, of_rows, of_output = live, live, live
        if (was_set := _rows(self.set_weights, rows)) is not None:
            of_weights, of_rows = live & ~was_set, live & ~was_set.any(-1, keepdim=True)
        if (was_set := _rows(self.set_output, rows)) is not None:
            of_output = live & ~was_set
        found: dict[str, Tensor] = {}
        scores, weights = _rows(self.scores, rows), _rows(self.weights, rows)
        if "scores" not in self.why and scores is not None:
            gap = self._formed(rows) - scores.double()
            if (was_set := _rows(self.set_scores, rows)) is not None:
                gap = torch.where(was_set, 0.0, gap)
            found["scores"] = _most(gap if mask is None else torch.where(mask, gap, 0.0))
        formed = None
        if "weights" not in self.why or ("output" not in self.why and weights is None):
            given = self._formed(rows) if scores is None else scores
            formed = defined_weights(given, mask, self._sinks(rows), self.call.normalizer)
        if "weights" not in self.why and weights is not None and formed is not None:
            found["weights"] = _most(torch.where(of_weights, formed - weights.double(), 0.0))
        if weights is not None and mask is not None:
            if "masked" not in self.why:
                found["masked"] = _most(torch.where(of_weights & ~mask, weights.double(), 0.0))
            if "rows" not in self.why:
                excess = weights.double().sum(-1, keepdim=True) - 1
                excess = excess if self._sinks(rows) is None else excess.clamp_min(0)
                found["rows"] = _most(torch.where(of_rows, excess, 0.0))
        applied = _rows(self.stored.get("applied"), rows)
        used = applied.double() if applied is not None else formed if weights is None else weights.double()
        if "output" not in self.why and used is not None and self.v is not None and self.output is not None:
            v = self._spread("v", self.v, used.shape[1])
            gap = defined_output(used, v) - self.output[:, :, rows].double()
            found["output"] = _most(torch.where(of_output, gap, 0.0))
        return found

    def _formed(self, rows: slice) -> Tensor:
        """Scores from q and k: B H rows S."""
        q, k = self.stored["q"], self.stored["k"]
        assert q is not None and k is not None
        scale = self.call.scale
        assert scale is not None
        factor = _rows(scale, rows) if isinstance(scale, Tensor) else None
        return defined_scores(
            q[:, :, rows],
            self._spread("k", k, q.shape[1]),
            scale if factor is None else factor,
            self.call.softcap,
            _rows(self.stored["bias"], rows),
        )

    def _sinks(self, rows: slice) -> Tensor | None:
        sinks = self.stored.get("sinks")
        return _rows(None if sinks is None else column(sinks), rows)

    def _spread(self, name: str, x: Tensor, heads: int) -> Tensor:
        """k or v with one entry for each query head, in float64; made once."""
        if name not in self.wide:
            self.wide[name] = per_query_head(self.call, x.double(), heads)
        return self.wide[name]

    def _tolerance(self, name: str) -> float:
        """What rounding may do: that of the kernel's dtype, and that of a coarser one the fields were stored in."""
        if name == "scores":
            largest = max(self.reach, _largest(self.scores), 1e-3)
            return largest * (self.unit + 4 * self._coarse("q", "k", "bias", "scores"))
        size = max(1.0, self.reach if self.scores is None else _largest(self.scores))
        sources = ("q", "k", "bias") if self.scores is None else ("scores",)
        weights = self.unit + (2 * size + 1) * self._coarse(*sources, "weights")
        if name == "weights":
            return weights * max(1.0, _largest(self.weights))
        if name == "rows":
            return 4 * (self.unit + self._coarse("weights"))
        if name == "masked":
            return 1e-12
        used = self.weights if self.stored.get("applied") is None else self.stored["applied"]
        largest = max(_largest(self.v), 1e-3)
        plain = used is self.weights and self.call.normalizer in SUM_TO_ONE and not self.by_edits
        if used is not None and not plain:
            largest *= max(1.0, _largest(used.float().abs().sum(-1)))
        if used is None:
            return largest * (weights + 4 * self._coarse("v", "output"))
        return largest * (self.unit + 4 * self._coarse("weights", "applied", "v", "output"))

    def _coarse(self, *names: str) -> float:
        """The rounding of the coarsest dtype among fields, where it is coarser than the kernel's."""
        kept = [x for n in names if (x := self.stored.get(n)) is not None and x.is_floating_point()]
        own = torch.finfo(self.call.dtype).eps
        return max([e for x in kept if (e := torch.finfo(x.dtype).eps) > own], default=0.0)


def _also(set_before: Tensor | None, entries: Tensor | None) -> Tensor | None:
    """What was set, and the rows of some entries."""
    if entries is None:
        return set_before
    of_rows = entries.any(-1, keepdim=True)
    return of_rows if set_before is None else set_before | of_rows


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    if x is not None and 1 < x.dim() < 4:
        x = x[(None,) * (4 - x.dim())]
    return x[:, :, rows] if x is not None and x.dim() == 4 and x.shape[2] > 1 else x


def _most(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, ord=torch.inf) if x.numel() else torch.zeros((), dtype=torch.float64)


def _largest(x: Tensor | None) -> float:
    """Max abs, the infinite ones left out."""
    if x is None or not x.numel():
        return 0.0
    return float(torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0).abs().amax())


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float(), dim=-1).amax()) if x.numel() else 0.0
