"""Calls whose tensors are distributed: what this process has of them, as plain tensors.

A model may leave its queries, keys and values as distributed tensors. Each of them tells how it lies over the
processes; what lies like the queries, or can be made to without a word to others, is taken as it is here. Anything else
would take a communication, in which all processes would have to take part, traced or not: such a call is not read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..attention.kernel_call import TENSOR_SPECS, KernelCall
from ..attention.pieces import Cut
from ..calls.shard import Shard
from ..models.sharding import distributed_tensor, part_of_mesh

_LETTERS = {"B": "B", "H": "H", "G": "H", "T": "T"}
"""What an axis of a tensor is cut along, of the axes that a call can be cut along."""


class Unreadable(Exception):
    """Why a call of distributed tensors cannot be read here."""


def is_distributed(x: object) -> bool:
    """Whether a tensor is a distributed one."""
    kind = distributed_tensor()
    return kind is not None and isinstance(x, kind)


def as_here(call: KernelCall) -> tuple[KernelCall, list[Shard]]:
    """A call with plain tensors, those of this process, and which part of each axis they are.

    Raises:
        Unreadable: what is here is no attention by itself.
    """
    named = {name: x for name in TENSOR_SPECS if isinstance(x := getattr(call, name), Tensor)}
    lead = next(name for name in ("q", "weights", "v") if name in named)
    first: Any = named[lead]
    if not is_distributed(first):
        raise Unreadable("some of its tensors are distributed, and its queries are not")
    mesh = first.device_mesh
    along = [_letter(lead, first, p) for p in first.placements]
    changes: dict[str, Any] = {name: _here(name, x, mesh, along) for name, x in named.items()}
    shards = _shards(mesh, along, call)
    # What comes back to the model is the distributed tensor, whose gradient lies over the processes.
    return replace(call, **changes, result=None, result_form=None, notes=list(call.notes)), shards


def _letter(name: str, x: Any, placement: Any) -> str | None:
    """What a placement cuts a tensor along; None: nothing."""
    if placement.is_replicate():
        return None
    axes = TENSOR_SPECS[name].axes
    if placement.is_shard() and x.dim() == len(axes):
        letter = _LETTERS.get(axes[placement.dim % x.dim()])
        if letter is not None:
            return letter
        raise Unreadable(f"its {name} is cut along {axes[placement.dim % x.dim()]} across processes")
    raise Unreadable(f"its {name} lies over processes as {placement}")


def _here(name: str, x: Any, mesh: Any, along: list[str | None]) -> Tensor:
    """One tensor as it is here, cut as the queries are."""
    if not is_distributed(x):
        raise Unreadable(f"its queries are distributed, and its {name} is not")
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Placed

    if x.device_mesh != mesh:
        raise Unreadable(f"its queries and its {name} lie over different meshes")
    spec = TENSOR_SPECS[name]
    axes = spec.axes
    wanted: list[Any] = []
    for have, letter in zip(x.placements, along, strict=True):
        dim = next((i for i, a in enumerate(axes) if _LETTERS.get(a) == letter), None) if letter else None
        if dim is not None and (x.dim() != len(axes) or (spec.broadcast and x.shape[dim] == 1)):
            dim = None  # the same for all
        target = Replicate() if dim is None else Placed(dim)
        if have != target and not have.is_replicate():
            raise Unreadable(
                f"its queries lie over processes as {_words(along)}, and its {name} as {x.placements}: to have the "
                f"{'keys' if name in ('k', 'v') else 'rest'} here, processes would have to send each other some, which "
                "a trace must not do"
            )
        wanted.append(target)
    if tuple(x.placements) != tuple(wanted):
        x = x.redistribute(placements=wanted)  # of what every process has: each takes its part
    local: Tensor = x.to_local()
    return local


def _words(along: list[str | None]) -> str:
    return ", ".join("the same for all" if x is None else f"cut along {x}" for x in along)


def _shards(mesh: Any, along: list[str | None], call: KernelCall) -> list[Shard]:
    b, h, t, _ = call.shape
    g = call.v.shape[1]
    made = []
    for letter in ("H", "T", "B"):
        over = [i for i, x in enumerate(along) if x == letter and mesh.size(i) > 1]
        if not over:
            continue
        of = {"B": b, "H": h, "T": t}[letter]
        start, _, name, rank, ranks = part_of_mesh(of, mesh, over)
        groups = part_of_mesh(g, mesh, over).start
        known = letter == "H" and h * groups == g * start
        at = (groups, g) if known else (None, None)
        made.append(Shard(letter, start if start < of else None, of, at[0], at[1], name, rank, ranks))
    return made


def cuts_of(shards: list[Shard]) -> dict[str, Cut] | None:
    """The same as a call's taps and selections know it; None: it is whole."""
    if not shards:
        return None
    made = {shard.axis: Cut(shard.start, shard.of) for shard in shards}
    heads = next((shard for shard in shards if shard.axis == "H"), None)
    if heads is not None:
        made["G"] = Cut(heads.group_start, heads.groups_of)
    return made
