"""The function mode: sees every torch operation while it is open, and follows what an attention may be made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...errors import HookattnError
from ...torch_internals.tensor_identity import storage_of, version_of
from .operation import Operation, OperationKind
from .operations import kind_of, name_of, writes_to
from .origins import Origins, strided
from .product_labels import parse_product
from .rules import next_state, piece_states, scattered_scores
from .states import (
    PartialOutput,
    RowStatistic,
    ScatteredOutput,
    ScatteredScores,
    ScatteredWeights,
    Scores,
    ScoresSlice,
    SoftmaxUse,
    State,
    Weights,
)
from .value_products import finish_scattered, finish_sum, note_product

if TYPE_CHECKING:
    from ..base import ActiveTrace

Call = Callable[..., Any]
# Of a function: its name (empty: to be ignored), the handler of its tap, whether it has to be looked at even where
# nothing is known to be part of an attention yet, and its row in the table.
Known = tuple[str, Call | None, bool, OperationKind]
_LESSER = (RowStatistic, ScatteredScores, ScoresSlice)


class Follower(TorchFunctionMode):
    """One thread's view of a model at work.

    Args:
        recorder: gets the attention calls that are seen.
        kernels: function name -> handler ``(watch, func, args, kwargs) -> result`` of the fused kernels' taps.
    """

    def __init__(self, recorder: ActiveTrace, kernels: dict[str, Call]):
        super().__init__()
        self.recorder = recorder
        self.kernels = kernels
        self.operations: dict[Any, Known] = {}
        self.origins = Origins()
        self.origin, self.set_origin = self.origins.of, self.origins.set
        self.live: dict[int, tuple[weakref.ref[Tensor], State]] = {}
        self.uses: list[SoftmaxUse] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, handler, special, kind = self.operations.get(func) or self._operation(func)
        if not name:
            return func(*args, **kwargs) if kwargs else func(*args)
        if handler is not None:
            return handler(self, func, args, kwargs or {})
        if special or self.live:
            return self.follow(name, func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        try:
            self.origins.note(kind, args, kwargs, out)
        except Exception as error:  # noqa: BLE001 - as in _try
            self._failed(name, error)
        return out

    def _operation(self, func: Any) -> Known:
        """What is known of a function, looked up once."""
        name = name_of(func)
        kind = kind_of(name)
        found = self.operations[func] = name, self.kernels.get(name), kind.product or kind.softmax, kind
        return found

    # What is known of a tensor

    def state(self, x: Tensor) -> State | None:
        """The state of a tensor that is part of an attention, marked opaque if it was written to behind our back."""
        known = self.live.get(id(x))
        if known is None or known[0]() is not x:
            return None
        state = known[1]
        if state.version != version_of(x) and isinstance(state, Scores):
            state = state.but(opaque=[*state.opaque, "a write through a view"], finite=None, version=version_of(x))
            self.live[id(x)] = (known[0], state)
        return state

    def set_state(self, x: Tensor, state: State) -> None:
        """Say what a tensor is."""
        state.version = version_of(x)
        key, live = id(x), self.live

        def gone(ref: Any) -> None:
            entry = live.get(key)
            if entry is not None and entry[0] is ref:
                del live[key]

        self.live[key] = (weakref.ref(x, gone), state)

    # One operation

    def follow(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operation and note what its result is."""
        kind = kind_of(name)
        if kind.product:
            return self._product(name, func, args, kwargs)
        found = self._stateful(args, kwargs) if self.live else None
        writes = writes_to(name, args, kwargs) if self.live else False
        if writes:
            self._try(name, self._before_write, name, found, args, kwargs)
        out = func(*args, **kwargs)
        if found is None:
            self._try(name, self._untouched, kind, args, kwargs, out)
        else:
            self._try(name, self._advance, name, kind, func, *found, out, args, kwargs, writes)
        return out

    def _try(self, name: str, action: Callable[..., Any], *args: Any) -> Any:
        """A fault in following the model is reported as attention not read; the model goes on."""
        try:
            return action(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is ours and not the model's
            return self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        if isinstance(error, HookattnError):
            raise error
        self.recorder.skip(f"following {name!r} failed: {type(error).__name__}: {error}")

    def _untouched(self, kind: OperationKind, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """An operation on tensors that are no part of an attention yet."""
        self.origins.note(kind, args, kwargs, out)
        if kind.softmax:
            self._orphan(out, args, kwargs)

    def _advance(
        self,
        name: str,
        kind: OperationKind,
        func: Any,
        position: int,
        x: Tensor,
        state: State,
        out: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        writes: bool,
    ) -> None:
        """An operation on a part of an attention."""
        target: Any = out[0] if isinstance(out, tuple) and out and isinstance(out[0], Tensor) else out
        origin, written = state.origin, _target(args, kwargs)
        if not writes:
            origin = self.origins.derive(kind, (x, *args[1:]) if position == 0 else args, kwargs, out, x, state.origin)
        elif written is x:
            self._written(x)
            if isinstance(state, ScoresSlice):
                return
            target = x
        context = Operation(
            name,
            kind,
            func,
            args,
            kwargs,
            x,
            position,
            state,
            target if isinstance(out, Tensor) or not writes else x,
            origin,
            self.state,
            self.recorder.wants("scores"),
        )
        if writes and written is not x:
            if strided(written) and isinstance(
                state, (Scores, ScoresSlice, ScatteredScores)
            ):  # poured into a tensor that is none
                context.x, context.position, context.origin = written, 0, self.origin(written)
                poured = scattered_scores(context, context.moved())
                if poured is not None:
                    self.set_state(written, poured)
            return
        with torch.no_grad():
            if kind.splits and isinstance(out, (tuple, list)):
                context.out = out
                for one, piece in zip(out, piece_states(context), strict=True):
                    if piece is not None:
                        self.set_state(one, piece)
                return
            new = next_state(context)
        if new is None:
            if writes and isinstance(target, Tensor):
                self.live.pop(id(target), None)
            return
        if not isinstance(target, Tensor):
            return
        if isinstance(new, Weights) and not isinstance(state, Weights):
            self._began(new, target)
        elif isinstance(new, ScatteredWeights) and not isinstance(state, ScatteredWeights):
            new.root.use.path = self.recorder.where()
            self.uses.append(new.root.use)
        if isinstance(new, PartialOutput) and new.complete:
            self.live.pop(id(target), None)
            with torch.no_grad():
                finish_sum(self, new, target)
            return
        if (
            isinstance(new, ScatteredOutput)
            and new is not state
            and isinstance(state, ScatteredOutput)
            and len(new.uses) > len(state.uses)
        ):
            with torch.no_grad():
                if finish_scattered(self, new, target):
                    self.live.pop(id(target), None)
                    return
        self.set_state(target, new)

    def _began(self, weights: Weights, out: Tensor) -> None:
        """A softmax ran over scores."""
        scores = weights.scores
        weights.dtype = out.dtype
        if scores is not None:
            if not scores.opaque and (scores.terms or scores.fills):
                weights.scores_tensor = None
            if scores.product.learned:  # a router weighs with a matrix of its own
                return
        weights.use = SoftmaxUse(self.recorder.where())
        weights.use.why = weights.why or weights.use.why
        self.uses.append(weights.use)

    def _stateful(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, Tensor, State] | None:
        """The tensor with a state among the arguments; scores and weights before parts and statistics of them."""
        found, live = None, self.live
        for i, arg in enumerate((*args, *kwargs.values()) if kwargs else args):
            for one in arg if isinstance(arg, (list, tuple)) else (arg,):
                if id(one) in live:
                    state = self.state(one)
                    if state is not None and (found is None or isinstance(found[2], _LESSER)):
                        found = (i, one, state)
        return found

    def _before_write(
        self, name: str, found: tuple[int, Tensor, State] | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """A tensor is about to be written to: keep what the score product read from it, and note what is poured in."""
        if found is not None and isinstance(found[2], Weights) and kind_of(name).drops_out and found[2].own is None:
            found[2].own = (found[1].clone(), found[2].origin)
        x = _target(args, kwargs)
        if not strided(x):
            return
        storage = storage_of(x)
        for _, state in list(self.live.values()):
            scores = state if isinstance(state, Scores) else getattr(state, "of", getattr(state, "scores", None))
            if scores is not None:
                scores.product.keep(storage)

    def _written(self, x: Tensor) -> None:
        """A write to ``x`` also changed every tensor that shares its memory."""
        storage = storage_of(x)
        for key, (ref, state) in list(self.live.items()):
            other = ref()
            if other is not None and other is not x and isinstance(state, Scores) and storage_of(other) == storage:
                changed = state.but(
                    opaque=[*state.opaque, "a write through a view"], finite=None, version=version_of(other)
                )
                self.live[key] = (ref, changed)

    # Softmaxes and products

    def _orphan(self, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if not isinstance(out, Tensor) or out.dim() < 2:
            return
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(dim, int):
            self.set_state(out, Weights(self.origin(out), dim=dim % out.dim()))

    def _product(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        parsed = parse_product(name, args, kwargs)
        out = func(*args, **kwargs)
        if parsed is None or not isinstance(out, Tensor):
            return out
        self._try(name, note_product, self, name, parsed, out)
        return out

    def flush(self) -> None:
        """Forget everything; what looked like an attention and was never used as one is reported."""
        for use in self.uses:
            if not use.done:
                self.recorder.skip(use.why, use.path)
        self.uses.clear()
        self.live.clear()
        self.origins.clear()


def _target(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operation writes to."""
    return kwargs.get("out", args[0] if args else None)
