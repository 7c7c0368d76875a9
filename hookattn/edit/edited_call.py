"""One attention while it runs, as edits see it; and how what they change reaches the model.

Queries, keys, values, masks and biases go into the arguments of the model's own kernel where it takes them
(:meth:`EditedCall.before`). What is changed after that, and what a kernel does not take, is computed by explicit math,
of the heads and rows that are touched and of no others; all others keep their bits (:meth:`EditedCall.after`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.functional import (
    compute_dtype,
    dot_scores,
    finish_scores,
    sink_column,
    weighted_values,
    with_four_axes,
)
from ..attention.kernel_call import KernelCall
from ..attention.normalizers import normalized, normalizer_of
from ..calls.edits import AppliedEdit
from ..calls.site import Site
from ..errors import EditError
from ..taps.base import Change
from .base import Edit
from .part import Part, axes_of, union
from .positions import Here

_BEFORE_WEIGHTS = ("q", "k", "mask", "scores")
_MIXED = "the model changes the weights between the softmax and the values ({}), and what it makes of others is unknown"


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
        edits: Sequence[tuple[Edit, Part]],
        first_head: int = 0,
        first_row: int = 0,
        positions: Here | None = None,
    ):
        """
        Args:
            call, site, step: as in the attributes.
            edits: each with its part of the call.
            first_head, first_row: where the call is in the whole attention, if it is a piece of one.
            positions: of its queries in the sequence; None: no edit asks for them.
        """
        self.site, self.step, self.tap = site, step, call.tap
        self.call = replace(call)  # what is reported is the tap's
        self.field, self.part = "", Part()
        self.applied: list[AppliedEdit] = []
        self._edits = list(edits)
        self._done: set[int] = set()
        self._value: Callable[[], Tensor] | Tensor | None = None
        self._exchanged: dict[str, Tensor] = {}  # whole tensors, for the record
        self._rows: dict[str, tuple[Part, Tensor]] = {}  # of edited scores and weights, the part and its values
        self._moved = False  # whether an edit has changed a value; one may have changed where gradients go alone
        self._first_head, self._first_row, self._positions = first_head, first_row, positions

    # What an edit reads

    @property
    def axes(self) -> str:
        """The letters of the axes of the field."""
        return axes_of(self.field)

    @property
    def value(self) -> Tensor:
        """The selected entries of the field, as they are without this edit: B H T S for scores and weights, and so on.
        Scores are finite, with no mask in them."""
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
        return tuple((self._first_head if letter == "H" else 0) + i for i in several)

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
        return self._mask(Part())

    @property
    def scores(self) -> Tensor:
        """B H T S, of the whole call: scale·q·kᵀ, soft-capped, plus bias; no mask in it."""
        return self._scores_of(Part())

    @property
    def weights(self) -> Tensor:
        """B H T S, of the whole call."""
        return self._weights_of(Part(), None)

    @property
    def output(self) -> Tensor:
        """B H T E: what the kernel has returned; known only where the output is edited."""
        if self.call.output is None:
            raise EditError(f"{self.site.label}: its output is not known yet where its {self.field} are edited.")
        return self.call.output

    def where(self, edit: Edit) -> str:
        """The place and the edit, for a message."""
        return f"{self.site.label} (step {self.step}, tap {self.tap}): {edit!r}"

    # Around the kernel

    def before(self, changeable: frozenset[str]) -> Change | None:
        """What the kernel shall be given instead."""
        call = self.call
        given: dict[str, Any] = {}
        for name in ("q", "k", "v"):
            if name in changeable and (x := getattr(call, name)) is not None:
                new = self._edit_whole(name, x)
                if new is not x:
                    given[name] = new
        if call.is_product:
            given |= self._masks_for_kernel(changeable)
        return Change(**given) if given else None

    def formed(self) -> Tensor | None:
        """B H T S: what shall take the place of the weights that the model has formed; None: nothing."""
        call = self.call
        pending = list(self._pending("q", "k", "mask", "scores", "weights"))
        if not pending:
            return None
        assert call.weights is not None
        part = self._touched(pending)
        weights = self._recomputed(part, pending)
        if weights is None:
            return None
        weights = self._in_place_of(weights.to(call.weights.dtype), part.take(call.weights, "BHTS"))
        return part.put(call.weights, "BHTS", weights)

    def after(self) -> Tensor | None:
        """B H T E: what the model shall get in place of the kernel's output; None: nothing."""
        call = self.call
        out = call.output
        assert out is not None
        pending = list(self._pending("q", "k", "v", "mask", "scores", "weights"))
        if pending:
            out = self._explicit_output(out, pending)
        out = self._edit_whole("output", out)
        if out is call.output:
            return None
        self._exchanged["output"] = out
        return out

    # One edit

    def _pending(self, *fields: str) -> Iterator[tuple[int, Edit, Part]]:
        """Edits of some fields that were not done, in their order."""
        for i, (edit, part) in enumerate(self._edits):
            if edit.field in fields and i not in self._done:
                yield i, edit, part

    def _edit_whole(self, field: str, x: Tensor) -> Tensor:
        """A field with its edits done, in their order."""
        for i, edit, part in self._pending(field):
            x = self._edit(i, edit, part, field, x, part)
        return x

    def _edit(self, i: int, edit: Edit, part: Part, field: str, x: Tensor, within: Part) -> Tensor:
        """One edit of one field.

        Args:
            i, edit, part: the edit, and its part of the call.
            field: what is edited.
            x: the field, or a part of it.
            within: the part of the call, counted in ``x``.
        """
        axes = axes_of(field)
        self._begin(i, part, field, lambda: within.take(x, axes))
        new = edit.check(self, edit.new(self))
        value = self.value
        if new is value:
            return x
        equal = torch.equal(new, value)
        if equal and not (torch.is_grad_enabled() and new.requires_grad):
            return x  # it has returned what it was given: nothing is done, and all keeps its bits
        self._moved = self._moved or not equal
        self._note(edit, part)
        return within.put(x, axes, new)

    def _begin(self, i: int, part: Part, field: str, value: Callable[[], Tensor]) -> None:
        self._done.add(i)
        self.field, self.part, self._value = field, part, value

    def _note(self, edit: Edit, part: Part) -> None:
        """Write down what was done, in the numbers of the whole attention."""
        heads = None if part.heads is None else tuple(self._first_head + i for i in part.heads)
        rows = None if part.rows is None else tuple(self._first_row + i for i in part.rows)
        self.applied.append(AppliedEdit(edit.name, edit.field, heads, rows, part.keys, part.batch, edit.note))

    # Masks and biases that a kernel takes

    def _masks_for_kernel(self, changeable: frozenset[str]) -> dict[str, Any]:
        """The mask with knock-outs, the bias with what is added to scores, and the heads and rows that they are for."""
        hidden = list(self._pending("mask")) if "mask" in changeable else []
        added = list(self._pending("scores")) if "bias" in changeable else []
        if not all(edit.additive for _, edit, _ in added):
            added = []  # one that needs the scores comes between
        if not hidden and not added:
            return {}
        mask = self._hidden(self.call.mask, hidden) if hidden else None
        if mask is not None and self._blinds(mask, union(p for _, _, p in hidden)):
            return {}  # kernels do not agree on what a query gets that sees nothing: by explicit math it is 0
        changed: dict[str, Any] = {}
        for i, edit, part in hidden:
            self._done.add(i)
            self._note(edit, part)
        if mask is not None:
            changed["mask"] = mask
        if added:
            changed["bias"] = self._biased(self.call.bias, added)
        part = union(p for _, _, p in (*hidden, *added))
        return {**changed, "heads": part.heads, "queries": part.rows}

    def _hidden(self, mask: Tensor | None, edits: Sequence[tuple[int, Edit, Part]]) -> Tensor:
        """bool, broadcastable to B H T S: a mask with the edges of some knock-outs hidden."""
        b, h, t, s = self.call.shape
        parts = [part for _, _, part in edits]
        base = (
            torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.call.device) if mask is None else with_four_axes(mask)
        )
        base = base if base.dtype == torch.bool else base.bool()
        shape = [
            n if any(part.of("BHTS")[dim] is not None for part in parts) else base.shape[dim]
            for dim, n in enumerate((b, h, t, s))
        ]
        made = base.expand([max(pair) for pair in zip(shape, base.shape, strict=True)]).clone()
        for part in parts:
            made = part.put(made, "BHTS", made.new_zeros((1,) * 4))
        return made

    def _biased(self, bias: Tensor | None, edits: Sequence[tuple[int, Edit, Part]]) -> Tensor:
        """Broadcastable to B H T S: a bias with what some edits add to the scores."""
        b, h, t, s = self.call.shape
        dtype = self.call.dtype
        base = self.call.q.new_zeros(1, 1, 1, 1) if bias is None else with_four_axes(bias)
        base = base.to(dtype).expand(b if base.shape[0] > 1 else 1, h, t, s)
        for i, edit, part in edits:
            if part.batch is not None:
                base = base.expand(b, h, t, s)
            self._begin(i, part, "scores", partial(self._value_of_scores, part))
            new = edit.check(self, edit.addend(self))  # type: ignore[attr-defined]
            if new.shape[0] > base.shape[0]:
                base = base.expand(b, h, t, s)
            base = part.put(base, "BHTS", part.take(base, "BHTS") + new)
            self._note(edit, part)
        return base

    def _value_of_scores(self, part: Part) -> Tensor:
        return part.take(self._scores_of(Part()), "BHTS")

    def _blinds(self, mask: Tensor, part: Part) -> bool:
        """Whether a mask leaves a query nothing to attend to that had something."""
        call = self.call
        rows = Part(None, None, part.rows)
        before, now = self._mask(rows), rows.take(mask, "BHTS")
        if call.diagonal.hides_any:
            now = now & before
        return bool((before.any(-1) & ~now.any(-1)).any())

    # Explicit math

    def _touched(self, pending: Sequence[tuple[int, Edit, Part]]) -> Part:
        """The batch entries, query heads and rows that some edits have a part in."""
        parts = []
        for _, edit, part in pending:
            if edit.field in ("k", "v"):
                groups = self.extents["H"] // self.extents["G"]
                heads = (
                    None
                    if part.heads is None
                    else tuple(h for h in range(self.extents["H"]) if h // groups in part.heads)
                )
                parts.append(Part(part.batch, heads))
            else:
                parts.append(Part(part.batch, part.heads, part.rows))
        return union(parts)

    def _explicit_output(self, out: Tensor, pending: Sequence[tuple[int, Edit, Part]]) -> Tensor:
        """The kernel's output with what some edits make of it."""
        call, part = self.call, self._touched(pending)
        of_values = [one for one in pending if one[1].field == "v"]
        before = call.v
        if of_values:
            call.v = self._exchanged["v"] = self._edit_whole("v", call.v)
        others = [one for one in pending if one[1].field != "v"]
        weights = self._recomputed(part, others) if others else None
        if weights is None:
            if call.v is before:
                return out
            weights = self._weights_of(part, None)
        if call.mixed:
            raise EditError(f"{self.where(pending[0][1])}: {_MIXED.format('; '.join(call.notes) or call.tap)}.")
        if call.dropout:
            weights = torch.nn.functional.dropout(weights, call.dropout)
            call.notes.append("the dropout of edited heads was drawn anew")
        z = weighted_values(weights, self._per_head(call.v, part)).to(out.dtype)
        return part.put(out, "BHTE", self._in_place_of(z, part.take(out, "BHTE")))

    def _in_place_of(self, new: Tensor, old: Tensor) -> Tensor:
        """What explicit math gives; where no value was changed, with the bits of the model's own."""
        return new if self._moved else old.detach() + (new - new.detach())

    def _recomputed(self, part: Part, pending: Sequence[tuple[int, Edit, Part]]) -> Tensor | None:
        """The weights of a part with some edits done, B' H' T' S; None: none of them changes anything."""
        call = self.call
        count = len(self.applied)
        for name in ("q", "k"):
            if any(edit.field == name for _, edit, _ in pending):
                x = getattr(call, name)
                if x is None:
                    raise EditError(
                        f"{self.site.label}: its scores are no product of queries and keys ({call.score}), so that it "
                        f"has no {name} to edit."
                    )
                setattr(call, name, self._edit_whole(name, x))
                self._exchanged[name] = getattr(call, name)
        hidden = [one for one in pending if one[1].field == "mask"]
        if hidden:
            for i, edit, own in hidden:
                self._done.add(i)
                self._note(edit, own)
            self._moved = True
            call.mask = self._exchanged["mask"] = self._hidden(call.mask, hidden)
        anew = len(self.applied) > count
        scores = None
        if any(edit.field == "scores" for _, edit, _ in pending):
            changed = len(self.applied)
            scores = self._edit_part("scores", self._scores_of(part), part)
            if len(self.applied) > changed:
                anew = True
                self._rows["scores"] = part, scores
            else:
                scores = None
        weights = self._weights_of(part, scores, anew)
        changed = len(self.applied)
        weights = self._edit_part("weights", weights, part)
        if len(self.applied) > changed:
            self._rows["weights"] = part, weights
        return weights if len(self.applied) > count else None

    def _edit_part(self, field: str, x: Tensor, part: Part) -> Tensor:
        """Scores or weights of a part with their edits done."""
        for i, edit, own in self._pending(field):
            x = self._edit(i, edit, own, field, x, own.within(part))
        return x

    def _scores_of(self, part: Part) -> Tensor:
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
        return finish_scores(dot_scores(q, self._per_head(call.k, part), scale), call.softcap, bias)

    def _weights_of(self, part: Part, scores: Tensor | None, anew: bool = False) -> Tensor:
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
            scores = self._scores_of(part)
        sinks = None if call.sinks is None else part.take(sink_column(call.sinks), "BHTS")
        made = normalized(call.normalizer, scores, self._mask(part), sinks)
        assert made is not None
        return made if call.weights is None else made.to(call.weights.dtype)

    def _mask(self, part: Part) -> Tensor:
        """bool, broadcastable to B' H' T' S: all that hides keys in a part."""
        call = self.call
        _, _, t, s = call.shape
        rows = torch.arange(t, device=call.device) if part.rows is None else torch.tensor(part.rows, device=call.device)
        mask = call.diagonal.allows(rows, slice(0, s))[None, None]
        if call.mask is not None:
            own = with_four_axes(call.mask)
            mask = mask & part.take(own if own.dtype == torch.bool else own.bool(), "BHTS")
        return mask

    def _per_head(self, x: Tensor, part: Part) -> Tensor:
        """k or v of the query heads of a part, B' H' S D; grouped as they are where the part has all heads."""
        x = Part(part.batch).take(x, "BGSD")
        if part.heads is None:
            return x
        groups = self.extents["H"] // x.shape[1]
        return x.index_select(1, torch.tensor([h // groups for h in part.heads], device=x.device))

    # The record

    @property
    def kept(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """The numbers of the heads and queries of a piece in its attention."""
        _, h, t, _ = self.call.shape
        heads = tuple(range(self._first_head, self._first_head + h)) if self._first_head else None
        return heads, tuple(range(self._first_row, self._first_row + t)) if self._first_row else None

    def as_it_ran(self, call: KernelCall) -> KernelCall:
        """The call as it is to be measured.

        A kernel has returned what it was given, which is what its tap reports. Weights that a model has formed and that
        were exchanged are made of what they were exchanged for.
        """
        if call.weights is None:
            return call
        made = replace(call)
        for name in ("q", "k", "mask"):
            if name in self._exchanged:
                setattr(made, name, self._exchanged[name])
        return made

    def finish(self, call: KernelCall, wants: Callable[[str], bool]) -> None:
        """Put into a call that is recorded what edits have made of its fields.

        Args:
            call: as its tap reports it: what the kernel was given and returned.
            wants: whether a field will be kept.
        """
        self.call = call
        formed = call.weights is not None  # then they are what the model went on with
        for name, x in self._exchanged.items():
            setattr(call, name, x)
        if "scores" in self._rows:
            part, rows = self._rows["scores"]
            whole = part.put(self._scores_of(Part()), "BHTS", rows) if wants("scores") or wants("weights") else None
            call.scores, call.opaque = whole, True
            if not formed and wants("weights"):
                assert whole is not None
                call.weights = self._weights_of(Part(), whole, True).to(call.dtype)
        if "weights" in self._rows and not formed and wants("weights"):
            part, rows = self._rows["weights"]
            whole = self._weights_of(Part(), None) if call.weights is None else call.weights
            call.weights = part.put(whole.to(call.dtype), "BHTS", rows)
