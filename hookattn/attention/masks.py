"""What hides keys from queries: the kernel by itself, the mask that it was given, and a mask that was added."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_internals.isolation import no_gradients


class Reach(NamedTuple):
    """Which keys a run of queries may attend to, as far as the kernel says it by itself.

    Attributes:
        some: the keys that any of these queries may see.
        all: the keys, among those, that every one of them may see.
    """

    some: slice
    all: slice


class Seers(NamedTuple):
    """Which queries may attend to blocks of keys, as far as the kernel says it by itself: Reach, seen from the keys.

    Attributes:
        first: int64, one for each block: the first query row that may see any of its keys.
        all_first: the first that may see all of them.
        all_last: the last that may see all of them; None: all that follow may.
        last: the last that may see any of them; None likewise.
    """

    first: Tensor
    all_first: Tensor
    all_last: Tensor | None
    last: Tensor | None


class Diagonal(NamedTuple):
    """What a kernel hides by itself, beside the mask that it is given. All that depends on its form asks this.

    Query row ``i`` stands at key position ``i + offset``: on a diagonal of T S. Rows are those of the whole call; which
    of them somebody asks for is no part of it.

    A new form (chunks, say, or a prefix that all may see) is an attribute here, and changes the methods below and, for
    GPUs, ``allows``, ``reach`` and ``reach_of_all`` in :mod:`hookattn.attention.kernels.rows`.

    Attributes:
        causal: whether keys after a query's own position are hidden.
        offset: 0 aligns query 0 with key 0 (torch); ``S - T`` aligns the last query with the last key (flash-attn).
        window: how many keys up to and including the query's own position it may see; without ``causal`` as many on
            the other side. None: no limit.
    """

    causal: bool = False
    offset: int = 0
    window: int | None = None

    @property
    def hides_any(self) -> bool:
        """Whether it hides keys at all; if not, its offset means nothing."""
        return self.causal or self.window is not None

    def positions(self, rows: Tensor) -> Tensor | None:
        """The key positions of some query rows, in their shape; None: this kernel does not say where queries are."""
        return rows + self.offset if self.causal else None

    def allows(self, rows: Tensor, keys: slice) -> Tensor:
        """R n, bool: which keys each of some queries may see.

        Args:
            rows: R, int64, in any order.
            keys: n keys, from ``start`` to ``stop``.
        """
        # Compared, not subtracted: distances would take eight times the memory of what is asked for.
        at, key = (rows + self.offset).unsqueeze(-1), torch.arange(keys.start, keys.stop, device=rows.device)
        if not self.hides_any:
            return torch.ones(len(rows), len(key), dtype=torch.bool, device=rows.device)
        if self.window is None:
            return key <= at
        return (key > at - self.window).logical_and_(key <= at if self.causal else key < at + self.window)

    def sees_any(self, rows: Tensor, s: int) -> Tensor:
        """Whether each of some queries may see any key, in their shape.

        Args:
            rows: int64.
            s: S.
        """
        at = rows + self.offset
        if self.window is None:
            return at >= 0 if self.causal else torch.ones_like(at, dtype=torch.bool)
        return (at if self.causal else at + self.window - 1).ge(0).logical_and_(at - self.window < s - 1)

    def hides(self, rows: Tensor, keys: slice) -> Tensor:
        """R n, bool: the contrary of :meth:`allows`."""
        return self.allows(rows, keys).logical_not_()

    def mask(self, t: int, s: int, device: torch.device | None = None) -> Tensor:
        """1 1 T S, bool, True = may attend: the mask of all queries and keys."""
        if not self.hides_any:  # nothing of the size T·S has to be formed
            return torch.ones((), dtype=torch.bool, device=device).expand(1, 1, t, s)
        return self.allows(torch.arange(t, device=device), slice(0, s)).view(1, 1, t, s)

    def reach(self, first: int, last: int, s: int) -> Reach:
        """Which keys the query rows from ``first`` to ``last``, both included, may see.

        Args:
            first: the least of these rows.
            last: the greatest of them.
            s: S. ``some`` has one key at least, be it one that nobody sees: a block without keys has no softmax.
        """
        least, most = first + self.offset, last + self.offset
        start, stop = 0, s
        if self.causal:
            stop = min(stop, most + 1)
        if self.window is not None:
            start = max(start, least - self.window + 1)
            stop = min(stop, most + self.window)
        start = min(max(start, 0), s - 1)
        stop = max(stop, start + 1)
        left, right = start, stop
        if self.window is not None:
            left = min(max(most - self.window + 1, start), stop)
            right = min(least + self.window, right)
        if self.causal:
            right = min(least + 1, right)
        return Reach(slice(start, stop), slice(left, max(left, right)))

    def seers(self, first: Tensor, last: Tensor) -> Seers:
        """Which query rows may see blocks of keys, for a kernel that hides any.

        Args:
            first: int64, the first key of each block.
            last: int64, the last key of each block.
        """
        ahead = 0 if self.causal else (self.window or 0) - 1  # so many keys after its own position a query sees
        first, last = first - self.offset, last - self.offset
        if self.window is None:
            return Seers(first - ahead, last - ahead, None, None)
        return Seers(first - ahead, last - ahead, first + self.window - 1, last + self.window - 1)

    def kernel_operands(self) -> dict[str, int | bool]:
        """It as the GPU kernels take it, by the names of their parameters."""
        return {
            "offset": self.offset,
            "window": self.window or 0,
            "CAUSAL": self.causal,
            "WINDOWED": self.window is not None,
        }


def causal_mask(
    t: int,
    s: int,
    *,
    window: int | None = None,
    offset: int = 0,
    causal: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """The bool mask of a causal or windowed kernel: 1 1 T S, True = may attend.

    Args:
        t: queries.
        s: keys.
        window: how many keys up to and including the query's own position it may see; None: no limit.
        offset: 0 aligns query 0 with key 0 (torch); ``s - t`` aligns the last query with the last key (flash-attn).
        causal: whether later keys are hidden; without it the window is two-sided.
        device: where the mask is made.
    """
    return Diagonal(causal, offset, window).mask(t, s, device)


# ---------------------------------------------------------------------------------------------- the complete mask

# Masks of up to this many entries that depend on nothing but a shape are made once for all traces: small models are
# traced over and over, and making one costs several times what a copy does.
_SMALL = 1 << 16


class CompleteMask(NamedTuple):
    """The complete mask of a call, and what it does.

    Attributes:
        mask: bool, broadcastable to B H T S, True = may attend.
        real: the same; None if nothing is hidden.
        empty: whether it has rows with nothing to attend to.
        hidden: 0 where it is True and −∞ elsewhere, float32; None if nobody has made it yet.
    """

    mask: Tensor
    real: Tensor | None
    empty: bool
    hidden: Tensor | None = None


def complete_mask(
    given: Tensor | None,
    t: int,
    s: int,
    diagonal: Diagonal,
    device: torch.device,
    rows: Tensor | None = None,
) -> CompleteMask:
    """The complete mask of a call, or of some of its queries.

    Args:
        given: bool, broadcastable to B H T S, what the kernel was given, and nobody writes to it; or None.
        t: queries.
        s: keys.
        diagonal: what the kernel hides by itself.
        device: where the mask is made.
        rows: T, int64, which queries of the whole call these are; None: all, in their order.
    """
    if not diagonal.hides_any:
        if given is None:
            return CompleteMask(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), None, False)
        mask = given
    elif rows is not None:
        mask = diagonal.allows(rows, slice(0, s))[None, None]
        mask = mask if given is None else given & mask
    elif given is None and t * s <= _SMALL:
        known = _by_shape(t, s, diagonal, device)
        return known._replace(mask=known.mask.clone())  # the reader may write to it, and other traces have the same
    else:
        mask = diagonal.mask(t, s, device)
        mask = mask if given is None else given & mask
    if mask.numel() == 1 and bool(mask):
        return CompleteMask(mask, None, False)
    return CompleteMask(mask, mask, _leaves_empty(mask))


@functools.lru_cache(maxsize=64)
def _by_shape(t: int, s: int, diagonal: Diagonal, device: torch.device) -> CompleteMask:
    with torch.inference_mode(False), no_gradients():  # it outlives the mode that is on now
        mask = diagonal.mask(t, s, device).contiguous()
        return CompleteMask(mask, mask, _leaves_empty(mask), additive_mask(mask))


def additive_mask(mask: Tensor) -> Tensor:
    """0 where a mask is True and −∞ elsewhere, float32."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)


def _leaves_empty(mask: Tensor) -> bool:
    return not bool(mask.any(-1).all())


# ---------------------------------------------------------------------------------------------- masks that were added

# An additive entry at or below this is a mask, unless the tensor slopes down to it gradually (a long ALiBi bias).
MASKED = -9_000.0

# The smallest penalty in use as a mask by itself, with zeros beside it: Swin's 0/-100, whose weights do reach 0.
FILL = -99.0

# What masks are made of beside -10000: float16's lowest, -1e9, the lowest of the others.
_BOUNDS = (MASKED, -60_000.0, -5e8, -1e30)
# A mask stands apart from the bias by at least a third of its size; a slope has entries in between.
_APART = 1.5
# A smaller penalty is a mask where nothing lies within so much of what it leaves: e^-40 is less than what rounding
# makes of a weight beside it in any dtype, float64 too.
_GAP = 40.0


def split_additive(additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """An additive mask as (bias, mask): finite terms, and what may be attended to.

    What is a mask, in this order:

    - −inf, ``finfo.min``, −10000 and their kin, also where a bias was summed into the same tensor.
    - All that is not 0 in a tensor of nothing but 0 and penalties of −99 or less (Swin's −100).
    - Smaller penalties that a bias was summed with (shifted windows with relative positions: −100 ± 16). Such a sum
      lies in two heaps, so there has to be a gap: of 40 at least, since e^-40 is nothing beside any weight; half as
      wide again as all that lies above it, so that no bias leads down to it; at the same keys for all heads, as a mask
      is and a learned bias is not. A row of which all lies below the gap attends to all of it, and is left alone.

    A bias that slopes down gradually (ALiBi over a long context) has no gap and stays a bias, however low it gets. What
    is masked in a tensor is masked in any batch entries and queries of it, too: a part can only widen a gap.

    Args:
        additive: floating, any shape; heads, if it has any, on the third axis from the end of four or more.

    Returns:
        bias (finite, zero where masked; None if it is zero everywhere) and mask (bool; None if nothing is masked).
    """
    if additive.numel() == 0:
        return None, None
    low, top = (x.item() for x in torch.aminmax(additive))
    if low == 0 and top == 0:
        return None, None
    if low > -_GAP:
        return additive, None
    hidden, bias, floor = None, additive, low
    for bound in (b for b in _BOUNDS if low <= b):
        below = additive <= bound
        rest = torch.where(below, 0.0, additive)
        least, most = (x.item() for x in torch.aminmax(rest))
        if least > bound / _APART:  # no slope that leads down to it
            hidden, bias, floor, top = below, rest, least, most
            break
    if floor <= FILL and top == 0 and not bool(((bias < 0) & (bias > FILL)).any()):
        hidden, floor = additive != 0, 0.0
    elif floor <= -_GAP and (penalised := _below_gap(bias, hidden)) is not None:
        hidden = penalised if hidden is None else hidden | penalised
        bias = bias.masked_fill(penalised, 0.0)
        floor, top = (x.item() for x in torch.aminmax(bias))
    return None if floor == 0 and top == 0 else bias, None if hidden is None else ~hidden


def _below_gap(bias: Tensor, hidden: Tensor | None) -> Tensor | None:
    """Where a bias has a penalty summed into it that is a mask: the third rule of :func:`split_additive`.

    Args:
        bias: finite, any shape.
        hidden: where it is masked already; those entries do not count.

    Returns:
        bool, of its shape; None: there is no such penalty.
    """
    seen = bias if hidden is None else bias.masked_fill(hidden, torch.inf)
    low = seen.min().item()
    top = (bias if hidden is None else bias.masked_fill(hidden, -torch.inf)).max().item()
    if not _may_have_gap(seen, low, top):
        return None
    found = None
    # Several penalties may be summed (-100 and -200). Each look halves what is left of the range, up to the last gap.
    while low <= -_GAP and low / 2 < top:
        lower = seen <= low / 2
        below, above = (
            seen.masked_fill(~lower, -torch.inf).max().item(),
            seen.masked_fill(lower, torch.inf).min().item(),
        )
        if above - below >= max(_GAP, _APART * (top - above)):
            found = lower
        low = above
    if found is None:
        return None
    if hidden is not None:
        found &= ~hidden
    if found.dim() >= 4 and found.shape[-3] > 1 and not bool((found == found.select(-3, 0).unsqueeze(-3)).all()):
        return None
    empty = (found if hidden is None else found | hidden).all(-1, keepdim=True)
    found = found & ~empty
    return found if bool(found.any()) else None


def _may_have_gap(x: Tensor, low: float, top: float) -> bool:
    """Whether some of the entries, with the lowest and the highest, leave a gap; if they don't, all don't either."""
    for dim, extent in enumerate(x.shape):
        most = 32 if dim >= x.dim() - 2 else 8
        x = x[(slice(None),) * dim + (slice(None, None, -(-extent // most)),)]
    some = x[x < torch.inf].float()
    some = torch.cat([some, some.new_tensor([max(low, torch.finfo(torch.float32).min), top])]).sort().values
    gap, above = some.diff(), top - some[1:]
    return bool(((gap >= _GAP) & (gap >= _APART * above)).any())
