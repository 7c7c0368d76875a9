"""What a listener is asked about attention that is written out by hand, and how its answers get into the model.

There is no kernel here that could be given other arguments: an operation of the model is run with another tensor in
place of its operand, or what it returned is exchanged. Other rows and other heads stay bit for bit what they were,
since tensors are put into the model's layout by moving entries about (:meth:`.products.Arrangement.back`).

============================================================  ==============  =========================  ==============
how the attention is written                                  weights         values                     output
                                                              (``formed``)    (``before``)               (``after``)
============================================================  ==============  =========================  ==============
softmax over scores; exp over its sum; exp of log_softmax;    as it returns   as an operand of the       as the product
with a sink's column; over scores of several products; over   them            product                    returns it
the largest scores, put back among all keys
another normalizer than a softmax (relu, sigmoid, none), or   as an operand   likewise                   likewise
a query that is learned: told by the values that they meet    of the product
                                                              with values
the same after a dropout                                      no              likewise                   likewise
softmax over what is no product of queries and keys           no              likewise                   likewise
weights that are multiplied with values and summed after      as above        no                         of the sum
weights that are cut along the keys                           as above        no                         of the sum
exponentials divided after they met the values; blocks of     no              no                         before it is
keys that are merged; a softmax beside which the logsumexp                                               used
of the same scores is taken, as for a merge
scores that lie elsewhere: bands, blocks in a buffer          no              no                         of the product
                                                                                                         or sum
============================================================  ==============  =========================  ==============

Values are asked about as they are recorded, B G S E: heads that the model copied to share them among query heads are
changed together. Where it says *no*, :meth:`~hookattn.taps.base.ActiveTrace.after` is asked with weights and values as
they were, and what the listener wants of these it has to compute for the output. Where an output was used already as it
turned out to be one, a call is recorded without being asked about, which the trace says to the listener.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...attention.kernel_call import KernelCall
from ...errors import EditError
from ...torch_internals.allocation import laid_as
from ...torch_internals.tensor_identity import storage_of, version_of
from ...torch_internals.transforms import stands_for_others
from .assemble import CallBuilder, values_back
from .assemble_plain import plain_call
from .axis_history import Atom, Origin, extent_of, known, resized
from .operation import OperationKind
from .product_labels import ParsedProduct
from .products import Arrangement, LayoutError
from .score_side import LaidWeights, ScoreSide
from .states import Formed, Instead, SoftmaxUse, State, Unnormalized, Weights
from .value_products import (
    KnownTensors,
    Operands,
    around,
    finish_unnormalized,
    joined_parts,
    operands_of,
    value_product,
    weights_that_meet,
)

if TYPE_CHECKING:
    from ..base import ActiveTrace

_VALUES = frozenset({"v"})


class Followed(NamedTuple):
    """The argument of an operation that is part of an attention: its place among the arguments, and its state."""

    position: int
    x: Tensor
    state: State


class Begun(NamedTuple):
    """An operation that is about to run."""

    name: str
    kind: OperationKind
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    found: Followed | None = None
    writes: bool = False
    parsed: ParsedProduct | None = None


class Following(KnownTensors, Protocol):
    """The part of the function mode that is needed to run its operations with other tensors.

    The mode calls what is here, so this file names what it needs and does not import the mode.
    """

    @property
    def recorder(self) -> ActiveTrace:
        """The running trace."""

    def before(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Begun:
        """An operation is about to run."""

    def after(self, begun: Begun, out: Any) -> None:
        """It ran."""

    def same(self, x: Tensor, like: Tensor) -> None:
        """Say that a tensor is what another is."""

    def attempt(self, name: str, action: Callable[..., Any], *args: Any) -> Any:
        """Do something whose faults are no errors of the model's; None: there was one, which was reported."""


class _Completed(NamedTuple):
    """A call that is to be told to the listener and recorded."""

    call: KernelCall
    builder: CallBuilder | None
    use: SoftmaxUse | None


class Exchange:
    """Runs the operations of a trace that somebody listens to.

    What is found while an operation is followed is noted, and the listener asked afterwards: its errors are its own,
    and none of following.

    Args:
        follower: the function mode.
    """

    def __init__(self, follower: Following):
        self._follower, self.recorder = follower, follower.recorder
        self._formed: list[tuple[Weights, Tensor]] = []
        self._completed: list[_Completed] = []
        # What was noted of a call as its values were asked about, by the product's operands.
        self._noted: list[tuple[SoftmaxUse | None, object]] = []
        self._instead: dict[int, Instead] = {}

    # What following finds

    def formed(self, weights: Weights, x: Tensor) -> None:
        """Weights were formed."""
        self._formed.append((weights, x))

    def completed(self, call: KernelCall, builder: CallBuilder | None, use: SoftmaxUse | None) -> None:
        """A call is complete."""
        self._completed.append(_Completed(call, builder, use))

    def asked(self, x: Tensor) -> Instead | None:
        """What is known of weights that were found to be some only as they met values."""
        return next((one for one in self._instead.values() if one.tensor is x), None)

    # One operation

    def follow(self, begun: Begun) -> Any:
        """Run an operation, with what takes the place of its operands; what takes the place of its result."""
        self._end_sums(begun)
        begun = self._meet_values(begun)
        out = begun.func(*begun.args, **begun.kwargs)
        self._follower.after(begun, out)
        return self._settle(begun, out)

    def finish(self) -> None:
        """The model has run: what is complete only now is recorded, and can't be changed any more."""
        for one in self._taken():
            self.recorder.record(one.call)
        self._instead.clear()

    def _settle(self, begun: Begun, out: Any) -> Any:
        formed, self._formed = self._formed, []
        for weights, x in formed:
            out = self._exchange_weights(begun, weights, x, out)
        again = False
        answered: Tensor | None = None
        for one in self._taken():
            result = one.call.result
            there = result is not None and _is_one(result, out)
            if there:
                answer = self._after(one, begun.writes, answered)
            elif result is not None and not begun.writes and _among(result, begun):
                # The operation has shown that its operand is an output. It only reads, so that it can run once more.
                answer = self._after(one, True, None)
                again = again or answer is not None
            else:
                self.recorder.record(one.call)
                continue
            if answer is None:
                continue
            if not there:
                assert result is not None
                result.copy_(answer)
            elif answered is None:
                answered = answer
        if again:
            fresh = begun.func(*begun.args, **begun.kwargs)
            if isinstance(fresh, Tensor) and isinstance(out, Tensor):
                self._follower.same(fresh, out)
            out = fresh
        return out if answered is None else self._put(answered.reshape(out.shape), out, begun.writes)

    def _taken(self) -> list[_Completed]:
        taken, self._completed = self._completed, []
        return taken

    def _put(self, new: Tensor, x: Tensor, writes: bool) -> Tensor:
        """Give the model a tensor in place of another, of which all that is known holds."""
        if writes:
            x.copy_(new)
            state = self._follower.state(x)
            if state is not None:
                self._follower.set_state(x, state)
            return x
        new = laid_as(new, x)
        self._follower.same(new, x)
        return new

    # Weights

    def _exchange_weights(self, begun: Begun, weights: Weights, x: Tensor, out: Any) -> Any:
        scores = weights.scores
        if scores is None or scores.product.learned or scores.product.log_sums or weights.use is None:
            return out
        if stands_for_others(x) or not _is_one(x, out):
            return out
        # What the operation wrote to is to be written to once more: the listener shall not hold it.
        new = self._ask_about_weights(begun.name, weights, x.clone() if begun.writes else x, weights.use)
        return out if new is None else self._put(new, out, begun.writes)

    def _ask_about_weights(self, name: str, weights: Weights, x: Tensor, use: SoftmaxUse) -> Tensor | None:
        """What is to take the place of weights, in their own layout; None: nothing."""
        made = self._follower.attempt(name, self._score_side, weights, x)
        if made is None:
            return None
        side, call, at = made
        product = side.product.path
        call.path = use.path if product is None else around(product, use.path)
        answer = self.recorder.formed(call)
        use.formed = Formed(side.axes, call.normalizer, side.outweighed, answer is not None, call.edits)
        if answer is None:
            return None
        _check("weights", answer, call.weights, call.path)
        new: Tensor = side.weights_back(answer).to(x.dtype)
        if at is None:
            return new
        dim, first = at
        rest = x.narrow(dim, 0 if first else x.shape[dim] - 1, 1)
        return torch.cat([rest, new] if first else [new, rest], dim)

    def _score_side(self, weights: Weights, x: Tensor) -> tuple[ScoreSide, KernelCall, tuple[int, bool] | None] | None:
        """What is known of weights as they are formed, and where beside them the sink's column is."""
        laid, origin, at = x, weights.origin, None
        scores = weights.scores
        assert scores is not None
        try:
            if weights.extended:
                dim = weights.keys_dim
                if dim is None:
                    return None
                at = dim, scores.sink_first
                laid = x.narrow(dim, int(scores.sink_first), x.shape[dim] - 1)
                origin = Origin(laid.shape, resized, origin)
            side = ScoreSide([LaidWeights(weights, laid, origin)])
            return side, side.formed_call(), at
        except LayoutError:  # is told of as they meet values
            return None

    # Values

    def _meet_values(self, begun: Begun) -> Begun:
        """Before a product: other weights and other values, if it is one of weights and values."""
        if begun.parsed is None:
            return begun
        for operands in operands_of(begun.name, begun.parsed):
            weights = self._follower.attempt(begun.name, self._weights_that_meet, operands)
            if weights is None:
                continue
            x = self._weights_for(begun, operands, weights)
            if x is not operands.x:
                return self._meet_values(self._with(begun, operands.x, x))
            v = self._values_for(begun, operands, weights)
            return begun if v is None else self._with(begun, operands.other, v)
        return begun

    def _weights_that_meet(self, operands: Operands) -> Weights | None:
        try:
            return weights_that_meet(self._follower, operands)
        except LayoutError:  # will be told of when it has run
            return None

    def _with(self, begun: Begun, x: Tensor, new: Tensor) -> Begun:
        """The operation with another operand."""
        args = [_replaced(one, x, new) for one in begun.args]
        kwargs = {name: _replaced(one, x, new) for name, one in begun.kwargs.items()}
        return self._follower.before(begun.name, begun.func, args, kwargs)

    def _weights_for(self, begun: Begun, operands: Operands, weights: Weights) -> Tensor:
        """The operand that is weights, or what takes its place: of weights that nothing told of before."""
        x = operands.x
        known = self._instead.get(id(x))
        if known is not None and known.of() is x and known.version == version_of(x):
            return known.tensor
        use = weights.use
        if weights.scores is None or weights.own is not None or weights.mixed or weights.joined or weights.extended:
            return x
        if (use is not None and use.formed is not None) or weights.entries is not None or stands_for_others(x):
            return x
        if not (weights.scores.product.learned or weights.steps is not None):
            return x
        if use is None:
            use = weights.use = SoftmaxUse(self._follower.where(), done=True)
        new = self._ask_about_weights(begun.name, weights, x, use)
        if use.formed is None:
            return x
        if new is None:
            new = x
        else:
            self._follower.same(new, x)
        state = self._follower.state(new)
        if isinstance(state, Weights):
            state.use = use

        def gone(ref: Any, key: int = id(x)) -> None:
            one = self._instead.get(key)
            if one is not None and one.of is ref:
                del self._instead[key]

        self._instead[id(x)] = Instead(weakref.ref(x, gone), version_of(x), new, use)
        return new

    def _values_for(self, begun: Begun, operands: Operands, weights: Weights) -> Tensor | None:
        """What is to take the place of the values; None: nothing."""
        self._noted.clear()
        if stands_for_others(operands.other):
            return None
        made = self._follower.attempt(begun.name, self._without_output, operands, weights)
        changed: Tensor | None = None
        for call, use, axes, back in made or ():
            if use is not None:
                self._keep_edits(call, use, axes)
            change = self.recorder.before(call, _VALUES)
            self._noted.append((use, call.edits))
            if change is None or change.v is None:
                continue
            _check("v", change.v, call.v, call.path)
            try:
                new = back(change.v).to(operands.other.dtype)
            except LayoutError as error:
                raise EditError(f"{call.path}: its v cannot be changed so (tap {call.tap}): {error}.") from None
            if changed is not None:
                if not torch.equal(changed, new):
                    raise EditError(f"{call.path}: two calls have the same v there, and it was changed in two ways.")
                continue
            changed = new
            origin = self._follower.origin(operands.other)
            same = new.shape == operands.other.shape
            self._follower.set_origin(new, origin if same else _grown(origin, new))
        return changed

    def _without_output(self, operands: Operands, weights: Weights) -> list[Any]:
        """For each call that a product will complete: it, its softmax, the axes, and the way back of values."""
        watch = self._follower
        values = value_product(watch, operands, weights)
        made = list[Any]()
        try:
            if weights.scores is None:
                plain = plain_call(weights, values)
                if plain is None or isinstance(plain, str):
                    return []
                call, how, extents = plain.call, plain.values, plain.extents
                call.path = around(None if weights.use is None else weights.use.path, watch.where())
                back = lambda v: values_back(how, v, extents, values.v)  # noqa: E731
                return [(call, weights.use, None, back)]
            for state, part in [(weights, values), *joined_parts(weights, values)]:
                builder = CallBuilder([(state, part)], None)
                call = builder.call()
                call.path = around(None if state.use is None else state.use.path, watch.where())
                made.append((call, state.use, builder.axes, builder.values_back))
        except LayoutError:  # will be told of when it has run
            return []
        return made

    # The output

    def _after(self, one: _Completed, writes: bool, answered: Tensor | None) -> Tensor | None:
        """Ask about an output, and record the call: what is to take its place, in its own layout.

        Args:
            one: the call.
            writes: whether the output is to be written to: the listener shall not hold it.
            answered: what is to take its place by another call.
        """
        call, builder, use = one
        result, form = call.result, call.result_form
        assert result is not None and form is not None
        if use is not None:
            self._keep_edits(call, use, None if builder is None else builder.axes)
        noted = next((edits for of, edits in self._noted if of is use), None)
        if noted is not None:
            call.edits = noted
        if writes and call.output is not None:
            call.output = call.output.clone()
        answer = self.recorder.after(call)
        self.recorder.record(call)
        if answer is None:
            return None
        _check("output", answer, call.output, call.path)
        new = _back(form, answer, result).to(result.dtype)
        if answered is not None and not torch.equal(answered, new):
            raise EditError(f"{call.path}: two calls have the same output there, and it was changed in two ways.")
        return new

    def _keep_edits(self, call: KernelCall, use: SoftmaxUse, axes: object) -> None:
        """Hand on what a listener noted of the weights, if they are what it was told that they are."""
        formed = use.formed
        if formed is None:
            return
        if axes is not None and axes != formed.axes:
            if not formed.changed:  # what was noted is of something else
                return
            raise EditError(
                f"{call.path}: its weights were changed as they were formed, and what the model did with them later "
                f"shows that their axes are others than they seemed to be (tap {call.tap}, {call.normalizer}): the "
                "weights of some of the heads were taken apart, or they are no softmax over keys."
            )
        call.edits = formed.edits

    def _end_sums(self, begun: Begun) -> None:
        """Sums of values that an operation takes for an output: they are one, and can be exchanged until it runs."""
        if begun.parsed is None and Unnormalized in begun.kind.rules:
            return
        for x in _tensors(begun):
            state = self._follower.state(x)
            if not isinstance(state, Unnormalized) or state.use is None or state.use.done:
                continue
            self._follower.attempt(begun.name, finish_unnormalized, self._follower, state, x)
            for one in self._taken():
                if one.call.result is not x:
                    self.recorder.record(one.call)
                    continue
                answer = self._after(one, True, None)
                if answer is not None:
                    x.copy_(answer)


def _check(name: str, answer: Tensor, of: Tensor | None, path: str | None) -> None:
    assert of is not None
    if answer.shape != of.shape:
        raise EditError(
            f"{path}: its {name} cannot be changed so (tap eager): a tensor of shape {tuple(answer.shape)} was given "
            f"for one of {tuple(of.shape)}."
        )


def _tensors(begun: Begun) -> list[Tensor]:
    found = list[Tensor]()
    for arg in (*begun.args, *begun.kwargs.values()):
        found += [x for x in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(x, Tensor)]
    return found


def _back(form: Callable[[Tensor], Tensor], output: Tensor, result: Tensor) -> Tensor:
    """What is to take the place of an output, B H T E, as the model has it.

    Args:
        form: brings the model's into B H T E.
        output: what is to take its place.
        result: the model's own.
    """
    if isinstance(form, Arrangement):
        return form.back(output, result.shape)
    numbers = form(torch.arange(result.numel(), device=result.device).view(result.shape))
    return output.new_zeros(output.numel()).index_put((numbers.flatten(),), output.flatten()).view(result.shape)


def _among(x: Tensor, begun: Begun) -> bool:
    return any(one is x for one in _tensors(begun))


def _is_one(x: Tensor, out: Any) -> bool:
    """Whether a tensor is the result of an operation, or a view of all of it."""
    if x is out:
        return True
    return isinstance(out, Tensor) and x.numel() == out.numel() and storage_of(x) == storage_of(out)


def _replaced(arg: Any, x: Tensor, new: Tensor) -> Any:
    if isinstance(arg, (list, tuple)):
        return type(arg)(_replaced(one, x, new) for one in arg)
    return new if arg is x else arg


def _grown(origin: Origin, v: Tensor) -> Origin:
    """The axes of values that were one for several, and are others for each of these now."""
    layout = origin.layout()
    if len(layout) != v.dim():
        return Origin(tuple(v.shape), birth=origin.birth)
    dims = zip(layout, v.shape, strict=True)
    return known(tuple(dim if extent_of(dim) == n else (Atom(n, birth=origin.birth),) for dim, n in dims))
