"""Attention whose scores were not laid out as queries by keys: a band, blocks, a few keys gathered for each query.

The numbers of :mod:`.entries` tell of every score which row of q met which row of k, and of every weight which row of v
it met. From that the call is laid out densely: what was never scored is masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.kernel_call import KernelCall
from ...attention.masks import FILL, MASKED
from .decisions import version_then
from .entries import Entries
from .products import LayoutError, basis_of
from .scattered_layout import ScatteredLayout, rows_of, vectors_of
from .score_side import differs
from .states import ScatteredSoftmax, ScatteredValueProduct

NAME = "eager"


def scattered_call(
    root: ScatteredSoftmax, uses: Sequence[ScatteredValueProduct], out: Tensor, entries: Sequence[Entries]
) -> KernelCall | None:
    """The call once every weight has met its value; None until then.

    Args:
        root: the softmax.
        uses: its products with values.
        out: their sum.
        entries: where the entries of ``out`` came from, for each of the uses.

    Raises:
        LayoutError: it can't be laid out so.
    """
    if version_then(root.scores) != root.version or any(version_then(use.weights) != use.version for use in uses):
        raise LayoutError("scores or weights were written to after the softmax")
    layout = root.layout = root.layout or ScatteredLayout(root)
    return _ScatteredCall(layout, uses).call(out, entries)


@dataclass
class _ScatteredCall:
    """One call from its scores and its products with values."""

    layout: ScatteredLayout
    uses: Sequence[ScatteredValueProduct]

    def call(self, out: Tensor, entries: Sequence[Entries]) -> KernelCall | None:
        """None where a weight has not met its value yet."""
        layout = self.layout
        root, live = layout.root, layout.live
        r, c = live.shape
        used = torch.zeros(r * c, dtype=torch.long, device=out.device)
        applied = torch.zeros(r * c, dtype=out.dtype, device=out.device)
        own = torch.zeros(r * c, dtype=root.out.dtype, device=out.device)
        place = torch.zeros(layout.count, dtype=torch.long, device=out.device) - 1
        v: Tensor | None = None
        first: dict[int, Tensor] = {}
        order = layout.rowwise(torch.arange(r * c, device=out.device).view(root.out.shape)).flatten()
        turned = torch.empty_like(order)
        turned[order] = torch.arange(r * c, device=out.device)
        for use in self.uses:
            flat = use.entries.numbers(lambda _: 0, out.device)
            there = flat >= 0
            flat = turned[flat.clamp_min(0)]
            there = there & live.flatten()[flat]
            cells = flat[there]
            used += torch.bincount(cells, minlength=r * c)
            applied[cells] = use.weights[there].to(out.dtype)
            if use.own is None:
                own[cells] = use.weights[there].to(own.dtype)
            else:
                before, numbers = use.own[0], use.own[1].numbers(lambda _: 0, out.device)
                own[turned[numbers[numbers >= 0]]] = before[numbers >= 0].to(own.dtype)
            number, address = rows_of(use.v, use.v_labels, use.w_labels, use.weights.shape)
            keys = layout.key.flatten()[cells]
            if bool(((place[keys] >= 0) & (place[keys] != address[there])).any()):
                raise LayoutError("a key has several values")
            place[keys] = address[there]
            if not torch.equal(place[keys], address[there]):
                raise LayoutError("a key has several values")
            vectors = vectors_of(use.v, use.v_labels, use.w_labels)
            v = vectors.new_zeros(layout.count, vectors.shape[1]) if v is None else v
            v[keys] = vectors[number[there]]
            first[id(use)] = self._rows_of(use, flat // c, there)
        if bool((used[live.flatten()] > 1).any()):
            raise LayoutError("a weight meets several values")
        if v is None or not bool((used[live.flatten()] == 1).all()):
            return None
        rest = layout.rowwise(root.out).masked_fill(live, 0.0).nan_to_num()
        if bool((rest != 0).any()):
            raise LayoutError("something that is no score takes part in the softmax")
        numbers = self._numbers(out, entries, first)
        return self._made(out, numbers, v, own.view(r, c), applied.view(r, c))

    def _rows_of(self, use: ScatteredValueProduct, rows: Tensor, there: Tensor) -> Tensor:
        """For every entry of a product's result, the row of weights that it is of, times the width, plus its column."""
        labels = [y for y in use.out_labels if y in use.w_labels]
        inner = [y for y in use.out_labels if y not in use.w_labels]
        order = [use.w_labels.index(y) for y in labels]
        summed = [i for i, y in enumerate(use.w_labels) if y not in labels]
        rows, there = (x.permute(*order, *summed).flatten(len(order)) for x in (rows, there))
        row = torch.where(there, rows, -1).amax(-1)
        if bool((there & (rows != row[..., None])).any()):
            raise LayoutError("an output is of several queries")
        extents = [use.out.shape[use.out_labels.index(y)] for y in inner]
        width = math.prod(extents)
        column = torch.arange(width, device=row.device).view(extents)
        numbers = row.view(*row.shape, *(1 for _ in inner)) * width + column
        numbers = torch.where(numbers < 0, -1, numbers)
        return numbers.permute(*([*labels, *inner].index(y) for y in use.out_labels))

    def _numbers(self, out: Tensor, entries: Sequence[Entries], first: dict[int, Tensor]) -> Tensor:
        """Where each entry of the output belongs among the rows of weights, times the width."""
        r = self.layout.live.shape[0]
        numbers: Tensor | None = None
        for part in entries:
            source = part.sources()[0]
            flat = part.numbers(lambda _: 0, out.device)
            mine = torch.where(flat < 0, -1, first[id(source)].flatten()[flat.clamp_min(0)])
            if numbers is not None and not torch.equal(mine, numbers):
                raise LayoutError("outputs of different queries were added")
            numbers = mine
        assert numbers is not None
        if out.numel() % r or int((numbers >= 0).sum()) != out.numel() or len(torch.unique(numbers)) != out.numel():
            raise LayoutError("an output is missing, or there twice")
        return numbers

    def _made(self, out: Tensor, numbers: Tensor, v: Tensor, own: Tensor, applied: Tensor) -> KernelCall:
        layout, root = self.layout, self.layout.root
        b, h = layout.n // layout.heads, layout.heads
        t, s = layout.t, layout.s
        rows, laid = layout.rows.flatten(), layout.laid
        q = layout.q[rows].view(b, h, t, -1)
        k = torch.cat(layout.vectors)[layout.keep][laid].view(b, h, s, -1)
        values = layout.own
        hidden = values <= (MASKED if bool((values[layout.live] <= MASKED).any()) else FILL)
        zeroed = ~((own != 0) & layout.live).any(-1, keepdim=True)  # rows that the model sets to 0 after the softmax
        seen = layout.live & ~hidden & ~zeroed
        mask = layout.spread(seen, False).view(b, h, t, s)
        dropout = max(use.dropout for use in self.uses)

        count = layout.live.shape[0]

        def of_output(x: Tensor) -> Tensor:  # for gradients it is kept, and so knows nothing of the layout
            made = x.new_zeros(x.numel())
            made[numbers] = x
            return made.view(count, -1)[rows].view(b, h, t, -1)

        call = KernelCall(
            q=q,
            k=k,
            v=v[laid].view(b, h, s, -1),
            output=of_output(out),
            result=out,
            result_form=of_output,
            scale=root.scale,
            tap=NAME,
            mask=mask,
            weights=layout.spread(own).view(b, h, t, s).to(out.dtype),
            dropout=dropout,
            softmax_dtype=root.out.dtype,
            basis=basis_of(layout.guessed),
        )
        if dropout:
            call.applied = layout.spread(applied).view(b, h, t, s)
        theirs = layout.spread(values.masked_fill(~seen, 0.0)).view(b, h, t, s)
        derived = q @ k.mT * root.scale
        residual = torch.where(mask, theirs.to(derived.dtype) - derived, 0.0)
        if differs(residual, derived, values.dtype):
            if root.opaque:
                call.opaque, call.scores = True, torch.where(mask, theirs, derived.to(theirs.dtype))
                call.notes.append("scores are the model's own: they are more than q·k")
            else:
                call.bias = residual
        call.notes.append("laid out densely: the model computed only some of the scores")
        return call
