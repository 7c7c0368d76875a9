"""A second witness: what the model itself forms, seen below torch's dispatcher in a run that is not traced.

The taps see the calls of Python functions; this sees what reaches the kernels, knows nothing of attention, and shares
no code with them. A record can agree with itself and still be wrong (both q and k before their rotation, with an output
to fit; heads in another order; the scale moved into q): then some field of it is a tensor that the model never made.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from ..calls.call import Call
from ..store.rawbytes import byte_blocks
from ..torch_internals.dispatch_modes import TorchDispatchMode, tree_leaves
from ..traces import Trace
from .case import Case, NotApplicable
from .failure import Failure

_Key = tuple[torch.dtype, bytes]
_MEND = {
    "q": "record q as it enters the product: after rotation and norms, before the kernel's scale, heads in their order",
    "k": "record k as it enters the product: after rotation and norms, with the cache, not repeated for grouped heads",
    "v": "record v as it meets the weights, with the cache, not repeated for grouped queries",
    "output": "record what the kernel returned, before heads are merged, in their order",
    "weights": "record the weights after the softmax and before dropout",
}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the content of every tensor of some sizes that an operator takes or returns."""

    def __init__(self, sizes: set[int]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes, self.seen = sizes, set[_Key]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note((args, kwargs))
        made = func(*args, **kwargs)
        self._note(made)
        return made

    def _note(self, x: Any) -> None:
        for t in tree_leaves(x):
            if isinstance(t, Tensor) and t.is_floating_point() and not t.is_nested and t.numel() in self.sizes:
                self.seen.add(_key(t))


def _key(x: Tensor) -> _Key:
    return x.dtype, b"".join(bytes(block) for block in byte_blocks(x))  # a block lasts until the next


def witness(case: Case) -> Iterator[Failure]:
    """q, k, v and output of every call are tensors that the untraced model forms, axes in any order."""
    model = case.model()
    yield from formed(case, model, case.trace(model))


def formed(case: Case, model: torch.nn.Module, trace: Trace, inputs: Any = None) -> Iterator[Failure]:
    """The same for one trace of a model."""
    wanted = [(call, name, x) for call in trace for name in case.formed if (x := _field(call, name)) is not None]
    watch = _Watch({n for *_, x in wanted for n in (x.numel(), x[:1].numel())})
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, in which nothing can be seen
    try:
        with watch:
            case.run(model, inputs)
    except NotImplementedError as error:
        raise NotApplicable(f"the model runs under no dispatch mode: {error}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for call, name, x in wanted:
        one = x[:1]  # learned queries that all batch entries share
        forms = (x, one) if torch.equal(x, one.expand_as(x)) else (x,)
        if not any(_key(y.permute(order)) in watch.seen for y in forms for order in permutations(range(y.dim()))):
            where = f"{call.site.label} (call {call.index}, step {call.step}, {call.tap})"
            yield Failure(
                where, f"{name} as the model has it", "a tensor that it forms", "one that it never forms", _MEND[name]
            )


def _field(call: Call, name: str) -> Tensor | None:
    if not call.has(name) or (name == "weights" and call.certificate.weights_error is None):
        return None
    x = call.get(name)
    return x if x is not None and x.numel() else None


def telling(case: Case) -> Iterator[Failure]:
    """The attention is far from uniform, so that a wrong record would differ; no check sees much otherwise."""
    best: dict[str, float] = {}
    for call in case.trace(case.model()):
        if call.has("weights") and call.has("mask"):
            weights, mask = call.weights.double(), call.mask.expand(call.weights.shape)
            count = mask.sum(-1, keepdim=True)
            if bool((count > 1).any()):
                gap = torch.where(mask & (count > 1), weights - 1 / count.clamp_min(1), 0.0).abs().max().item()
                best[call.site.label] = max(best.get(call.site.label, 0.0), gap)
    for where, gap in best.items():
        if not gap >= 0.05:
            mend = "draw larger weights: with attention this flat a wrong record matches too"
            yield Failure(where, "how far the attention is from uniform", "0.05 or more somewhere", f"{gap:.2g}", mend)


def expected_weights(case: Case) -> Iterator[Failure]:
    """The weights are those of the author's own reference."""
    if case.weights is None:
        raise NotApplicable("no weights= was given")
    model = case.model()
    trace, own = case.trace(model), case.weights(model, case.make_inputs())
    for path, theirs in own.items():
        calls = [c for c in trace if c.site.path == path]
        if len(calls) != 1:
            yield Failure(path, "calls to compare with weights=", "1", str(len(calls)))
            continue
        mine, live = calls[0].weights, calls[0].mask.any(-1, keepdim=True)
        if mine.shape != theirs.shape:
            yield Failure(path, "the shape of the weights", str(tuple(theirs.shape)), str(tuple(mine.shape)))
            continue
        worst = torch.where(live, mine.double() - theirs.double(), 0.0).abs().max().item()
        if not worst <= 1e-4:
            yield Failure(path, "the weights of your reference", "within 1e-4", f"off by {worst:.3g}")
