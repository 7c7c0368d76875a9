"""One T×S picture of a generation: the calls of all its steps, put together as one forward would have made them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Size, Tensor

from .. import checks
from ..attention.functional import dot_scores, finish_scores, with_four_axes
from ..attention.kernel_call import FIELD_SPECS, FIELDS, SOURCES
from ..cached import cached_property
from ..calls.call import Call, joint_basis
from ..calls.certificate import joined
from ..calls.deriving import derive_field, shape_and_dtype
from ..calls.edits import AppliedEdit, edits_in_words, put_together
from ..calls.extents import per_query_head
from ..calls.fields import DERIVED, Derived, Field, InFile, tensor_of
from ..calls.key_history import Continued
from ..calls.key_tokens import stitching_note
from ..calls.trace_data import TraceData
from ..errors import StitchError
from .lineage import CallPositions, Lineage, query_and_key_counts

Whole = TypeVar("Whole", bound=TraceData)

_SAME_IN_EVERY_STEP = ("softcap", "heads", "kv_heads", "mixed", "score", "normalizer")
# Where nothing else was edited, what follows from the fields of each step follows from those of all of them.
_FOLLOWED = frozenset(("q", "v", "bias", "mask", "weights", "output"))


def stitch(trace: Whole, *, beams: Any = None, length: int | None = None) -> Whole:
    """Put the steps of a generation together: one call for each site, as one forward over the final sequence has it.

    T is every token that was fed and kept, S the same (for cross-attention: the keys of the other sequence). Each row
    is taken from the step that computed it. What that step could not see is masked and weighs 0; its ``bias`` is 0
    there, and its ``scores`` are scale·q·kᵀ (0 where q or k was not captured). Scores and weights that no step formed
    follow from the fields that are put together. The last generated token was never fed, so it is not there. What ran
    in the first step alone (an encoder, a vision tower) stays as it is. Fields are put together when they are read, and
    of a part (``call.at``) that part alone.

    Of one request of a server (``trace.split``) the first rows may have been computed for another one, with the same
    prefix: then T is what was computed for this one, ``queries`` are its positions, and S has all. What was computed
    again, as the request was preempted, say, is taken of the later run.

    Edits are carried, in the numbers of the whole. Keys and scores that an edit has changed in some step are what the
    rows of that step met: ``k`` is that of the last step, and nothing is derived of it.

    The empty end of a static cache is left out; keys that fell out of a sliding window, or that a cache dropped from
    among others, are taken from the steps that had them; candidates that assisted decoding took back are dropped. Where
    the keys of a step stand is told by those of the step before, which they are compared with (or their values, if a
    cache turns its keys). Rows that beam search reordered are followed back
    by their cached keys, so ``k`` has to be captured wherever there is more than one row.

    Args:
        trace: a trace of one generation, from its first forward on.
        beams: ``beam_indices`` as ``generate(num_beams=…, return_dict_in_generate=True, output_scores=True)`` returns
            it (N sequences × generated tokens, −1 after the end): gives the N returned sequences, whose rows after the
            end attend to nothing. False: rows keep their places, which is checked where keys were captured. None: the
            keys tell; gives the rows of the last step.
        length: how many positions are kept. For assisted decoding one less than the final sequence has: candidates that
            were rejected after the last forward are still in the trace, which can't know it.

    Returns:
        A trace of the same class with one call a site, all in step 0.

    Raises:
        StitchError: the steps are no one generation, or of several requests; a step or a layer is missing (some models
            leave early), query rows were left out, or a cache dropped keys and which ones can't be told.
        FieldNotCaptured: a field that tells how the steps fit together is not there; names the ``capture=``.
    """
    if not trace.calls:
        raise StitchError("the trace has no calls to stitch.")
    beams = _beam_indices(beams)
    length = None if length is None else checks.whole("length", length, error=StitchError)
    made: list[Call] = []
    for stack, sites in _stacks(trace).items():
        made += _stitched_stack(stack, sites, beams, length)
    made.sort(key=lambda c: c.index)
    for i, call in enumerate(made):
        call.index = i
    return replace(trace, calls=made)


def _beam_indices(beams: Any) -> Any:
    """The argument of that name as a tensor N T of ints; False or None as it is."""
    if beams is None or beams is False:
        return beams
    try:
        made = torch.tensor(beams) if isinstance(beams, (list, tuple)) else beams
    except (TypeError, ValueError, RuntimeError, OverflowError):
        made = None
    whole = isinstance(made, Tensor) and made.dim() == 2 and made.dtype in (torch.int64, torch.int32)
    if made is None or not whole or made.numel() == 0 or int(made.min()) < -1:
        expected = "beam_indices (sequences × steps, ints from −1), False or None"
        raise checks.wrong("beams", beams, expected, StitchError)
    return made


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
    layers = {(_series(calls[0].site.path), calls[0].site.kind) for calls in rest}
    for calls in (*(c for c in once if (_series(c[0].site.path), c[0].site.kind) in layers), *rest):
        ran = [c.step for c in calls]
        if ran != steps:
            raise StitchError(
                f"{calls[0].site.label} is there in steps {ran}, and the {stack} stack in steps {steps}: the trace "
                "has lost some of its calls, or the model runs this module only now and then."
            )
    lineage = Lineage(stack, beams, _request(stack, rest))
    for i, step in enumerate(steps):
        try:
            lineage.add(step, [calls[i] for calls in rest])
        except StitchError as error:
            turned = [edit for calls in rest for c in calls[: i + 1] for edit in c.edits if edit.field in ("k", "v")]
            if not turned:
                raise
            raise StitchError(
                f"{error} Keys or values that steps are told by were {edits_in_words(turned)}."
            ) from error
    end = lineage.length if length is None else length
    if not 0 < end <= lineage.length:
        raise StitchError(f"length={length}: the {stack} stack has {lineage.length} positions.")
    spans, rows = _spans(lineage, end), _rows_of_steps(lineage, beams, stack)
    for n, calls in enumerate(rest):
        followed = beams is None and lineage.exact
        site = _Site(calls, [p[n] for p in lineage.places], spans, rows, end, lineage.exact, followed)
        made.append(site.call(_about_positions(lineage, n)))
    return made


def _request(stack: str, sites: Sequence[Sequence[Call]]) -> str | None:
    """The request that all calls are of; None: nobody has named one, or the batch has several from end to end."""
    batches = {c.requests for calls in sites for c in calls}
    names = {name for requests in batches for name in requests or ()}
    if len(names) == 1 and None not in batches:
        return names.pop()
    if len(batches) > 1:
        raise StitchError(
            f"the calls of the {stack} stack are of several requests, and the batch changes from step to step; stitch "
            'each request by itself: trace.split("request")[name].stitch().'
        )
    return None


def _about_positions(lineage: Lineage, site: int) -> list[str]:
    """What the keys told of positions that one forward would not tell."""
    said = []
    if lineage.taken_back:
        said.append(
            f"positions {', '.join(f'{r.start} to {r.stop - 1}' for r in lineage.taken_back[:4])}"
            f"{', …' if len(lineage.taken_back) > 4 else ''} are taken as fed in vain and fed anew: their keys, which "
            "were the last, were gone in the step after"
        )
    for step, positions in lineage.again:
        lost = f", but those from {lineage.length} on" if positions.stop > lineage.length else ""
        said.append(
            f"positions {positions.start} to {positions.stop - 1} were computed again from step {step} on (a request "
            f"that was preempted, or drafts that were rejected): their rows are those of the later run{lost}"
        )
    if not all(places[site].gapless for places in lineage.places):
        said.append("keys that its cache dropped between others are masked in the steps after")
    return said


def _series(path: str) -> tuple[str, ...]:
    """What the paths of the layers of one series have in common."""
    return tuple("" if part.isdigit() else part for part in path.split("."))


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


@dataclass(eq=False)
class _Site:
    """One site through all steps; a source of fields (:class:`~hookattn.calls.fields.File`), of which a part is put
    together of the parts of the steps that it needs.

    Attributes:
        calls: of each step.
        places: where each is among the positions of the sequence.
        spans: which positions' rows are taken of which step.
        rows: for each step the batch rows that the final rows have there.
        end: how many positions there are.
        exact: whether cached keys come back as they were stored.
        followed: whether the keys have told, too, which rows continue which.
    """

    calls: Sequence[Call]
    places: Sequence[CallPositions]
    spans: Sequence[tuple[int, int, int]]
    rows: Sequence[Tensor]
    end: int
    exact: bool
    followed: bool
    _known_shapes: dict[str, list[Size | None]] = field(default_factory=dict, init=False)

    def call(self, notes: Sequence[str]) -> Call:
        first = self.calls[0]
        for name in _SAME_IN_EVERY_STEP:
            values = [getattr(c, name) for c in self.calls]
            if any(value != values[0] for value in values):
                raise StitchError(f"{first.site.label}: {name} differs between the steps: {values[:4]}…")
        if len({c.own_scores for c in self.calls}) > 1 and not any(c.edits for c in self.calls):
            raise StitchError(f"{first.site.label}: own_scores differs between the steps.")
        made = replace(
            first,
            step=0,
            scale=self._scale(),
            dropout=max(c.dropout for c in self.calls),
            basis=joint_basis(self.calls),
            notes=(
                *dict.fromkeys(n for c in self.calls for n in c.notes),
                *notes,
                stitching_note(len(self.calls)),
            ),
            certificate=joined([c.certificate for c in self.calls]),
            derivable=self._derivable,
            own_scores=any(c.own_scores for c in self.calls),
            own_by_edits=False,  # those of queries and keys that never met are not all formed
            edits=self._edits(),
            fields={},
            beside={},
            **self._of_request,
        )
        for name in FIELDS:
            if all(c.has(name) for c in self.calls):
                made.fields[name] = self._whole_field(name)
        return made

    @property
    def _of_request(self) -> dict[str, Any]:
        """Whose it is, how long, and which rows there are, where the first ones were computed for another request."""
        first, n = self.calls[0], len(self.rows[0])
        made: dict[str, Any] = {}
        if self.start:
            made |= {"queries": tuple(range(self.start, self.end)), "of_queries": self.end}
        if first.requests is not None:
            one = first.requests[:1] * n if len(set(first.requests)) == 1 else None
            made |= {"requests": one or (first.requests if len(first.requests) == n else None), "lengths": None}
            if one is not None:
                made["lengths"] = ((self.end, self._width()),) * n
        return made

    @property
    def start(self) -> int:
        """The position of the first row: those before it were computed for another request, or it is 0."""
        return self.spans[0][1]

    def _whole_field(self, name: str) -> Field:
        """Where a field of all steps is."""
        places = [self._place(i, name) for i in range(len(self.calls))]
        if all(place is None for place in places):
            return None
        sources = self.followed and all(source in c.fields for c in self.calls for source in SOURCES)
        if sources and self._follows and all(isinstance(place, Derived) for place in places):
            return DERIVED  # what follows from the fields of each step follows from those of all of them
        return InFile(self, name)

    @cached_property
    def _follows(self) -> bool:
        """Whether no edit has changed in one step what others have from another."""
        return all(edit.field in _FOLLOWED for call in self.calls for edit in call.edits)

    @property
    def _derivable(self) -> tuple[str, ...]:
        if not self.exact or not self._follows:
            return ()
        return tuple(name for name in self.calls[0].derivable if all(name in c.derivable for c in self.calls))

    def _edits(self) -> tuple[AppliedEdit, ...]:
        """Those of all steps, in the positions and rows of the whole."""
        if not any(c.edits for c in self.calls):
            return ()
        of_steps = {i: range(start, stop) for i, start, stop in self.spans}
        return put_together(
            [
                [x for e in self.calls[i].edits if (x := self._of_whole(i, e, own)) is not None]
                for i, own in of_steps.items()
            ],
            self._written,
        )

    def _of_whole(self, i: int, edit: AppliedEdit, own: range) -> tuple[AppliedEdit, set[int]] | None:
        """An edit of a step without its queries, and the positions of these; None: none of its rows is there."""
        place = self.places[i]
        named = range(place.queries) if edit.queries is None else {*edit.queries}
        rows = [place.first + row for row in range(place.queries) if row in named]
        keys = edit.keys
        if keys is not None and not self._crosses:
            keys = tuple(place.at[c] for c in keys if c < place.slots and place.at[c] < self.end)
        batch, kept = edit.batch, self.rows[i].tolist()
        if batch is not None:
            batch = tuple(n for n, row in enumerate(kept) if row in batch)
        cells = {position for position in rows if position in own}
        if not cells or () in (keys, batch):
            return None
        return replace(edit, queries=None, keys=keys, batch=batch), cells

    def _written(self, edit: AppliedEdit, positions: set[int]) -> Iterator[AppliedEdit]:
        if len(positions) == sum(stop - start for _, start, stop in self.spans):
            yield edit
        elif "T" in FIELD_SPECS[edit.field].axes:
            yield replace(edit, queries=tuple(sorted(positions)))
        else:
            first, last = min(positions), max(positions)
            rows = f"query {first}" if first == last else f"queries {first} to {last}"
            yield replace(edit, note=f"{edit.note}, as {rows} met it".removeprefix(", "))

    def _place(self, i: int, name: str) -> Field:
        return self.calls[i].fields.get(name, DERIVED)

    # As a source of fields

    def shape(self, name: str) -> Size:
        """B H T S of all steps, and so on; nothing is put together for it."""
        shapes = self._shapes(name)
        first = next(shape for shape in shapes if shape is not None)
        if len(first) == 1:
            return first
        spec, n = FIELD_SPECS[name], len(self.rows[0])
        if spec.per_key_head:
            keys = first[2] if self._crosses else self.end
            return Size((n, first[1], keys, first[3]))
        width = self._width() if spec.is_pairs else first[3]
        heads = max(shape[1] for shape in shapes if shape is not None)
        return Size((1 if self._shared(shapes) else n, heads, self.end - self.start, width))

    def dtype(self, name: str) -> torch.dtype:
        """That of the first step that has the field."""
        i = next(i for i in range(len(self.calls)) if self._place(i, name) is not None)
        return shape_and_dtype(self.calls[i], name)[1]

    def tensor(self, name: str) -> Tensor:
        """The field of all steps."""
        return self.slice(name, ())

    def slice(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Of the field of all steps what ``index`` says of its first axes; of the steps no more is derived."""
        shape = self.shape(name)
        if len(shape) == 1:  # a number for each head, which is learned: the same in every step
            one = next(x for i in range(len(self.calls)) if (x := self._of_step(i, name, None, None)) is not None)
            return one[index]
        if FIELD_SPECS[name].per_key_head:
            return self._keys(name)[index]
        batch, heads, rows = (*index, *[slice(None)] * 3)[:3]
        first, stop, step = rows.indices(shape[2])
        chosen = range(*heads.indices(shape[1]))
        made = self._by_row(
            name, None if len(chosen) == shape[1] else chosen, range(self.start + first, self.start + stop)
        )
        return made[batch, :, ::step]

    def _shapes(self, name: str) -> list[Size | None]:
        """Those of the field in each step; None: the step has none."""
        if name not in self._known_shapes:
            self._known_shapes[name] = [
                None if self._place(i, name) is None else shape_and_dtype(call, name)[0]
                for i, call in enumerate(self.calls)
            ]
        return self._known_shapes[name]

    def _shared(self, shapes: Sequence[Size | None]) -> bool:
        """Whether a field is the same for all batch rows."""
        # A mask that all rows have in common stays one; a row that has ended attends to nothing, so that it differs.
        return not self._ended and all(shape[0] == 1 for shape in shapes if shape is not None)

    @cached_property
    def _ended(self) -> bool:
        """Whether some batch row is in none of the rows of some step."""
        return any(bool((r < 0).any()) for r in self.rows)

    def _of_step(self, i: int, name: str, heads: Sequence[int] | None, rows: range | None) -> Tensor | None:
        """The field of one step: of these of its heads and query rows, None: of all."""
        call = self.calls[i]
        if heads is not None or rows is not None:
            numbers = None if heads is None else [h if call.heads is None else call.heads[h] for h in heads]
            call = call.at(heads=numbers, queries=rows)
        place = call.fields.get(name, DERIVED)
        return derive_field(call, name) if isinstance(place, Derived) else tensor_of(place)

    # Put together

    def _scale(self) -> float | Tensor | None:
        values = [c.scale for c in self.calls]
        if all(isinstance(x, Tensor) for x in values):
            first: Any = values[0]
            if all(torch.equal(first, x) for x in values):  # type: ignore[arg-type]
                return first  # type: ignore[no-any-return]
            full = [with_four_axes(x) for x in values if isinstance(x, Tensor)]
            columns = any(x.shape[3] > 1 for x in full)

            def read(i: int, rows: range | None) -> Tensor:
                return full[i] if rows is None or full[i].shape[2] == 1 else full[i][:, :, rows.start : rows.stop]

            heads = max(x.shape[1] for x in full)
            return self._in_rows([x.shape for x in full], read, heads, range(self.start, self.end), columns)
        if any(x != values[0] for x in values):
            raise StitchError(f"{self.calls[0].site.label}: the scale differs between the steps: {values[:4]}…")
        return values[0]

    def _by_row(self, name: str, heads: Sequence[int] | None, rows: range) -> Tensor:
        """A field with a row for each query, of these heads (None: all) and positions."""
        shapes, columns = self._shapes(name), FIELD_SPECS[name].is_pairs

        def read(i: int, own: range | None) -> Tensor | None:
            return self._of_step(i, name, heads, own)

        h = max(shape[1] for shape in shapes if shape is not None) if heads is None else len(heads)
        whole = self._in_rows(shapes, read, h, rows, columns)
        return self._fill(whole, heads, rows) if name == "scores" else whole

    def _in_rows(
        self,
        shapes: Sequence[Size | None],
        read: Callable[[int, range | None], Tensor | None],
        heads: int,
        rows: range,
        columns: bool,
    ) -> Tensor:
        """Rows of the steps, each in its place.

        Args:
            shapes: in each step; None: it has none, and its rows stay 0.
            read: what a step has in these of its rows (None: in all), with H or one head.
            heads: H.
            rows: which positions.
            columns: whether the last axis counts keys, which are put in place, too.
        """
        shared, out = self._shared(shapes), None
        for i, start, stop in self.spans:
            place, shape = self.places[i], shapes[i]
            first, last = max(start, rows.start), min(stop, rows.stop)
            if shape is None or first >= last:
                continue
            own = range(first - place.first, last - place.first)
            x = read(i, None if len(own) == place.queries else own)
            assert x is not None
            x = x.expand(-1, heads, len(own), place.keys if columns else -1)
            if not shared:
                x = _taken_rows(x, self.rows[i])
            if out is None:
                n = 1 if shared else len(self.rows[0])
                out = x.new_zeros(n, heads, len(rows), self._width() if columns else x.shape[3])
            where = slice(first - rows.start, last - rows.start)
            if not columns:
                out[:, :, where] = x
                continue
            reach = out.shape[3]
            if stop < place.first + place.queries and not self._crosses:
                reach = min(reach, stop)  # the keys behind it were taken back
            if isinstance(place.at, range):
                reach = min(place.at.stop, reach)
                out[:, :, where, place.at.start : reach] = x[..., : reach - place.at.start]
            else:
                own_columns = [c for c, position in enumerate(place.at) if position < reach]
                out[:, :, where, [place.at[c] for c in own_columns]] = x[..., own_columns]
        assert out is not None
        return out

    def _keys(self, name: str) -> Tensor:
        if self._crosses:
            return _taken_rows(self._of_step(0, name, None, None), self.rows[0])
        parts = []
        for i, positions in self._stretches(name):
            x = self._of_step(i, name, None, None)
            assert x is not None
            parts.append(_taken_rows(x[:, :, self.places[i].columns(positions)], self.rows[i]))
        return torch.cat(parts, 2)

    def _stretches(self, name: str) -> list[tuple[int, range]]:
        """The step of which the keys of each run of positions are taken: the last that has them as they were stored."""
        found: list[tuple[int, range]] = []
        for i, start, stop in reversed(self.spans):
            start = 0 if start == self.start else start  # the keys of a prefix, too, whose rows are not there
            later, positions = found[-1] if found else (i, range(stop, stop))
            has_all = self.places[later].gapless and self.places[later].at[0] <= start
            if found and has_all and self._goes_on(i, later, name):
                found[-1] = later, range(start, positions.stop)
            else:
                found.append((i, range(start, stop)))
        return found[::-1]

    def _goes_on(self, earlier: int, later: int, name: str) -> bool:
        """Whether the keys of a later step are known to be those of an earlier one and some more."""
        one, other = self._place(earlier, name), self._place(later, name)
        same = isinstance(one, Continued) and isinstance(other, Continued) and one.history is other.history
        return self.followed and same and not bool((self.rows[later] < 0).any())

    def _fill(self, scores: Tensor, heads: Sequence[int] | None, rows: range) -> Tensor:
        """The scores of queries and keys that never met in one step."""
        first = self.calls[0]
        own = any(c.own_scores for c in self.calls)
        if self._crosses or own or not self._follows or not all(c.has("q") and c.has("k") for c in self.calls):
            return scores
        q, k = self._by_row("q", heads, rows), per_query_head(first, self._keys("k"), self.shape("q")[1])
        if heads is not None:
            k = k[:, list(heads)]
        one = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=scores.device)
        met = self._in_rows([one.shape] * len(self.calls), lambda i, own: one, 1, rows, columns=True)
        rest = finish_scores(dot_scores(q, k, self._part_of_scale(heads, rows)), first.softcap, None)
        return torch.where(met, scores, rest.to(scores.dtype))

    def _part_of_scale(self, heads: Sequence[int] | None, rows: range) -> float | Tensor:
        scale = self._scale()
        assert scale is not None, "scores of q and k have a scale"
        if not isinstance(scale, Tensor):
            return scale
        scale = with_four_axes(scale)
        if heads is not None and scale.shape[1] > 1:
            scale = scale[:, list(heads)]
        own = slice(rows.start - self.start, rows.stop - self.start)
        return scale[:, :, own] if scale.shape[2] > 1 else scale

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
