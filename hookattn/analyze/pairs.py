"""The attention that goes along given pairs of tokens, or to given tokens: gathered, not multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from .call_view import View
from .labels import Rows, as_label_rows, key_labels, with_padding_marked
from .measures.base import Measure


@dataclass(frozen=True, slots=True)
class Pairs:
    """P query-key pairs of a call.

    Attributes:
        example: P, int64, the batch entry.
        row: P, int64, the query's row.
        key: P, int64, the key.
    """

    example: Tensor
    row: Tensor
    key: Tensor


def pairs_of(view: View, related: Sequence[Tensor], reachable: bool = True) -> Pairs:
    """Those of given pairs whose query counts and whose key is real.

    Args:
        view: the call, with positions.
        related: for each batch entry 2 P, int64: the place of the query and the place of the key in the sequence; no
            pair twice.
        reachable: only those in which some head may attend to the key.
    """
    b, _, t, s = view.shape
    device = view.keys.device
    places = torch.cat(list(related), 1).to(device)
    example = torch.repeat_interleave(torch.tensor([r.shape[1] for r in related], device=device))
    assert view.positions is not None
    at = view.positions.to(device).expand(b, t)
    # Which row has its query at each place. Queries outside of the keys are written to a column s that is never read.
    row_of = torch.full((b, s + 1), -1, device=device)
    row_of.scatter_(1, torch.where((at >= 0) & (at < s), at, s), torch.arange(t, device=device).expand(b, t))
    query, key = places
    row = row_of[example, query]
    good = (row >= 0) & view.keys[example, key]
    good &= view.rows[example, row.clamp_min(0)]
    example, row, key = example[good], row[good], key[good]
    if not reachable:
        return Pairs(example, row, key)
    open_ = view.mask.to(device).expand(b, -1, t, s)[example, :, row, key].any(1)
    return Pairs(example[open_], row[open_], key[open_])


def pair_mass(view: View, pairs: Pairs) -> Tensor:
    """B H T: the sum of the weights of each query's pairs."""
    b, h, t, _ = view.shape
    along = view.weights[pairs.example, :, pairs.row, pairs.key]
    total = along.new_zeros(b * t, h).index_add_(0, pairs.example * t + pairs.row, along)
    return rearrange(total, "(b t) h -> b h t", b=b)


def has_pairs(view: View, pairs: Pairs) -> Tensor:
    """bool, B T: which queries have any pair."""
    b, _, t, _ = view.shape
    some = torch.zeros(b, t, dtype=torch.bool, device=pairs.row.device)
    some[pairs.example, pairs.row] = True
    return some


def mass_on_keys(view: View, keys: Sequence[Sequence[int]]) -> Tensor:
    """B H T: the weight on some keys of each batch entry."""
    return torch.stack([w[..., list(chosen)].sum(-1) for w, chosen in zip(view.weights, keys, strict=True)])


@dataclass(frozen=True)
class PairMass(Measure):
    """``Σ_{j related to i} w_ij``, the mean over the queries that may attend to any related key; NaN where none does.

    Subclasses write :meth:`related`.

    Args:
        tokens: token strings or ids, one list, or one for each batch entry; None: the tokens of the trace.
    """

    unit: ClassVar[str] = "share"
    positional: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("weights", "mask")
    reachable: ClassVar[bool] = True
    """Whether keys that no head may attend to are left out."""
    tokens: Rows | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", as_label_rows(self.tokens, f"{self.name}: tokens"))

    def related(self, tokens: tuple[Any, ...]) -> Tensor:
        """2 P, int64: the related places in a sequence, query and key; no pair twice.

        Args:
            tokens: S, with ``[PAD]`` where there is padding.
        """
        raise NotImplementedError

    def problem(self, view: View) -> str | None:
        """See :class:`Measure`."""
        found = super().problem(view) or key_labels(view, self.tokens)
        return found if isinstance(found, str) else None

    def places(self, view: View) -> list[Tensor]:
        """What is related in each batch entry of a call."""
        rows = key_labels(view, self.tokens)
        assert not isinstance(rows, str)
        return [self.related(row) for row in with_padding_marked(view, rows)]

    def pairs(self, view: View) -> Pairs:
        """What is related in a call."""
        return view.once(self, lambda: pairs_of(view, self.places(view), self.reachable))

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return pair_mass(view, self.pairs(view))

    def counted(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return has_pairs(view, self.pairs(view))


@dataclass(frozen=True)
class KeyMass(Measure):
    """``Σ_{j chosen} w_ij``, the mean over the queries; NaN where no key is chosen.

    Subclasses write :meth:`chosen`.
    """

    unit: ClassVar[str] = "share"
    positional: ClassVar[bool] = True

    def chosen(self, tokens: tuple[str, ...]) -> list[int]:
        """The places of a sequence that are chosen.

        Args:
            tokens: S, with ``[PAD]`` where there is padding.
        """
        raise NotImplementedError

    def problem(self, view: View) -> str | None:
        """See :class:`Measure`."""
        found = super().problem(view) or key_labels(view)
        return found if isinstance(found, str) else None

    def _keys(self, view: View) -> list[list[int]]:
        def make() -> list[list[int]]:
            rows = key_labels(view)
            assert not isinstance(rows, str)
            every = [self.chosen(row) for row in with_padding_marked(view, rows)]
            return [[i for i in keys if own[i]] for keys, own in zip(every, view.keys.tolist(), strict=True)]

        return view.once(self, make)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return mass_on_keys(view, self._keys(view))

    def counted(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        some = torch.tensor([bool(keys) for keys in self._keys(view)], device=view.rows.device)
        return view.rows & some.unsqueeze(1)
