"""Functions and modules of ``torch.jit`` (scripted and traced): compiled code that dispatches to no mode.

Nothing can be seen in it. Where the Python function that it was made from gives the same bits, that is run beside it
and followed; what the model gets is the compiled code's own, or, where somebody listens, that function's, which may be
changed. Else the compiled code is one unknown operation, and where it attends by itself, it is said that this was not
read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..torch_internals.code_patching import Patch
from ..torch_internals.dispatch_modes import tree_leaves
from ..torch_internals.isolation import no_gradients
from ..torch_internals.scripted import made_from
from .active import current, paused
from .base import ActiveTrace, Tap

_OPERATOR = re.compile(r"\baten::(\w+)")
_KERNEL = re.compile(r"scaled_dot_product|multi_head_attention|_transformer_encoder")
_SOFTMAX = re.compile(r"_?softmax|_?log_softmax")
_PRODUCT = re.compile(r"matmul|bmm|mm|baddbmm|addmm|einsum")
_RANDOM = re.compile(r".*dropout.*|rand\w*|bernoulli|normal|uniform|multinomial|exponential")


class _Compiled(NamedTuple):
    """What is known of compiled code.

    Attributes:
        attends: the operators that make an attention of it; () where it does not attend by itself.
        written: the Python function that may run beside it; None: there is none, or it would draw random numbers or
            write to what it is given a second time.
    """

    attends: tuple[str, ...]
    written: Callable[..., Any] | None


_known: WeakKeyDictionary[Any, _Compiled] = WeakKeyDictionary()


def attending(graph: Any) -> tuple[str, ...]:
    """The operators that make an attention of a graph: a kernel's name, or a softmax and products of matrices."""
    names = list(dict.fromkeys(_OPERATOR.findall(str(graph))))
    if kernels := tuple(n for n in names if _KERNEL.search(n)):
        return kernels
    softmaxes = tuple(n for n in names if _SOFTMAX.fullmatch(n))
    products = tuple(n for n in names if _PRODUCT.fullmatch(n))
    return (*softmaxes, *products) if softmaxes and products else ()


def body(original: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the compiled code, and follow what it was made from beside it."""
    tracing = current()
    if tracing is None or not tracing.watching():
        return original(function, *args, **kwargs)
    found = _known.get(function)
    if found is None:
        found = _known[function] = _look(function)
    out = original(function, *args, **kwargs)
    written = found.written
    if written is not None and (found.attends or tracing.followed((args, kwargs))):
        run = functools.partial(written, *args, **kwargs)
        if tracing.listened:  # the Python function itself is what the model gets, with what is changed in it
            if tracing.shapes_only or _gives(tracing, run, out):
                return run()
        else:
            with no_gradients():
                if tracing.shapes_only or _gives(tracing, run, out):
                    for mine, like in zip(_tensors(out), _tensors(run()), strict=True):
                        tracing.same(mine, like)
                    return out
    if found.attends:
        tracing.skip(
            f"{_name(function)} attends in code compiled by torch.jit ({', '.join(found.attends)}), where nothing can "
            "be seen; call the Python function or module that it was made from"
        )
    return tracing.follow(_name(function), lambda *_, **__: out, args, kwargs)


def _look(function: Any) -> _Compiled:
    graph = function.inlined_graph
    names = set(_OPERATOR.findall(str(graph)))
    once = any((n.endswith("_") and not n.endswith("__")) or _RANDOM.fullmatch(n) for n in names)
    return _Compiled(attending(graph), None if once else made_from(function))


def _name(function: Any) -> str:
    kind = "function" if isinstance(function, torch.jit.ScriptFunction) else "method"
    return f"the scripted {kind} {function.name}"


def _gives(tracing: ActiveTrace, run: Callable[[], Any], out: Any) -> bool:
    """Whether a function gives the very bits of the compiled code; it is not watched as it does."""
    try:
        with tracing.aside(), paused():
            again = run()
    except Exception:  # noqa: BLE001 - a traced function need not run as it was written
        return False
    return type(again) is type(out) and _same_bits(again, out)


def _same_bits(a: Any, b: Any) -> bool:
    """Whether two results hold the same, tensors to the bit, in whatever they are packed."""
    mine, others = tree_leaves(a), tree_leaves(b)
    return len(mine) == len(others) and all(map(_same, mine, others))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and bool(a == b)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def patches() -> Iterable[Patch]:
    """The call of any scripted function, and of the methods of scripted modules."""
    yield Patch(torch.jit.ScriptFunction, "__call__", body)
    yield Patch(torch.ScriptMethod, "__call__", body)


TAP = Tap("script", mode_patches=patches)
