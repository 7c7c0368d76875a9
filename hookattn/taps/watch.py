"""The function mode: sees every torch operation while it is open, and follows what an attention may be made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import HookattnError
from .axes import Origin
from .eager import Build, ValueProduct, contracts_keys
from .operations import PRODUCTS, SOFTMAX, SPECIAL, Parsed, name_of, parse_product, writes_to
from .origins import Origins, plain, storage_of
from .product import Label, LayoutError, Product
from .states import Part, RowStat, Scores, State, Term, Use, Weights
from .steps import Context, step

if TYPE_CHECKING:
    from .base import Recorder

Call = Callable[..., Any]


class Watch(TorchFunctionMode):
    """One thread's view of a model at work.

    Args:
        recorder: gets the attention calls that are seen.
        kernels: function name -> handler ``(watch, func, args, kwargs) -> result`` of the fused kernels' taps.
    """

    def __init__(self, recorder: Recorder, kernels: dict[str, Call]):
        super().__init__()
        self.recorder = recorder
        self.kernels = kernels
        self.names: dict[Any, str] = {}
        self.origins = Origins()
        self.origin, self.set_origin = self.origins.of, self.origins.set
        self.live: dict[int, tuple[weakref.ref[Tensor], State]] = {}
        self.uses: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.names.get(func)
        if name is None:
            name = self.names[func] = name_of(func)
        if not name:
            return func(*args, **(kwargs or {}))
        handler = self.kernels.get(name)
        if handler is not None:
            return handler(self, func, args, kwargs or {})
        if self.live or name in SPECIAL or not (args and isinstance(args[0], Tensor)):
            return self.follow(name, func, args, kwargs or {})
        out = func(*args, **kwargs) if kwargs else func(*args)
        self._try(name, self.origins.note, name, args, kwargs or {}, out)
        return out

    # What is known of a tensor

    def state(self, x: Tensor) -> State | None:
        """The state of a tensor that is part of an attention, marked opaque if it was written to behind our back."""
        known = self.live.get(id(x))
        if known is None or known[0]() is not x:
            return None
        state = known[1]
        if state.version != _version(x) and isinstance(state, Scores):
            state = state.but(opaque=[*state.opaque, "a write through a view"], finite=None, version=_version(x))
            self.live[id(x)] = (known[0], state)
        return state

    def set_state(self, x: Tensor, state: State) -> None:
        """Say what a tensor is."""
        state.version = _version(x)
        key, live = id(x), self.live

        def gone(ref: Any) -> None:
            entry = live.get(key)
            if entry is not None and entry[0] is ref:
                del live[key]

        self.live[key] = (weakref.ref(x, gone), state)

    # One operation

    def follow(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operation and note what its result is."""
        if name in PRODUCTS:
            return self._product(name, func, args, kwargs)
        found = self._stateful(args, kwargs) if self.live else None
        writes = bool(self.live) and writes_to(name, args, kwargs)
        if writes:
            self._try(name, self._before_write, name, found, args, kwargs)
        out = func(*args, **kwargs)
        if found is None:
            self._try(name, self._untouched, name, args, kwargs, out)
        else:
            self._try(name, self._advance, name, *found, out, args, kwargs, writes)
        return out

    def _try(self, name: str, action: Callable[..., Any], *args: Any) -> Any:
        """A fault in following the model is reported as attention not read; the model goes on."""
        try:
            return action(*args)
        except HookattnError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is ours and not the model's
            self.recorder.skip(f"following {name!r} failed: {type(error).__name__}: {error}")
            return None

    def _untouched(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """An operation on tensors that are no part of an attention yet."""
        self.origins.note(name, args, kwargs, out)
        if name in SOFTMAX:
            self._orphan(out, args, kwargs)

    def _advance(
        self,
        name: str,
        position: int,
        x: Tensor,
        state: State,
        out: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        writes: bool,
    ) -> None:
        """An operation on a part of an attention."""
        if writes:
            self._written(x)
            origin = state.origin
        else:
            origin = self.origins.note(name, (x, *args[1:]) if position == 0 else args, kwargs, out, x, state.origin)
        with torch.no_grad():
            result = out[0] if isinstance(out, tuple) and out and isinstance(out[0], Tensor) else out
            if writes and not isinstance(out, Tensor):
                result = x
            context = Context(
                name.removesuffix("_") if name == "where_" else name,
                state,
                x,
                position,
                result,
                args,
                kwargs,
                origin,
                self.state,
                self.recorder.wants("scores"),
            )
            new = step(context)
        target = x if writes else result
        if isinstance(state, Part) and writes:
            return
        if new is None:
            if writes and isinstance(target, Tensor):
                self.live.pop(id(target), None)
            return
        if not isinstance(target, Tensor):
            return
        if isinstance(new, Weights) and not isinstance(state, Weights):
            if new.scores is not None and not new.scores.opaque and (new.scores.terms or new.scores.fills):
                new.scores_tensor = None
            new.dtype = target.dtype
            if new.scores is not None and not new.scores.product.learned:  # a router weighs with a matrix of its own
                new.use = Use(self.recorder.where())
                self.uses.append(new.use)
        self.set_state(target, new)

    def _stateful(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, Tensor, State] | None:
        """The tensor with a state among the arguments; scores and weights before statistics of them."""
        found = None
        for i, arg in enumerate((*args, *kwargs.values())):
            for one in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(one, Tensor):
                    state = self.state(one)
                    if state is not None and (found is None or isinstance(found[2], RowStat)):
                        found = (i, one, state)
        return found

    def _before_write(
        self, name: str, found: tuple[int, Tensor, State] | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """A tensor is about to be written to: keep what the score product read from it, and note what is poured in."""
        if found is not None and isinstance(found[2], Weights) and name.startswith("dropout") and found[2].own is None:
            found[2].own = (found[1].clone(), found[2].origin)
        x: Any = kwargs.get("out", args[0] if args else None)
        if not plain(x):
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
                    opaque=[*state.opaque, "a write through a view"], finite=None, version=_version(other)
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
        self._try(name, self._note_product, name, parsed, out)
        return out

    def _note_product(self, name: str, parsed: Parsed, out: Tensor) -> None:
        """Scores, or weights meeting the values, or heads being mixed; else one of a model's many other products."""
        a, b, labels, alpha, beta = parsed
        with torch.no_grad():
            states = [self.state(t) for t in (a, b)]
            for i, state in enumerate(states):
                if isinstance(state, Weights):
                    self._weights_product(name, state, i, (a, b), labels, out)
                    return
                if isinstance(state, Scores) and _sums_heads(state, labels[i], labels[1 - i], labels[2]):
                    if out.shape == (a, b)[i].shape:
                        self.set_origin(out, state.origin)
                        self.set_state(out, state.but(opaque=[*state.opaque, name], finite=None))
                    return
            product = Product(_autocast(a, out), _autocast(b, out), labels, self.origin(a), self.origin(b))
            origin = Origin(out.shape, product.layout)
            scores = Scores(origin, product=product, scale=alpha)
            if beta is not None:
                scores.terms.append(Term(beta[0], origin, beta[1]))
            self.set_origin(out, origin)
            self.set_state(out, scores)

    def _weights_product(
        self,
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
                if out.shape == w.shape:
                    self._mix(name, state, w, out)
                return
            if state.use is not None:
                state.use.done = True
            if state.scores is None:
                self.recorder.skip("softmax over something that is not a product of queries and keys")
                return
            use = ValueProduct(w, w_labels, state.origin, v, v_labels, self.origin(v), out, labels[2])
            call = Build(state, use).call()
        except LayoutError as error:
            self.recorder.skip(str(error))
            return
        self.recorder.record(call)

    def _mix(self, name: str, state: Weights, w: Tensor, out: Tensor) -> None:
        self.set_origin(out, state.origin)
        self.set_state(out, replace(state, own=state.own or (w, state.origin), mixed=[*state.mixed, name]))

    def flush(self) -> None:
        """Forget everything; what looked like an attention and was never used as one is reported."""
        for use in self.uses:
            if not use.done:
                self.recorder.skip("softmax over q·k whose result was never multiplied with values", use.path)
        self.uses.clear()
        self.live.clear()
        self.origins.clear()


def _sums_heads(state: Scores, labels: Sequence[Label], others: Sequence[Label], result: Sequence[Label]) -> bool:
    """Whether a product sums scores over their heads (head mixing) rather than over queries or keys."""
    layout = state.origin.layout()
    summed = [a for x, dim in zip(labels, layout, strict=True) if x in others and x not in result for a in dim]
    axes = state.product.axes
    roots = [r for a in summed for r in (a, *a.lineage()) if r in axes]
    return bool(roots) and all(axes[r].side == "batch" for r in roots)


def _autocast(x: Tensor, out: Tensor) -> Tensor:
    return x if x.dtype == out.dtype or not x.is_floating_point() else x.to(out.dtype)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
