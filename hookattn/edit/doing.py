"""How what edits change reaches the model.

Queries, keys, values, masks and biases go into the arguments of the model's own kernel where it takes them
(:meth:`Doing.before`). What is changed after that, and what a kernel does not take, is computed by explicit math, of
the heads and rows that are touched and of no others; all others keep their bits (:meth:`Doing.after`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.functional import compute_dtype, weighted_values, with_four_axes
from ..attention.kernel_call import KernelCall
from ..attention.whole import Axis, Place
from ..calls.edits import AppliedEdit
from ..calls.site import Site
from ..errors import EditError, TraceTooLargeError
from ..taps.base import Change
from ..torch_internals import devices
from .base import Edit
from .edited_call import EditedCall
from .part import Part, Places, axes_of, union
from .positions import Here

_MIXED = "the model changes the weights between the softmax and the values ({}), and what it makes of others is unknown"


class Doing(EditedCall):
    """One attention call, and what its edits do to it.

    Attributes:
        applied: what was done, in its order.
    """

    def __init__(
        self,
        call: KernelCall,
        site: Site,
        step: int,
        edits: Sequence[tuple[Edit, Part]],
        place: Place | None = None,
        positions: Here | None = None,
    ):
        """
        Args:
            edits: each with its part of the call.
            call, site, step, place, positions: as of an :class:`EditedCall`.
        """
        super().__init__(call, site, step, place, positions)
        self.applied: list[AppliedEdit] = []
        self._edits = list(edits)
        self._done: set[int] = set()
        self._exchanged: dict[str, Tensor] = {}  # whole tensors, for the record
        self._rows: dict[str, tuple[Part, Tensor]] = {}  # of edited scores and weights, the part and its values
        self._moved = False  # whether an edit has changed a value; one may have changed where gradients go alone

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
        self._done.add(i)
        self.begin(part, field, lambda: within.take(x, axes))
        new = edit.check(self, edit.new(self))
        equal = self.is_unedited(new)
        if equal and (self.was_handed(new) or not (torch.is_grad_enabled() and new.requires_grad)):
            return x  # it has returned what it was given: nothing is done, and all keeps its bits
        self._moved = self._moved or not equal
        self._note(edit, part)
        return within.put(x, axes, new)

    def _note(self, edit: Edit, part: Part) -> None:
        """Write down what was done, in the numbers of the whole attention."""
        place = self.place
        first = (place.key_heads if edit.field in ("k", "v") else place.heads).first or 0
        heads = None if part.heads is None else tuple(first + i for i in part.heads)
        rows = None if part.rows is None else tuple((place.rows.first or 0) + i for i in part.rows)
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
            self._done.add(i)
            self.begin(part, "scores", partial(self._value_of_scores, part))
            new = edit.check(self, edit.addend(self))  # type: ignore[attr-defined]
            if new.shape[0] > base.shape[0]:
                base = base.expand(b, h, t, s)
            base = part.put(base, "BHTS", part.take(base, "BHTS") + new)
            self._note(edit, part)
        return base

    def _value_of_scores(self, part: Part) -> Tensor:
        return part.take(self.scores_of(Part()), "BHTS")

    def _blinds(self, mask: Tensor, part: Part) -> bool:
        """Whether a mask leaves a query nothing to attend to that had something."""
        call = self.call
        rows = Part(None, None, part.rows)
        before, now = self.mask_of(rows), rows.take(mask, "BHTS")
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
            weights = self.weights_of(part, None)
        if call.mixed:
            raise EditError(f"{self.where(pending[0][1])}: {_MIXED.format('; '.join(call.notes) or call.tap)}.")
        if call.dropout:
            weights = torch.nn.functional.dropout(weights, call.dropout)
            call.notes.append("the dropout of edited heads was drawn anew")
        z = weighted_values(weights, self.per_head(call.v, part)).to(out.dtype)
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
            scores = self._edit_part("scores", self.scores_of(part), part)
            if len(self.applied) > changed:
                anew = True
                self._rows["scores"] = part, scores
            else:
                scores = None
        weights = self.weights_of(part, scores, anew)
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

    # The record

    @property
    def kept(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """The numbers of the heads and queries of a piece in its attention."""
        heads, rows = self.place.heads, self.place.rows
        return _numbers(heads), _numbers(rows)

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

    @property
    def set_rows(self) -> tuple[tuple[Places, Places, Places], Tensor] | None:
        """Where weights were set, and to what, where the others follow from what is recorded: batch entries, heads and
        queries, None: all; and the rows. None: none were, or scores were set as well."""
        if "weights" not in self._rows or "scores" in self._rows:
            return None
        part, rows = self._rows["weights"]
        return (part.batch, part.heads, part.rows), rows

    def finish(self, call: KernelCall, wants: Callable[[str], bool]) -> None:
        """Put into a call that is recorded what edits have made of its fields.

        Args:
            call: as its tap reports it: what the kernel was given and returned.
            wants: whether a field will be kept.

        Raises:
            TraceTooLargeError: there is no room for edited weights or scores, which are kept whole.
        """
        self.call = call
        if self._rows and (wants("weights") or wants("scores")):
            self._check_room()
        formed = call.weights is not None  # then they are what the model went on with
        for name, x in self._exchanged.items():
            setattr(call, name, x)
        if "scores" in self._rows:
            part, rows = self._rows["scores"]
            whole = part.put(self.scores_of(Part()), "BHTS", rows) if wants("scores") or wants("weights") else None
            call.scores, call.opaque = whole, True
            if not formed and wants("weights"):
                assert whole is not None
                call.weights = self.weights_of(Part(), whole, True).to(call.dtype)
        if "weights" in self._rows and not formed and wants("weights"):
            part, rows = self._rows["weights"]
            whole = self.weights_of(Part(), None) if call.weights is None else call.weights
            call.weights = part.put(whole.to(call.dtype), "BHTS", rows)

    def _check_room(self) -> None:
        """Whether there is memory for the scores and weights of the whole call, which follow from nothing any more."""
        call = self.call
        b, h, t, s = call.shape
        size = b * h * t * s * 2 * compute_dtype(call.dtype).itemsize
        free = devices.free_memory(call.device) if size > _LARGE else None
        if free is not None and size > free:
            raise TraceTooLargeError(
                f"{self.site.label}: its {' and '.join(self._rows)} were edited, so that they are kept whole, which "
                f"takes {devices.size_of(size)}, and {devices.size_of(free)} of memory are free. Leave weights and "
                "scores out of capture=."
            )


# Up to so many bytes nobody asks how much memory is free.
_LARGE = 1 << 28


def _numbers(axis: Axis) -> tuple[int, ...] | None:
    return tuple(range(axis.first, axis.first + axis.count)) if axis.first else None
