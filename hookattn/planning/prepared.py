"""A model that was made ready for several devices: what its weights are like when its modules run.

Sharded weights are put together for as long as a module runs, or never; offloaded ones are brought by hooks. A plan
runs a copy of the model without wrappers and hooks, on weights of the shapes that its modules would have met.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..models.wrappers import Unwrapped, is_sharded_by_torch
from ..torch_internals.flat_parameters import flattened
from ..torch_internals.module_state import parameters_of

_NOTES = "__composable_api"
_HOOK, _FORWARD, _OWN_FORWARD = "_hf_hook", "forward", "_old_forward"


def shapes_met(model: nn.Module) -> dict[int, tuple[Tensor, tuple[int, ...]]]:
    """Identity -> tensor and shape, of each tensor that stands for a weight of another shape than its own.

    Args:
        model: with its wrappers.
    """
    found: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
    together: set[int] = set()  # the modules whose weights are put together before they run
    for module in model.modules():
        if is_sharded_by_torch(module):
            together.update(map(id, module.modules()))
        for tensor, shape in flattened(module):
            found[id(tensor)] = tensor, shape
        for x in parameters_of(module).values():
            if x is not None and _is_placed(x):
                found[id(x)] = x, _local_shape(x, id(module) in together)
    return found


def _is_placed(x: Tensor | None) -> bool:
    """Whether a tensor is one of a mesh of devices. None can be made without the module being imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _local_shape(x: Any, together: bool) -> tuple[int, ...]:
    """The shape of what a module of this rank computes with.

    Args:
        x: a distributed tensor.
        together: whether it is put together, over the axes of the mesh up to the first that it is sharded over. Those
            of tensor parallelism come after that one.
    """
    shape = list(x.shape)
    sharded = [(axis, place.dim) for axis, place in enumerate(x.placements) if hasattr(place, "dim")]
    for axis, dim in sharded[1:] if together else sharded:
        count, at = x.device_mesh.size(axis), x.device_mesh.get_local_rank(axis)
        most = -(-shape[dim] // count)
        shape[dim] = max(0, min(most, shape[dim] - most * at))
    return tuple(shape)


def notes_of_torch(model: nn.Module) -> Iterator[Any]:
    """What torch has noted on modules that it has sharded or replicated: process groups and streams, which no copy can
    have."""
    for module in model.modules():
        yield from (value for name, value in vars(module).items() if name.startswith(_NOTES))


def dispatch_hooks(model: nn.Module) -> Iterator[Any]:
    """What brings weights to modules as they run, and the forwards that call it: a copy has none of them."""
    for module in model.modules():
        state = vars(module)
        if _HOOK in state:
            yield state[_HOOK]
            if _OWN_FORWARD in state:
                yield state[_FORWARD]


def undispatched(copy: nn.Module) -> None:
    """Give the modules of a copy their own forwards back."""
    for module in copy.modules():
        state = vars(module)
        if state.pop(_HOOK, copy) is not copy and _OWN_FORWARD in state:
            state[_FORWARD] = state.pop(_OWN_FORWARD)


def copied(unwrapped: Unwrapped, copy: Callable[[Any, dict[int, Any]], Any], memo: dict[int, Any]) -> nn.Module:
    """A copy of the model without wrappers. What refers to a wrapped module has the copy of what stands for it.

    Args:
        unwrapped: the model.
        copy: ``copy.deepcopy``.
        memo: its memory.
    """
    made = {}
    for stands, module in unwrapped.stand_ins():
        made[id(stands)] = memo[id(stands)] = memo[id(module)] = object.__new__(type(stands))
    for wrapper, inner in unwrapped.wrappers():
        memo[id(wrapper)] = memo.get(id(inner)) or copy(inner, memo)
    for stands, _ in unwrapped.stand_ins():
        vars(made[id(stands)]).update(copy(vars(stands), memo))
    whole: nn.Module = copy(unwrapped.root, memo)
    return whole
