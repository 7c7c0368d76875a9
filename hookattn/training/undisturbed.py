"""A forward in the midst of a training, after which the training goes on as if it had not been."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..torch_internals.devices import random_state
from ..torch_internals.module_state import buffers_of


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients in the block; after it, everything that the training depends on is as before.

    These are the mode of each module (dropout is off in the block, and statistics of batches stay), the values of
    buffers, the states of random numbers of Python, numpy, the CPU and the model's devices, grad mode, and the copies
    that autocast keeps of weights.

    Args:
        model: what runs in the block.
    """
    modules = list(model.modules())
    with random_numbers_kept(model), ExitStack() as back:
        _keep_buffers(back, modules)
        # By the flag alone: `train()` and `eval()` may be overridden, to merge adapters into weights, say, which does
        # not come apart again to the last bit.
        for module in modules:
            back.callback(setattr, module, "training", module.training)
        for module in modules:
            module.training = False
        # A weight that autocast has cast without gradients would be taken again where gradients are wanted.
        back.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        back.enter_context(torch.no_grad())
        yield


@contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Random numbers of Python, numpy, the CPU and the model's devices go on after the block as if it had not been."""
    with ExitStack() as back:
        back.callback(random.setstate, random.getstate())
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            back.callback(numpy.random.set_state, numpy.random.get_state())
        of = {torch.device("cpu"), *(x.device for x in (*model.parameters(), *model.buffers()))}
        for device in of:
            back.callback(random_state(device))
        yield


def _keep_buffers(back: ExitStack, modules: list[nn.Module]) -> None:
    seen: set[int] = set()
    for module in modules:
        for name, buffer in buffers_of(module).items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                back.callback(_restore_buffer, module, name, buffer, buffer.detach().clone())


def _restore_buffer(module: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    own = buffers_of(module)
    if own.get(name) is not buffer:
        own[name] = buffer  # a forward may exchange it, as for positions beyond those that were there
    # Only what was changed is written to: a backward that is still to come may have kept it.
    with torch.no_grad():
        if not _same(buffer, value):
            buffer.copy_(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
