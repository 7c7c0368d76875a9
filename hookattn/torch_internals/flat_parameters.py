"""What ``FullyShardedDataParallel`` makes of parameters: one flat tensor of many, that are put back as views of it.

It has no public way to the shapes that the parameters had: ``summon_full_params`` puts them together, which takes all
ranks and their memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def flattened(wrapper: nn.Module) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """What stands in the place of each parameter that a wrapper has flattened, and the parameter's own shape."""
    flat = getattr(vars(wrapper).get("_handle"), "flat_param", None)
    infos, shapes = getattr(flat, "_param_infos", ()), getattr(flat, "_shapes", ())
    for (name, module, *_), shape in zip(infos, shapes, strict=True):
        there = getattr(module, name, None)
        if isinstance(there, Tensor):
            yield there, tuple(shape)
