"""All statistics of a call in one pass over blocks of rows: memory is linear in the number of keys.

A GPU's kernels compute what they can (:mod:`.fused`), and this pass the rest.

A block of scores stays in the processor's cache from the product to the last sum over it. Beside that one product and
the exponential, which a fused kernel computes too, there are only sums over it. Reusing a fused kernel, which returns
its log-sum-exp and takes more columns along in v, would cost one forward for the entropy and another for what keys
receive, and leave the largest score to a third pass.

A block has whole rows: all the keys that any of its rows may see. So the softmax is the plain one, with the row's
largest score taken off (no overflow), and not the online one of the GPU's kernels, which see a row tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..attention.functional import compute_dtype, finish_scores, with_four_axes
from ..attention.masks import Reach
from ..attention.score_inputs import ScoreInputs
from ..torch_internals import devices
from .base import Out, Statistic
from .block import HIDDEN, LOG2E, Block

# How many scores make a block: 4 MiB of float32 stay in the cache. On a GPU nothing does for so long: there so many
# that starting an operation costs little beside it.
_BLOCK = 1 << 20
_BLOCK_ON_GPU = 1 << 26
# Rows of a block. Fewer make a product slow, however many keys there are; with more, what is done around the diagonal,
# which takes their square, costs as much as the rest.
_LEAST = 16
_WIDEST = 128


@torch.no_grad()
def compute(problem: ScoreInputs, statistics: Sequence[Statistic]) -> dict[str, Tensor | None]:
    """The statistics of one call.

    Args:
        problem: the call.
        statistics: which ones.

    Returns:
        Field name → tensor, in float32 (float64 for a call in that); None for a statistic that needs positions, where
        the call has none.

    Raises:
        InputError: ``problem`` or one of the statistics is something else.
    """
    checks.one_of("problem", problem, ScoreInputs, "a hookattn.statistics.Problem")
    statistics = checks.several("statistics", statistics, Statistic, "statistics of hookattn.statistics")
    q, k = problem.q, problem.k
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    dtype = compute_dtype(q.dtype if problem.scores is None else problem.scores.dtype)
    made: dict[str, Tensor | None] = dict.fromkeys(name for statistic in statistics for name in statistic.fields)
    defined = [x for x in statistics if problem.positions is not None or not x.positional]
    if devices.on_gpu(q) and 0 not in shape and defined:
        from .fused import kernel_statistics  # what it needs is heavy

        found, defined = kernel_statistics(problem, defined)
        made.update(found)
    asked: list[tuple[Statistic, Out]] = []
    for statistic in defined:
        out = statistic.allocate(shape, dtype, q.device)
        made.update(out)
        asked.append((statistic, out))
    if asked and 0 not in shape:
        asked.sort(key=lambda pair: pair[0].last)  # the one that writes over the scores comes after all who read them
        columns = _Columns([statistic for statistic, _ in asked], shape[3], dtype, q.device)
        for block in _Pass(problem, dtype, columns).blocks():
            for (statistic, out), span in zip(asked, columns.spans, strict=True):
                statistic.write(block, columns.sums[..., span], out)
    return made


class _Columns:
    """The vectors over the keys that statistics want products with, as rows of one matrix: one product gives all sums.

    The first is of ones: its product is the softmax's denominator.

    Attributes:
        spans: which rows are whose, in the order of the statistics.
        all: N S.
        sums: b h R N, the products of the block that was taken last.
    """

    def __init__(self, statistics: Sequence[Statistic], s: int, dtype: torch.dtype, device: torch.device):
        self.statistics = statistics
        self.spans: list[slice] = []
        n = 1
        for statistic in statistics:
            self.spans.append(slice(n, n + statistic.columns()))
            n = self.spans[-1].stop
        # Keys are the inner axis: the product is several times slower the other way round.
        self.all = torch.zeros(n, s, dtype=dtype, device=device)
        self.all[0] = 1
        self.sums = self.all
        self.fill(slice(0, s), None)

    def fill(self, keys: slice, reach: tuple[int, int] | None) -> None:
        """Write the vectors that depend on the rows of a block; see :meth:`Statistic.fill`."""
        for statistic, span in zip(self.statistics, self.spans, strict=True):
            if span.stop > span.start:
                statistic.fill(self.all[span, keys], keys, reach)

    def row_sums(self, mass: Tensor, keys: slice) -> Tensor:
        """b h R 1: the sums of a block's rows; :attr:`sums` gets the other products."""
        if len(self.all) == 1:
            self.sums = mass.sum(-1, keepdim=True)
        else:
            self.sums = mass @ self.all[:, keys].t()
        return self.sums[..., :1]


@dataclass(slots=True)
class _Span:
    """Some rows.

    Attributes:
        rows: which.
        seen: the keys that any of them, and that all of them may see for all that the kernel hides by itself.
        positions: the least and the greatest of their key positions; 0 and 0 where there is no such thing.
    """

    rows: slice
    seen: Reach
    positions: tuple[int, int]

    @property
    def keys(self) -> slice:
        """The keys of its block."""
        return self.seen.some


class _Pass:
    """One pass over the scores of a call.

    Attributes:
        g: key heads; of the model's own scores as many as there are query heads, as no product is shared.
        per: query heads of one key head. They go into one product, as so many more rows.
        rows: T, int64, which queries of the whole call these are; ``row_numbers``: the same as ints.
        least_and_most: for each row the least and the greatest key position of the batch; None: there are no positions.
        mask: True where a key is hidden, where the mask is the same for all rows: inverted once and not in every block.
        scratch: memory of a block, used again: fresh memory would not be in the cache.
    """

    def __init__(self, problem: ScoreInputs, dtype: torch.dtype, columns: _Columns):
        self.problem, self.dtype, self.columns = problem, dtype, columns
        q, k = problem.q, problem.k
        self.b, self.h, self.t, self.d = q.shape
        self.s = k.shape[2]
        own = problem.scores is not None
        self.g = self.h if own else k.shape[1]
        self.per = self.h // self.g
        self.k = k if own else k.to(dtype).expand(self.b, -1, -1, -1)
        self.diagonal = problem.diagonal
        self.rows = torch.arange(self.t, device=q.device) if problem.rows is None else problem.rows
        self.row_numbers = self.rows.tolist()
        at = problem.positions
        self.least_and_most = None if at is None else (at.amin(0).tolist(), at.amax(0).tolist())
        self.mask = None if problem.mask is None else ~problem.mask.bool() if problem.mask.shape[2] == 1 else None
        self.on_gpu = devices.on_gpu(q)
        self.scratch: dict[int, Tensor] = {}

    def blocks(self) -> Iterator[Block]:
        """Every row of every head once."""
        size = _BLOCK_ON_GPU if self.on_gpu else _BLOCK
        for span in self._spans(size):
            self.columns.fill(span.keys, span.positions)
            hidden = self._hidden(span)
            scores = self._size(span)
            # As many key heads as fit, and batch entries only where all heads of one do: a block is one piece of
            # memory.
            groups = min(self.g, max(1, size // scores))
            batch = min(self.b, max(1, size // (scores * self.g))) if groups == self.g else 1
            for b in range(0, self.b, batch):
                for g in range(0, self.g, groups):
                    heads = slice(g, min(g + groups, self.g))
                    yield self._block(slice(b, min(b + batch, self.b)), heads, span, hidden)

    def _spans(self, size: int) -> Iterator[_Span]:
        """All rows, in spans of about as many scores: of rows that see few keys a span has more.

        Which keys a wider span sees is known only when it is made, so it grows by steps.
        """
        least = max(_LEAST, size // (self.per * self.s))
        most = least if self.on_gpu else _WIDEST
        start = 0
        while start < self.t:
            span = self._span(start, start + min(least, most))
            while span.rows.stop < min(start + most, self.t):
                wider = self._span(start, min(span.rows.stop + _LEAST, start + most))
                if self._size(wider) > size:
                    break
                span = wider
            yield span
            start = span.rows.stop

    def _size(self, span: _Span) -> int:
        """How many scores a span has in one key head."""
        rows, keys = (x.stop - x.start for x in (span.rows, span.keys))
        return int(self.per * rows * keys)

    def _span(self, start: int, stop: int) -> _Span:
        rows = slice(start, min(stop, self.t))
        numbers = self.row_numbers[rows]
        seen = self.diagonal.reach(min(numbers), max(numbers), self.s)
        if self.least_and_most is None:
            return _Span(rows, seen, (0, 0))
        least, most = self.least_and_most
        return _Span(rows, seen, (min(least[rows]), max(most[rows])))

    def _scratch(self, which: int, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised memory, the same for each block; ``which``: of several that are in use at once."""
        n = 1
        for size in shape:
            n *= size
        if which not in self.scratch or self.scratch[which].numel() < n:
            self.scratch[which] = torch.empty(n, dtype=self.dtype, device=self.problem.q.device)
        return self.scratch[which][:n].view(shape)

    def _block(self, batch: slice, groups: slice, span: _Span, hidden: list[tuple[slice, Tensor]]) -> Block:
        problem = self.problem
        place = (batch, slice(groups.start * self.per, groups.stop * self.per), span.rows)
        scores = self._scores(groups, place, span.keys)
        positions = problem.positions
        if positions is not None:
            positions = (positions if positions.shape[0] == 1 else positions[batch])[:, None, span.rows, None]
        if self.mask is not None:
            scores.masked_fill_(_part(self.mask, place, span.keys), HIDDEN)
        elif problem.mask is not None:
            scores.masked_fill_(~_part(problem.mask, place, span.keys).bool(), HIDDEN)
        for columns, hides in hidden:
            scores[..., columns].masked_fill_(hides, HIDDEN)
        top = scores.amax(-1, keepdim=True)
        # A dead row has nothing to attend to. Its shift is 0: with its own, HIDDEN, all its keys would weigh the same.
        dead = top <= HIDDEN / 2  # false for NaN, which shall be seen
        full = not self.on_gpu and not bool(dead.any())  # a GPU would have to be waited for
        shift = top if full else torch.where(dead, 0.0, top)
        shifted = scores.sub_(shift)
        mass = torch.exp2(shifted, out=self._scratch(1, tuple(scores.shape)))
        own = self.columns.row_sums(mass, span.keys)
        lse = own.log2().add_(shift)
        if not full:
            top = torch.where(dead, -torch.inf, top)
        if problem.sinks is not None:  # one more column of the denominator, which nobody attends to
            lse = torch.logaddexp2(lse, _part(problem.sinks, place, None).to(self.dtype) * LOG2E)
            factor = torch.exp2(shift - lse)
        else:
            factor = own.reciprocal()
        if not full:
            factor = torch.where(dead, 0.0, factor)
        top, lse = top / LOG2E, lse.div_(LOG2E)
        return Block(place, span.keys, shifted, mass, factor, top, lse, own * factor, positions, span.positions)

    def _scores(self, groups: slice, place: tuple[slice, slice, slice], keys: slice) -> Tensor:
        """b h R n, times log₂e, before any mask."""
        problem, (batch, heads, rows) = self.problem, place
        b, h, r = (x.stop - x.start for x in place)
        n = keys.stop - keys.start
        out = self._scratch(0, (b, h, r, n))
        if problem.scores is not None:
            return out.copy_(problem.scores[batch, heads, rows, keys]).mul_(LOG2E)
        g = groups.stop - groups.start
        q = problem.q[batch, heads, rows].to(self.dtype).reshape(b * g, self.per * r, self.d)
        k = self.k[batch, groups, keys].reshape(b * g, n, self.d)
        alpha = LOG2E * problem.scale if isinstance(problem.scale, (int, float)) else LOG2E
        flat = out.view(b * g, self.per * r, n)
        if len(flat) == 1:
            torch.addmm(flat[0], q[0], k[0].t(), beta=0, alpha=alpha, out=flat[0])
        else:
            torch.baddbmm(flat, q, k.transpose(1, 2), beta=0, alpha=alpha, out=flat)
        if isinstance(problem.scale, Tensor):
            out.mul_(_part(with_four_axes(problem.scale), place, keys).to(self.dtype))
        # With s' = s·log₂e and c' = c·log₂e, c'·tanh(s'/c') is c·tanh(s/c)·log₂e: the cap is scaled as the scores are.
        finish_scores(out, None if problem.softcap is None else LOG2E * problem.softcap, None)
        return out if problem.bias is None else out.add_(_part(problem.bias, place, keys), alpha=LOG2E)

    def _hidden(self, span: _Span) -> list[tuple[slice, Tensor]]:
        """What the kernel hides by itself: some columns of a block, and R n, which of their scores it hides.

        Only the columns at the edges, that some rows see and others do not: for long rows that is next to nothing of
        the block, and no comparison is made for the rest.
        """
        keys, every = span.seen
        edges = (slice(keys.start, every.start), slice(every.stop, keys.stop))
        return [
            (slice(edge.start - keys.start, edge.stop - keys.start), self.diagonal.hides(self.rows[span.rows], edge))
            for edge in edges
            if edge.stop > edge.start
        ]


def _part(x: Tensor, place: tuple[slice, slice, slice], keys: slice | None) -> Tensor:
    """A block of what is broadcastable to B H T S, itself broadcastable to that block."""
    for dim, at in enumerate(place if keys is None else (*place, keys)):
        if x.shape[dim] > 1:
            x = x[(slice(None),) * dim + (at,)]
    return x
