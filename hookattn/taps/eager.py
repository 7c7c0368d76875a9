"""The tap of attention written out by hand: from followed tensors to one :class:`KernelCall`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import FILL, MASKED, dot_scores, finish_scores, split_additive
from ..record import KernelCall
from .axes import Atom, Layout, Origin, refine
from .product import Label, LayoutError, Piece, Product, Roles, arrange
from .states import Scores, Term, Weights

NAME = "eager"


@dataclass(slots=True)
class ValueProduct:
    """``weights · v``: the operands, their labels, and the result."""

    weights: Tensor
    weights_labels: Sequence[Label]
    weights_origin: Origin
    v: Tensor
    v_labels: Sequence[Label]
    v_origin: Origin
    out: Tensor
    out_labels: Sequence[Label]


def contracts_keys(state: Weights, labels: Sequence[Label], contracted: Sequence[Label], origin: Origin) -> bool:
    """Whether a product sums over exactly the keys (then the other operand is ``v``; else it mixes heads)."""
    if state.scores is None or state.scores_origin is None:
        return len(contracted) == 1 and labels.index(contracted[0]) == state.dim
    dims = dict(zip(labels, origin.layout(), strict=True))
    roles = Roles(state.scores.product, state.scores_origin.layout()[state.dim])
    summed = [a for x in contracted for a in dims[x]]
    kept = [a for x in labels if x not in contracted for a in dims[x]]
    try:
        return all(roles.of(a) == "S" for a in summed) and not any(roles.of(a) == "S" for a in kept)
    except LayoutError:
        return False


@dataclass
class Build:
    """Brings everything that belongs to one hand-written attention into B H T S."""

    state: Weights
    use: ValueProduct
    scores: Scores = field(init=False)
    product: Product = field(init=False)
    roles: Roles = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.state.scores is not None and self.state.scores_origin is not None
        self.scores = self.state.scores
        self.product = self.scores.product
        self.roles = Roles(self.product, self.state.scores_origin.layout()[self.state.dim])

    def call(self) -> KernelCall:
        """The call in the contract's layout. Raises LayoutError where the axes can't be told apart."""
        scores, product, state = self.scores, self.product, self.state
        if not product.untouched:
            raise LayoutError("q or k was written to between the score product and its use")
        query_side, key_side = self.roles.queries, self.roles.keys
        sides = {"a": product.a, "b": product.b}
        if query_side == "batch" or key_side == "batch":
            raise LayoutError("the operands of the score product can't be told apart")
        q = arrange(sides[query_side], product.operand_pieces(query_side, self.roles), "BHTD")
        k = arrange(sides[key_side], product.operand_pieces(key_side, self.roles), "BHSD", group=True)
        dims = dict(zip(self.use.weights_labels, self.use.weights_origin.layout(), strict=True))
        v = arrange(self.use.v, self._value_pieces(dims), "BHSD", group=True)
        output = arrange(self.use.out, self._output_pieces(dims), "BHTD")
        dtype = self.use.v.dtype
        own, own_origin = state.own or (self.use.weights, self.use.weights_origin)
        weights = self._like_scores(own, own_origin.layout())
        b, h = weights.shape[:2]
        q = q.expand(b, h, -1, -1)
        k, v = _same_groups(k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1))
        call = KernelCall(
            q=q,
            k=k,
            v=v,
            output=output,
            scale=self._scale(),
            tap=NAME,
            softcap=scores.cap,
            weights=weights.to(dtype) if weights.dtype != dtype and state.own is None else weights,
            dropout=state.dropout,
            softmax_dtype=state.dtype,
            mixed=bool(state.mixed),
        )
        if call.softcap is not None:
            call.scale = call.scale * call.softcap
        if state.own is not None:
            call.applied = self._like_scores(self.use.weights, self.use.weights_origin.layout())
        if state.mixed:
            call.notes.append(
                f"weights changed after the softmax by {', '.join(state.mixed)}"
                + (" (mixed across heads)" if _mixes(state.mixed) else "")
            )
        self._check(call)
        self._terms(call)
        if scores.sink is not None:
            sink = self._aligned(Term(scores.sink, state.scores_origin or state.origin))
            call.sinks = sink.reshape(-1) if sink.shape[0] == sink.shape[2] == 1 else sink
            if call.sinks.dim() == 1 and call.sinks.shape[0] == 1:
                call.sinks = call.sinks.expand(q.shape[1])
        if scores.opaque:
            self._own_values(call)
        elif not scores.shifts:
            self._finite(call)
        return call

    def _scale(self) -> float | Tensor:
        scale: float | Tensor = self.scores.scale
        for factor in self.scores.factors:
            scale = self._aligned(factor) * scale
        return scale

    def _terms(self, call: KernelCall) -> None:
        biases, masks = [], []
        for term in self.scores.terms:
            if term.tensor.dtype == torch.bool:
                term = Term(term.tensor.to(call.q.dtype), term.origin, term.factor)
            bias, mask = split_additive(term.tensor * term.factor if term.factor != 1 else term.tensor)
            if bias is not None:
                biases.append(self._aligned(Term(bias, term.origin)))
            if mask is not None:
                masks.append(self._aligned(Term(mask, term.origin)))
        masks += [~self._aligned(fill) for fill in self.scores.fills]
        for bias in biases:
            call.bias = bias if call.bias is None else call.bias + bias
        for mask in masks:
            call.mask = mask if call.mask is None else call.mask & mask

    def _finite(self, call: KernelCall) -> None:
        """The model's own scores, if they were formed before anything was masked."""
        scores, tensor = self.scores, self.state.scores_tensor
        if not scores.terms and not scores.fills and scores.sink is None and tensor is not None:
            assert self.state.scores_origin is not None
            call.scores = self._like_scores(tensor, self.state.scores_origin.layout())
        elif scores.finite is not None and call.bias is None:
            kept, version, origin = scores.finite
            if version == (-1 if kept.is_inference() else kept._version):
                call.scores = self._like_scores(kept, origin.layout())

    def _own_values(self, call: KernelCall) -> None:
        """Scores that went through something unknown: the model's own values, and a mask read off them."""
        tensor, scores = self.state.scores_tensor, self.scores
        if tensor is None or self.state.scores_origin is None:
            raise LayoutError(f"the scores went through {', '.join(scores.opaque)}, and their values were not kept")
        own = self._like_scores(tensor, self.state.scores_origin.layout())
        if scores.sink is not None:
            raise LayoutError(f"a sink joined scores that went through {', '.join(scores.opaque)}")
        hidden = own <= (MASKED if bool((own <= MASKED).any()) else FILL)
        keep = ~hidden if call.mask is None else call.mask & ~hidden
        derived = finish_scores(dot_scores(call.q, call.k, call.scale), call.softcap, call.bias)
        residual = torch.where(keep, own.to(derived.dtype) - derived, 0.0)
        call.mask = keep if bool(hidden.any()) or call.mask is not None else None
        slack = {torch.float64: 1e-10, torch.float32: 1e-5}.get(own.dtype, 2e-2)
        if float(residual.abs().amax()) > slack * max(1.0, float(derived.abs().amax())):
            call.opaque = True
            call.scores = torch.where(keep, own, derived.to(own.dtype)) if call.mask is not None else own
            call.notes.append(
                f"scores are the model's own: q·k went through {', '.join(scores.opaque)}"
                + (" (mixed across heads)" if _mixes(scores.opaque) else "")
            )

    def _check(self, call: KernelCall) -> None:
        b, h, t, _ = call.q.shape
        s = call.k.shape[2]
        assert call.weights is not None and call.output is not None
        if (
            tuple(call.weights.shape) != (b, h, t, s)
            or call.v.shape[2] != s
            or tuple(call.output.shape[:3]) != (b, h, t)
            or h % call.k.shape[1]
        ):
            raise LayoutError(
                f"the shapes do not fit: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}, v {tuple(call.v.shape)}, "
                f"weights {tuple(call.weights.shape)}, output {tuple(call.output.shape)}"
            )

    def _like_scores(self, x: Tensor, layout: Layout) -> Tensor:
        return arrange(x, self.roles.pieces(layout), "BHTS")

    def _aligned(self, term: Term) -> Tensor:
        layout, x = term.origin.layout(), term.tensor
        x = x.reshape((1,) * (len(layout) - x.dim()) + tuple(x.shape))
        return arrange(x, self.roles.pieces(layout, x.shape), "BHTS", broadcast=True)

    def _value_pieces(self, dims: dict[Label, tuple[Atom, ...]]) -> list[list[Piece]]:
        use, out = self.use, []
        own_layout = use.v_origin.layout()
        for i, (label, extent) in enumerate(zip(use.v_labels, use.v.shape, strict=True)):
            if label not in dims:
                out.append([Piece(extent, "D")])
            elif label not in use.out_labels:
                out.append([Piece(extent, "S")])
            else:
                pairs = refine(dims[label], own_layout[i]) if extent != 1 else None
                atoms = [(a, o.repeated) for a, o in pairs] if pairs else [(a, False) for a in dims[label]]
                out.append([Piece(a.size, self.roles.of(a), broadcast=extent == 1, repeated=r) for a, r in atoms])
        return out

    def _output_pieces(self, dims: dict[Label, tuple[Atom, ...]]) -> list[list[Piece]]:
        use = self.use
        return [
            [Piece(a.size, self.roles.of(a)) for a in dims[label]] if label in dims else [Piece(extent, "D")]
            for label, extent in zip(use.out_labels, use.out.shape, strict=True)
        ]


def _same_groups(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    g = max(k.shape[1], v.shape[1])
    k, v = (x if x.shape[1] == g else x.repeat_interleave(g // x.shape[1], 1) for x in (k, v))
    return k, v


def _mixes(operations: Sequence[str]) -> bool:
    return any(x in ("linear", "matmul", "einsum", "conv2d", "conv1d", "bmm") for x in operations)
