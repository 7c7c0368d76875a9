"""Values of many inputs at one site, and what makes weights of a mix of them."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike

from torch import Tensor

from .. import checks
from ..calls.trace_data import TraceData
from ..errors import EditError, InputError
from ..traces import as_trace
from .base import Edit
from .edited_call import EditedCall
from .part import axes_of
from .sources import calls_like, taken_from

OVER = ("positions", "batch")
"""What an edit can be over that is of the same run."""


def over_of(over: object) -> TraceData | str:
    """The ``over`` of an edit.

    Raises:
        InputError: it is none.
    """
    if isinstance(over, str) and over in OVER:
        return over
    if isinstance(over, TraceData):
        return over
    if isinstance(over, (str, PathLike)):
        return as_trace(over, "over")
    raise checks.wrong("over", over, f"one of {', '.join(OVER)}, a Trace, or the path of its file", InputError)


def named(over: TraceData | str) -> str:
    return over if isinstance(over, str) else over.path or "a trace"


def check_whole(call: EditedCall, edit: Edit, over: str) -> None:
    """Whether a call has all that an edit is over.

    Raises:
        EditError: the model computes its attention piece by piece, and this is a piece.
    """
    axis, what = (call.place.rows, "queries") if over == "positions" else (call.place.batch, "batch entries")
    if not axis.whole:
        raise EditError(
            f"{call.where(edit)}: over={over!r} is over all {what}, and the model computes its attention in pieces, "
            f"{axis.count} of {axis.of} {what} at a time; take values of a trace (over=trace), which has them together."
        )


def samples_of(corpus: TraceData, call: EditedCall, edit: Edit, positions: bool = True) -> Iterator[Tensor]:
    """The field of each call of a corpus at the site of a call: b H' T' S and so on, with its own batch entries.

    Args:
        corpus: a trace.
        call, edit: what they are for.
        positions: of the selected queries alone; False: of all there are, whatever their number.

    Raises:
        EditError: there is none, or the shapes do not fit.
    """
    for source in calls_like(corpus, call, edit):
        free = "BTS" if not positions else "B"
        yield taken_from(source, call, edit, free="".join(x for x in free if x in axes_of(edit.field)))


def renormalised(call: EditedCall, weights: Tensor) -> Tensor:
    """Weights that see no key that is hidden, and sum to 1; of a query that is left none, 0.

    Args:
        weights: broadcastable to the selected entries of the call's weights.
    """
    weights = weights * call.part.take(call.mask, "BHTS")
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)
