"""Which query and which key every score of a softmax is of, where its argument was put together from many pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...torch_internals.tensor_identity import address_of
from .axis_history import extent_of, shown
from .products import Label, LayoutError, Product
from .states import ScatteredSoftmax

# A row is told by its address. Heads that share their keys by broadcasting (a stride of 0) have the same addresses, and
# keys of their own all the same: each such index counts as this many entries, more than any memory has.
_SHARED = 1 << 44


def rows_of(x: Tensor, labels: Sequence[Label], over: Sequence[Label], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For every entry of a tensor with labels ``over``: the number of its row in ``x``, and the row's address."""
    number = address = torch.zeros((1,) * len(over), dtype=torch.long, device=x.device)
    step = 1
    for label in reversed([y for y in labels if y in over]):
        i = labels.index(label)
        place = torch.arange(x.shape[i], device=x.device)
        view = [1] * len(over)
        view[over.index(label)] = x.shape[i]
        number = number + place.view(view) * step
        address = address + place.view(view) * (x.stride(i) or _SHARED * (i + 1))
        step *= x.shape[i]
    address = address + address_of(x) // x.element_size()
    return number.expand(tuple(shape)), address.expand(tuple(shape))


def vectors_of(x: Tensor, labels: Sequence[Label], over: Sequence[Label]) -> Tensor:
    """The rows of ``x``, in the order of :func:`rows_of`."""
    rows = [i for i, label in enumerate(labels) if label in over]
    width = [i for i, label in enumerate(labels) if label not in over]
    n = math.prod(x.shape[i] for i in rows)
    return x.permute(*rows, *width).reshape(n, -1)


class ScatteredLayout:
    """Which query and which key every entry of a softmax's argument is of.

    Attributes:
        live: R C, the entries that are scores.
        key: R C, the number of the key.
        at: R, where the row goes among the sorted rows.
        n, t, s: batch entries times heads, queries, keys.
        heads: how many of the ``n`` are heads of one batch entry.
        guessed: the letters of the axes that are guessed.
    """

    def __init__(self, root: ScatteredSoftmax):
        self.root = root
        x = root.scores
        self.shape = (*x.shape[: root.dim], *x.shape[root.dim + 1 :])
        self.columns = x.shape[root.dim]
        self.own = self.rowwise(x)
        sources: list[Product] = root.entries.sources()
        first: dict[int, int] = {}
        total = 0
        for product in sources:
            first[id(product)] = total
            total += math.prod(product.shape)
        numbers = self.rowwise(root.entries.numbers(lambda p: first[id(p)], x.device))
        self.live = (numbers >= 0) & (self.own > -torch.inf)
        if not bool(self.live.any(-1).all()):
            raise LayoutError("a row of scores that were moved about is of no query")
        self.guessed: set[str] = set()
        heads = torch.full_like(numbers, -1)  # of every entry
        self.heads = 1
        q: list[tuple[Tensor, Tensor]] = []
        address, vector = torch.full_like(numbers, -1), torch.full_like(numbers, -1)
        self.vectors: list[Tensor] = []
        held = 0
        for product in sources:
            start, n = first[id(product)], math.prod(product.shape)
            mine = self.live & (numbers >= start) & (numbers < start + n)
            if not bool(mine.any()):
                continue
            at = (numbers - start).clamp(0, n - 1)
            queries, keys, of_keys = self._sides(product, at, mine)
            heads = torch.where(mine, self._head_of(product, of_keys)[at], heads)
            q.append((mine.any(-1), queries))
            address, vector = torch.where(mine, keys[0], address), torch.where(mine, keys[1] + held, vector)
            self.vectors.append(keys[2])
            held += len(keys[2])
        self.q = self._queries(q)
        self.key, self.count, self.keep = self._number(address, vector)
        self._lay(heads)

    def rowwise(self, x: Tensor) -> Tensor:
        """Like the softmax's argument to R C."""
        return x.movedim(self.root.dim, -1).reshape(-1, self.columns)

    def _head_of(self, product: Product, keys: Literal["a", "b"]) -> Tensor:
        """For every entry of a product, flat: the number of its head."""
        layout = shown(product.layout(product.shape))
        mine, other = (product.la, product.lb) if keys == "a" else (product.lb, product.la)
        own = [x for x in product.lo if x in mine and x not in other]
        roles = product.roles(tuple(a for x in own for a in product.atoms_of(x)))
        self.guessed |= roles.guessed
        self.heads = extent_of(roles.heads)
        return roles.head_numbers(layout, self.own.device).flatten()

    def _sides(
        self, product: Product, at: Tensor, mine: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Literal["a", "b"]]:
        """R D, the queries, and of the keys: their addresses and numbers, R C, their vectors; and their side."""
        if not product.untouched:
            raise LayoutError("q or k was written to between the score product and its use")
        sides = []
        for x, labels in ((product.a, product.la), (product.b, product.lb)):
            number, place = rows_of(x, labels, product.lo, product.shape)
            sides.append((place.flatten()[at], number.flatten()[at], vectors_of(x, labels, product.lo)))
        for a, b, label in ((0, 1, product.la), (1, 0, product.lb)):
            place = sides[a][0]
            low = torch.where(mine, place, place.amax() + 1).amin(-1)
            high = torch.where(mine, place, -1).amax(-1)
            if bool((low >= high).all()):
                if sum(y in label and y not in (product.lb if a == 0 else product.la) for y in product.lo) > 1:
                    raise LayoutError("heads and queries of scores that were moved about can't be told apart")
                row = torch.where(mine, sides[a][1], -1).amax(-1).clamp_min(0)
                return sides[a][2][row], sides[b], "b" if a == 0 else "a"
        raise LayoutError("a row of scores that were moved about is of several queries")

    def _queries(self, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        q = torch.zeros_like(found[0][1])
        known = torch.zeros_like(found[0][0])
        for there, rows in found:
            if rows.shape != q.shape or not torch.equal(rows[there & known], q[there & known]):
                raise LayoutError("scores of different queries in one softmax")
            q, known = torch.where((there & ~known)[:, None], rows, q), known | there
        return q

    def _number(self, address: Tensor, vector: Tensor) -> tuple[Tensor, int, Tensor]:
        """Keys by number, in the order of the columns that first show a tensor of keys, and then of its memory."""
        live = self.live
        every, inverse = torch.unique(address[live], return_inverse=True)
        key = torch.zeros_like(address)
        key[live] = inverse
        keep = torch.zeros(len(every), dtype=torch.long, device=every.device)
        keep[inverse] = vector[live]
        owner = torch.zeros_like(every)  # which of the products' operands
        edges = torch.tensor([0, *torch.tensor([len(v) for v in self.vectors]).cumsum(0).tolist()], device=every.device)
        owner = torch.bucketize(keep, edges[1:], right=True)
        column = torch.arange(self.columns, device=every.device).expand_as(address)[live]
        seen = torch.full((len(self.vectors),), self.columns, device=every.device)
        seen = seen.scatter_reduce(0, owner[inverse], column, "amin")
        order = torch.argsort(seen[owner] * len(every) + torch.arange(len(every), device=every.device))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return torch.where(live, place[key], 0), len(every), keep[order]

    def _lay(self, heads: Tensor) -> None:
        """Rows that share keys are of one head of one batch entry; the axes along which they lie are the queries'."""
        live, key = self.live, self.key
        rows, keys = live.shape[0], self.count
        # Connected components, by minimum labels: a row takes the least label of its keys, a key that of its rows, and
        # a label the label of the key that it names, which halves the paths in every turn.
        group = torch.arange(keys, device=key.device)
        while True:
            row = torch.where(live, group[key], keys).amin(-1)
            new = group.scatter_reduce(0, key[live], row[:, None].expand_as(key)[live], "amin")
            new = new[new]
            if torch.equal(new, group):
                break
            group = new
        names, of_row = torch.unique(row, return_inverse=True)
        self.n = len(names)
        of_key = torch.bucketize(group, names)
        if rows % self.n or keys % self.n:
            raise LayoutError("the heads of scores that were moved about have different numbers of queries or keys")
        self.t, self.s = rows // self.n, keys // self.n
        if bool((torch.bincount(of_row) != self.t).any()) or bool((torch.bincount(of_key) != self.s).any()):
            raise LayoutError("the heads of scores that were moved about have different numbers of queries or keys")
        place = torch.arange(rows, device=key.device).view(self.shape)
        along = []
        # An axis is the queries' if rows of one head lie at different places of it.
        for i, extent in enumerate(self.shape):
            where = torch.arange(extent, device=key.device).view([-1 if j == i else 1 for j in range(place.dim())])
            where = where.expand(self.shape).flatten()
            head = torch.zeros(self.n, dtype=torch.long, device=key.device).scatter_reduce(
                0, of_row, where, "amax", include_self=False
            )
            if not torch.equal(head[of_row], where):
                along.append(i)
        along = along or [i for i, extent in enumerate(self.shape) if extent == 1][-1:]
        across = [i for i in range(len(self.shape)) if i not in along]
        if math.prod(self.shape[i] for i in across) != self.n:
            raise LayoutError("the queries of scores that were moved about do not lie along axes of their own")
        self.rows = place.permute(*across, *along).reshape(self.n, self.t)
        self.rows = self.rows[self._by_head(heads, [self.shape[i] for i in across])]
        owner = of_row[self.rows[:, 0]]  # the group that is laid out in each place
        back = torch.empty_like(owner)
        back[owner] = torch.arange(self.n, device=owner.device)
        self.at = torch.empty(rows, dtype=torch.long, device=key.device)
        self.at[self.rows.flatten()] = torch.arange(rows, device=key.device)
        self.laid = torch.argsort(back[of_key] * keys + torch.arange(keys, device=key.device))
        place_of = torch.empty_like(self.laid)
        place_of[self.laid] = torch.arange(keys, device=key.device)
        self.cell = self.at[:, None] * self.s + place_of[key] % self.s
        cells = self.cell[live]
        if len(torch.unique(cells)) != len(cells):
            raise LayoutError("a key is scored twice in one softmax")

    def _by_head(self, heads: Tensor, extents: Sequence[int]) -> Tensor:
        """The order of the groups of rows, as batch entries times heads.

        Args:
            heads: R C, the head of every entry.
            extents: of the axes along which groups lie.
        """
        there = torch.where(self.live, heads, -1)[self.rows]  # N T C
        mine = there.flatten(1).amax(1)
        every = torch.arange(self.n, device=heads.device)
        counts = torch.bincount(mine.clamp_min(0), minlength=self.heads)
        one_each = bool(((there == mine[:, None, None]) | (there < 0)).all())
        if one_each and self.n % self.heads == 0 and bool((counts == self.n // self.heads).all()):
            # In the order in which they lie; of each batch entry, its heads side by side.
            nth = torch.zeros_like(mine)
            for h in range(self.heads):
                nth[mine == h] = torch.arange(self.n // self.heads, device=heads.device)
            return torch.argsort(nth * self.heads + mine)
        if len(extents) > 2:
            raise LayoutError("the axes of scores that were moved about can't be told apart")
        self.guessed |= set("BHG")
        self.heads = extents[1] if len(extents) == 2 else 1
        return every

    def spread(self, x: Tensor, fill: float | bool = 0.0) -> Tensor:
        """R C to N T S."""
        out = x.new_full((self.n * self.t * self.s,), fill)
        out[self.cell[self.live]] = x[self.live]
        return out.view(self.n, self.t, self.s)
