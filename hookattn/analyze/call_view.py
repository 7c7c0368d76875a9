"""What a measure sees of a call: weights, statistics, which rows and keys count, positions, tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .. import checks
from ..attention.functional import compute_dtype, with_four_axes
from ..attention.normalizers import is_softmax, normalized, normalizer_of
from ..cached import cached_property
from ..calls.call import Call
from ..calls.certificate import tolerance
from ..calls.edits import edits_in_words, set_by_edits
from ..calls.extents import extents_of, per_query_head
from ..calls.key_tokens import is_stitched, key_positions, padding_is_of_keys
from ..calls.query_positions import query_positions
from ..calls.trace_data import check_trace
from ..errors import FieldNotCaptured, MeasureError
from ..statistics.base import Statistic
from ..statistics.engine import compute
from .score_inputs import score_inputs_of

if TYPE_CHECKING:
    from ..traces import Trace


Made = TypeVar("Made")

# What a call has only where its scores are products of queries and keys, or are known.
_OF_PRODUCTS = ("q", "k", "scores")
# So many weights are derived together, where more heads than one have as many: 16 MiB of float32.
_BLOCK = 1 << 22


class _of_all_heads(cached_property[Made]):
    """A value that is the same for all heads: a view of some of them has it from the view of all."""

    def __get__(self, view: Any, owner: Any = None) -> Made:  # type: ignore[override]
        whole = None if view is None else view._whole
        made: Made = super().__get__(view if whole is None else whole, owner)
        return made


def as_real(real: Any) -> Tensor | None:
    """What a caller says of padding, as bool, B S: True = a real token; None: nothing is said.

    Args:
        real: bool or 0/1, a tensor, an array or lists.

    Raises:
        MeasureError: something else.
    """
    if real is None:
        return None
    try:
        made = torch.as_tensor(real)
        good = (
            made.dim() == 2 and made.numel() > 0 and not made.is_complex() and bool(((made == 0) | (made == 1)).all())
        )
    except (TypeError, ValueError, RuntimeError, OverflowError):
        good = False
    if not good:
        raise checks.wrong("real", real, "B S of bool or 0/1, as an attention_mask is", MeasureError)
    return made.bool()


class View:
    """One call of a trace, or some heads of one. What is expensive is computed once, when it is first asked for, and
    held as long as the view.

    Args:
        call: the call.
        trace: the trace it is of; its tokens are used.
        real: bool or 0/1, B S (as an ``attention_mask``): True = a real token, no padding. Without it a key is real
            that some query may attend to.
        whole: the view of all heads, of which ``call`` has some; its mask is the same for all of them.

    Attributes:
        call: the call, as one that nobody else holds.
        traced: the same call as the trace has it, with all its heads.
    """

    def __init__(self, call: Call, trace: Trace, real: Tensor | None = None, *, whole: View | None = None):
        if not isinstance(call, Call):
            raise checks.wrong("call", call, "a Call of a trace")
        check_trace(trace)
        if whole is not None and not isinstance(whole, View):
            raise checks.wrong("whole", whole, "a View, or None")
        # A call of its own: what is derived of it goes with the view, and the trace's keeps what it has.
        self.call = replace(call)
        self.traced: Call = call if whole is None else whole.traced
        self.trace, self._real, self._whole = trace, real if whole is not None else as_real(real), whole
        self._statistics: dict[str, Tensor | None] = {}
        self._made: dict[Hashable, Any] = {} if whole is None else whole._made

    # What it is of

    @property
    def where(self) -> str:
        """The call as it is named in an error."""
        return f"call {self.call.index} ({self.call.site.label}, step {self.call.step})"

    @property
    def crosses(self) -> bool:
        """Whether queries and keys are of different sequences."""
        return self.call.site.crosses

    @cached_property
    def of_inputs(self) -> bool:
        """Whether padding of the inputs is of its keys; see :func:`hookattn.calls.key_tokens.padding_is_of_keys`."""
        return padding_is_of_keys(self.traced, self.trace)

    @cached_property
    def grows(self) -> bool:
        """Whether it is of a sequence that got longer, so that it may have fewer keys than there are tokens."""
        call, of_all = self.call, [c for c in self.trace.calls if c.site.path == self.call.site.path]
        return any(c.step != call.step for c in of_all) or is_stitched(call)

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """B H T S.

        Raises:
            FieldNotCaptured: no field that was kept tells.
        """
        found = extents_of(self.call, "BHTS").known("BHTS")
        if len(found) == 4:
            return found["B"], found["H"], found["T"], found["S"]
        raise FieldNotCaptured(
            f"{self.where}: its shape is not known from {', '.join(self.call.fields) or 'nothing'}; "
            "trace again with 'weights', or with a statistic of each query such as 'lse', in capture=."
        )

    @cached_property
    def heads(self) -> Sequence[int]:
        """H: the number of each head that was kept."""
        return range(self.shape[1]) if self.call.heads is None else self.call.heads

    @cached_property
    def queries(self) -> Sequence[int]:
        """T: the number of each query row that was kept."""
        return range(self.shape[2]) if self.call.queries is None else self.call.queries

    # Values

    def tensor(self, name: str) -> Tensor:
        """A field.

        Raises:
            FieldNotCaptured: it was not kept, or the call has none.
            FieldAbsent: its attention is of a kind that has none; says which.
        """
        value = self.call.get(name)
        if value is None and name in _OF_PRODUCTS:
            value = getattr(self.call, name)  # says why there is none
        if value is None:
            raise FieldNotCaptured(f"{self.where} has no {name}.")
        return value

    @cached_property
    def weights(self) -> Tensor:
        """B H T S, float32 (float64 for a call in that).

        Raises:
            FieldNotCaptured: the weights were not kept.
        """
        call = self.call
        follow = not set_by_edits(call.edits, "weights")
        if follow and not call.has("weights") and all(map(call.has, ("scores", "mask", "sinks"))):
            scores = call.scores
            made = normalized(call.normalizer, scores.to(compute_dtype(scores.dtype)), call.mask, call.sinks)
            if made is not None:
                return made
        weights = self.tensor("weights")
        return weights.to(compute_dtype(weights.dtype))

    @_of_all_heads
    def no_distribution(self) -> str | None:
        """Why the weights of a query are no distribution over the keys: some are negative, or they do not sum to 1 with
        what goes to sinks; None: they are one. Measures that take them for shares are not defined without."""
        call = self.call
        by_edits = set_by_edits(call.edits, "weights")
        if not by_edits and (is_softmax(call.normalizer) or normalizer_of(call.normalizer).sums_to_one):
            return None
        # A normalizer that nobody knows (an entmax, say) is known by what it made.
        if (call.has("weights") or call.has("scores")) and all(map(_are_distributions, self.parts())):
            return None
        why = edits_in_words(call.edits) if by_edits else f"call.normalizer is {call.normalizer!r}"
        return (
            f"its weights are no distribution over the keys ({why}); measure "
            "hookattn.analyze.as_distribution(trace), which takes the magnitude of each over the sum of its row"
        )

    def per_head(self, name: str) -> Tensor:
        """``k`` or ``v`` of each query head: B H S D, or B H S E.

        Raises:
            FieldNotCaptured: it was not kept, or it is not known how many heads there are.
        """
        return per_query_head(self.call, self.tensor(name), self.shape[1])

    def prepare(self, statistics: Sequence[Statistic]) -> None:
        """Compute several statistics in one pass, those that the trace does not hold already.

        Raises:
            FieldNotCaptured: neither they nor what they can be computed of was kept.
        """
        missing = {}
        for statistic in statistics:
            if statistic.key not in self.call.fields and statistic.key not in self._statistics:
                missing[statistic.key] = statistic
        if missing:
            if self.no_distribution is not None:
                raise MeasureError(f"{self.where}: {', '.join(missing)}: {self.no_distribution}.")
            problem = score_inputs_of(self.call, self.positions)
            if problem is None:
                kept = ", ".join(self.call.fields) or "nothing"
                raise FieldNotCaptured(
                    f"{self.where}: {', '.join(missing)} can be computed of weights, of scores and mask, or of q, k, "
                    f"mask, bias and sinks; captured were {kept}. Trace again with one of these, or with "
                    f"hookattn.analyze.capture(…), in capture=."
                )
            self._statistics |= compute(problem, list(missing.values()))

    def stat(self, statistic: Statistic, *, field: str | None = None) -> Tensor:
        """A statistic's field: as it was captured, or computed of what was.

        Args:
            statistic: which.
            field: which of its fields, where it has several; by default the first.

        Raises:
            FieldNotCaptured: see :meth:`prepare`.
            MeasureError: it needs positions that the call does not have.
        """
        self.prepare([statistic])
        key = field or statistic.key
        value = self._statistics[key] if key in self._statistics else self.call.get(key)
        if value is None:
            why = self.no_distribution or "queries and keys are not places in one sequence"
            raise MeasureError(f"{self.where}: {key} is not defined here, as {why}.")
        return value

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` returns, called once for each key; the same for all heads of a call."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    # Some heads at a time

    @cached_property
    def _block_size(self) -> int | None:
        """How many heads make a block; None: all of them are looked at together.

        So it is where heads have masks of their own, which tell what counts only as a whole; and where neither weights
        nor scores were kept, and so nothing large.
        """
        call = self.call
        if not (call.has("weights") or call.has("scores")) or not call.has("mask") or self.mask.shape[1] > 1:
            return None
        b, _, t, s = self.shape
        return max(1, _BLOCK // max(1, b * t * s))

    def part(self, heads: Sequence[int]) -> View:
        """A view of some heads (numbers in the model), which holds what is derived of these as long as it is there."""
        call = self.call
        if len(heads) < len(self.heads):
            call = call.at(heads=heads)
            if "mask" in call.fields:  # it is the same for all heads, and formed once for all of them
                call.fields["mask"] = self.call.fields["mask"]
        return View(call, self.trace, self._real, whole=self)

    def of_query(self, row: int, example: int | None = None) -> View:
        """A view of one query row, counted from 0 among those that were kept, of all batch entries or of one."""
        queries, batch = self.queries[row], example if example is None or self.shape[0] > 1 else None
        return View(self.call.at(queries=queries, batch=batch), self.trace)

    def parts(self) -> Iterator[View]:
        """The heads block by block, in their order: what is made of weights holds no more of them than a block has."""
        return map(self.part, blocks_of([self]))

    # Which rows and keys count

    @_of_all_heads
    def mask(self) -> Tensor:
        """bool, broadcastable to B H T S: True = may attend; where the mask was not kept, what has weight."""
        if self.call.has("mask"):
            return with_four_axes(self.tensor("mask"))
        if self.call.has("weights"):
            return self.weights != 0  # a NaN is to be seen
        held = next((x for x in map(self.call.get, self.call.fields) if x is not None), None)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=None if held is None else held.device)

    @_of_all_heads
    def allowed(self) -> Tensor:
        """int64, broadcastable to B H T: how many keys each query may attend to.

        Raises:
            FieldNotCaptured: the mask was not kept.
        """
        mask = with_four_axes(self.tensor("mask"))
        return mask.expand(*mask.shape[:3], self.shape[3]).sum(-1)

    @_of_all_heads
    def keys(self) -> Tensor:
        """bool, B S: which keys are real tokens.

        Raises:
            MeasureError: ``real`` is of another shape.
        """
        b, _, _, s = self.shape
        if self._real is None:
            return self.mask.any(1).any(1).expand(b, s)
        real = self._real.to(self.mask.device)
        at = key_positions(self.traced, self.trace, s, [real.shape[1]])
        if at is None or at.stop > real.shape[1] or real.shape[0] not in (1, b) or not self.of_inputs:
            stack = self.call.site.stack
            whose = "decoder alone (it is taken to be the encoder's)"
            if stack != "decoder":
                whose = f"{stack} stack alone (it is taken to be of the trace's tokens)"
            of = "" if self.of_inputs else f" of the {whose}"
            raise MeasureError(
                f"{self.where}: real= has shape {tuple(real.shape)}; expected B S = {b} {s}{of}. Measure the "
                "calls that it is for, with trace.select(…)."
            )
        return real[:, at.start : at.stop].expand(b, s)

    @_of_all_heads
    def rows(self) -> Tensor:
        """bool, B T: which queries count: those with something to attend to that are no padding themselves."""
        b, _, t, s = self.shape
        rows = self.mask.any(-1).any(1).expand(b, t)
        positions = self.positions
        if positions is None:
            return rows
        at = positions.expand(b, t)
        # A query that is at no key (in a window that has moved on, say) cannot be padding among the keys.
        own = self.keys.gather(1, at.clamp(0, s - 1)) | (at < 0) | (at >= s)
        return rows & own

    @_of_all_heads
    def pairs(self) -> Tensor:
        """bool, B (1 or H) T S: which real keys each query that counts may attend to.

        Raises:
            FieldNotCaptured: the mask was not kept.
        """
        return self.tensor("mask") & self.rows[:, None, :, None] & self.keys[:, None, None]

    @_of_all_heads
    def positions(self) -> Tensor | None:
        """(B or 1) T, int64: the key position of each query; None where there is no such thing."""
        positions = query_positions(self.call, *self.shape[2:])
        return None if positions is None else positions.to(self.mask.device)

    @property
    def lost(self) -> str | None:
        """Why it is not known at which keys its queries are, where a cache may have an empty end; None: it is."""
        call, (_, _, t, s) = self.call, self.shape
        if (call.of_queries or t) >= s or call.has("mask") or call.has("weights"):
            return None
        # A cache of fixed size has as many keys in every step, the last of them empty. One that grows has none empty.
        steps = [c for c in self.trace.calls if c.site.path == call.site.path and c.step != call.step]
        if all(c.keys != call.keys for c in steps):
            return None
        return "only the mask tells where its queries are in the cache; trace again with 'mask' in capture= too"

    @_of_all_heads
    def distance(self) -> Tensor:
        """(B or 1) T S, int64: query position − key position.

        Raises:
            MeasureError: there are no positions.
        """
        if self.positions is None:
            raise MeasureError(f"{self.where}: queries and keys are not places in one sequence: there is no distance.")
        return self.positions.unsqueeze(-1) - torch.arange(self.shape[3], device=self.positions.device)

    def mean(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """B H: the mean over the rows that count, NaN where none does.

        Args:
            values: B H T.
            rows: bool, B T or B H T: which of them; by default :attr:`rows`.
        """
        rows = self.rows if rows is None else rows
        rows = (rows if rows.dim() == 3 else rows.unsqueeze(1)).expand(values.shape)
        total = torch.where(rows, values, 0.0).sum(-1, dtype=torch.float64)
        return total / rows.sum(-1)


def _are_distributions(view: View) -> bool:
    """Whether no weight of some heads is negative, and those of each query sum to 1, or are all 0; or to less, where
    edits have left out some, as where a sink takes the rest."""
    weights = view.weights
    allowed = 4 * tolerance(view.call.dtype)  # a row sum is of many roundings
    total = weights.sum(-1)
    sound = ((total - 1).abs() <= allowed) | (total == 0)
    if set_by_edits(view.call.edits, "weights"):
        sound |= total < 1
    return bool((weights >= 0).all() and sound.all())


def blocks_of(several: Sequence[View], matrices: int = 1) -> list[Sequence[int]]:
    """The numbers of the heads whose weights are derived together, one at least.

    Args:
        several: calls that have the same heads.
        matrices: how many of the size of the weights whoever asks will hold; so many fewer heads make a block.
    """
    heads = several[0].heads
    sizes = [view._block_size for view in several]
    known = [size for size in sizes if size is not None]
    size = max(1, len(heads) if len(known) < len(sizes) else min(known) // matrices)
    return [heads[start : start + size] for start in range(0, len(heads), size)]
