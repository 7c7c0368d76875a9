"""Products of two tensors while a model runs: scores are made, heads are mixed, weights meet the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from ...attention.kernel_call import DOT, KernelCall
from ...torch_internals.isolation import no_gradients
from ...torch_internals.tensor_identity import storage_of
from .assemble import CallBuilder, contracts_keys
from .assemble_plain import plain_call
from .assemble_scattered import scattered_call
from .axis_history import Atom, Origin, known, sizes
from .blockwise import unnormalized_call
from .decisions import decide, version_then
from .entries import Entries
from .pairwise import scores_of_pairs
from .product_labels import ParsedEinsum, ParsedProduct
from .products import Label, LayoutError, Product, ProductLabels, mixes_heads
from .states import (
    Exponentials,
    Instead,
    Pairwise,
    PartialOutput,
    ScatteredOutput,
    ScatteredValueProduct,
    ScatteredWeights,
    Scores,
    SoftmaxUse,
    State,
    Term,
    Unnormalized,
    ValueProduct,
    WeightedValues,
    Weights,
)
from .weight_rules import new_weights
from .weightless import CARRIED, POOLED, carried_pairs, delta_rule, sums_of_positions

_NOT_KEYS = "softmax over an axis that the product with the values does not sum over"
_COMPOSED = "softmax over q·k whose result was multiplied with other weights before any values"
_SEVERAL = (
    "weights, values and a third tensor are multiplied in one einsum, so that no tensor of the model is the output"
)


class KnownTensors(Protocol):
    """What is known of the tensors of a running model: the part of the function mode that products need.

    The mode calls the functions below, so this file names what it needs and does not import the mode.
    """

    @property
    def attached(self) -> bool:
        """Whether what is made of the tensors is to be in their graph."""

    def where(self) -> str | None:
        """The path of the module that is running."""

    def tell(self, reason: str, path: str | None = None, changed: bool = False) -> None:
        """Attention ran that cannot be read.

        Args:
            reason: why not.
            path: the module; None: the one that is running.
            changed: whether a listener has changed the weights of it.
        """

    def shared(self, key: str, x: Tensor, make: Callable[[], Any]) -> Any:
        """What is made of a tensor that many layers share, once."""

    def made(self, call: KernelCall, builder: CallBuilder | None, use: SoftmaxUse | None) -> None:
        """A call is complete; ``builder``: what made it of its tensors, if nothing else has a part in it."""

    @property
    def listened(self) -> bool:
        """Whether a listener is asked about weights, values and outputs."""

    def asked(self, x: Tensor) -> Instead | None:
        """What is known of weights that a listener was asked about only as they met values; None: it was not."""

    @property
    def live(self) -> Mapping[int, Any]:
        """The tensors that have a state, by identity; mostly there are none, and then nobody has to be looked up."""

    def state(self, x: Tensor) -> State | None:
        """The state of a tensor that is part of an attention."""

    def set_state(self, x: Tensor, state: State) -> None:
        """Say what a tensor is."""

    def origin(self, x: Tensor) -> Origin:
        """Where the axes of a tensor come from."""

    def set_origin(self, x: Tensor, origin: Origin) -> Origin:
        """Say where the axes of a tensor come from."""

    def layout_here(self) -> str | None:
        """What the user said of the axes of the queries in the module that is running."""


@dataclass(frozen=True, slots=True)
class Operands:
    """The operands of a product, one of which is followed, and their labels.

    Attributes:
        name: the operation.
        x, x_labels: the operand that is followed.
        other, other_labels: the other one, ``v`` if it is followed weights that it meets.
        out_labels: those of the result.
    """

    name: str
    x: Tensor
    x_labels: Sequence[Label]
    other: Tensor
    other_labels: Sequence[Label]
    out_labels: Sequence[Label]

    @property
    def contracted(self) -> list[Label]:
        """The labels that are summed over."""
        return [x for x in self.x_labels if x in self.other_labels and x not in self.out_labels]

    def summed(self, origin: Origin) -> list[Atom]:
        """The axes of the operand that are summed over; ``origin``: where its axes come from."""
        layout = origin.layout()
        if len(layout) != len(self.x_labels):
            return []
        contracted = self.contracted
        return [a for x, dim in zip(self.x_labels, layout, strict=True) if x in contracted for a in dim]


@dataclass(frozen=True, slots=True)
class _Product(Operands):
    """A product that has run; ``out``: its result."""

    out: Tensor


def operands_of(name: str, parsed: ParsedProduct) -> tuple[Operands, Operands]:
    """The operands of a product, with either of them as the one that is followed."""
    a, b, labels = parsed.a, parsed.b, parsed.labels
    return (
        Operands(name, a, labels.a, b, labels.b, labels.out),
        Operands(name, b, labels.b, a, labels.a, labels.out),
    )


def note_product(watch: KnownTensors, name: str, parsed: ParsedProduct, out: Tensor) -> None:
    """Scores, or weights meeting the values, or heads being mixed; else one of a model's many other products."""
    a, b, labels = parsed.a, parsed.b, parsed.labels
    with no_gradients(but=watch.attached):
        # Mostly nothing is followed, and then no operand has to be looked up.
        for product in (
            (
                _Product(name, a, labels.a, b, labels.b, labels.out, out),
                _Product(name, b, labels.b, a, labels.a, labels.out, out),
            )
            if watch.live
            else ()
        ):
            if _note_followed(watch, product, watch.state(product.x)):
                return
        states = [watch.state(x) for x in (a, b)] if watch.live else []
        _note_scores(watch, parsed, out, any(map(is_part, states)), any(map(_of_activations, states)))


def _note_followed(watch: KnownTensors, product: _Product, state: State | None) -> bool:
    """Whether an operand is part of an attention already; then it is noted what its product is."""
    if isinstance(state, Weights):
        return _note_weights(watch, product, state)
    elif isinstance(state, Unnormalized):
        finish_unnormalized(watch, state, product.x)
        return False
    elif isinstance(state, Exponentials):
        return _note_exponentials(watch, product, state)
    elif isinstance(state, ScatteredWeights):
        _note_scattered_weights(watch, product, state)
    elif isinstance(state, Scores) and mixes_heads(state.product, product.summed(state.origin)):
        if product.out.shape == product.x.shape:
            watch.set_origin(product.out, state.origin)
            watch.set_state(product.out, state.but(opaque=[*state.opaque, product.name], finite=None))
    elif isinstance(state, Scores) and delta_rule(state, watch.state(product.other)):
        watch.tell(CARRIED)
        return False
    elif isinstance(state, Scores) and (weights := weights_without_softmax(watch, product, state)) is not None:
        return _note_weights(watch, product, weights)
    elif isinstance(state, Pairwise) and (scores := _mapped_pairs(watch, product, state)) is not None:
        watch.set_origin(product.out, scores.origin)
        watch.set_state(product.out, scores)
    elif isinstance(state, (Scores, Pairwise)):
        _note_weightless(watch, product, state)
        return False
    else:
        return False
    return True


def _mapped_pairs(watch: KnownTensors, product: _Product, state: Pairwise) -> Scores | None:
    """What a learned vector makes of every pair, or a matrix of it with a column for each head: scores."""
    if watch.origin(product.other).birth != "parameter" or len(product.contracted) != 1:
        return None
    at = list(product.x_labels).index(product.contracted[0])
    kept = [y for y in product.x_labels if y not in product.contracted]
    own = [y for y in product.out_labels if y not in kept]
    if [y for y in product.out_labels if y in kept] != kept or len(own) > 1 or len(state.dims) != len(product.x_labels):
        return None
    if own and (at != len(product.x_labels) - 1 or product.out_labels[-1] != own[0]):
        return None
    return scores_of_pairs(state, at, product.out, product.name)


def _note_weightless(watch: KnownTensors, product: _Product, state: Scores | Pairwise) -> None:
    """A product with what two activations made: of positions that are mixed by data without weights, perhaps."""
    if is_part(watch.state(product.other)) or watch.origin(product.other).birth == "parameter":
        return
    if isinstance(state, Scores):
        why = sums_of_positions(state, product.x_labels, product.contracted)
    else:
        dims = [i for i, label in enumerate(product.x_labels) if label in product.contracted]
        why = carried_pairs(state, dims) if len(state.dims) == len(product.x_labels) else None
    if why is not None:
        watch.tell(why)


def weights_without_softmax(watch: KnownTensors, product: Operands, state: Scores) -> Weights | None:
    """Scores that meet the values of their keys as they are, or as something else than a softmax made them: weights.

    Products of activations are many things. These are weights where a sum runs over one axis that is the keys' alone,
    of positions and not of features, and each key has a vector.
    """
    scores, of = state.before or state, state.product
    learned = {x for x, o in (("a", of.origin_a), ("b", of.origin_b)) if o.birth == "parameter"}
    if state.composed or state.chained or (learned and (len(learned) == 2 or not state.steps)):
        return None
    met = watch.state(product.other)
    if is_part(met) or _of_activations(met) or watch.origin(product.other).birth == "parameter":
        return None
    vectors = [y for y in product.other_labels if y not in product.x_labels and y in product.out_labels]
    layout = state.origin.layout()
    if len(product.contracted) != 1 or not vectors or len(layout) != len(product.x_labels):
        return None
    at = list(product.x_labels).index(product.contracted[0])
    keys = _roots(of, layout[at])
    if len({of.axes[a].side for a in keys} or {_side_of_one(of, state.origin, at)} - {"batch"}) != 1:
        return None
    if any(of.axes[a].side == "batch" for a in keys) or learned & {of.axes[a].side for a in keys}:
        return None
    if any(s.birth in ("feature", "parameter") for a in keys for s in of.axes[a].sources):
        return None
    made = any(a.birth == "feature" for side in of.widths.values() for a in side)
    if not state.steps and (not made or (of.of_one and decide(_share_memory, of.a, product.other))):
        return None  # nothing was done to them: products of one tensor, or such that no learned map made q or k
    dim = next((i for i, atoms in enumerate(scores.origin.layout()) if keys & _roots(of, atoms)), None)
    if not keys:  # one key: its axis has an extent of 1
        label = of.label_of(state.origin, at)
        dims = range(len(scores.origin.shape))
        dim = next((i for i in dims if of.label_of(scores.origin, i) == label), None)
    if dim is None:
        return None
    tensor = scores.held[0] if scores.held and scores.held[1] == version_then(scores.held[0]) else None
    asked = watch.asked(product.x)
    if state.before is None:
        tensor = product.x if asked is None else asked.of()
    return Weights(
        state.origin,
        scores=scores,
        scores_origin=scores.origin,
        dim=dim,
        own=None if state.dropped is None else state.dropped[:2],
        scores_tensor=tensor,
        dropout=0.0 if state.dropped is None else state.dropped[2],
        dtype=product.x.dtype,
        steps=state.steps,
        use=None if asked is None else asked.use,
    )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one storage."""
    return storage_of(a) == storage_of(b)


def _side_of_one(of: Product, origin: Origin, at: int) -> str:
    """Which operand the keys are of, where they are one and no axis tells: by the label of their dimension."""
    label = of.label_of(origin, at)
    if label is None:
        return "batch"
    return "batch" if (label in of.la) == (label in of.lb) else "a" if label in of.la else "b"


def is_part(state: State | None) -> bool:
    """Whether a tensor is weights, or made of some, so that it is no values."""
    return isinstance(state, (Weights, Exponentials)) or (isinstance(state, Scores) and state.composed)


def _of_activations(state: State | None) -> bool:
    """Whether a tensor is a product of two activations."""
    if not isinstance(state, Scores) or state.product.learned:
        return False
    return "parameter" not in (state.product.origin_a.birth, state.product.origin_b.birth)


def _roots(product: Product, atoms: Sequence[Atom]) -> set[Atom]:
    """The axes of a product that these are, or are parts of."""
    return {found for x in atoms if (found := x.nearest(product.axes)) is not None}


def _note_scores(watch: KnownTensors, parsed: ParsedProduct, out: Tensor, composed: bool, chained: bool) -> None:
    """Every product of two tensors may be q·k, and is taken for it until something else is done with it.

    Nothing is worked out here: axes are, once a softmax over them has met values.
    """
    a, b = parsed.a, parsed.b
    product = Product(a, b, parsed.labels, watch.origin(a), watch.origin(b))
    product.shape, product.given, product.dtype = tuple(out.shape), watch.layout_here, out.dtype
    if watch.listened:
        product.path = watch.where()
    origin = Origin(out.shape, product.layout)
    opaque = [] if parsed.score == DOT else [parsed.score]
    scores = Scores(
        origin,
        product=product,
        scale=parsed.alpha,
        composed=composed,
        chained=chained,
        score=parsed.score,
        opaque=opaque,
    )
    if parsed.added is not None:
        scores.terms.append(Term(parsed.added[0], origin, parsed.added[1]))
    watch.set_origin(out, origin)
    watch.set_state(out, scores)


def _note_weights(watch: KnownTensors, product: _Product, state: Weights) -> bool:
    """A product with weights: of values if it sums over the keys, or of heads that are mixed; whether it is either."""
    try:
        over = _weights_of_keys(product, state)
        if over is not None and is_part(watch.state(product.other)):  # an inverse of weights that is iterated, say
            if state.use is not None:
                state.use.why = _COMPOSED
            return False
        if over is None:
            _note_mixed_weights(watch, product, state)
            return True
        _note_axes(watch, product, over)
        if over.scores is None and over.why:
            _finish(over.use)
            watch.tell(over.why)
        elif over.scores is None:
            _note_plain(watch, product, over)
        else:
            _note_values(watch, product, over)
    except LayoutError as error:
        _finish(state.use)
        watch.tell(str(error), changed=_changed(state))
    return True


def _changed(state: Weights) -> bool:
    """Whether a listener has changed weights as they were formed."""
    return state.use is not None and state.use.formed is not None and state.use.formed.changed


def _weights_of_keys(product: Operands, state: Weights) -> Weights | None:
    """The weights, if the product sums over their keys."""
    if contracts_keys(state, product.x_labels, product.contracted, state.origin):
        return state
    return _weights_over_others(product, state)


def weights_that_meet(watch: KnownTensors, product: Operands) -> Weights | None:
    """The weights that are about to meet the values of all their keys, in a product that has not run yet.

    Raises:
        LayoutError: the axes can't be told apart.
    """
    state = watch.state(product.x)
    if isinstance(state, Scores):
        if mixes_heads(state.product, product.summed(state.origin)):
            return None
        other = watch.state(product.other)
        state = None if delta_rule(state, other) else weights_without_softmax(watch, product, state)
    over = _weights_of_keys(product, state) if isinstance(state, Weights) else None
    if over is None or over.key_range is not None or is_part(watch.state(product.other)):
        return None
    if over.scores is not None and over.scores.product.log_sums and over.steps is None:
        return None  # of a block of keys, perhaps
    if over.scores is None:
        return None if over.why else over
    return None if _of_parameters(over, value_product(watch, product, over)) else over


def joined_parts(state: Weights, values: ValueProduct) -> list[tuple[Weights, ValueProduct]]:
    """The weights of the other softmaxes that these were joined with, each with what the values met."""
    made = []
    for other, tensor in state.joined:
        if values.weights.shape == other.origin.shape:
            # The same weights as the other softmax has them: its own, and what the values met.
            mine = other.but(own=other.own or (tensor, other.origin))
            made.append((mine, replace(values, weights_origin=other.origin)))
    return made


def _weights_over_others(product: Operands, state: Weights) -> Weights | None:
    """Weights whose softmax ran over another axis than the keys: over the queries, say, as slots compete for inputs."""
    layout, scores = state.origin.layout(), state.scores
    if scores is None or state.scores_origin is None or state.key_range is not None or state.extended:
        return None
    if len(product.contracted) != 1 or len(layout) != len(product.x_labels):
        return None
    of = scores.product
    keys = _roots(of, layout[list(product.x_labels).index(product.contracted[0])])
    then = state.scores_origin.layout()
    dim = next((i for i, atoms in enumerate(then) if keys & _roots(of, atoms)), None)
    if dim is None or not keys or len({of.axes[a].side for a in keys} | {"batch"}) != 2:
        return None
    if any(a.birth == "feature" for a in keys):  # of a map, and no keys
        return None
    roles = of.roles(then[dim])
    over = {roles.of(a) for a in then[state.dim]} & set(_LETTERS)
    if len(over) != 1:
        return None
    return replace(
        state, dim=dim, own=state.own if state.dropout else None, mixed=[], joined=[], normalizer=_LETTERS[over.pop()]
    )


_LETTERS = {"T": "softmax over queries", "H": "softmax over heads", "B": "softmax over the batch"}


def _note_mixed_weights(watch: KnownTensors, product: _Product, state: Weights) -> None:
    out, scores = product.out, state.scores
    if (
        scores is not None
        and out.shape == product.x.shape
        and mixes_heads(scores.product, product.summed(state.origin))
    ):
        mixed = [*state.mixed, product.name]
        watch.set_origin(out, state.origin)
        watch.set_state(out, replace(state, own=state.own or (product.x, state.origin), mixed=mixed))
    elif state.use is not None:
        state.use.why = _NOT_KEYS


def value_product(watch: KnownTensors, product: Operands, state: Weights) -> ValueProduct:
    """A product of weights and values."""
    return ValueProduct(
        product.x,
        product.x_labels,
        state.origin,
        product.other,
        product.other_labels,
        watch.origin(product.other),
        product.out if isinstance(product, _Product) else None,
        product.out_labels,
    )


def _of_parameters(state: Weights, values: ValueProduct) -> bool:
    """Whether keys and values are learned, both: a vocabulary, classes, experts; no position meets another."""
    assert state.scores is not None and state.scores_origin is not None
    of = state.scores.product
    keys = of.roles_over(state.scores_origin, state.dim).keys
    return values.v_origin.birth == (of.origin_a if keys == "a" else of.origin_b).birth == "parameter"


def _note_axes(watch: KnownTensors, product: _Product, state: Weights) -> None:
    """Say where the axes of weights times values come from: queries from the weights, the width from the values."""
    weights, values = state.origin.layout(), watch.origin(product.other).layout()
    if len(weights) != len(product.x_labels) or len(values) != len(product.other_labels):
        return
    dims = dict(zip(product.other_labels, values, strict=True)) | dict(zip(product.x_labels, weights, strict=True))
    layout = tuple(dims[label] for label in product.out_labels)
    if sizes(layout) == product.out.shape:
        watch.set_origin(product.out, known(layout))


def _note_values(watch: KnownTensors, product: _Product, state: Weights) -> None:
    """Weights met the values of all their keys, and the call is complete; or of some, and the others are waited for."""
    values = value_product(watch, product, state)
    if state.key_range is not None:
        _begin_sum(watch, state, values)
        return
    _finish(state.use)
    if state.scores is not None and _of_parameters(state, values):
        return
    if state.scores is not None and state.scores.product.log_sums and state.steps is None:
        # Somebody took the logsumexp of the same scores: the output may be merged with that of other keys.
        use = SoftmaxUse(watch.where())
        origin = watch.origin(product.out)
        watch.set_state(product.out, Unnormalized(origin, parts=[(state, values)], use=use, normalized=True))
        return
    _build(watch, CallBuilder([(state, values)], product.out), state.use)
    for other, _ in state.joined:
        _finish(other.use)
    for mine, theirs in joined_parts(state, values):
        _build(watch, CallBuilder([(mine, theirs)], product.out), mine.use)


def _note_exponentials(watch: KnownTensors, product: _Product, state: Exponentials) -> bool:
    """Exponentials met values, and are divided by their sum later on: whether they did."""
    layout = state.origin.layout()
    if len(product.contracted) != 1 or len(layout) != len(product.x_labels) or is_part(watch.state(product.other)):
        return False
    at = list(product.x_labels).index(product.contracted[0])
    weights = new_weights(state.of, state.origin, state.origin, at, None)
    weights.dtype = product.x.dtype
    try:
        if not contracts_keys(weights, product.x_labels, product.contracted, state.origin):
            return False
        values = value_product(watch, product, weights)
    except LayoutError:
        return False
    origin = watch.origin(product.out)
    use = SoftmaxUse(watch.where())
    watch.set_state(product.out, Unnormalized(origin, parts=[(weights, values)], use=use))
    return True


def finish_unnormalized(watch: KnownTensors, state: Unnormalized, out: Tensor) -> None:
    """Something else than scaling and adding is done with a sum of weighted values: it is an output, or it is said why
    not."""
    use = state.use
    if use is None or use.done:
        return
    use.done = True
    try:
        if state.version != version_then(out):
            raise LayoutError("sums of weighted values were written to")
        if len(state.parts) > 1 and any(_changed(weights) for weights, _ in state.parts):
            raise LayoutError("blocks of keys are merged whose weights were changed as they were formed")
        call = unnormalized_call(state, out)
    except LayoutError as error:
        watch.tell(str(error), use.path)
        return
    call.path = use.path
    uses = [w.use for w, _ in state.parts if w.use is not None]
    watch.made(call, None, uses[0] if len(state.parts) == 1 and uses else None)


def _note_plain(watch: KnownTensors, product: _Product, state: Weights) -> None:
    """Weights whose scores are no product of queries and keys met values, or something that a router chooses from."""
    made = plain_call(state, value_product(watch, product, state))
    if isinstance(made, str):
        watch.tell(made)
    elif made is not None:
        _record(watch, made.call, state.use)


def note_weighted_sum(watch: KnownTensors, state: WeightedValues, out: Tensor) -> None:
    """Values, each times its weight, were summed: a product of weights and values, if the sum runs over the keys."""
    of = state.state
    if isinstance(of, Weights) and of.met is state.v:
        if watch.origin(state.v).birth != "parameter":
            watch.tell(POOLED)
        return
    labels = [y for y in sorted({*state.labels, *state.v_labels}) if y not in state.summed]
    kept = out.squeeze(tuple(state.summed)) if out.dim() > len(labels) else out
    if kept.dim() != len(labels) or any(y not in state.labels or y not in state.v_labels for y in state.summed):
        return
    product = _Product("sum", state.weights, state.labels, state.v, state.v_labels, labels, kept)
    if isinstance(of, Exponentials):
        _note_exponentials(watch, product, of)
        return
    weights = of if isinstance(of, Weights) else weights_without_softmax(watch, product, of)
    if weights is not None:
        _note_weights(watch, product, weights)


def note_several(watch: KnownTensors, parsed: ParsedEinsum, out: Tensor) -> None:
    """An einsum of three tensors or more: q·M·k, or weights, values and an output projection in one."""
    with no_gradients(but=watch.attached):
        states = [watch.state(x) for x in parsed.operands] if watch.live else [None] * len(parsed.operands)
        for one, state, labels in zip(parsed.operands, states, parsed.labels, strict=True):
            if isinstance(state, Pairwise) or _of_activations(state):
                others = [y for x, o in zip(parsed.operands, parsed.labels, strict=True) if x is not one for y in o]
                met = _Product("einsum", one, labels, out, others, parsed.out, out)
                assert isinstance(state, (Scores, Pairwise))
                _note_weightless(watch, met, state)
                return
            summed = [x for x in labels if x not in parsed.out]
            if (
                isinstance(state, Weights)
                and (state.use is None or not state.use.done or state.scores is None)
                and summed
            ):
                if state.scores is not None:
                    _finish(state.use)
                    watch.tell(_SEVERAL)
                return
        _note_bilinear(watch, parsed, out)


def _note_bilinear(watch: KnownTensors, parsed: ParsedEinsum, out: Tensor) -> None:
    """``q·M·k``: scores of the two operands that have an axis of their own in the result; q may be learned."""
    sides = [
        i
        for i, labels in enumerate(parsed.labels)
        if any(y in parsed.out and all(y not in o for j, o in enumerate(parsed.labels) if j != i) for y in labels)
    ]
    others = [set(o) for i, o in enumerate(parsed.labels) if i not in sides]
    if len(sides) != 2 or all(watch.origin(parsed.operands[i]).birth == "parameter" for i in sides):
        return
    a, b = (parsed.operands[i] for i in sides)
    la, lb = (list(parsed.labels[i]) for i in sides)
    if any(y not in {*la, *lb} for y in parsed.out):
        return
    summed_a, summed_b = ([y for y in labels if y not in parsed.out] for labels in (la, lb))
    if not summed_a or len(summed_a) != len(summed_b) or not any(o & {*summed_a} for o in others):
        return
    lb = [summed_a[summed_b.index(y)] if y in summed_b else y for y in lb]
    product = Product(a, b, ProductLabels(la, lb, parsed.out), watch.origin(a), watch.origin(b))
    product.shape, product.given = tuple(out.shape), watch.layout_here
    origin = Origin(out.shape, product.layout)
    watch.set_origin(out, origin)
    watch.set_state(out, Scores(origin, product=product, score="bilinear", opaque=["einsum"]))


def _finish(use: SoftmaxUse | None) -> None:
    if use is not None:
        use.done = True


def _build(watch: KnownTensors, builder: CallBuilder, use: SoftmaxUse | None) -> None:
    _record(watch, builder.call(shared=watch.shared), use, builder)


def _record(watch: KnownTensors, call: KernelCall, use: SoftmaxUse | None, builder: CallBuilder | None = None) -> None:
    call.path = around(None if use is None else use.path, watch.where())
    watch.made(call, builder, use)


def _begin_sum(watch: KnownTensors, state: Weights, use: ValueProduct) -> None:
    """The values of some of the keys: the output once those of the others are added."""
    dims = dict(zip(use.weights_labels, use.weights_origin.layout(), strict=True))
    layout = []
    assert use.out is not None
    for label, extent in zip(use.out_labels, use.out.shape, strict=True):
        if label not in dims:
            use.width += () if extent == 1 else (Atom(extent),)
            layout.append(use.width[-1:] if extent != 1 else ())
        else:
            layout.append(dims[label])
    if sizes(tuple(layout)) != use.out.shape:
        raise LayoutError("a slice of the weights was multiplied with values that have more of an axis than it")
    if state.use is not None:
        state.use.why = "only a part of the weights of a softmax over q·k was multiplied with values, or was summed up"
    origin = known(tuple(layout))
    watch.set_origin(use.out, origin)
    watch.set_state(use.out, PartialOutput(origin, parts=[(state, use)]))


def _note_scattered_weights(watch: KnownTensors, product: _Product, state: ScatteredWeights) -> None:
    """Scattered weights met some values: what they add up to is the output once every weight has met one."""
    met = ScatteredValueProduct(
        entries=state.entries,
        weights=product.x,
        w_labels=product.x_labels,
        v=product.other,
        v_labels=product.other_labels,
        out=product.out,
        out_labels=product.out_labels,
        own=state.own,
        dropout=state.dropout,
        version=version_then(product.x),
    )
    entries = Entries(source=met, shape=tuple(product.out.shape))
    output = ScatteredOutput(watch.origin(product.out), root=state.root, uses=[met], entries=[entries])
    if not finish_scattered(watch, output, product.out):
        watch.set_state(product.out, output)


def finish_scattered(watch: KnownTensors, state: ScatteredOutput, out: Tensor) -> bool:
    """Whether all weights have met their values: then the call is reported, or why it can't be read."""
    use = state.root.use
    if use.done:
        return True
    try:
        call = scattered_call(state.root, state.uses, out, state.entries)
    except LayoutError as error:
        use.done = True
        watch.tell(f"{use.why}: {error}")
        return True
    if call is None:
        return False
    use.done = True
    _record(watch, call, use)
    return True


def finish_sum(watch: KnownTensors, state: PartialOutput, out: Tensor) -> None:
    """The values of all the keys are in: ``out`` is the kernel's output."""
    use = state.parts[0][0].use
    _finish(use)
    try:
        _build(watch, CallBuilder(state.parts, out, state.origin), use)
    except LayoutError as error:
        watch.tell(str(error))


def around(softmax: str | None, path: str | None) -> str | None:
    """The module around both the softmax and its product with the values."""
    if softmax is None or path is None or softmax == path:
        return path
    both = []
    for a, b in zip(softmax.split("."), path.split("."), strict=False):
        if a != b:
            break
        both.append(a)
    return ".".join(both)
