"""Who of several processes measures, and how the parts that each has of a model become one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import distributed, nn

from ..errors import MeasureError

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..traces import Trace

PLACE = ("call", "stack", "kind", "layer", "path", "head")
"""The columns that say which head of a forward a row is of."""


def rank() -> int:
    """The number of this process among those that train together; 0 where it is alone."""
    return distributed.get_rank() if _together() else 0


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what replicates or compiles it, whose own forward would talk to the other processes."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_sharded(model: nn.Module) -> bool:
    """Whether no process can run it alone, as each holds a part of its parameters."""
    if not _together() or distributed.get_world_size() == 1:
        return False
    if any("FullyShardedDataParallel" in {kind.__name__ for kind in type(m).__mro__} for m in model.modules()):
        return True
    # DTensor has a mesh; parameters that DeepSpeed has taken apart a number of their own.
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def takes_part(model: nn.Module) -> bool:
    """Whether this process runs the forward: all do where the model is sharded, the first one alone where each has a
    model of its own."""
    return is_sharded(model) or rank() == 0


def shards_of(trace: Trace) -> bool:
    """Whether this process has a part of the heads of some call.

    Raises:
        MeasureError: it has a part that no measure can be put together of, or it is not known which.
    """
    found = False
    for call in trace:
        for shard in call.shards:
            if shard.axis != "H" or shard.start is None:
                raise MeasureError(
                    f"call {call.index} ({call.site.label}) has {shard} here; heads can be put together where each "
                    "process has whole heads, and it is known which."
                )
            found = True
    return found


def gathered(found: DataFrame | Exception, sharded: bool) -> DataFrame:
    """One table of those of all processes; each calls this, whether it could measure or not.

    Args:
        found: of this process, with the columns :data:`PLACE`; or why there is none.
        sharded: whether this process has a part of the heads.

    Raises:
        HookattnError: of this process, or of another one.
    """
    import pandas as pd

    parts: list[Any] = [None] * distributed.get_world_size()
    own = None if isinstance(found, Exception) else found
    told = f"{type(found).__name__}: {found}" if isinstance(found, Exception) else None
    distributed.all_gather_object(parts, (None if own is None else pd.DataFrame(own), sharded, told))
    if isinstance(found, Exception):
        raise found
    failed = [f"rank {n}: {error}" for n, (_, _, error) in enumerate(parts) if error is not None]
    if failed:
        raise MeasureError(f"heads could not be measured on every process; {'; '.join(failed)}")
    if not any(part[1] for part in parts):
        return found
    joined = pd.concat([part[0] for part in parts], ignore_index=True)
    joined = joined.drop_duplicates(list(PLACE)).sort_values(["call", "head"], kind="stable", ignore_index=True)
    made: DataFrame = type(found)(joined)
    return made


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
