"""Products of two tensors while a model runs: scores are made, heads are mixed, weights meet the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ...torch_internals.tensor_identity import version_of
from ..base import ActiveTrace
from .assemble import CallBuilder, contracts_keys
from .assemble_scattered import dense
from .axis_history import Atom, Origin, known, sizes
from .entries import Entries
from .product_labels import Parsed
from .products import Label, LayoutError, Product, mixes_heads
from .states import Gathered, Met, Scores, Spread, State, Sum, Term, Use, ValueProduct, Weights

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


def note_product(watch: KnownTensors, name: str, parsed: Parsed, out: Tensor) -> None:
    """Scores, or weights meeting the values, or heads being mixed; else one of a model's many other products."""
    a, b, labels, alpha, beta = parsed
    for i, x in enumerate((a, b)):
        state = watch.state(x) if watch.live else None
        if isinstance(state, Weights):
            with torch.no_grad():
                _weights_product(watch, name, state, i, (a, b), labels, out)
            return
        if isinstance(state, Spread):
            with torch.no_grad():
                _spread_product(watch, state, i, (a, b), labels, out)
            return
        if isinstance(state, Scores) and mixes_heads(state.product, _summed(state, i, labels)):
            if out.shape == x.shape:
                watch.set_origin(out, state.origin)
                watch.set_state(out, state.but(opaque=[*state.opaque, name], finite=None))
            return
    with torch.no_grad():
        product = Product(_autocast(a, out), _autocast(b, out), labels, watch.origin(a), watch.origin(b))
    product.shape = tuple(out.shape)
    origin = Origin(out.shape, product.layout)
    scores = Scores(origin, product=product, scale=alpha)
    if beta is not None:
        scores.terms.append(Term(beta[0], origin, beta[1]))
    watch.set_origin(out, origin)
    watch.set_state(out, scores)


def _weights_product(
    watch: KnownTensors,
    name: str,
    state: Weights,
    index: int,
    operands: tuple[Tensor, Tensor],
    labels: tuple[list[Label], list[Label], list[Label]],
    out: Tensor,
) -> None:
    w, v = operands[index], operands[1 - index]
    w_labels, v_labels = labels[index], labels[1 - index]
    contracted = [x for x in w_labels if x in v_labels and x not in labels[2]]
    try:
        if not contracts_keys(state, w_labels, contracted, state.origin):
            atoms = _summed(state, index, labels)
            if out.shape == w.shape and state.scores is not None and mixes_heads(state.scores.product, atoms):
                mixed = replace(state, own=state.own or (w, state.origin), mixed=[*state.mixed, name])
                watch.set_origin(out, state.origin)
                watch.set_state(out, mixed)
            elif state.use is not None:
                state.use.why = _NOT_KEYS
            return
        if state.scores is None:
            if state.use is not None:
                state.use.done = True
            watch.recorder.skip(state.why or _NO_PRODUCT)
            return
        use = ValueProduct(w, w_labels, state.origin, v, v_labels, watch.origin(v), out, labels[2])
        if state.share is not None:
            _begin_sum(watch, state, use)
            return
        if state.use is not None:
            state.use.done = True
        call = CallBuilder([(state, use)], out).call()
    except LayoutError as error:
        if state.use is not None:
            state.use.done = True
        watch.recorder.skip(str(error))
        return
    call.path = _around(state.use, watch.recorder.where())
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
    watch.set_state(use.out, Sum(origin, parts=[(state, use)]))


def _spread_product(
    watch: KnownTensors,
    state: Spread,
    index: int,
    operands: tuple[Tensor, Tensor],
    labels: tuple[list[Label], list[Label], list[Label]],
    out: Tensor,
) -> None:
    w, v = operands[index], operands[1 - index]
    met = Met(
        state.entries, w, labels[index], v, labels[1 - index], out, labels[2], state.own, state.dropout, version_of(w)
    )
    entries = Entries(source=met, shape=tuple(out.shape))
    gathered = Gathered(watch.origin(out), root=state.root, uses=[met], entries=[entries])
    if not finish_gathered(watch, gathered, out):
        watch.set_state(out, gathered)


def finish_gathered(watch: KnownTensors, state: Gathered, out: Tensor) -> bool:
    """Whether all weights have met their values: then the call is reported, or why it can't be read."""
    use = state.root.use
    if use.done:
        return True
    try:
        call = dense(state.root, state.uses, out, state.entries)
    except LayoutError as error:
        use.done = True
        watch.recorder.skip(f"{use.why}: {error}")
        return True
    if call is None:
        return False
    use.done = True
    call.path = _around(use, watch.recorder.where())
    watch.recorder.record(call)
    return True


def finish_sum(watch: KnownTensors, state: Sum, out: Tensor) -> None:
    """The values of all the keys are in: ``out`` is the kernel's output."""
    use = state.parts[0][0].use
    if use is not None:
        use.done = True
    try:
        call = CallBuilder(state.parts, out, state.origin).call()
    except LayoutError as error:
        watch.recorder.skip(str(error))
        return
    call.path = _around(use, watch.recorder.where())
    watch.recorder.record(call)


def _around(use: Use | None, path: str | None) -> str | None:
    """The module around both the softmax and its product with the values."""
    if use is None or use.path is None or path is None or use.path == path:
        return path
    both = []
    for a, b in zip(use.path.split("."), path.split("."), strict=False):
        if a != b:
            break
        both.append(a)
    return ".".join(both)


def _summed(state: Weights | Scores, index: int, labels: tuple[list[Label], list[Label], list[Label]]) -> list[Atom]:
    """The axes of an operand that a product sums over."""
    layout, own, other, out = state.origin.layout(), labels[index], labels[1 - index], labels[2]
    if len(layout) != len(own):
        return []
    return [a for x, dim in zip(own, layout, strict=True) if x in other and x not in out for a in dim]


def _autocast(x: Tensor, out: Tensor) -> Tensor:
    return x if x.dtype == out.dtype or not x.is_floating_point() else x.to(out.dtype)
