"""One attention while it runs, as an edit sees it.

What a kernel never forms, scores and weights, is computed by explicit math on its arguments when it is asked for: of
the part that is asked for, and with gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..attention.functional import compute_dtype, dot_scores, finish_scores, sink_column, with_four_axes
from ..attention.kernel_call import KernelCall
from ..attention.normalizers import normalized, normalizer_of
from ..attention.whole import Place
from ..calls.site import Site
from ..errors import EditError
from .part import Part, axes_of
from .positions import Here
from .where import UNNUMBERED


class EditedCall:
    """One attention call that is edited, given to :meth:`~hookattn.edit.base.Edit.new` and to functions of
    :func:`hookattn.edit.call`.

    Letters: B batch, H query heads, G key heads, T queries, S keys, D query width, E value width.

    Attributes:
        site: where it happens.
        step: which forward of the block, from 0.
        tap: what sees its kernel.
        field: the field that is being edited.
        part: which of its entries, as places along its axes; None: all.
    """

    def __init__(
        self,
        call: KernelCall,
        site: Site,
        step: int,
        place: Place | None = None,
        positions: Here | None = None,
    ):
        """
        Args:
            call, site, step: as in the attributes.
            place: where the call is in the whole attention; None: to be looked up.
            positions: of its queries in the sequence; None: no edit asks for them.
        """
        self.site, self.step, self.tap = site, step, call.tap
        self.call = replace(call)  # what is reported is the tap's
        self.field, self.part = "", Part()
        self._value: Callable[[], Tensor] | Tensor | None = None
        self._given: Tensor | None = None  # what the edit was handed of it
        self.place = Place.of(call) if place is None else place
        self._positions = positions

    def begin(self, part: Part, field: str, value: Callable[[], Tensor]) -> None:
        """An edit of a part of a field begins; ``value``: makes what is there."""
        self.field, self.part, self._value, self._given = field, part, value, None

    # What an edit reads

    @property
    def axes(self) -> str:
        """The letters of the axes of the field."""
        return axes_of(self.field)

    @property
    def value(self) -> Tensor:
        """The selected entries of the field, as they are without this edit: B H T S for scores and weights, and so on.
        Scores are finite, with no mask in them. It is the edit's own copy, which may be written to: what is returned
        counts."""
        if self._given is None:
            self._given = self._unedited().clone()
        return self._given

    def is_unedited(self, new: Tensor) -> bool:
        """Whether values are those that there were; where they are what was handed out, NaN is NaN."""
        old = self._unedited()
        if torch.equal(new, old):
            return True
        return new is self._given and bool(((new == old) | (new.isnan() & old.isnan())).all())

    def was_handed(self, new: Tensor) -> bool:
        """Whether values are those that were handed out, written to or not."""
        return new is self._given

    def _unedited(self) -> Tensor:
        """The selected entries as the model has them."""
        if not isinstance(self._value, Tensor):
            assert self._value is not None, "only while an edit is done"
            self._value = self._value()
        return self._value

    @property
    def value_shape(self) -> list[int]:
        """The shape of :attr:`value`, which is not computed for it."""
        return self.part.shape(self.axes, self.extents)

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype of :attr:`value`; likewise."""
        if isinstance(self._value, Tensor):
            return self._value.dtype
        call = self.call
        if self.field == "weights" and call.weights is not None:
            return call.weights.dtype
        return compute_dtype(call.dtype) if self.field in ("scores", "weights") else call.dtype

    def numbers(self, letter: str) -> tuple[int, ...] | None:
        """The numbers of the selected entries along an axis, all of them where none were selected: heads of the model,
        positions of queries in the sequence, keys, batch entries. None: it is a width, which has none."""
        if letter not in "BHGTS":
            return None
        (places,) = self.part.of(letter)
        several = range(self.extents[letter]) if places is None else places
        if letter == "T":
            assert self._positions is not None, "an edit that asks says that it is by position"
            return tuple(self._positions.queries[i] for i in several)
        place = self.place
        axis = {"B": place.batch, "H": place.heads, "G": place.key_heads}.get(letter)
        first = 0 if axis is None else axis.first
        if first is None:
            if axis is not None and axis.elsewhere:
                raise EditError(f"{self.site.label} (step {self.step}): {UNNUMBERED}.")
            raise EditError(
                f"{self.site.label} (step {self.step}): the model computes some heads of one batch entry together with "
                "some of another, so that values of another run have no place here."
            )
        return tuple(first + i for i in several)

    @property
    def extents(self) -> dict[str, int]:
        """Letter → extent of the whole call."""
        call = self.call
        b, h, t, s = call.shape
        found = {"B": b, "H": h, "T": t, "S": s}
        if call.q is not None:
            found["D"] = call.q.shape[3]
        if call.k is not None:
            found["G"] = call.k.shape[1]
        if call.v is not None:
            found |= {"G": call.v.shape[1], "E": call.v.shape[3]}
        return found

    @property
    def q(self) -> Tensor | None:
        """B H T D, of the whole call as it is now, as it enters the dot product; None: the scores are no product."""
        return self.call.q

    @property
    def k(self) -> Tensor | None:
        """B G S D; likewise."""
        return self.call.k

    @property
    def v(self) -> Tensor:
        """B G S E; likewise. Where a model writes attention out by hand, it is not known yet while scores and weights
        are edited."""
        if self.call.v is None:
            raise EditError(f"{self.site.label}: its values are not known yet where its {self.field} are edited.")
        return self.call.v

    @property
    def bias(self) -> Tensor | None:
        """Finite additive terms, broadcastable to B H T S, or None."""
        return self.call.bias

    @property
    def mask(self) -> Tensor:
        """bool, broadcastable to B H T S, True = may attend: all that hides keys, knock-outs included."""
        return self.mask_of(Part())

    @property
    def scores(self) -> Tensor:
        """B H T S, of the whole call: scale·q·kᵀ, soft-capped, plus bias; no mask in it."""
        return self.scores_of(Part())

    @property
    def weights(self) -> Tensor:
        """B H T S, of the whole call."""
        return self.weights_of(Part(), None)

    @property
    def output(self) -> Tensor:
        """B H T E: what the kernel has returned; known only where the output is edited."""
        if self.call.output is None:
            raise EditError(f"{self.site.label}: its output is not known yet where its {self.field} are edited.")
        return self.call.output

    def where(self, edit: object) -> str:
        """The place and the edit, for a message."""
        return f"{self.site.label} (step {self.step}, tap {self.tap}): {edit!r}"

    # Explicit math of a part

    def scores_of(self, part: Part) -> Tensor:
        """B' H' T' S, finite."""
        call = self.call
        if not call.is_product:
            if call.scores is None:
                raise EditError(
                    f"{self.site.label} (tap {call.tap}): its scores are not known: they are no product of queries and "
                    f"keys alone ({call.score}), and the model formed none that are finite. Edit its weights."
                )
            return part.take(call.scores, "BHTS")
        scale = call.scale
        if isinstance(scale, Tensor):
            scale = part.take(with_four_axes(scale), "BHTS")
        bias = None if call.bias is None else part.take(with_four_axes(call.bias), "BHTS")
        q = part.take(call.q, "BHTD")
        return finish_scores(dot_scores(q, self.per_head(call.k, part), scale), call.softcap, bias)

    def weights_of(self, part: Part, scores: Tensor | None, anew: bool = False) -> Tensor:
        """B' H' T' S: the model's own where it formed them and nothing before them was edited, else what its normalizer
        makes of the scores.

        Args:
            part: B' H' T'.
            scores: edited ones of the part; None: there are none.
            anew: whether something before the weights was edited.
        """
        call = self.call
        if call.weights is not None and not anew:
            return part.take(call.weights, "BHTS")
        if not normalizer_of(call.normalizer).known:
            raise EditError(
                f"{self.site.label} (tap {call.tap}): nobody knows how its normalizer ({call.normalizer}) makes "
                "weights of scores, so that only its weights and its output can be edited."
            )
        if scores is None:
            scores = self.scores_of(part)
        sinks = None if call.sinks is None else part.take(sink_column(call.sinks), "BHTS")
        made = normalized(call.normalizer, scores, self.mask_of(part), sinks)
        assert made is not None
        return made if call.weights is None else made.to(call.weights.dtype)

    def mask_of(self, part: Part) -> Tensor:
        """bool, broadcastable to B' H' T' S: all that hides keys in a part."""
        call = self.call
        _, _, t, s = call.shape
        rows = torch.arange(t, device=call.device) if part.rows is None else torch.tensor(part.rows, device=call.device)
        mask = call.diagonal.allows(rows, slice(0, s))[None, None]
        if call.mask is not None:
            own = with_four_axes(call.mask)
            mask = mask & part.take(own if own.dtype == torch.bool else own.bool(), "BHTS")
        return mask

    def per_head(self, x: Tensor, part: Part) -> Tensor:
        """k or v of the query heads of a part, B' H' S D; grouped as they are where the part has all heads."""
        x = Part(part.batch).take(x, "BGSD")
        if part.heads is None:
            return x
        groups = self.extents["H"] // x.shape[1]
        return x.index_select(1, torch.tensor([h // groups for h in part.heads], device=x.device))
