"""Which tokens every step of a generation fed, and which row of the step before each batch row continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.functional import with_four_axes
from ..calls.call import Call
from ..calls.extents import extents_of
from ..calls.key_history import Continued, Link
from ..errors import FieldNotCaptured, StitchError

# Cached keys come back as they were stored, or rounded by a quantized cache; those of another sequence are further off
# (two unrelated vectors of one length: about 1.4).
_SAME = 0.5
_EXACT = 1e-5


@dataclass(frozen=True, slots=True)
class CallPositions:
    """One call among the positions of the final sequence.

    Attributes:
        queries: how many query rows it has.
        first: the position of its first query.
        at: the positions of its keys, of those that are real: from the first one on (the rest of a static cache is
            empty). Of another sequence, where it crosses.
        keys: S, with what is not real.
    """

    queries: int
    first: int
    at: Sequence[int]
    keys: int

    @property
    def slots(self) -> int:
        """How many of its keys are real."""
        return len(self.at)

    @property
    def gapless(self) -> bool:
        """Whether its keys stand one behind the other, none left out."""
        return isinstance(self.at, range)

    def columns(self, positions: range) -> slice | list[int]:
        """Which of its keys stand at these positions, that it has all."""
        if self.gapless:
            return slice(positions.start - self.at[0], positions.stop - self.at[0])
        return [self.at.index(p) for p in positions]


def query_and_key_counts(call: Call) -> tuple[int, int]:
    """T and S of a call, from whatever was captured.

    Raises:
        FieldNotCaptured: nothing that was captured tells.
        StitchError: query rows were left out.
    """
    if call.queries is not None:
        raise StitchError(
            f"{call.site.label}: only the query rows {list(call.queries)[:4]}… of step {call.step} were kept, so a "
            "picture of the generation would have gaps; trace again without queries=."
        )
    found = extents_of(call, "TS")
    t, s = found.t, found.s
    if t is None or s is None:
        raise FieldNotCaptured(
            f"how many {'queries' if t is None else 'keys'} {call.site.label} had in step {call.step} can't be told; "
            f"trace again with capture={(*call.captured, 'q' if t is None else 'k')!r}."
        )
    return t, s


class Lineage:
    """Follows one stack through the steps: where its calls stand, and which rows they continue.

    Args:
        stack: the stack's name, for messages.
        beams: None: the rows a step continues are found by their cached keys; False: rows keep their places; a tensor:
            the row of each step is given from outside.
        request: the request that all calls are of; None: they are of a generation that nobody has named. A server may
            begin a request with keys that another has computed, and compute it again from any position on.
    """

    def __init__(self, stack: str, beams: Tensor | bool | None, request: str | None = None):
        self.stack, self.beams, self.request = stack, beams, request
        self.length = 0
        self.batch = 0
        self.exact = True  # whether cached keys come back as they were stored
        self.places: list[list[CallPositions]] = []
        self.reorder: list[Tensor] = []
        self.taken_back: list[range] = []  # positions that were fed and then given up
        self.again: list[tuple[int, range]] = []  # of a request: the step from which positions were computed anew
        self._known: dict[int, Tensor] = {}
        self._last: dict[int, tuple[Call, Sequence[int]]] = {}  # of the step before, and where its keys are
        self._found: list[list[int | None]] = []  # in this step, where the layers that have dropped keys found theirs

    def add(self, step: int, calls: Sequence[Call]) -> None:
        """One step: the calls of all sites of the stack, in one order.

        Raises:
            StitchError: the step does not continue the one before.
            FieldNotCaptured: what is needed to tell was not kept.
        """
        sizes = [query_and_key_counts(c) for c in calls]
        t = sizes[0][0]
        odd = next(((c, size[0]) for c, size in zip(calls, sizes, strict=True) if size[0] != t), None)
        if odd is not None:
            raise StitchError(
                f"{odd[0].site.label} has {odd[1]} queries in step {step}, and {calls[0].site.label} has {t}; "
                "what runs at different lengths can't be stitched together. Select one stack first."
            )
        own = [i for i, c in enumerate(calls) if not c.site.crosses]
        filled = {i: self._filled(calls[i], *sizes[i]) for i in own}
        self._found = []
        first = self._first(step, t, {i: (filled[i], sizes[i][1]) for i in own}, calls)
        if t < self.length and first == 0 and self.request is None:
            raise StitchError(
                f"step {step} of the {self.stack} stack begins again with {t} positions, after {self.length} of the "
                "steps before it: these are several generations. Stitch the steps of each: trace.select(step=…)."
            )
        if first < self.length and self.request is not None:
            self.again.append((step, range(first, self.length)))
        elif first < self.length and not all(filled[i] == t for i in own):
            self.taken_back.append(range(first, self.length))
        at: dict[int, Sequence[int]] = {}
        for i in reversed(own):  # keys of layers further in tell places apart that the first layer's may not
            s = sizes[i][1]
            at[i] = range(filled[i]) if filled[i] < s else self._at(step, i, calls[i], t, s, first)
        places = [CallPositions(t, first, at.get(i, range(s)), s) for i, (_, s) in enumerate(sizes)]
        batch = extents_of(calls[0], "B").b or 1
        self.reorder.append(self._continued(step, batch, calls, places, own))
        self._last = {i: (calls[i], places[i].at) for i in own}
        self.places.append(places)
        self.length, self.batch = first + t, batch

    def _filled(self, call: Call, t: int, s: int) -> int:
        """How many of the S keys are real: up to the last one that the last query may attend to."""
        if s <= t or (call.lengths is not None and self.request is not None):  # what fills up was left out
            return s
        if call.has("mask"):
            # A static cache has room for the whole generation; what is not written yet is hidden from every query, and
            # of these the last one sees the most.
            last = with_four_axes(call.mask)[:, :, -1].flatten(0, -2).any(0).expand(s).nonzero()
            return int(last[-1]) + 1 if len(last) and int(last[-1]) + 1 >= t else s
        if s > self.length + t:
            raise FieldNotCaptured(
                f"{call.site.label} has {s} keys in step {call.step} and {self.length + t} tokens were fed: which of "
                f"them are real is in the mask. Trace again with capture={(*call.captured, 'mask')!r}."
            )
        return s

    def _first(self, step: int, t: int, filled: dict[int, tuple[int, int]], calls: Sequence[Call]) -> int:
        """The position of the first query: the tokens that stand before it."""
        if not filled:
            if self.length and t > 1:
                raise StitchError(
                    f"step {step} of the {self.stack} stack has {t} queries and only cross-attention is in the trace: "
                    "whether candidates were taken back can't be told. Stitch the trace with its self-attention, and "
                    "select afterwards."
                )
            return self.length
        # Each layer says how many keys stand before its queries. One with a sliding window has dropped some, so that
        # the layer with the most of them is nearest to the truth.
        before = {i: end - t for i, (end, _) in filled.items()}
        most = max(before.values())
        if most > self.length and self.request is not None and not self.places:
            return most  # what comes before is of a prefix that was computed for another request
        if most > self.length:
            worst = calls[max(before, key=lambda i: before[i])]
            raise StitchError(
                f"{worst.site.label} attends in step {step} to {most} earlier positions, and the trace has the "
                f"queries of {self.length} of them: a step is missing, the trace was begun with a filled cache, or "
                f"the keys are not the queries' own tokens (kind={worst.site.kind!r})."
            )
        # A cache with an empty end has dropped nothing, and a step without a cache feeds all from its beginning.
        certain = most == self.length or any(end < s for end, s in filled.values())
        if certain or all(s == t for _, s in filled.values()):
            return most
        if isinstance(self.beams, Tensor):
            return self.length  # beam search never goes back
        return self._back_or_window(step, t, most, filled, calls)

    def _back_or_window(
        self, step: int, t: int, most: int, filled: dict[int, tuple[int, int]], calls: Sequence[Call]
    ) -> int:
        """Fewer keys than tokens: some were taken back, or fell out of every layer's window. The keys tell."""
        for i, (end, _) in reversed(filled.items()):
            if end - t == most and i in self._last and (kept := self._kept(i, calls[i], t, most)) is not None:
                newest = max(p for p in kept if p is not None)
                if newest + 1 == self.length:
                    return self.length
                # The last ones are not there: they were taken back, if what is there is all that stood before them.
                if isinstance(_as_range(sorted(p for p in kept if p is not None)), range):
                    return newest + 1
                raise self._unknown_keys(step, calls[i])
        site = next((i for i in self._known if i in filled and calls[i].has("k")), None)
        if site is None:
            any_call = calls[next(iter(filled))]
            raise FieldNotCaptured(
                f"step {step} of the {self.stack} stack has {most} earlier keys after {self.length} tokens: only the "
                f"keys tell whether candidates were taken back or a window moved on. Trace again with "
                f"capture={(*any_call.captured, 'k')!r}."
            )
        return self._of_gaps(step, site, calls[site], filled[site][0] - t, most)

    def _of_gaps(self, step: int, site: int, call: Call, n: int, most: int) -> int:
        """The same where cached keys come back changed a little, and so are found nowhere: they are nearest to their
        own place. The number of keys is the same either way."""
        cached, known = call.k[:, :, :n], self._known[site]
        gaps = {
            at: _distance(cached, known[:, :, at - n : at]).amin(1).max().item()
            for at in range(self.length, most - 1, -1)  # nothing was taken back; one token was; …
        }
        best = min(gaps, key=lambda at: gaps[at])
        if gaps[best] > _SAME:
            raise self._unknown_keys(step, call)
        return best

    def _unknown_keys(self, step: int, call: Call) -> StitchError:
        return StitchError(
            f"{call.site.label} ({self.stack}) has dropped keys before step {step}, and which ones can't be told: what "
            "is left are neither keys nor values of the step before it, the same ones in every head and row. Stitch "
            "the steps before it, or those from it on: trace.select(step=…)."
        )

    def _at(self, step: int, i: int, call: Call, t: int, s: int, first: int) -> Sequence[int]:
        """The positions of the keys of a call that has no empty end.

        Raises:
            StitchError: it has dropped some, and the others are nowhere among those of the step before.
            FieldNotCaptured: it has dropped some, and nothing that was captured tells which.
        """
        n, own = s - t, range(first, first + t)
        if n <= 0 or i not in self._last or (n == first and self._goes_on(i, call, t, n)):
            return range(first + t - s, first + t)
        found = self._kept(i, call, t, n)
        if found is None and n == first:
            return range(s)  # as many as there were: changed a little by their cache, or not captured
        if found is not None:
            positions = [p for p in found if p is not None]
            if all(p < first for p in positions) and len(positions) == n:
                fed = iter(own)
                return _as_range([next(fed) if p is None else p for p in found])
            raise self._unknown_keys(step, call)
        before, at = self._last[i]
        readable = call.has("k") and before.has("k")
        if readable and _is_window(call.k[:, :, :n], before.k[:, :, : len(at)]):
            return range(first + t - s, first + t)
        if readable:
            raise self._unknown_keys(step, call)
        if call.window is not None:  # what it drops is what its window has left behind
            return range(first + t - s, first + t)
        raise FieldNotCaptured(
            f"{call.site.label} has dropped keys before step {step}: only keys tell which. Trace again with "
            f"capture={(*call.captured, 'k')!r}."
        )

    def _goes_on(self, i: int, call: Call, t: int, n: int) -> bool:
        """Whether the keys of a call are known to be those of the step before and its own behind them."""
        before, at = self._last[i]
        if not isinstance(at, range) or len(at) < n:
            return False
        link = _link(before, call)
        if link is not None:
            return (link.dropped, link.at, link.count) == (0, n, t)
        if not (call.has("k") and before.has("k")):
            return True
        one, other = call.k[:, :, :n], before.k[:, :, :n]
        return one.shape == other.shape and torch.equal(one, other)

    def _kept(self, i: int, call: Call, t: int, n: int) -> list[int | None] | None:
        """For each key of a call its position, None for its t own; None: they are not found among those before it."""
        before, at = self._last[i]
        link = _link(before, call)
        if link is not None and (link.at, link.count) == (n, t):
            return [*at[link.dropped : link.dropped + n], *[None] * t]
        for name in ("k", "v"):  # keys may be turned to where they stand now; values never are
            if not (call.has(name) and before.has(name)):
                continue
            found = _positions_found(getattr(call, name), getattr(before, name)[:, :, : len(at)], at, n, self._found)
            if found is not None:
                self._found.append(found)
                return found
        return None

    def _continued(
        self, step: int, batch: int, calls: Sequence[Call], places: list[CallPositions], own: list[int]
    ) -> Tensor:
        """For each batch row the row of the step before that it continues; its keys are remembered."""
        same = torch.arange(batch)
        if isinstance(self.beams, Tensor):
            self.exact = False  # not looked at
            return same
        # The first and the last layer tell rows apart; to remember the keys of all would take the trace's memory again.
        watched = [i for i in dict.fromkeys((*own[:1], *own[-1:], *self._known)) if calls[i].has("k")]
        total, order = None, same
        if self.length:
            first, last = places[0].first, self.length
            for i in watched:
                place, k, known = places[i], calls[i].k, self._known[i]
                # What was fed before; where no cache is used, it is fed again.
                end = first if place.slots > place.queries or first else min(last, place.queries)
                seen = [(c, p) for c, p in enumerate(place.at) if p < end]
                if seen:
                    columns, positions = zip(*seen, strict=True)
                    gap = _distance(k[:, :, list(columns)], known[:, :, list(positions)])
                    total = gap if total is None else torch.maximum(total, gap)
            again = first < last
            if total is not None and self.beams is None:
                order = self._match(step, total)
            elif total is not None and batch == self.batch and bool((total.diagonal() > _SAME).any()):
                if not all(self._has_its_values(i, calls[i], places[i]) for i in watched):
                    raise StitchError(
                        f"step {step} of the {self.stack} stack does not have the keys of the step before it where "
                        "these were, nor its values: rows were reordered (stitch(beams=None) follows them), or these "
                        "are separate sequences. Stitch the steps of each: trace.select(step=…)."
                    )
            elif self.beams is None and (batch > 1 or again) and own:
                raise FieldNotCaptured(
                    f"which rows step {step} of the {self.stack} stack continues is told by its keys, which were not "
                    f"captured: trace again with capture={(*calls[own[0]].captured, 'k')!r}; or, if rows were never "
                    "reordered (no beam search), say so with stitch(beams=False)."
                )
            elif self.beams is None and batch > 1 and not own:
                raise StitchError(
                    f"only cross-attention of the {self.stack} stack is in the trace, which does not tell whether "
                    "rows were reordered: stitch the trace with its self-attention, or say with stitch(beams=False) "
                    "that they were not."
                )
            elif batch != self.batch:
                raise StitchError(f"step {step} has {batch} rows, and the step before it {self.batch}.")
        for i in watched:
            place, k = places[i], calls[i].k
            new = k[:, :, place.columns(range(place.first, place.first + place.queries))]
            kept = self._known[i][:, :, : place.first][order] if self.length else _before_first(k, place)
            self._known[i] = torch.cat([kept, new], 2)
        return order

    def _has_its_values(self, i: int, call: Call, place: CallPositions) -> bool:
        """Whether the values of a call are, row by row, those of the step before: caches turn keys, and not these."""
        before, at = self._last[i]
        if not (call.has("v") and before.has("v")):
            return False
        shared = [(c, at.index(p)) for c, p in enumerate(place.at) if p < place.first and p in at]
        columns, earlier = map(list, zip(*shared, strict=True)) if shared else ([], [])
        return bool((_distance(call.v[:, :, columns], before.v[:, :, earlier]).diagonal() <= _SAME).all())

    def _match(self, step: int, gap: Tensor) -> Tensor:
        """B_now B_before distances -> for each row the row before; its own place wherever that fits as well."""
        # Beams that have the same tokens so far have the same keys: a row keeps its place wherever it may.
        n = min(gap.shape)
        gap[range(n), range(n)] -= 1e-6
        best = gap.min(1)
        self.exact &= bool((best.values <= _EXACT).all())
        lost = (best.values > _SAME).nonzero()
        if len(lost):
            raise StitchError(
                f"row {int(lost[0])} of step {step} ({self.stack}) continues no row of the step before it: the keys "
                "differ. These are separate sequences (stitch each one's steps: trace.select(step=…)), or a cache "
                "that changes its keys; stitch(beams=False) takes them as they come."
            )
        return best.indices


def _before_first(k: Tensor, place: CallPositions) -> Tensor:
    """B G n D: the keys of the first step that stand before its queries, each in its place; 0 where it has none."""
    made = k.new_zeros(*k.shape[:2], place.first, k.shape[3])
    for column, position in enumerate(place.at):
        if position < place.first:
            made[:, :, position] = k[:, :, column]
    return made


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """B G n D, C G n D -> B C: how far apart, relative to their size."""
    x, y = a.flatten(1).float(), b.flatten(1).float()
    if x.shape == y.shape and torch.equal(x, y):  # the usual case, for which there is no need to compare all pairs
        far = torch.full((len(x), len(y)), 2.0, device=x.device)
        return far.fill_diagonal_(0.0).cpu()
    size = torch.maximum(x.norm(dim=1)[:, None], y.norm(dim=1)[None]).clamp_min(1e-12)
    gaps = torch.stack([(row - y).norm(dim=1) for row in x])
    return (gaps / size).cpu()


def _link(before: Call, call: Call) -> Link | None:
    """How the keys of a call are known to go on from those of another; None: that is not known."""
    for name in ("k", "v"):
        earlier, now = before.fields.get(name), call.fields.get(name)
        if isinstance(earlier, Continued) and isinstance(now, Continued) and now.history is earlier.history:
            return now.history.link(now.step) if now.step == earlier.step + 1 else None
    return None


def _positions_found(
    keys: Tensor, before: Tensor, at: Sequence[int], n: int, others: Sequence[list[int | None]]
) -> list[int | None] | None:
    """S: for each key the position of the same one before it, n in all, and None for the others; None: there is none.

    Batch entries may have changed their order; each finds its keys in one entry, and all find them in the same places.

    Args:
        keys: B G S D.
        before: B G S D, of the step before.
        at: where these stand.
        n: how many have to be found.
        others: what other layers have found in this step.
    """
    if keys.shape[1] != before.shape[1] or keys.shape[3] != before.shape[3] or keys.dtype != before.dtype:
        return None
    mine, theirs = _as_bytes(keys), _as_bytes(before)
    found: list[int | None] | None = None
    for entry, row in enumerate(mine):
        order = sorted(range(len(theirs)), key=lambda i: i != entry)
        here = next((p for i in order if (p := _in_one_entry(row, theirs[i], at, n, others)) is not None), None)
        if here is None or (found is not None and here != found):
            return None
        found = here
    return found


def _in_one_entry(
    keys: list[bytes], before: list[bytes], at: Sequence[int], n: int, others: Sequence[list[int | None]]
) -> list[int | None] | None:
    there: dict[bytes, list[int]] = {}
    for place, key in enumerate(before):
        there.setdefault(key, []).append(place)
    found = [there.get(key, []) for key in keys]
    if all(found[:n]):  # its own keys stand behind the others, and may be the same as an earlier one
        found[n:] = [[]] * (len(keys) - n)
    if sum(map(bool, found)) != n:
        return None
    if all(len(places) < 2 for places in found):
        places = [columns[0] if columns else None for columns in found]
        return _at_positions(places, at) if len({p for p in places if p is not None}) == n else None
    # The same token may have the same key at several places, where keys know nothing of their place or of what stands
    # before them; in a layer further in they do.
    for other in others:
        if len(other) == len(found) and all(
            p in {at[place] for place in columns} if columns else p is None
            for columns, p in zip(found, other, strict=True)
        ):
            return other
    ordered = _in_order(found)
    return None if ordered is None else _at_positions(ordered, at)


def _at_positions(places: list[int | None], at: Sequence[int]) -> list[int | None]:
    return [None if place is None else at[place] for place in places]


def _in_order(found: list[list[int]]) -> list[int | None] | None:
    """Of the places that each key may be at the one that keeps all in their order; None: there are several, or none."""
    low: list[int | None] = []
    before = -1
    for places in found:
        least = next((p for p in places if p > before), None)
        if places and least is None:
            return None
        before = before if least is None else least
        low.append(least)
    high: list[int | None] = []
    behind = float("inf")
    for places in reversed(found):
        most = next((p for p in reversed(places) if p < behind), None)
        behind = behind if most is None else most
        high.append(most)
    return low if low == high[::-1] else None


def _as_bytes(x: Tensor) -> list[list[bytes]]:
    """B G S D -> for each batch entry and key what it is, in bytes, all heads of it."""
    rows = x.detach().transpose(1, 2).flatten(2).contiguous().cpu().view(torch.uint8).numpy()
    return [[column.tobytes() for column in row] for row in rows]


def _as_range(positions: list[int]) -> Sequence[int]:
    """The same positions, as a range if they are one."""
    one = range(positions[0], positions[0] + len(positions)) if positions else range(0)
    return one if list(one) == positions else positions


def _is_window(cached: Tensor, before: Tensor) -> bool:
    """Whether keys are the last of those before them, as far as a cache that rounds them gives them back."""
    n = cached.shape[2]
    if n > before.shape[2] or cached.shape[1] != before.shape[1] or cached.shape[3] != before.shape[3]:
        return False
    return bool((_distance(cached, before[:, :, before.shape[2] - n :]).amin(1) <= _SAME).all())
