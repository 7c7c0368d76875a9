"""The tap of attention written out by hand: from followed tensors to one :class:`KernelCall`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...attention.functional import dot_scores, finish_scores
from ...attention.kernel_call import DOT, KernelCall
from ...attention.masks import FILL, MASKED, split_additive
from ...attention.normalizers import OF_ONE, SOFTMAX
from ...torch_internals.tensor_identity import version_of
from .axis_history import Layout, Origin, refine
from .normalizer_names import name_of_steps, verified_name
from .operations import mixes_axis
from .products import AxisRoles, Factor, Label, LayoutError, Product, Roles, arrange
from .sequences import describe_product
from .states import Scores, Term, ValueProduct, Weights

NAME = "eager"


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


@dataclass
class CallBuilder:
    """Brings everything that belongs to one hand-written attention into B H T S.

    Attributes:
        parts: the weights and their product with the values; several where the weights were split along the keys.
        out: the output.
        out_origin: its axes, where there are several parts.
        formed: whether the weights' tensors are weights; else they follow from the scores.
    """

    parts: Sequence[tuple[Weights, ValueProduct]]
    out: Tensor
    out_origin: Origin | None = None
    formed: bool = True
    state: Weights = field(init=False)
    scores: Scores = field(init=False)
    product: Product = field(init=False)
    roles: Roles = field(init=False)

    def __post_init__(self) -> None:
        self.parts = sorted(self.parts, key=lambda part: part[0].key_range or (0, 0))
        self.state = self.parts[0][0]
        assert self.state.scores is not None and self.state.scores_origin is not None
        self.scores = self.state.scores
        self.product = self.scores.product
        self.roles = self.product.roles_over(self.state.scores_origin, self.state.dim)

    def call(self) -> KernelCall:
        """The call in the contract's layout. Raises LayoutError where the axes can't be told apart."""
        scores = self.scores
        q, k = self._queries_and_keys()
        v = _joined([values_in_layout(use, self.roles) for _, use in self.parts])
        own, applied = self._weights()
        b, h = own.shape[:2]
        if self.heads is not None:
            q, k = self._picked(q), self._picked(k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        if not self.formed:
            own = applied = own[:0]
        k, v = _same_groups(k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1))
        mixed = list(dict.fromkeys(name for w, _ in self.parts for name in w.mixed))
        call = KernelCall(
            q=q.expand(b, h, -1, -1),
            k=k,
            v=v,
            output=arrange(self.out, self._output_factors(), "BHTD"),
            # Divided by the cap in here, multiplied by it outside: the contract's scale is that of q·k itself.
            scale=self._scale() if scores.cap is None else self._scale() * scores.cap,
            tap=NAME,
            softcap=scores.cap,
            weights=None if not self.formed else own.to(v.dtype) if own.dtype != v.dtype and applied is own else own,
            dropout=max(w.dropout for w, _ in self.parts),
            softmax_dtype=self.state.dtype,
            mixed=bool(mixed),
            basis=self.roles.basis,
        )
        if applied is not own:
            call.applied = applied
        if mixed:
            call.notes.append(f"weights changed after the softmax by {operations_note(mixed)}")
        describe_product(call, self.product, self.roles)
        call.score = scores.score
        self._terms(call, own)
        if scores.sink is not None:
            call.sinks = self.sinks(scores.sink, h)
            if float(call.sinks.abs().amax()) <= slack_of(call.sinks.dtype):  # one in the denominator, and no more
                call.normalizer = OF_ONE
        if scores.opaque:
            self._own_values(call)
        elif not scores.shifts:  # shifted scores give the same weights, and are not q·k
            self._finite(call)
        self._check(call)
        self._name(call)
        if scores.score != DOT:
            call.opaque = False
            call.q = call.k = call.scale = None  # type: ignore[assignment]
        return call

    def _name(self, call: KernelCall) -> None:
        """Say what made weights of the scores, where it was no softmax over the keys."""
        steps = self.state.steps
        if self.state.normalizer != SOFTMAX:
            call.normalizer = self.state.normalizer
        if steps is None:
            return
        name = name_of_steps(steps)
        assert call.weights is not None
        own = call.opaque or self.scores.score != DOT
        scores = call.scores if own else finish_scores(dot_scores(call.q, call.k, call.scale), call.softcap, call.bias)
        call.normalizer = verified_name(name, call.weights, scores, call.mask, slack_of(call.weights.dtype))

    def _queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """B H T D, and B G S D."""
        product, roles = self.product, self.roles
        if not product.untouched:
            raise LayoutError("q or k was written to between the score product and its use")
        if roles.queries == "batch" or roles.keys == "batch":
            raise LayoutError("the operands of the score product can't be told apart")
        sides = {"a": product.a, "b": product.b}
        q = arrange(sides[roles.queries], product.operand_factors(roles.queries, roles), "BHTD")
        return q, arrange(sides[roles.keys], product.operand_factors(roles.keys, roles), "BHSD", group=True)

    @cached_property
    def heads(self) -> list[int] | None:
        """The heads of the scores that the weights are of, where they are of some of them; None: they are of all."""
        entries = self.state.entries
        if entries is None:
            return None
        root: Origin = entries.sources()[0]
        number = self.roles.head_numbers(root.layout(), self.out.device)
        part = number.reshape(-1)[entries.numbers(lambda _: 0, number.device)]
        arranged = self._like_scores(part, self.parts[0][1].weights_origin.layout())
        found = arranged[0, :, 0, 0]
        if not torch.equal(arranged, found[None, :, None, None].expand_as(arranged)):
            raise LayoutError("the weights of some of the heads were taken, others for each query or batch entry")
        return [int(i) for i in found.tolist()]

    def _picked(self, x: Tensor) -> Tensor:
        """Of all heads of the scores, B H …, those that the weights are of."""
        return x if self.heads is None or x.shape[1] == 1 else x[:, self.heads]

    def _weights(self) -> tuple[Tensor, Tensor]:
        """B H T S, as the softmax made them and as the values met them: one tensor where nothing lies between."""
        applied = _cat([self._like_scores(use.weights, use.weights_origin.layout()) for _, use in self.parts])
        if all(w.own is None for w, _ in self.parts):
            return applied, applied
        own = [w.own or (use.weights, use.weights_origin) for w, use in self.parts]
        return _cat([self._like_scores(x, origin.layout()) for x, origin in own]), applied

    def sinks(self, sink: Tensor, heads: int) -> Tensor:
        """The sink's column: H where it is a parameter of each head, else B H T 1."""
        column = self._aligned(Term(sink, self.state.scores_origin or self.state.origin))
        if not column.shape[0] == column.shape[2] == 1:
            return column
        column = column.reshape(-1)
        return column.expand(heads) if column.shape[0] == 1 else column

    def _scale(self) -> float | Tensor:
        scale: float | Tensor = self.scores.scale
        for factor in self.scores.factors:
            scale = self._aligned(factor) * scale
        return scale

    def _terms(self, call: KernelCall, weights: Tensor) -> None:
        """What joined the scores, as the call's bias and mask; ``weights``: B H T S, or none where none are formed."""
        biases, masks = [], []
        for term in self.scores.terms:
            if term.tensor.dtype == torch.bool:
                term = Term(term.tensor.to(call.q.dtype), term.origin, term.factor)
            added = term.tensor * term.factor if term.factor != 1 else term.tensor
            bias, mask = split_additive(added)
            hides = None if mask is None else self._aligned(Term(mask, term.origin))
            if hides is not None and self._outweighed(hides, added, weights):
                bias, hides = added, None
            if bias is not None:
                biases.append(self._aligned(Term(bias, term.origin)))
            if hides is not None:
                masks.append(hides)
        if self.state.steps is not None:  # a softmax is the same whatever is added to a row; what stands here is not
            for shift in scores_shifts(self.scores, call.v):
                biases.append(-self._aligned(Term(shift, self.scores.origin)))
        masks += [~self._aligned(fill) for fill in self.scores.fills]
        # Joined in B H T S, where each is 1 where it broadcasts: the sum has no more extents than its parts.
        for bias in biases:
            call.bias = bias if call.bias is None else call.bias + bias
        for mask in masks:
            call.mask = mask if call.mask is None else call.mask & mask

    def _outweighed(self, mask: Tensor, added: Tensor, weights: Tensor) -> bool:
        """Whether a penalty is no mask after all, since scores are so large that what it would hide weighs something.

        Args:
            mask: bool, B H T S or broadcastable to it, True = may attend.
            added: what was added to the scores.
            weights: B H T S, as the softmax made them; none where none are formed.
        """
        if not len(weights) or self.state.steps is not None or self.state.normalizer != SOFTMAX:
            return False
        if float(added.amin()) <= MASKED:  # nothing outweighs that
            return False
        return bool((weights.masked_fill(mask, 0) > slack_of(weights.dtype)).any())

    def _finite(self, call: KernelCall) -> None:
        """The model's own scores, if they were formed before anything was masked."""
        scores, tensor = self.scores, self.state.scores_tensor
        if not scores.terms and not scores.fills and scores.sink is None and tensor is not None:
            assert self.state.scores_origin is not None
            call.scores = self._picked(self._like_scores(tensor, self.state.scores_origin.layout()))
        elif scores.finite is not None and call.bias is None:
            kept, version, origin = scores.finite
            if version == version_of(kept):
                call.scores = self._picked(self._like_scores(kept, origin.layout()))

    def _own_values(self, call: KernelCall) -> None:
        """Scores that went through something unknown: the model's own values, and a mask read off them.

        What was unknown may have changed nothing (a custom copy, a mask by multiplication): then the call is as any.
        """
        tensor, scores = self.state.scores_tensor, self.scores
        if tensor is None or self.state.scores_origin is None:
            raise LayoutError(f"the scores went through {', '.join(scores.opaque)}, and their values were not kept")
        own = self._picked(self._like_scores(tensor, self.state.scores_origin.layout()))
        if scores.sink is not None:
            raise LayoutError(f"a sink joined scores that went through {', '.join(scores.opaque)}")
        # Where something is as low as masks usually are, that alone is masked, and a low score is a score.
        # A distance may be as low as masks are that somebody writes by hand.
        low = scores.score != DOT or bool((own <= MASKED).any())
        hidden = own <= (MASKED if low else FILL)
        keep = ~hidden if call.mask is None else call.mask & ~hidden
        derived = finish_scores(dot_scores(call.q, call.k, call.scale), call.softcap, call.bias)
        residual = torch.where(keep, own.to(derived.dtype) - derived, 0.0)
        call.mask = keep if bool(hidden.any()) or call.mask is not None else None
        if scores.score != DOT:
            call.scores = own if call.mask is None else torch.where(keep, own, 0.0)
        elif differs(residual, derived, own.dtype):
            call.opaque = True
            call.scores = torch.where(keep, own, derived.to(own.dtype)) if call.mask is not None else own
            call.notes.append(f"scores are the model's own: q·k went through {operations_note(scores.opaque)}")

    def _check(self, call: KernelCall) -> None:
        b, h, t, _ = call.q.shape
        s = call.k.shape[2]
        assert call.output is not None
        if (
            (call.weights is not None and tuple(call.weights.shape) != (b, h, t, s))
            or call.v.shape[2] != s
            or tuple(call.output.shape[:3]) != (b, h, t)
            or h % call.k.shape[1]
        ):
            raise LayoutError(
                f"the shapes do not fit: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}, v {tuple(call.v.shape)}, "
                f"output {tuple(call.output.shape)}"
            )

    def _like_scores(self, x: Tensor, layout: Layout) -> Tensor:
        return arrange(x, self.roles.factors(layout), "BHTS")

    def _aligned(self, term: Term) -> Tensor:
        layout, x = term.origin.layout(), term.tensor
        x = x.reshape((1,) * (len(layout) - x.dim()) + tuple(x.shape))
        return self._picked(arrange(x, self.roles.factors(layout, x.shape), "BHTS", broadcast=True))

    def _output_factors(self) -> list[list[Factor]]:
        if self.out_origin is None:
            return output_factors(self.parts[0][1], self.roles)
        width = {a for _, use in self.parts for a in use.width}
        return [
            [Factor(a.size, "D") if a in width or width & {*a.lineage()} else self.roles.factor(a) for a in dim]
            for dim in self.out_origin.layout()
        ]


def values_in_layout(use: ValueProduct, roles: AxisRoles) -> Tensor:
    """The values of a product with weights, B G S E."""
    dims = dict(zip(use.weights_labels, use.weights_origin.layout(), strict=True))
    layout = dict(zip(use.v_labels, use.v_origin.layout(), strict=True))
    extents = dict(zip(use.v_labels, use.v.shape, strict=True))
    pieces: list[list[Factor]] = []
    order = []
    # In the order of the weights' dimensions, with those that all values share.
    for label, atoms in dims.items():
        if label not in layout:
            mine = [roles.factor(a, broadcast=True) for a in atoms]
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
        # Values that are shared by all queries have no axis of them, but an extent of 1.
        pieces.append([p for p in mine if not (p.broadcast and p.role == "T")])
    for i, label in enumerate(use.v_labels):
        if label not in dims:
            order.append(i)
            pieces.append([Factor(extents[label], "D")])
    return arrange(use.v.permute(order), pieces, "BHSD", group=True)


def output_factors(use: ValueProduct, roles: AxisRoles) -> list[list[Factor]]:
    """The factors of the result of a product of weights and values."""
    dims = dict(zip(use.weights_labels, use.weights_origin.layout(), strict=True))
    return [
        [roles.factor(a) for a in dims[label]] if label in dims else [Factor(extent, "D")]
        for label, extent in zip(use.out_labels, use.out.shape, strict=True)
    ]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 3)


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


def operations_note(names: Sequence[str]) -> str:
    """The operations that scores or weights went through, for a note."""
    # One that sums over an axis and left scores or weights behind summed over heads; all else loses them.
    return ", ".join(names) + (" (mixed across heads)" if any(mixes_axis(x) for x in names) else "")


def scores_shifts(scores: Scores, like: Tensor) -> list[Tensor]:
    """What was subtracted from every score of a row, as tensors."""
    return [x if isinstance(x, Tensor) else like.new_tensor(x) for x in scores.shifts]


def differs(residual: Tensor, derived: Tensor, dtype: torch.dtype) -> bool:
    """Whether scores are more than rounding away from those that are derived from q and k.

    Args:
        residual: their difference, 0 where a key is masked.
        derived: the derived scores.
        dtype: that the model computed its scores in.
    """
    # q·k is a sum over the width, so that rounding adds up: 1e-5 is 84 units in the last place of float32, 2e-2 are 20
    # of float16 and 3 of bfloat16. What a model does to scores on purpose changes them by more than that.
    return float(residual.abs().amax()) > slack_of(dtype) * max(1.0, float(derived.abs().amax()))


def slack_of(dtype: torch.dtype) -> float:
    """The relative difference that is rounding still, of numbers that were computed in a dtype."""
    return {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
