"""The function mode: sees every torch operation while it is open, and follows what an attention may be made of.

What an operation makes of a state is said by its row in the table (:mod:`.operations`) and by :mod:`.rules`; which
tensor has which state, and what a write to memory spoils, is kept here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...attention.kernel_call import KernelCall
from ...errors import HookattnError
from ...torch_internals.isolation import no_gradients
from ...torch_internals.tensor_identity import storage_of
from ...torch_internals.tensor_memo import TensorMemo
from ..foreign import handler_of
from . import axis_history
from .assemble import CallBuilder
from .axis_history import Origin
from .decisions import version_then
from .exchange import Begun, Exchange, Followed
from .operation import Operation, OperationKind
from .operations import REARRANGED, kind_of, name_of, writes_to
from .origins import Origins, strided
from .pairwise import paired
from .product_labels import parse_product, parse_several
from .rules import next_state, piece_states, scattered_scores
from .states import (
    Instead,
    Pairwise,
    PartialOutput,
    RowStatistic,
    ScatteredOutput,
    ScatteredScores,
    ScatteredWeights,
    Scores,
    ScoresSlice,
    SoftmaxUse,
    State,
    TopScores,
    Unnormalized,
    WeightedValues,
    Weights,
)
from .value_products import (
    finish_scattered,
    finish_sum,
    finish_unnormalized,
    note_product,
    note_several,
    note_weighted_sum,
)
from .view_rules import rearrange, rearranges
from .weightless import carried_pairs

if TYPE_CHECKING:
    from ..base import ActiveTrace

Handler = Callable[["Follower", Any, Sequence[Any], dict[str, Any]], Any]
# Of a function: its name (empty: to be ignored), the handler of its tap, whether it has to be looked at even where
# nothing is known to be part of an attention yet, and its row in the table. A plain tuple: it is unpacked for every
# operation of the model.
Known = tuple[str, Handler | None, bool, OperationKind]
# Followed for what they may become; where an operation has scores or weights as well, it is an operation on those.
_LARGEST = "softmax over the largest scores of each query, whose result was not put back among all keys"
_POURED = (Scores, ScoresSlice, ScatteredScores, Unnormalized, TopScores)
_MINOR = (RowStatistic, ScatteredScores, ScoresSlice, Pairwise)


# Of so many asked for, those of earlier forwards go: masks that layers share.
_SHARED = 256


class _Ran(NamedTuple):
    """An operation that ran."""

    name: str
    kind: OperationKind
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any


class Follower(TorchFunctionMode):
    """The function mode of one trace: sees every torch operation of the model, and knows the state of every tensor.

    Args:
        recorder: gets the attention calls that are seen.
        kernels: function name -> handler ``(follower, func, args, kwargs) -> result`` of the fused kernels' taps.

    Attributes:
        operations: what is known of each function, looked up once.
        origins: where the axes of the tensors come from.
        live: the tensors that have a state, by identity; an entry goes with its tensor.
        uses: what became of every softmax so far.
        attached: whether what is made of the model's tensors is to be in their graph.
        model_runs: whether the traced model's own forward runs; a part of it may, where it does not.
        exchange: asks the listener, where there is one, and puts its answers into the model.
        interpreting: whether what the model did is looked at right now; False: the model itself is at work.
    """

    def __init__(self, recorder: ActiveTrace, kernels: dict[str, Handler]):
        super().__init__()
        self.recorder = recorder
        self.kernels = kernels
        self.operations: dict[Any, Known] = {}
        self.model_runs, self.attached = False, recorder.attached or recorder.listened
        self.origins = Origins(lambda: self.model_runs or recorder.where() is not None)
        self.origin, self.set_origin = self.origins.of, self.origins.set
        self.live: dict[int, tuple[weakref.ref[Tensor], State]] = {}
        self.uses: list[SoftmaxUse] = []
        self.interpreting = False
        self.exchange = Exchange(self) if recorder.listened else None
        self._memo, self._count = TensorMemo(), 0
        # The last product that was broadcast to the shape of one operand, and its operands.
        self._multiplied: tuple[weakref.ref[Tensor], ...] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = self.operations.get(func) or self.operation(func)
        if not known[0]:
            return func(*args, **kwargs) if kwargs else func(*args)
        if known[1] is not None:
            return known[1](self, func, args, kwargs or {})
        return self.watch(known, func, args, kwargs)

    def watch(self, known: Known, func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> Any:
        """Run an operation and follow it."""
        name, _, special, kind = known
        if special or self.live:
            return self.follow(name, func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        try:
            self.origins.note(kind, args, kwargs, out)
            if kind.pairs:
                self._pair(name, kind, args, kwargs or {}, out)
        except Exception as error:  # noqa: BLE001 - as in attempt
            self.failed(name, error)
        return out

    # What following tells, and asks

    def where(self) -> str | None:
        """The path of the module that is running."""
        return self.recorder.where()

    def tell(self, reason: str, path: str | None = None, changed: bool = False) -> None:
        """Attention ran that cannot be read; as :meth:`hookattn.taps.base.ActiveTrace.skip`."""
        if changed:
            self.recorder.skip(reason, path, changed)
        else:
            self.recorder.skip(reason, path)

    def made(self, call: KernelCall, builder: CallBuilder | None, use: SoftmaxUse | None) -> None:
        """A call is complete.

        Args:
            call: the call.
            builder: what made it of its tensors, if nothing else has a part in it.
            use: the softmax that it is of.
        """
        if self.exchange is None:
            self.recorder.record(call)
        else:
            self.exchange.completed(call, builder, use)

    @property
    def listened(self) -> bool:
        """Whether a listener is asked about weights, values and outputs."""
        return self.exchange is not None

    def asked(self, x: Tensor) -> Instead | None:
        """What is known of weights that a listener was asked about only as they met values."""
        return None if self.exchange is None else self.exchange.asked(x)

    def keeps(self) -> None:
        """What is about to be overwritten was copied, since it is needed still."""

    def shared(self, key: str, x: Tensor, make: Callable[[], Any]) -> Any:
        """What is made of a tensor that many layers share, such as a mask: once."""
        if self.attached:  # of a parameter something is made for each forward, whose graph goes with its backward
            return make()
        self._count += 1
        if self._count % _SHARED == 0:  # those of earlier forwards go
            self._memo.forget()
        return self._memo(key, x, make)

    def seed(self, x: Tensor, roles: str) -> None:
        """Somebody says what the axes of a tensor are, a letter of B H T S D each."""
        self.origins.seed(x, roles)

    def operation(self, func: Any) -> Known:
        """What is known of a function, looked up once."""
        name = name_of(func)
        kind = kind_of(name)
        handler = self.kernels.get(name) or handler_of(name)
        found = self.operations[func] = name, handler, kind.product or kind.softmax, kind
        return found

    def layout_here(self) -> str | None:
        """What the user said of the axes of the queries in the module that is running; None: nothing."""
        path = self.recorder.where()
        return None if path is None else self.recorder.layout_for(path)

    # What is known of a tensor

    def state(self, x: Tensor) -> State | None:
        """The state of a tensor that is part of an attention."""
        known = self.live.get(id(x))
        if known is None or known[0]() is not x:  # the identity of a tensor that is gone may be another's
            return None
        state = known[1]
        if state.version != version_then(x) and isinstance(state, Scores):
            # It was written to through a tensor that shares its memory: nobody knows which scores are left.
            state = _overwritten(state, x)
            self.live[id(x)] = (known[0], state)
        return state

    def set_state(self, x: Tensor, state: State) -> None:
        """Say what a tensor is."""
        state.version = version_then(x)
        key, live = id(x), self.live

        def gone(ref: Any) -> None:
            entry = live.get(key)
            if entry is not None and entry[0] is ref:
                del live[key]

        self.live[key] = (weakref.ref(x, gone), state)

    def followed(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of some tensors is part of an attention."""
        return any(self.state(x) is not None for x in tensors)

    def same(self, x: Tensor, like: Tensor) -> None:
        """Say that a tensor is what another is, whose values it has."""
        if self.origins.knows(like):
            self.set_origin(x, self.origin(like))
        if (state := self.state(like)) is not None:
            self.set_state(x, state)

    # One operation

    def follow(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operation and note what its result is."""
        begun = self.before(name, func, args, kwargs)
        if self.exchange is not None:
            return self.exchange.follow(begun)
        out = begun.func(*begun.args, **begun.kwargs)
        self.after(begun, out)
        return out

    def before(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Begun:
        """An operation is about to run: look at its arguments, which it may write to; to be followed by :meth:`after`.

        The function and the arguments to run it with are those of the result.
        """
        kind = kind_of(name)
        if kind.product:
            moved = rearranges(args) if name == "einsum" else None
            if moved is None:  # parsed before it runs: baddbmm_ writes to what it adds
                written = writes_to(name, args, kwargs)
                if written:
                    self.keeps()
                parsed = parse_product(name, args, kwargs)
                return Begun(name, kind, func, args, kwargs, writes=written, parsed=parsed)
            func, args, kind = rearrange, moved, REARRANGED
        found = self._followed(kind, args, kwargs) if self.live else None
        writes = bool(self.live) and writes_to(name, args, kwargs)
        if writes:
            self.attempt(name, self._before_write, kind, found, args, kwargs)
        return Begun(name, kind, func, args, kwargs, found=found, writes=writes)

    def after(self, begun: Begun, out: Any) -> None:
        """It ran; ``out``: its result."""
        name, kind, func, args, kwargs, found, writes, _ = begun
        if kind.product:
            self._after_product(begun, out)
            return
        ran = _Ran(name, kind, func, args, kwargs, out)
        if found is None:
            self.attempt(name, self._not_followed, ran)
        else:
            self.attempt(name, self._after_write if writes else self._after, ran, found)

    def attempt(self, name: str, action: Callable[..., Any], *args: Any) -> Any:
        """A fault in following the model is reported as attention not read; the model goes on."""
        self.interpreting = True
        try:
            return action(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is ours and not the model's
            return self.failed(name, error)
        finally:
            self.interpreting = False

    def failed(self, name: str, error: Exception) -> None:
        if isinstance(error, HookattnError):
            raise error
        self.tell(f"following {name!r} failed: {type(error).__name__}: {error}")

    def _not_followed(self, ran: _Ran) -> None:
        """An operation on tensors that are no part of an attention yet."""
        self.origins.note(ran.kind, ran.args, ran.kwargs, ran.out)
        if ran.kind.softmax:
            self._softmax_of_others(ran)
        elif ran.kind.pairs:
            self._pair(ran.name, ran.kind, ran.args, ran.kwargs, ran.out)

    def _pair(self, name: str, kind: OperationKind, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """An operation on two tensors ran: each may have been paired with each entry of the other."""
        if type(out) is not Tensor or not args:
            return
        if name == "sum":
            self._summed_product(kind, args, kwargs, out)
            return
        if len(args) < 2 or out.dim() < 3 - (kind.arithmetic is None):
            return
        a, b = args[0], args[1]
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return
        whole = kind.arithmetic is None
        alike = a.shape == b.shape if whole else out.shape in (a.shape, b.shape)
        if alike and not self._pairs_of_one(a, b, out.dim() + whole):
            if a.shape != b.shape and kind.arithmetic == "mul":
                self._multiplied = weakref.ref(out), weakref.ref(a), weakref.ref(b)
            return
        if not out.is_floating_point() or not (strided(a) and strided(b)):
            return
        with no_gradients(but=self.attached):
            state = paired(name, kind.arithmetic, a, b, out, self.origin(a), self.origin(b))
        if state is not None:
            if isinstance(state, Scores):
                self.set_origin(out, state.origin)
            self.set_state(out, state)

    def _pairs_of_one(self, a: Tensor, b: Tensor, dims: int) -> bool:
        """Whether each of two operands had a dimension put in where the other has an axis, of one query or one key."""
        before = self.origin(a), self.origin(b)
        if not all(o.how is axis_history.keep_dims for o in before):
            return False
        new_a, new_b = (axis_history.inserted(o, dims) for o in before)
        return bool(new_a - new_b) and bool(new_b - new_a)

    def _operation_on(self, found: Followed, ran: _Ran, out: Any, origin: Origin) -> Operation:
        """The operation as the rules take it; ``origin``: where the axes of ``out`` come from."""
        return Operation(
            name=ran.name,
            kind=ran.kind,
            func=ran.func,
            args=ran.args,
            kwargs=ran.kwargs,
            x=found.x,
            position=found.position,
            state=found.state,
            out=out,
            origin=origin,
            look=self.state,
            keep_finite=self.recorder.wants("scores"),
            results=ran.out,
        )

    def _summed_product(self, kind: OperationKind, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        """A sum over the product of vectors with one vector, that was made just before: scores of one query or key."""
        x, a, b = (ref() for ref in self._multiplied) if self._multiplied is not None else (None, None, None)
        if x is not args[0] or a is None or b is None or not out.is_floating_point():
            return
        with no_gradients(but=self.attached):
            pairs = paired("mul", "mul", a, b, x, self.origin(a), self.origin(b), alone=True)
            if not isinstance(pairs, Pairwise):
                return
            ran = _Ran("sum", kind, torch.sum, args, kwargs, out)
            new = next_state(self._operation_on(Followed(0, x, pairs), ran, out, self.origin(out)))
            if isinstance(new, Scores):
                self.set_origin(out, new.origin)
                self.set_state(out, new)

    def _after(self, ran: _Ran, found: Followed) -> None:
        """An operation on a part of an attention ran, and made a new tensor or several."""
        out = ran.out
        result: Any = out[0] if isinstance(out, tuple) and out and isinstance(out[0], Tensor) else out
        args = (found.x, *ran.args[1:]) if found.position == 0 and not ran.kind.joins else ran.args
        origin = self.origins.derive(ran.kind, args, ran.kwargs, out, found.x, found.state.origin)
        if ran.kind.pairs and _mapped(found.state) and len(ran.args) > 1 and isinstance(result, Tensor):
            a, b = ran.args[:2]
            dims = result.dim() + (ran.kind.arithmetic is None)
            if isinstance(a, Tensor) and isinstance(b, Tensor) and self._pairs_of_one(a, b, dims):
                self._pair(ran.name, ran.kind, ran.args, ran.kwargs, result)
                return
        with no_gradients(but=self.attached):
            if ran.kind.splits and isinstance(out, (tuple, list)):
                for one, state in zip(out, piece_states(self._operation_on(found, ran, out, origin)), strict=True):
                    if state is not None:
                        self.set_state(one, state)
                return
            new = next_state(self._operation_on(found, ran, result, origin))
            if new is not None and isinstance(result, Tensor):
                self._became(result, found.state, new)
            elif isinstance(found.state, Unnormalized):
                for x in tensors_among(ran.args, ran.kwargs):
                    if isinstance(state := self.state(x), Unnormalized):
                        finish_unnormalized(self, state, x)
            elif ran.kind.pairs:
                self._pair(ran.name, ran.kind, ran.args, ran.kwargs, ran.out)

    def _after_write(self, ran: _Ran, found: Followed) -> None:
        """An operation on a part of an attention ran, and wrote to an argument."""
        x, state = found.x, found.state
        written = target_of(ran.args, ran.kwargs)
        if written is not x:
            if written is ran.kwargs.get("out"):  # a result like any other, in memory that was there before
                self._after(ran, found)
            else:
                self._poured(ran, found, written)
            return
        self._mark_sharing(x)
        if isinstance(state, ScoresSlice):  # the scores that it is a slice of are marked
            return
        with no_gradients(but=self.attached):
            new = next_state(self._operation_on(found, ran, x, state.origin))
            if new is None:
                self.live.pop(id(x), None)
            else:
                self._became(x, state, new)

    def _poured(self, ran: _Ran, found: Followed, written: Any) -> None:
        """Scores were written into a tensor that is no scores: a buffer that is filled block by block, say."""
        if not strided(written) or not isinstance(found.state, _POURED):
            return
        if isinstance(found.state, (Unnormalized, TopScores)):
            self._summed_into(ran, found, written)
            return
        out = ran.out if isinstance(ran.out, Tensor) else found.x
        poured = self._operation_on(found._replace(x=written, position=0), ran, out, self.origin(written))
        state = scattered_scores(poured, poured.moved())
        if state is not None:
            self.set_state(written, state)

    def _summed_into(self, ran: _Ran, found: Followed, written: Tensor) -> None:
        """Sums of values were added to a tensor in place, or written into one; or a softmax scattered into zeros."""
        with no_gradients(but=self.attached):
            new = next_state(self._operation_on(found, ran, written, found.state.origin))
            if new is not None:
                self._became(written, found.state, new)
            elif isinstance(found.state, Unnormalized):
                finish_unnormalized(self, found.state, found.x)

    def _became(self, x: Tensor, before: State, new: State) -> None:
        """A tensor has a new state; ``before``: that of the argument it was made of."""
        if isinstance(new, Weights) and not isinstance(before, Weights):
            self._softmax_of_scores(new, x)
        elif isinstance(new, ScatteredWeights) and not isinstance(before, ScatteredWeights):
            new.root.use.path = self.where()
            self.uses.append(new.root.use)
        elif isinstance(new, TopScores) and new.weights and new.use is None:
            new.use = SoftmaxUse(self.where(), why=_LARGEST)
            self.uses.append(new.use)
        elif isinstance(new, Pairwise) and new.summed:
            why = carried_pairs(new, new.summed)
            if why is not None:
                self.tell(why)
            return
        elif isinstance(before, (Pairwise, TopScores)) and isinstance(new, Scores):
            self.set_origin(x, new.origin)
        elif isinstance(new, WeightedValues) and new.summed:
            note_weighted_sum(self, new, x)
            return
        elif isinstance(new, PartialOutput) and new.complete:
            self.live.pop(id(x), None)
            finish_sum(self, new, x)
            return
        elif (
            isinstance(new, ScatteredOutput)
            and isinstance(before, ScatteredOutput)
            and len(new.uses) > len(before.uses)  # a sum of two: a view of one waits as it did
            and finish_scattered(self, new, x)
        ):
            self.live.pop(id(x), None)
            return
        self.set_state(x, new)
        if self.exchange is not None and isinstance(new, Weights) and not isinstance(before, Weights):
            self.exchange.formed(new, x)

    def _softmax_of_scores(self, weights: Weights, out: Tensor) -> None:
        """A softmax ran over scores."""
        scores = weights.scores
        weights.dtype = out.dtype
        if scores is not None:
            if not scores.opaque and (scores.terms or scores.fills):
                # What it ran over is masked: scores are q·k before that, and are derived from q and k.
                weights.scores_tensor = None
            if scores.product.learned:  # a router weighs with a matrix of its own: no attention to report
                return
        if weights.use is not None:  # of a softmax that ran over some of them
            return
        weights.use = SoftmaxUse(self.where())
        weights.use.why = weights.why or weights.use.why
        self.uses.append(weights.use)

    def _followed(self, kind: OperationKind, args: Sequence[Any], kwargs: dict[str, Any]) -> Followed | None:
        """The argument that is part of an attention; scores and weights before slices and statistics of them.

        Of a view it is the tensor that is viewed, and nothing that only says to which shape (``expand_as``).
        """
        found: Followed | None = None
        live = self.live
        if kind.operand == 0 and args:
            args = args[:1]
        for i, arg in enumerate((*args, *kwargs.values()) if kwargs else args):
            for one in arg if isinstance(arg, (list, tuple)) else (arg,):
                if id(one) in live:
                    state = self.state(one)
                    if state is not None and (found is None or isinstance(found.state, _MINOR)):
                        found = Followed(i, one, state)
        return found

    def _before_write(
        self, kind: OperationKind, found: Followed | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """A tensor is about to be written to: copy what is still needed of it.

        That is an operand of a score product (a cache of keys that the next layer reuses), and weights before dropout.
        """
        if found is not None and isinstance(found.state, Weights) and kind.drops_out and found.state.own is None:
            found.state.own = (found.x.clone(), found.state.origin)
            self.keeps()
        x = target_of(args, kwargs)
        if not strided(x):
            return
        storage = storage_of(x)
        for _, state in list(self.live.values()):
            scores = state if isinstance(state, Scores) else getattr(state, "of", getattr(state, "scores", None))
            if scores is not None and scores.product.keep(storage):
                self.keeps()

    def _mark_sharing(self, x: Tensor) -> None:
        """``x`` was written to: mark all other scores that lie in the same memory as overwritten."""
        storage = storage_of(x)
        for key, (ref, state) in list(self.live.items()):
            other = ref()
            if other is not None and other is not x and isinstance(state, Scores) and storage_of(other) == storage:
                self.live[key] = (ref, _overwritten(state, other))

    # Softmaxes and products

    def _softmax_of_others(self, ran: _Ran) -> None:
        """A softmax ran over something that is no scores: it is reported if values are then multiplied with it."""
        out, dim = ran.out, ran.kwargs.get("dim", ran.args[1] if len(ran.args) > 1 else None)
        if not (isinstance(out, Tensor) and out.dim() >= 2 and isinstance(dim, int)):
            return
        origin = self.origin(out)
        if origin.birth == "parameter":  # weights that are learned as they are
            return
        x = ran.args[0] if ran.args else ran.kwargs.get("input")
        held = x if isinstance(x, Tensor) and x is not out and self.recorder.wants("scores") else None
        use = SoftmaxUse(self.where(), done=True)
        dtype = ran.kwargs.get("dtype") or out.dtype
        state = Weights(origin, dim=dim % out.dim(), scores_tensor=held, use=use, dtype=dtype)
        state.scores_origin, state.read = origin, -1 if held is None else version_then(held)
        self.set_state(out, state)

    def _after_product(self, begun: Begun, out: Any) -> None:
        name, parsed = begun.name, begun.parsed
        if not isinstance(out, Tensor):
            return
        if parsed is not None:
            self.attempt(name, note_product, self, name, parsed, out)
        elif name == "einsum" and (several := parse_several(begun.args)) is not None:
            self.origins.note(begun.kind, begun.args, begun.kwargs, out)
            self.attempt(name, note_several, self, several, out)

    def flush(self) -> None:
        """Forget everything; what looked like an attention and was never used as one is reported."""
        for ref, state in list(self.live.values()):
            out = ref()
            if isinstance(state, Unnormalized) and out is not None:
                self.attempt("flush", finish_unnormalized, self, state, out)
        if self.exchange is not None:
            self.exchange.finish()
        for use in self.uses:
            if not use.done:
                self.recorder.skip(use.why, use.path)
        self.uses.clear()
        self.live.clear()
        self._memo.forget()
        self.origins.clear()


def _mapped(state: State) -> bool:
    """Whether what was taken for scores is what a learned map made: queries, keys or values."""
    return isinstance(state, Scores) and "parameter" in (state.product.origin_a.birth, state.product.origin_b.birth)


def tensors_among(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation, and in their lists."""
    for arg in (*args, *kwargs.values()):
        for one in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(one, Tensor):
                yield one


def target_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operation writes to."""
    return kwargs.get("out", args[0] if args else None)


def _overwritten(scores: Scores, x: Tensor) -> Scores:
    """Scores whose tensor was written to through another: their values have to be read off the tensor."""
    return scores.but(opaque=[*scores.opaque, "a write through a view"], finite=None, version=version_then(x))
