"""A model's copy without weights: it runs on shapes, takes hardly any memory, and shares nothing with the original.

Parameters and floating inputs become fake tensors, and so does whatever is computed from them. Token ids, masks,
buffers and small tables stay real, so that what a model decides by their values (which mask, which bias) comes out as
it would.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from ..models.wrappers import Unwrapped
from ..torch_internals.dispatch_modes import TorchDispatchMode
from ..torch_internals.fake_tensors import (
    FakeTensor,
    FakeTensorMode,
    is_equal,
    is_grouped_mm,
    reads_a_value,
)
from ..torch_internals.frames import argument_names
from ..torch_internals.isolation import no_gradients
from ..torch_internals.module_state import hooks_of, parameters_of
from .prepared import copied, dispatch_hooks, notes_of_torch, shapes_met, undispatched

# Up to this many elements a table (relative positions, sinks) stays real; so does what is no parameter.
_TABLE = 1 << 14
_OTHER = 1 << 20
_BOOLS = 1 << 26  # causal masks that are kept as buffers
_MASK_NAME = re.compile(r"mask|bias", re.IGNORECASE)


class _Copying(TorchFunctionMode):
    """Copies tensors while ``copy.deepcopy`` runs: what is large becomes fake."""

    def __init__(self, fake: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        if id(x) not in memo:
            most = _BOOLS if x.dtype == torch.bool else _OTHER
            large = x.is_meta or x.numel() > most or x.layout is not torch.strided
            memo[id(x)] = self.fake(x) if large else x.detach().clone()
        return memo[id(x)]


class Rules(TorchDispatchMode):
    """Open while the copy runs: rules for shapes that torch has too narrowly, and answers for whoever may guess.

    Args:
        may_guess: asked when somebody wants the value of a fake tensor; True: the answer is yes, or one.
    """

    def __init__(self, may_guess: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.may_guess = may_guess

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, FakeTensor) for t in types):
            if is_grouped_mm(func):  # in the kernel float32 is fine; torch's own rule has bfloat16 alone
                return _grouped_mm(args[0], args[1], args[2] if len(args) > 2 else (kwargs or {}).get("offs"))
            if reads_a_value(func) and self.may_guess():
                truth = is_equal(func) or args[0].dtype == torch.bool
                return True if truth else torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def _grouped_mm(a: Tensor, b: Tensor, offsets: Any) -> Tensor:
    groups = [offsets.shape[0]] if a.dim() == b.dim() == 2 else [a.shape[0]] if a.dim() == b.dim() == 3 else []
    return a.new_empty([*groups, a.shape[-2], b.shape[-1]])


def fake_copy(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], str]:
    """Copies of a model and of its forward's arguments, with fake tensors in them. The model's hooks are left out, and
    its wrappers.

    Returns:
        The copies, and what was left out that the model's weights may need, in words; "": nothing.

    Raises:
        ModelError: something in them cannot be copied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), torch.device("cpu"))
    unwrapped = Unwrapped(model)
    hooks, shapes = list(dispatch_hooks(model)), shapes_met(model)

    def fake(x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        # What hooks move from device to device stays where the inputs are.
        device = given if x.is_meta or hooks else x.device
        with mode:
            if shape is not None:
                return torch.empty(shape, dtype=x.dtype, device=device)
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device, requires_grad=False)

    memo: dict[int, Any] = {id(x): None for x in (*hooks, *notes_of_torch(model))}
    for module in model.modules():
        for those in hooks_of(module).values():  # they are somebody's, and may keep what they see
            memo[id(those)] = type(those)()
        for name, x in parameters_of(module).items():
            if x is None or id(x) in memo or id(x) in shapes:
                continue
            table = isinstance(module, nn.Embedding) or not name.endswith("weight")
            real = table and x.numel() <= _TABLE and not x.is_meta
            with no_gradients():
                memo[id(x)] = nn.Parameter(x.detach().clone() if real else fake(x), x.requires_grad)
    for apart, shape in shapes.values():
        with no_gradients():
            memo[id(apart)] = nn.Parameter(fake(apart, shape), apart.requires_grad)
    for name, x in [*((_name(unwrapped.root, i), x) for i, x in enumerate(args)), *kwargs.items()]:
        if isinstance(x, Tensor) and x.is_floating_point() and not _MASK_NAME.search(name):
            memo[id(x)] = fake(x)
    try:
        with no_gradients(), _Copying(fake):
            made = copied(unwrapped, copy.deepcopy, memo)
            undispatched(made)
            return made, *copy.deepcopy((args, kwargs), memo), _prepared_by(unwrapped, bool(hooks), bool(shapes))
    except Exception as error:
        raise ModelError(
            f"{unwrapped.root.__class__.__name__} or its inputs cannot be copied without their weights ({error}); plan "
            "a model of the same configuration that was not prepared for running yet, or trace a short input and scale "
            "its sizes."
        ) from error


def _prepared_by(unwrapped: Unwrapped, dispatched: bool, sharded: bool) -> str:
    """What was left out of a copy that its weights may need; "": nothing."""
    found = [*unwrapped.wrapped_by, *["the hooks that bring its weights"] * dispatched, *["its mesh"] * sharded]
    return ", ".join(found)


def _name(model: nn.Module, position: int) -> str:
    names = argument_names(model.forward)
    return names[position] if position < len(names) else ""
