"""One T×S picture of a generation: the calls of all its steps, put together as one forward would have made them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..attention.functional import dot_scores, finish_scores
from ..attention.kernel_call import FIELD_SPECS, FIELDS
from ..calls.call import Call
from ..calls.certificate import Certificate
from ..calls.extents import evenly_grouped
from ..calls.fields import Later
from ..calls.key_tokens import stitching_note
from ..calls.trace_data import TraceData
from ..errors import StitchError
from .lineage import CallPositions, Lineage, query_and_key_counts

Whole = TypeVar("Whole", bound=TraceData)

_SAME_IN_EVERY_STEP = ("softcap", "heads", "kv_heads", "own_scores", "mixed")


def stitch(trace: Whole, *, beams: Any = None, length: int | None = None) -> Whole:
    """Put the steps of a generation together: one call for each site, as one forward over the final sequence has it.

    T is every token that was fed and kept, S the same (for cross-attention: the keys of the other sequence). Each row
    is taken from the step that computed it. What that step could not see is masked and weighs 0; its ``bias`` is 0
    there, and its ``scores`` are scale·q·kᵀ (0 where q or k was not captured). The last generated token was never fed,
    so it is not there. What ran in the first step alone (an encoder, a vision tower) stays as it is. Fields are put
    together when they are read.

    The empty end of a static cache is left out; keys that fell out of a sliding window are taken from the steps that
    had them; candidates that assisted decoding took back are dropped. Rows that beam search reordered are followed back
    by their cached keys, so ``k`` has to be captured wherever there is more than one row.

    Args:
        trace: a trace of one generation, from its first forward on.
        beams: ``beam_indices`` as ``generate(num_beams=…, return_dict_in_generate=True, output_scores=True)`` returns
            it (N sequences × generated tokens, −1 after the end): gives the N returned sequences, whose rows after the
            end attend to nothing. False: rows keep their places, which is not checked. None: the keys tell; gives the
            rows of the last step.
        length: how many positions are kept. For assisted decoding one less than the final sequence has: candidates that
            were rejected after the last forward are still in the trace, which can't know it.

    Returns:
        A trace of the same class with one call a site, all in step 0.

    Raises:
        StitchError: the steps are no one generation, a step or a layer is missing, or query rows were left out.
        FieldNotCaptured: a field that tells how the steps fit together is not there; names the ``capture=``.
    """
    if not trace.calls:
        raise StitchError("the trace has no calls to stitch.")
    if isinstance(beams, (list, tuple)):
        beams = torch.tensor(beams)
    if beams is not None and beams is not False and not (isinstance(beams, Tensor) and beams.dim() == 2):
        raise StitchError(f"beams={beams!r}: expected beam_indices (sequences × steps), False or None.")
    made: list[Call] = []
    for stack, sites in _stacks(trace).items():
        made += _stitched_stack(stack, sites, beams, length)
    made.sort(key=lambda c: c.index)
    for i, call in enumerate(made):
        call.index = i
    return replace(trace, calls=made)


def _stacks(trace: TraceData) -> dict[str, list[list[Call]]]:
    """Stack -> its sites, each the calls of its steps. A module that runs n times in a forward is n sites."""
    runs: dict[tuple[str, str, int], list[Call]] = defaultdict(list)
    seen: dict[tuple[str, str, int], int] = defaultdict(int)
    for call in trace.calls:
        place = (call.site.path, call.site.kind, call.step)
        runs[(*place[:2], seen[place])].append(call)
        seen[place] += 1
    stacks: dict[str, list[list[Call]]] = defaultdict(list)
    for calls in runs.values():
        stacks[calls[0].site.stack].append(calls)
    return stacks


def _stitched_stack(stack: str, sites: list[list[Call]], beams: Any, length: int | None) -> list[Call]:
    steps = sorted({c.step for calls in sites for c in calls})
    once: list[list[Call]] = []
    rest: list[list[Call]] = []
    for calls in sites:
        alone = len(calls) == 1 and calls[0].step == steps[0]
        (once if alone and (len(steps) > 1 or not _has_cache(calls[0])) else rest).append(calls)
    made = [replace(calls[0], step=0) for calls in once]
    if not rest:
        return made
    for calls in rest:
        ran = [c.step for c in calls]
        if ran != steps:
            raise StitchError(
                f"{calls[0].site.label} is there in steps {ran}, and the {stack} stack in steps {steps}: the trace "
                "has lost some of its calls, or the model runs this module only now and then."
            )
    lineage = Lineage(stack, beams)
    for i, step in enumerate(steps):
        lineage.add(step, [calls[i] for calls in rest])
    end = lineage.length if length is None else length
    if not 0 < end <= lineage.length:
        raise StitchError(f"length={length}: the {stack} stack has {lineage.length} positions.")
    spans, rows = _spans(lineage, end), _rows_of_steps(lineage, beams, stack)
    for n, calls in enumerate(rest):
        made.append(_Site(calls, [p[n] for p in lineage.places], spans, rows, end, lineage.exact).call())
    return made


def _has_cache(call: Call) -> bool:
    """Whether a call of a trace of one step has keys beside those of its own tokens (a static cache)."""
    if call.site.crosses or call.queries is not None:
        return False
    t, s = query_and_key_counts(call)
    return s > t


def _spans(lineage: Lineage, end: int) -> list[tuple[int, int, int]]:
    """(step, start, stop): the positions whose rows each step has; a later step replaces what it went back over."""
    spans: list[tuple[int, int, int]] = []
    for i, places in enumerate(lineage.places):
        first = places[0].first
        # Assisted decoding goes back over rejected candidates: what the earlier steps have from there on is dropped.
        spans = [(j, a, min(b, first)) for j, a, b in spans if a < first]
        spans.append((i, first, first + places[0].queries))
    return [(i, a, min(b, end)) for i, a, b in spans if a < end]


def _rows_of_steps(lineage: Lineage, beams: Any, stack: str) -> list[Tensor]:
    """For each step the batch rows that the final rows have there; −1: none."""
    n = len(lineage.places)
    if isinstance(beams, Tensor):
        if beams.shape[1] > n:
            raise StitchError(f"beams has {beams.shape[1]} steps, and the {stack} stack ran in {n}.")
        ended = beams.new_full((len(beams), n - beams.shape[1]), -1)
        found = list(torch.cat([beams, ended], 1).cpu().unbind(1))
        high = max(int(r.max()) for r in found)
        if high >= lineage.batch:
            raise StitchError(f"beams names row {high}, and the {stack} stack ran with {lineage.batch} rows.")
        return found
    rows = [torch.arange(lineage.batch)]
    # From the last step back: the rows that are left at the end say which rows of the step before they continue.
    for order in reversed(lineage.reorder[1:]):
        rows.insert(0, order[rows[0]])
    return rows


@dataclass
class _Site:
    """One site through all steps."""

    calls: Sequence[Call]
    places: Sequence[CallPositions]
    spans: Sequence[tuple[int, int, int]]
    rows: Sequence[Tensor]
    end: int
    exact: bool

    def call(self) -> Call:
        first = self.calls[0]
        for name in _SAME_IN_EVERY_STEP:
            values = [getattr(c, name) for c in self.calls]
            if any(value != values[0] for value in values):
                raise StitchError(f"{first.site.label}: {name} differs between the steps: {values[:4]}…")
        made = replace(
            first,
            step=0,
            scale=self._scale(),
            dropout=max(c.dropout for c in self.calls),
            notes=(
                *dict.fromkeys(n for c in self.calls for n in c.notes),
                stitching_note(len(self.calls)),
            ),
            certificate=_joint_certificate([c.certificate for c in self.calls]),
            derivable=first.derivable if self.exact else (),
            fields={},
        )
        for name in FIELDS:
            if all(c.has(name) for c in self.calls):
                none = all(name in c.fields and c.fields[name] is None for c in self.calls)
                made.fields[name] = None if none else Later(self._field, name)
        return made

    def _field(self, name: str) -> Tensor:
        spec = FIELD_SPECS[name]
        if spec.per_key_head:
            return self._keys(name)
        values = [c.get(name) for c in self.calls]
        given = next(x for x in values if x is not None)
        if spec.is_column and given.dim() == 1:
            return given  # a number for each head, which is learned: the same in every step
        whole = self._by_row(values, columns=spec.is_pairs)
        return self._fill(whole) if name == "scores" else whole

    def _scale(self) -> float | Tensor:
        values = [c.scale for c in self.calls]
        if all(isinstance(x, Tensor) for x in values):
            first: Any = values[0]
            if all(torch.equal(first, x) for x in values):  # type: ignore[arg-type]
                return first  # type: ignore[no-any-return]
            full = [x[(None,) * (4 - x.dim())] for x in values if isinstance(x, Tensor)]
            return self._by_row(full, columns=any(x.shape[3] > 1 for x in full))
        if any(x != values[0] for x in values):
            raise StitchError(f"{self.calls[0].site.label}: the scale differs between the steps: {values[:4]}…")
        return values[0]

    def _by_row(self, values: Sequence[Tensor | None], columns: bool = False) -> Tensor:
        """Fields with a row for each query; with ``columns`` the last axis counts keys, which are put in place."""
        given = [x for x in values if x is not None]
        width = self._width() if columns else given[0].shape[3]
        heads = max(x.shape[1] for x in given)
        ended = any(bool((r < 0).any()) for r in self.rows)
        # A mask that all rows have in common stays one; a row that has ended attends to nothing, so that it differs.
        shared = not ended and all(x.shape[0] == 1 for x in given)
        n = 1 if shared else len(self.rows[0])
        out = given[0].new_zeros(n, heads, self.end, width)
        for i, start, stop in self.spans:
            x, place = values[i], self.places[i]
            if x is None:
                continue
            x = x.expand(-1, heads, place.queries, place.keys if columns else -1)
            x = x[:, :, start - place.first : stop - place.first]
            if not shared:
                x = _taken_rows(x, self.rows[i])
            if not columns:
                out[:, :, start:stop] = x
                continue
            last = min(place.offset + place.slots, width)
            if stop < place.first + place.queries and not self._crosses:
                last = min(last, stop)  # the keys behind it were taken back
            out[:, :, start:stop, place.offset : last] = x[..., : last - place.offset]
        return out

    def _keys(self, name: str) -> Tensor:
        if self._crosses:
            return _taken_rows(self.calls[0].get(name), self.rows[0])
        parts = []
        for i, start, stop in self.spans:
            x, offset = self.calls[i].get(name), self.places[i].offset
            assert x is not None
            parts.append(_taken_rows(x[:, :, start - offset : stop - offset], self.rows[i]))
        return torch.cat(parts, 2)

    def _fill(self, scores: Tensor) -> Tensor:
        """The scores of queries and keys that never met in one step."""
        first = self.calls[0]
        if self._crosses or first.own_scores or not all(c.has("q") and c.has("k") for c in self.calls):
            return scores
        k = evenly_grouped(first, self._keys("k"))
        ones = [torch.ones(1, 1, 1, 1, dtype=torch.bool, device=scores.device)] * len(self.calls)
        met = self._by_row(ones, columns=True)
        rest = finish_scores(dot_scores(self._field("q"), k, self._scale()), first.softcap, None)
        return torch.where(met, scores, rest.to(scores.dtype))

    def _width(self) -> int:
        return self.places[0].slots if self._crosses else self.end

    @property
    def _crosses(self) -> bool:
        return self.calls[0].site.crosses


def _taken_rows(x: Tensor | None, rows: Tensor) -> Tensor:
    """Batch rows by index; −1: zeros."""
    assert x is not None
    if x.shape[0] == 1:
        x = x.expand(int(rows.max()) + 1, *x.shape[1:])
    taken = x.index_select(0, rows.clamp_min(0).to(x.device))
    if bool((rows < 0).any()):
        taken[rows.to(x.device) < 0] = 0
    return taken


def _joint_certificate(certificates: Sequence[Certificate]) -> Certificate:
    """What holds for all of them."""
    states = {c.status for c in certificates}
    status = next(s for s in ("unfaithful", "unverified", "faithful") if s in states)
    worst = max(certificates, key=lambda c: (c.status == status, c.output_error / (c.tolerance or 1.0)))
    formed = [c.weights_error for c in certificates if c.weights_error is not None]
    return replace(
        worst,
        weights_error=max(formed) if formed else None,
        row_sum_error=max(c.row_sum_error for c in certificates),
        rows=sum(c.rows for c in certificates),
        of_rows=sum(c.of_rows for c in certificates),
    )
