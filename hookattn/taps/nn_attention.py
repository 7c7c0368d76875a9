"""``torch.nn.MultiheadAttention`` and the ``nn.Transformer`` layers, in their Python form and on their eval fast path.

The Python form dispatches as one function and would hide its kernels: its body is run with that one check answered
"no", so that the taps of the kernels inside see them. The fast path is one native call, which
:mod:`~hookattn.taps.native_layers` reads. Nothing in it can be changed: where somebody listens, the Python form runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..torch_internals.code_patching import Patch, copy_of
from ..torch_internals.function_modes import beneath, depth, opened
from .active import current
from .base import Tap
from .native_layers import handle_layer, handle_native

if TYPE_CHECKING:
    from .eager.follower import Follower

PYTHON_FORM = (
    "torch's attention layers ran in their Python form, so that what they do can be changed, and not on their native "
    "fast path: outputs may differ in the last bits, and where a padded position attends they may differ in all"
)


def _undispatched(function: Any) -> Any:
    """The same function, with its ``has_torch_function`` answering no."""
    return copy_of(function, has_torch_function=lambda _: False) if isinstance(function, FunctionType) else function


def handle_python(watch: Follower, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run the body of ``multi_head_attention_forward`` with our mode on; every other sees the one call it would see."""
    if depth():
        with beneath(watch):
            return func(*args, **kwargs)
    with opened(watch):
        return _undispatched(func)(*args, **kwargs)


def _no_dispatch(original: Any, args: Iterable[Any]) -> bool:
    """In a traced thread our mode is no reason to leave the fast path, where nobody listens; a tensor subclass or
    another mode is."""
    answer, tracing = bool(original(args)), current()
    if not answer or tracing is None:
        return answer
    with tracing.aside():
        plain = bool(original(args))
    if tracing.listened and not plain:
        # With gradients there is no fast path.
        if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)):
            tracing.note(PYTHON_FORM)
        return answer
    return plain


TAP = Tap(
    "mha",
    kernels={
        "multi_head_attention_forward": handle_python,
        "_native_multi_head_attention": handle_native,
        "_transformer_encoder_layer_fwd": handle_layer,
    },
    mode_patches=lambda: (Patch(torch.overrides, "has_torch_function", _no_dispatch),),
)
