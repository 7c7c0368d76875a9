"""Products of two tensors while a model runs: scores are made, heads are mixed, weights meet the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...attention.kernel_call import KernelCall
from ...torch_internals.tensor_identity import version_of
from ..base import ActiveTrace
from .assemble import CallBuilder, contracts_keys
from .assemble_scattered import scattered_call
from .axis_history import Atom, Origin, known, sizes
from .entries import Entries
from .product_labels import ParsedProduct
from .products import Label, LayoutError, Product, mixes_heads
from .states import (
    PartialOutput,
    ScatteredOutput,
    ScatteredValueProduct,
    ScatteredWeights,
    Scores,
    SoftmaxUse,
    State,
    Term,
    ValueProduct,
    Weights,
)

_NOT_KEYS = "softmax over an axis that the product with the values does not sum over"
_NO_PRODUCT = "softmax over something that is not a product of queries and keys"


class KnownTensors(Protocol):
    """What is known of the tensors of a running model: the part of the function mode that products need.

    The mode calls the functions below, so this file names what it needs and does not import the mode.
    """

    @property
    def recorder(self) -> ActiveTrace:
        """Gets the attention calls that are seen."""

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


class _Product(NamedTuple):
    """A product with one operand that is followed, and its labels.

    Attributes:
        name: the operation.
        x, x_labels: the operand that is followed.
        other, other_labels: the other one, ``v`` if it is followed weights that it meets.
        out, out_labels: the result.
    """

    name: str
    x: Tensor
    x_labels: Sequence[Label]
    other: Tensor
    other_labels: Sequence[Label]
    out: Tensor
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


def note_product(watch: KnownTensors, name: str, parsed: ParsedProduct, out: Tensor) -> None:
    """Scores, or weights meeting the values, or heads being mixed; else one of a model's many other products."""
    a, b, labels = parsed.a, parsed.b, parsed.labels
    with torch.no_grad():
        # Mostly nothing is followed, and then no operand has to be looked up.
        for product in (
            (
                _Product(name, a, labels.a, b, labels.b, out, labels.out),
                _Product(name, b, labels.b, a, labels.a, out, labels.out),
            )
            if watch.live
            else ()
        ):
            if _note_followed(watch, product, watch.state(product.x)):
                return
        _note_scores(watch, parsed, out)


def _note_followed(watch: KnownTensors, product: _Product, state: State | None) -> bool:
    """Whether an operand is part of an attention already; then it is noted what its product is."""
    if isinstance(state, Weights):
        _note_weights(watch, product, state)
    elif isinstance(state, ScatteredWeights):
        _note_scattered_weights(watch, product, state)
    elif isinstance(state, Scores) and mixes_heads(state.product, product.summed(state.origin)):
        if product.out.shape == product.x.shape:
            watch.set_origin(product.out, state.origin)
            watch.set_state(product.out, state.but(opaque=[*state.opaque, product.name], finite=None))
    else:
        return False
    return True


def _note_scores(watch: KnownTensors, parsed: ParsedProduct, out: Tensor) -> None:
    """Every product of two tensors may be q·k, and is taken for it until something else is done with it.

    Nothing is worked out here: axes are, once a softmax over them has met values.
    """
    a, b = _autocast(parsed.a, out), _autocast(parsed.b, out)
    product = Product(a, b, parsed.labels, watch.origin(parsed.a), watch.origin(parsed.b))
    product.shape = tuple(out.shape)
    origin = Origin(out.shape, product.layout)
    scores = Scores(origin, product=product, scale=parsed.alpha)
    if parsed.added is not None:
        scores.terms.append(Term(parsed.added[0], origin, parsed.added[1]))
    watch.set_origin(out, origin)
    watch.set_state(out, scores)


def _note_weights(watch: KnownTensors, product: _Product, state: Weights) -> None:
    """A product with weights: of values if it sums over the keys, else of heads that are mixed."""
    try:
        if not contracts_keys(state, product.x_labels, product.contracted, state.origin):
            _note_mixed_weights(watch, product, state)
        elif state.scores is None:
            _finish(state.use)
            watch.recorder.skip(state.why or _NO_PRODUCT)
        else:
            _note_values(watch, product, state)
    except LayoutError as error:
        _finish(state.use)
        watch.recorder.skip(str(error))


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


def _note_values(watch: KnownTensors, product: _Product, state: Weights) -> None:
    """Weights met the values of all their keys, and the call is complete; or of some, and the others are waited for."""
    values = ValueProduct(
        product.x,
        product.x_labels,
        state.origin,
        product.other,
        product.other_labels,
        watch.origin(product.other),
        product.out,
        product.out_labels,
    )
    if state.key_range is not None:
        _begin_sum(watch, state, values)
        return
    _finish(state.use)
    _record(watch, CallBuilder([(state, values)], product.out).call(), state.use)


def _finish(use: SoftmaxUse | None) -> None:
    if use is not None:
        use.done = True


def _record(watch: KnownTensors, call: KernelCall, use: SoftmaxUse | None) -> None:
    call.path = _around(use, watch.recorder.where())
    watch.recorder.record(call)


def _begin_sum(watch: KnownTensors, state: Weights, use: ValueProduct) -> None:
    """The values of some of the keys: the output once those of the others are added."""
    dims = dict(zip(use.weights_labels, use.weights_origin.layout(), strict=True))
    layout = []
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
        version=version_of(product.x),
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
        watch.recorder.skip(f"{use.why}: {error}")
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
        call = CallBuilder(state.parts, out, state.origin).call()
    except LayoutError as error:
        watch.recorder.skip(str(error))
        return
    _record(watch, call, use)


def _around(use: SoftmaxUse | None, path: str | None) -> str | None:
    """The module around both the softmax and its product with the values."""
    if use is None or use.path is None or path is None or use.path == path:
        return path
    both = []
    for a, b in zip(use.path.split("."), path.split("."), strict=False):
        if a != b:
            break
        both.append(a)
    return ".".join(both)


def _autocast(x: Tensor, out: Tensor) -> Tensor:
    """The operand as the product read it: autocast casts it inside the function, where nobody sees it."""
    return x if x.dtype == out.dtype or not x.is_floating_point() else x.to(out.dtype)
