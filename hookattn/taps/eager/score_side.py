"""The tap of attention written out by hand: the score side of one :class:`KernelCall`, all but values and output.

What is here is known as soon as there are weights, before anybody has done anything with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention.functional import dot_scores, finish_scores
from ...attention.kernel_call import DOT, KernelCall
from ...attention.masks import FILL, MASKED, split_additive
from ...attention.normalizers import OF_ONE, SOFTMAX
from ...attention.pieces import Piece
from ...torch_internals.transforms import stands_for_others
from .axis_history import Origin
from .decisions import version_then
from .normalizer_names import name_of_steps, verified_name
from .operations import mixes_axis
from .products import Arrangement, LayoutError, arrange, arrangement
from .sequences import describe_product
from .states import Formed, Weights

NAME = "eager"


Shared = Callable[[str, Tensor, Callable[[], Any]], Any]


class LaidWeights(NamedTuple):
    """Weights as the model has them: of all keys, or of some.

    Attributes:
        state: what they are.
        tensor: the tensor.
        origin: where its axes come from.
    """

    state: Weights
    tensor: Tensor
    origin: Origin


@dataclass(slots=True)
class Ingredients:
    """The tensors of a model that one call is made of, as the model has them.

    Attributes:
        a, b: the operands of the score product.
        untouched: whether neither was written to since.
        weights: of each part, the weights that met the values.
        own: of each part, the weights before dropout or mixing; None: neither happened.
        values: of each part.
        out: the output; None: there is none yet.
        terms: what was added to the scores.
        fills: the masks that overwrote scores.
        factors: what the scores were multiplied by.
        shifts: what was subtracted from them: tensors or numbers.
        sink: the column that was joined to them.
        scores: what the softmax ran over.
        finite: the scores before anything joined them, if they are still what they were.
    """

    a: Tensor
    b: Tensor
    untouched: bool
    weights: Sequence[Tensor]
    own: Sequence[Tensor | None]
    values: Sequence[Tensor] = ()
    out: Tensor | None = None
    terms: Sequence[Tensor] = ()
    fills: Sequence[Tensor] = ()
    factors: Sequence[Tensor] = ()
    shifts: Sequence[Tensor | float] = ()
    sink: Tensor | None = None
    scores: Tensor | None = None
    finite: Tensor | None = None


def ingredients_of(parts: Sequence[LaidWeights]) -> Ingredients:
    """The tensors that the score side of a call is made of."""
    state = parts[0].state
    scores = state.scores
    assert scores is not None
    product, finite = scores.product, scores.finite
    return Ingredients(
        a=product.a,
        b=product.b,
        untouched=product.untouched,
        weights=[part.tensor for part in parts],
        own=[None if part.state.own is None else part.state.own[0] for part in parts],
        terms=[t.tensor for t in scores.terms],
        fills=[t.tensor for t in scores.fills],
        factors=[t.tensor for t in scores.factors],
        shifts=scores.shifts,
        sink=scores.sink,
        scores=state.scores_tensor,
        finite=finite[0] if finite is not None and finite[1] == version_then(finite[0]) else None,
    )


class ScoreSide:
    """Brings what the weights of one hand-written attention are made of into B H T S, and the weights.

    How each tensor is brought there is found out once, by where its axes come from. It may be asked again with the
    tensors of another run of the same operations, and then only does the same to them; what depends on values is looked
    at each time.

    Args:
        laid: the weights; several where they were cut along the keys.
        formed: whether the weights' tensors are weights; else they follow from the scores.

    Attributes:
        given: the tensors of the first run.
        product: the product that its scores are.
        again: whether it can be asked again: nothing but views of tensors is to be remembered.
        piece: which part of one attention the call is; filled as it is made.
        outweighed: of each mask that was added to the scores, whether it is none after all; likewise.
    """

    def __init__(self, laid: Sequence[LaidWeights], formed: bool = True):
        self.given: Ingredients | None = ingredients_of(laid)
        self._laid: Sequence[LaidWeights] = laid
        self._formed = formed
        self._state = laid[0].state
        assert self._state.scores is not None and self._state.scores_origin is not None
        self._scores = self._state.scores
        self._product = self._scores.product
        self._roles = self._product.roles_over(self._state.scores_origin, self._state.dim)
        self.again = self._state.entries is None
        self.product = self._product
        self.piece: Piece | None = None
        self.outweighed: dict[int, bool] = {}
        self._kind: str | None = None
        self._heads: list[int] | None = None
        self._made: dict[object, Arrangement] = {}
        self._known = False
        self._shared: Shared = _made_anew

    def formed_call(self, shared: Shared | None = None) -> KernelCall:
        """The call so far: it has no values and no output.

        Raises:
            LayoutError: the axes can't be told apart.
        """
        call = self._score_side(self._begin(None, shared))
        self._finish(call)
        return call

    def weights_back(self, weights: Tensor) -> Tensor:
        """What is to take the place of the weights, as the first of the model's tensors has them.

        Args:
            weights: B H T S.
        """
        return self._made["weights", 0].back(weights, self._laid[0].tensor.shape)

    def _begin(self, given: Ingredients | None, shared: Shared | None) -> Ingredients:
        t = given or self.given
        assert t is not None
        self._shared = shared or _made_anew
        if not self._known:
            self._learn()
        return t

    def _score_side(self, t: Ingredients) -> KernelCall:
        """All but the values, the output and the name of what made the weights."""
        scores, state = self._scores, self._state
        q, k = self._queries_and_keys(t)
        own, applied = self._weights(t)
        b, h = own.shape[:2]
        if self._heads is not None:
            q, k = self._picked(q), self._picked(k.repeat_interleave(q.shape[1] // k.shape[1], 1))
        if not self._formed:
            own = applied = own[:0]
        mixed = self._mixed
        call = KernelCall(
            q=q if q.shape[:2] == (b, h) else q.expand(b, h, -1, -1),
            k=expanded(k, b),
            v=None,  # type: ignore[arg-type]  # comes later, or the call is of weights alone
            output=None,
            # Divided by the cap in here, multiplied by it outside: the contract's scale is that of q·k itself.
            scale=self._scale(t) if scores.cap is None else self._scale(t) * scores.cap,
            tap=NAME,
            softcap=scores.cap,
            weights=own if self._formed else None,
            dropout=self._dropout,
            softmax_dtype=state.dtype,
            mixed=bool(mixed),
            basis=self._basis,
        )
        if applied is not own:
            call.applied = applied
        if mixed:
            call.notes.append(f"weights changed after the softmax by {operations_note(mixed)}")
        if not self._known:
            describe_product(call, self._product, self._roles)
            self._kind, self.piece = call.kind, call.piece
        call.kind, call.piece = self._kind, self.piece
        call.score = scores.score
        self._terms(call, own, t)
        if t.sink is not None:
            call.sinks = self._sinks(t.sink, h)
            if float(call.sinks.detach().abs().amax()) <= slack_of(
                call.sinks.dtype
            ):  # one in the denominator, and no more
                call.normalizer = OF_ONE
        if scores.opaque:
            self._own_values(call, t)
        elif not scores.shifts:  # shifted scores give the same weights, and are not q·k
            self._finite(call, t)
        if not self._known:
            self._check_scores(call)
        return call

    def _finish(self, call: KernelCall) -> None:
        """Say what made the weights, now that all is there."""
        self._shared = _made_anew  # which is the trace's
        self._name(call)
        if self._scores.score != DOT:
            call.opaque = False
            call.q = call.k = call.scale = None  # type: ignore[assignment]
        self._known = True

    def _learn(self) -> None:
        """What holds for every run."""
        laid, roles = self._laid, self._roles
        if roles.queries == "batch" or roles.keys == "batch":
            raise LayoutError("the operands of the score product can't be told apart")
        self._basis = roles.basis
        self._mixed = list(dict.fromkeys(name for w in laid for name in w.state.mixed))
        self._dropout = max(w.state.dropout for w in laid)
        self._queries_first = roles.queries == "a"
        self._dtype = self._product.dtype
        self._heads = self._heads_taken()

    def _arranged(self, key: object, x: Tensor, how: Callable[[Any, Tensor], Arrangement]) -> Tensor:
        """A tensor in its roles; ``how``: tells how it is brought there, the first time."""
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = how(key, x)
        return made(x)

    def _queries_and_keys(self, t: Ingredients) -> tuple[Tensor, Tensor]:
        """B H T D, and B G S D."""
        if not t.untouched:
            raise LayoutError("q or k was written to between the score product and its use")
        q, k = (t.a, t.b) if self._queries_first else (t.b, t.a)
        q, k = self._arranged("q", q, self._operand), self._arranged("k", k, self._operand)
        # Autocast casts an operand inside the product, where nobody sees it.
        return _cast(q, self._dtype), _cast(k, self._dtype)

    def _operand(self, key: object, x: Tensor) -> Arrangement:
        roles, product = self._roles, self._product
        if key == "q":
            return arrangement(x.shape, product.operand_factors(roles.queries, roles), "BHTD")  # type: ignore[arg-type]
        return arrangement(x.shape, product.operand_factors(roles.keys, roles), "BHSD", group=True)  # type: ignore[arg-type]

    def _heads_taken(self) -> list[int] | None:
        """The heads of the scores that the weights are of, where they are of some of them; None: they are of all."""
        entries = self._state.entries
        if entries is None:
            return None
        root: Origin = entries.sources()[0]
        one = self._laid[0]
        number = self._roles.head_numbers(root.layout(), one.tensor.device)
        part = number.reshape(-1)[entries.numbers(lambda _: 0, number.device)]
        arranged = arrange(part, self._roles.factors(one.origin.layout()), "BHTS")
        found = arranged[0, :, 0, 0]
        if not torch.equal(arranged, found[None, :, None, None].expand_as(arranged)):
            raise LayoutError("the weights of some of the heads were taken, others for each query or batch entry")
        return [int(i) for i in found.tolist()]

    def _picked(self, x: Tensor) -> Tensor:
        """Of all heads of the scores, B H …, those that the weights are of."""
        return x if self._heads is None or x.shape[1] == 1 else x[:, self._heads]

    def _weights(self, t: Ingredients) -> tuple[Tensor, Tensor]:
        """B H T S, as the softmax made them and as the values met them: one tensor where nothing lies between."""
        applied = _cat([self._like_scores(("weights", i), x) for i, x in enumerate(t.weights)])
        if all(x is None for x in t.own):
            return applied, applied
        both = enumerate(zip(t.own, t.weights, strict=True))
        own = [
            self._like_scores(("weights", i) if x is None else ("own", i), y if x is None else x) for i, (x, y) in both
        ]
        return _cat(own), applied

    def sinks(self, sink: Tensor, heads: int) -> Tensor:
        """The sink's column: H where it is a parameter of each head, else B H T 1."""
        if not self._known:
            self._learn()
        return self._sinks(sink, heads)

    def _sinks(self, sink: Tensor, heads: int) -> Tensor:
        column = self._aligned("sink", sink)
        if not column.shape[0] == column.shape[2] == 1:
            return column
        column = column.reshape(-1)
        return column.expand(heads) if column.shape[0] == 1 else column

    def _scale(self, t: Ingredients) -> float | Tensor:
        scale: float | Tensor = self._scores.scale
        for i, x in enumerate(t.factors):
            scale = self._aligned(("factors", i), self._scores.factors[i].value(x)) * scale
        return scale

    def _terms(self, call: KernelCall, weights: Tensor, t: Ingredients) -> None:
        """What joined the scores, as the call's bias and mask; ``weights``: B H T S, or none where none are formed."""
        biases, masks = [], []
        for i, (term, term_tensor) in enumerate(zip(self._scores.terms, t.terms, strict=True)):
            x = term.value(term_tensor)
            if x.dtype == torch.bool:
                x = x.to(call.q.dtype)
            added = x * term.factor if term.factor != 1 else x
            shared = added is term_tensor and not stands_for_others(added)
            bias, mask, lowest = (
                self._shared("term", added, partial(_read_term, added)) if shared else _read_term(added)
            )
            hides = None if mask is None else self._aligned(("terms", i), mask)
            if hides is not None and self._outweighed(i, hides, lowest, weights):
                bias, hides = added, None
            if bias is not None:
                biases.append(self._aligned(("terms", i), bias))
            if hides is not None:
                masks.append(hides)
        if self._state.steps is not None:  # a softmax is the same whatever is added to a row; what stands here is not
            for i, shift in enumerate(t.shifts):
                shift = shift if isinstance(shift, Tensor) else call.q.new_tensor(shift)
                biases.append(-self._aligned(("shifts", i), shift))
        masks += [
            ~self._aligned(("fills", i), fill.value(x))
            for i, (fill, x) in enumerate(zip(self._scores.fills, t.fills, strict=True))
        ]
        # Joined in B H T S, where each is 1 where it broadcasts: the sum has no more extents than its parts.
        for bias in biases:
            call.bias = bias if call.bias is None else call.bias + bias
        for mask in masks:
            call.mask = mask if call.mask is None else call.mask & mask

    def _outweighed(self, number: int, mask: Tensor, lowest: float, weights: Tensor) -> bool:
        """Whether a penalty is no mask after all, since scores are so large that what it would hide weighs something.

        Args:
            number: of the term.
            mask: bool, B H T S or broadcastable to it, True = may attend.
            lowest: the least of what was added to the scores.
            weights: B H T S, as the softmax made them; none where none are formed.
        """
        if not len(weights) or self._state.steps is not None or self._state.normalizer != SOFTMAX:
            return False
        if lowest <= MASKED:  # nothing outweighs that
            return False
        if self._formed_before is not None and number in self._formed_before.outweighed:
            return self._formed_before.outweighed[number]
        self.outweighed[number] = bool((weights.masked_fill(mask, 0) > slack_of(weights.dtype)).any())
        return self.outweighed[number]

    @property
    def _formed_before(self) -> Formed | None:
        """What was asked of these weights as they were formed: they may be others now, which tell nothing of scores."""
        use = self._state.use
        return None if use is None else use.formed

    @property
    def axes(self) -> object:
        """Tells which of the weights' axes are what."""
        return id(self.product), self._state.dim, None if self._heads is None else tuple(self._heads)

    def _finite(self, call: KernelCall, t: Ingredients) -> None:
        """The model's own scores, if they were formed before anything was masked."""
        if not t.terms and not t.fills and t.sink is None and t.scores is not None:
            call.scores = self._picked(self._like_scores("scores", t.scores))
        elif t.finite is not None and call.bias is None:
            call.scores = self._picked(self._like_scores("finite", t.finite))

    def _own_values(self, call: KernelCall, t: Ingredients) -> None:
        """Scores that went through something unknown: the model's own values, and a mask read off them.

        What was unknown may have changed nothing (a custom copy, a mask by multiplication): then the call is as any.
        """
        tensor, scores = t.scores, self._scores
        if tensor is None or self._state.scores_origin is None:
            raise LayoutError(f"the scores went through {', '.join(scores.opaque)}, and their values were not kept")
        own = self._picked(self._like_scores("scores", tensor))
        if t.sink is not None:
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

    def _name(self, call: KernelCall) -> None:
        """Say what made weights of the scores, where it was no softmax over the keys."""
        steps = self._state.steps
        if self._state.normalizer != SOFTMAX:
            call.normalizer = self._state.normalizer
        if steps is None:
            return
        if self._formed_before is not None:
            call.normalizer = self._formed_before.normalizer
            return
        name = name_of_steps(steps)
        assert call.weights is not None
        own = call.opaque or self._scores.score != DOT
        scores = call.scores if own else finish_scores(dot_scores(call.q, call.k, call.scale), call.softcap, call.bias)
        call.normalizer = verified_name(name, call.weights, scores, call.mask, slack_of(call.weights.dtype))

    def _check_scores(self, call: KernelCall) -> None:
        b, h, t, _ = call.q.shape
        if call.weights is not None and tuple(call.weights.shape) != (b, h, t, call.k.shape[2]):
            raise LayoutError(
                f"the shapes do not fit: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}, weights "
                f"{tuple(call.weights.shape)}"
            )

    def _like_scores(self, key: object, x: Tensor) -> Tensor:
        return self._arranged(key, x, self._scores_arrangement)

    def _scores_arrangement(self, key: Any, x: Tensor) -> Arrangement:
        """Of what is laid out like the scores: by the axes of whatever the key names."""
        origin: Origin | None
        if key == "scores":
            origin = self._state.scores_origin
        elif key == "finite":
            assert self._scores.finite is not None
            origin = self._scores.finite[2]
        elif key[0] == "own":
            own = self._laid[key[1]].state.own
            assert own is not None
            origin = own[1]
        else:
            origin = self._laid[key[1]].origin
        assert origin is not None
        return arrangement(x.shape, self._roles.factors(origin.layout()), "BHTS")

    def _aligned(self, key: object, x: Tensor) -> Tensor:
        """What was broadcast against the scores."""
        return self._picked(self._arranged(key, x, self._term_arrangement))

    def _term_arrangement(self, key: Any, x: Tensor) -> Arrangement:
        if key == "sink":
            origin = self._state.scores_origin or self._state.origin
        elif key[0] == "shifts":
            origin = self._scores.origin
        else:
            origin = getattr(self._scores, key[0])[key[1]].origin
        layout = origin.layout()
        shape = (1,) * (len(layout) - x.dim()) + tuple(x.shape)
        made = arrangement(shape, self._roles.factors(layout, shape), "BHTS", broadcast=True)
        return made if len(shape) == x.dim() or made.split is not None else replace(made, split=shape)


def _made_anew(key: str, tensor: Tensor, make: Callable[[], Any]) -> Any:
    return make()


def _read_term(added: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """Of what was added to scores: the bias, the mask and the least of it, which is asked for beside a mask alone."""
    bias, mask = split_additive(added)
    return bias, mask, 0.0 if mask is None else float(added.detach().amin())


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None or x.dtype == dtype or not x.is_floating_point() else x.to(dtype)


def expanded(x: Tensor, b: int) -> Tensor:
    """A tensor B … of one batch entry as one of ``b``."""
    return x if x.shape[0] == b else x.expand(b, -1, -1, -1)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 3)


def operations_note(names: Sequence[str]) -> str:
    """The operations that scores or weights went through, for a note."""
    # One that sums over an axis and left scores or weights behind summed over heads; all else loses them.
    return ", ".join(names) + (" (mixed across heads)" if any(mixes_axis(x) for x in names) else "")


def differs(residual: Tensor, derived: Tensor, dtype: torch.dtype) -> bool:
    """Whether scores are more than rounding away from those that are derived from q and k.

    Args:
        residual: their difference, 0 where a key is masked.
        derived: the derived scores.
        dtype: that the model computed its scores in.
    """
    # q·k is a sum over the width, so that rounding adds up: 1e-5 is 84 units in the last place of float32, 2e-2 are 20
    # of float16 and 3 of bfloat16. What a model does to scores on purpose changes them by more than that.
    largest = max(1.0, float(derived.detach().abs().amax()))
    return float(residual.detach().abs().amax()) > slack_of(dtype) * largest


def slack_of(dtype: torch.dtype) -> float:
    """The relative difference that is rounding still, of numbers that were computed in a dtype."""
    return {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
