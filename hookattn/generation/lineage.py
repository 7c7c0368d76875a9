"""Which tokens every step of a generation fed, and which row of the step before each batch row continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calls.call import Call
from ..calls.extents import extents_of
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
        slots: how many of its keys are real, from the first one on (the rest of a static cache is empty).
        offset: the position of its first key.
        keys: S, with what is not real.
    """

    queries: int
    first: int
    slots: int
    offset: int
    keys: int


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
    """

    def __init__(self, stack: str, beams: Tensor | bool | None):
        self.stack, self.beams = stack, beams
        self.length = 0
        self.batch = 0
        self.exact = True  # whether cached keys come back as they were stored
        self.places: list[list[CallPositions]] = []
        self.reorder: list[Tensor] = []
        self._known: dict[int, Tensor] = {}

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
        first = self._first(step, t, {i: (filled[i], sizes[i][1]) for i in own}, calls)
        if t < self.length and first == 0:
            raise StitchError(
                f"step {step} of the {self.stack} stack begins again with {t} positions, after {self.length} of the "
                "steps before it: these are several generations. Stitch the steps of each: trace.select(step=…)."
            )
        places = []
        for i, (_, s) in enumerate(sizes):
            if i not in filled:
                places.append(CallPositions(t, first, s, 0, s))
            else:
                offset = 0 if filled[i] < s else first + t - s
                places.append(CallPositions(t, first, filled[i], offset, s))
        batch = extents_of(calls[0], "B").b or 1
        self.reorder.append(self._continued(step, batch, calls, places, own))
        self.places.append(places)
        self.length, self.batch = first + t, batch

    def _filled(self, call: Call, t: int, s: int) -> int:
        """How many of the S keys are real: up to the last one that the last query may attend to."""
        if s <= t:
            return s
        if call.has("mask"):
            # A static cache has room for the whole generation; what is not written yet is hidden from every query, and
            # of these the last one sees the most.
            last = call.mask[:, :, -1].flatten(0, -2).any(0).expand(s).nonzero()
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
        site = next((i for i in self._known if i in filled and calls[i].has("k")), None)
        if site is None:
            any_call = calls[next(iter(filled))]
            raise FieldNotCaptured(
                f"step {step} of the {self.stack} stack has {most} earlier keys after {self.length} tokens: only the "
                f"keys tell whether candidates were taken back or a window moved on. Trace again with "
                f"capture={(*any_call.captured, 'k')!r}."
            )
        n = filled[site][0] - t
        cached, known = calls[site].k[:, :, :n], self._known[site]
        gaps: dict[int, float] = {}
        # The number of keys is the same either way: the cached ones are compared with those that stood there, for each
        # place where they might be.
        for at in range(self.length, most - 1, -1):  # nothing was taken back; one token was; …
            gaps[at] = _distance(cached, known[:, :, at - n : at]).amin(1).max().item()
            if gaps[at] <= _EXACT:
                return at
        return min(gaps, key=lambda at: gaps[at])

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
                seen = slice(place.offset, end)
                if place.offset < end:
                    gap = _distance(k[:, :, : end - place.offset], known[:, :, seen])
                    total = gap if total is None else torch.maximum(total, gap)
            again = first < last
            if total is not None and self.beams is None:
                order = self._match(step, total)
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
            new = k[:, :, place.first - place.offset : place.slots]
            kept = self._known[i][:, :, : place.first][order] if self.length else new[:, :, :0]
            self._known[i] = torch.cat([kept, new], 2)
        return order

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


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """B G n D, C G n D -> B C: how far apart, relative to their size."""
    x, y = a.flatten(1).float(), b.flatten(1).float()
    if x.shape == y.shape and torch.equal(x, y):  # the usual case, for which there is no need to compare all pairs
        far = torch.full((len(x), len(y)), 2.0, device=x.device)
        return far.fill_diagonal_(0.0).cpu()
    size = torch.maximum(x.norm(dim=1)[:, None], y.norm(dim=1)[None]).clamp_min(1e-12)
    gaps = torch.stack([(row - y).norm(dim=1) for row in x])
    return (gaps / size).cpu()
