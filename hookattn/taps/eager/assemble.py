"""The tap of attention written out by hand: from followed tensors to one :class:`KernelCall`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...attention.kernel_call import KernelCall
from .axis_history import Origin, refine
from .products import Arrangement, AxisRoles, Factor, Label, LayoutError, arrangement
from .score_side import Ingredients, LaidWeights, ScoreSide, Shared, expanded
from .states import Scores, ValueProduct, Weights


def contracts_keys(state: Weights, labels: Sequence[Label], contracted: Sequence[Label], origin: Origin) -> bool:
    """Whether a product sums over exactly the keys (then the other operand is ``v``; else it mixes heads)."""
    if state.scores_origin is None:
        return len(contracted) == 1 and labels.index(contracted[0]) == state.dim
    if len(origin.layout()) != len(labels):
        return False
    if state.scores is None:
        keys = {*state.scores_origin.layout()[state.dim]}
        if not keys:  # one key: its axis has an extent of 1
            same = len(contracted) == 1 and origin.shape == state.scores_origin.shape
            return same and labels.index(contracted[0]) == state.dim
        layout = dict(zip(labels, origin.layout(), strict=True))
        own = [bool(keys & {a, *a.lineage()}) for x in contracted for a in layout[x]]
        return bool(own) and all(own)
    dims = dict(zip(labels, origin.layout(), strict=True))
    roles = state.scores.product.roles_over(state.scores_origin, state.dim)
    summed = [a for x in contracted for a in dims[x]]
    kept = [a for x in labels if x not in contracted for a in dims[x]]
    try:
        return all(roles.of(a) == "S" for a in summed) and not any(roles.of(a) == "S" for a in kept)
    except LayoutError:
        return False


class CallBuilder(ScoreSide):
    """Brings everything that belongs to one hand-written attention into B H T S.

    Args:
        parts: the weights and their product with the values; several where the weights were split along the keys.
        out: the output; None: the product has not run yet.
        out_origin: its axes, where there are several parts.
        formed: as of :class:`~.score_side.ScoreSide`.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Weights, ValueProduct]],
        out: Tensor | None,
        out_origin: Origin | None = None,
        formed: bool = True,
    ):
        parts = sorted(parts, key=lambda part: part[0].key_range or (0, 0))
        super().__init__([LaidWeights(w, use.weights, use.weights_origin) for w, use in parts], formed)
        assert self.given is not None
        self.given.values, self.given.out = [use.v for _, use in parts], out
        self._parts: Sequence[tuple[Weights, ValueProduct]] = parts
        self._out_origin = out_origin
        self._values_shape = torch.Size()

    def call(self, given: Ingredients | None = None, shared: Shared | None = None) -> KernelCall:
        """The call in the contract's layout.

        Args:
            given: its tensors; None: those of the first run.
            shared: remembers what is made of a tensor that many layers share.

        Raises:
            LayoutError: the axes can't be told apart.
        """
        t = self._begin(given, shared)
        call = self._score_side(t)
        v = _joined([self._arranged(("v", i), x, self._value_arrangement) for i, x in enumerate(t.values)])
        self._values_shape = v.shape[:2]
        call.k, call.v = _same_groups(call.k, expanded(v, call.q.shape[0]))
        if t.out is not None:
            call.output = self._arranged("out", t.out, self._output_arrangement)
            call.result, call.result_form = t.out, self._made["out"]
        own = call.weights
        if own is not None and call.applied is None and own.dtype != v.dtype:
            call.weights = own.to(v.dtype)
        if not self._known:
            self._check(call)
        self._finish(call)
        return call

    def values_back(self, v: Tensor) -> Tensor:
        """What is to take the place of the values of the first part, as the model's product gets them.

        Args:
            v: B G S E.

        Raises:
            LayoutError: what was changed for some of them is one in the model.
        """
        return values_back(self._made["v", 0], v, self._values_shape, self._parts[0][1].v)

    def forget_tensors(self) -> None:
        """Keep nothing of the first run but how its tensors were brought into B H T S."""
        self._scores = _bare(self._scores)
        self._state = replace(
            self._state,
            origin=_NOWHERE,
            scores=self._scores,
            scores_origin=_NOWHERE,
            own=None,
            scores_tensor=None,
            joined=[],
            met=None,
            use=None,
        )
        self.given = self._out_origin = None
        self._parts = self._laid = ()
        del self._product, self._roles, self.product

    def _check(self, call: KernelCall) -> None:
        b, h, t, _ = call.q.shape
        s = call.k.shape[2]
        output = call.output
        if call.v.shape[2] != s or (output is not None and tuple(output.shape[:3]) != (b, h, t)) or h % call.k.shape[1]:
            raise LayoutError(
                f"the shapes do not fit: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}, v {tuple(call.v.shape)}, "
                f"output {None if output is None else tuple(output.shape)}"
            )

    def _value_arrangement(self, key: Any, x: Tensor) -> Arrangement:
        return values_arrangement(self._parts[key[1]][1], self._roles)

    def _output_arrangement(self, key: object, x: Tensor) -> Arrangement:
        if self._out_origin is None:
            return arrangement(x.shape, output_factors(self._parts[0][1], self._roles), "BHTD")
        width = {a for _, use in self._parts for a in use.width}
        factors = [
            [Factor(a.size, "D") if a in width or width & {*a.lineage()} else self._roles.factor(a) for a in dim]
            for dim in self._out_origin.layout()
        ]
        return arrangement(x.shape, factors, "BHTD")


# In place of origins that are not asked for again: they know of what they are made, and so keep it.
_NOWHERE = Origin(())


def _bare(scores: Scores) -> Scores:
    """The scores as a builder reads them again: numbers, names and how many tensors of each kind there are."""
    nothing = torch.empty(0)
    terms, fills, factors = (
        [replace(t, tensor=nothing, origin=_NOWHERE) for t in of] for of in (scores.terms, scores.fills, scores.factors)
    )
    return scores.but(
        origin=_NOWHERE, product=None, terms=terms, fills=fills, factors=factors, sink=None, before=None, held=None,
        dropped=None, finite=None, shifts=[0.0 for _ in scores.shifts], entries=None,
    )  # fmt: skip


def values_arrangement(use: ValueProduct, roles: AxisRoles) -> Arrangement:
    """How the values of a product with weights are brought to B G S E."""
    dims = dict(zip(use.weights_labels, use.weights_origin.layout(), strict=True))
    layout = dict(zip(use.v_labels, use.v_origin.layout(), strict=True))
    extents = dict(zip(use.v_labels, use.v.shape, strict=True))
    pieces: list[list[Factor]] = []
    order, missing = [], set[int]()
    # In the order of the weights' dimensions, with those that all values share.
    for label, atoms in dims.items():
        if label not in layout:
            mine = [roles.factor(a, broadcast=True) for a in atoms]
            missing.add(len(pieces))
            pieces.append([p for p in mine if p.role in "BH"])
            continue
        order.append(use.v_labels.index(label))
        extent = extents[label]
        if label not in use.out_labels:
            pieces.append([Factor(extent, "S")])
            continue
        pairs = refine(atoms, layout[label]) if extent != 1 else None
        own = [(a, o.repeated) for a, o in pairs] if pairs else [(a, False) for a in atoms]
        mine = [roles.factor(a, broadcast=extent == 1, repeated=r) for a, r in own]
        if any(p.role == "T" and not p.broadcast for p in mine):
            raise LayoutError("the values are others for each query, as those of relative positions are")
        # Values that are shared by all queries have no axis of them, but an extent of 1.
        pieces.append([p for p in mine if not (p.broadcast and p.role == "T")])
    for i, label in enumerate(use.v_labels):
        if label not in dims:
            order.append(i)
            pieces.append([Factor(extents[label], "D")])
    made = arrangement([use.v.shape[i] for i in order], pieces, "BHSD", group=True)
    parts = tuple((n, i not in missing) for i, (n, _) in enumerate(made.parts))
    return replace(made, parts=parts, first=None if order == sorted(order) else tuple(order))


def values_back(made: Arrangement, v: Tensor, extents: Sequence[int], then: Tensor) -> Tensor:
    """What is to take the place of values, as they lie in the model.

    Args:
        made: how the model's are brought to B G S E.
        v: B G S E, with those of a shared batch or of shared heads for each of them.
        extents: B and G as they are of the model's own.
        then: the model's own.

    Raises:
        LayoutError: what was changed for some of them is one in the model.
    """
    for dim, extent in enumerate(extents):
        apart = v.reshape(*v.shape[:dim], extent, -1, *v.shape[dim + 1 :]) if extent else v.unsqueeze(dim + 1)
        first = apart.narrow(dim + 1, 0, 1)
        if not torch.equal(apart, first.expand_as(apart)):
            raise LayoutError("the model has one set of values for several batch entries or heads")
        v = first.squeeze(dim + 1)
    return made.back(v, then.shape)


def output_factors(use: ValueProduct, roles: AxisRoles) -> list[list[Factor]]:
    """The factors of the result of a product of weights and values."""
    dims = dict(zip(use.weights_labels, use.weights_origin.layout(), strict=True))
    widths = dict(zip(use.v_labels, use.v.shape, strict=True))
    return [
        [roles.factor(a) for a in dims[label]] if label in dims else [Factor(widths[label], "D")]
        for label in use.out_labels
    ]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The values of all the keys, with those of shared heads or batches copied where others are not."""
    if len(parts) == 1:
        return parts[0]
    b, g = (max(x.shape[i] for x in parts) for i in (0, 1))
    return torch.cat([x.expand(b, -1, -1, -1).repeat_interleave(g // x.shape[1], 1) for x in parts], 2)


def _same_groups(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of equally many heads: a model may share the one among more query heads than the other."""
    g = max(k.shape[1], v.shape[1])
    k, v = (x if x.shape[1] == g else x.repeat_interleave(g // x.shape[1], 1) for x in (k, v))
    return k, v
