"""Which of a model's heads a process has, as the placements of its parameters tell it.

Tensor parallelism cuts the projections of queries, keys and values by their rows, whole heads each, and what runs then
is an attention of fewer heads. Nothing in that attention says so. What says it are the parameters: those that are
distributed tensors *while the site runs* have their placement with them. Others are no part of it: parameters that are
cut for memory alone (fully sharded data parallelism) have been gathered by then, and are plain tensors.

Nothing is guessed. A parameter tells something where what is here of it, and what there is of it in the whole, are
heads times width exactly; where no parameter does, or two tell different things, the numbers of the heads are unknown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..calls.shard import Shard
from .wrappers import Unwrapped

_UNKNOWN = (
    "which of the model's heads these are is not known: parameters of {0} are cut across processes ({1}), and {2}; say "
    "it with shard=hookattn.Shard('H', start=…, of=…)"
)
_FUSED = "one of them holds queries, keys and values together, of which no placement tells which rows are whose"
_NONE = "none has its heads by rows"
_BOTH = "they fit heads that are cut and heads that are not alike"
_APART = "they tell different things"


class HeadShard(NamedTuple):
    """What placements say of the heads of a call.

    Attributes:
        shard: which of the model's; None: all.
        note: why that is not known; empty: it is.
    """

    shard: Shard | None
    note: str = ""


class Heads(NamedTuple):
    """The extents of one call.

    Attributes:
        h, g: query heads and key heads.
        d, e: widths of a query and of a value; None: not known.
    """

    h: int
    g: int
    d: int | None
    e: int | None

    @property
    def widths(self) -> set[int]:
        """Those that are known."""
        return {x for x in (self.d, self.e) if x is not None}


class _Cut(NamedTuple):
    """One axis of a parameter that is cut.

    Attributes:
        dim: the axis.
        start, here, of: the first of its rows that is here, how many are here, how many there are.
        mesh: the names of the dimensions of the device mesh along which it is cut.
        rank, ranks: which of the processes on these this is, and how many they are.
    """

    dim: int
    start: int
    here: int
    of: int
    mesh: str
    rank: int
    ranks: int


class _Parameter(NamedTuple):
    """One parameter: its shape in the whole, and the axis that is cut; None: none is."""

    shape: tuple[int, ...]
    cut: _Cut | None

    @property
    def by_rows(self) -> bool:
        """Whether what is cut is what it gives, not what it takes: of a matrix its rows."""
        return self.cut is not None and (self.cut.dim == 0 or len(self.shape) > 2)


def has_distributed_parameters(model: nn.Module) -> bool:
    """Whether a model has a parameter that is a distributed tensor now."""
    kind = distributed_tensor()
    return kind is not None and any(isinstance(x, kind) for x in model.parameters())


def distributed_tensor() -> Any:
    """The class of distributed tensors; None: nobody has loaded it, and so there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def shard_of_heads(model: Unwrapped, path: str, heads: Heads) -> HeadShard:
    """Which of a model's heads a call has. To be asked while its site runs.

    Args:
        model: the model.
        path: of the module that attends.
        heads: of the call.
    """
    found = list(_matrices(_with_parameters(model, path)))
    cut = [x for x in found if x.cut is not None]
    if not cut:
        return HeadShard(None)
    sharded, why = _of_cut(cut, found, heads)
    whole, together = _is_whole(found, heads), _is_whole_fused(found, heads)
    if (whole or together) and sharded is None:
        return HeadShard(None)  # what is cut is put together before it attends
    first = cut[0].cut
    assert first is not None
    # As many rows as queries, keys and values together would have, here, a projection of queries may have in the whole:
    # that counts where nothing says what the keys are made by.
    if sharded is None or whole or (together and sharded.groups_of is None):
        words = _UNKNOWN.format(path or "the model", f"{first.ranks} on {first.mesh or 'their mesh'}", why or _BOTH)
        return HeadShard(Shard("H", None, None, None, None, first.mesh, first.rank, first.ranks), words)
    return HeadShard(sharded)


def _with_parameters(model: Unwrapped, path: str) -> nn.Module:
    """The module at a path, or the innermost around it that has a matrix: a kernel may be a module of its own."""
    around = [model.root]
    for name in path.split(".") if path else ():
        child = getattr(around[-1], name, None)
        if not isinstance(child, nn.Module):
            break
        around.append(child)
    # What stands for a module may not have the parameters that it runs with now.
    found = [model.real(module) for module in around]
    return next((m for m in reversed(found) if any(x.dim() > 1 for x in m.parameters())), found[0])


def _matrices(module: nn.Module) -> Iterator[_Parameter]:
    """Those of a module that have heads' worth of entries: matrices, and what has more axes."""
    kind = distributed_tensor()
    for x in module.parameters():
        if x.dim() < 2:
            continue
        cuts = _cuts(x) if kind is not None and isinstance(x, kind) else []
        if len(cuts) < 2:
            yield _Parameter(tuple(x.shape), cuts[0] if cuts else None)


def _cuts(x: Tensor) -> list[_Cut]:
    """The axes of a distributed tensor that are cut, over mesh dimensions that have more than one process."""
    mesh = x.device_mesh  # type: ignore[attr-defined]
    placed = list(enumerate(x.placements))  # type: ignore[attr-defined]
    made = []
    for dim in range(x.dim()):
        over = [i for i, p in placed if mesh.size(i) > 1 and getattr(p, "dim", None) in (dim, dim - x.dim())]
        if not over:
            continue
        part = part_of_mesh(x.shape[dim], mesh, over)
        plain = all(x.placements[i].is_shard() for i in over)  # type: ignore[attr-defined]
        local = tuple(x.to_local().shape)[dim]  # type: ignore[attr-defined]
        # Cut in strides, or by somebody's own rule: how many rows are here is known, and not which.
        start = part.start if plain and local == part.here else -1
        made.append(_Cut(dim, start, local, x.shape[dim], part.mesh, part.rank, part.ranks))
    return made


class MeshPart(NamedTuple):
    """What one process has of an axis that is cut along dimensions of a device mesh.

    Attributes:
        start, here: the first position, and how many.
        mesh: the names of the dimensions.
        rank, ranks: which of the processes on these this is, and how many they are.
    """

    start: int
    here: int
    mesh: str
    rank: int
    ranks: int


def part_of_mesh(of: int, mesh: Any, over: Sequence[int]) -> MeshPart:
    """What this process has of ``of`` positions that are cut along dimensions of a mesh, one after the other."""
    start, here, index, count = 0, of, 0, 1
    for i in over:
        size, rank = mesh.size(i), mesh.get_local_rank(i)
        chunk = -(-here // size)  # as torch.chunk cuts: the last ones may have less
        first = min(rank * chunk, here)
        start, here = start + first, min(chunk, here - first)
        index, count = index * size + rank, count * size
    names = mesh.mesh_dim_names or ()
    return MeshPart(start, here, ", ".join(names[i] for i in over if i < len(names)), index, count)


def _of_cut(cut: Sequence[_Parameter], every: Sequence[_Parameter], heads: Heads) -> tuple[Shard | None, str]:
    """The heads that cut parameters tell; None where they do not, and why."""
    telling: dict[tuple[int, int], list[_Parameter]] = {}
    for x in cut:
        if (found := _told(x, heads.h, heads)) is not None:
            telling.setdefault(found, []).append(x)
    fused = any(_is_fused(x, heads) for x in cut)
    # Where as many key heads as query heads are here, and fewer in the whole, they tell of each by itself.
    keys = next((k for k in telling if len(telling) == 2 and heads.h == heads.g and _are_keys(k, telling)), None)
    of_queries = [k for k in telling if k != keys]
    if len(of_queries) > 1:
        return None, _APART
    # What comes after the attention tells nothing of what it was made of.
    by_rows = next((x for k in of_queries for x in telling[k] if x.by_rows), None)
    if by_rows is None:
        return None, _FUSED if fused else _NONE
    ((start, of),) = of_queries
    groups = _groups(cut, every, heads, start, of) if keys is None else keys
    if fused and groups == (None, None):
        return None, _FUSED
    assert by_rows.cut is not None
    _, _, _, _, mesh, index, count = by_rows.cut
    return Shard("H", start, of, *groups, mesh, index, count), ""


def _are_keys(told: tuple[int, int], telling: Mapping[tuple[int, int], Sequence[_Parameter]]) -> bool:
    """Whether what some parameters tell is of keys and values, and what others tell of the queries that read them."""
    (start, of), ((first, whole),) = told, [k for k in telling if k != told]
    several = sum(x.by_rows for x in telling[told]), sum(x.by_rows for x in telling[first, whole])
    return several == (2, 1) and whole % of == 0 and first // (whole // of) == start


def _told(x: _Parameter, n: int, heads: Heads) -> tuple[int, int] | None:
    """The first of ``n`` heads, and how many the whole has, as a parameter tells it; None: it tells nothing."""
    cut = x.cut
    if cut is None or cut.start < 0:
        return None
    for width in heads.widths if len(x.shape) == 2 else {1, *heads.widths}:
        if cut.here == n * width and cut.start % width == 0 and cut.of % width == 0:
            return cut.start // width, cut.of // width
    return None


def _is_fused(x: _Parameter, heads: Heads) -> bool:
    """Whether a cut parameter has queries, keys and values together here."""
    d, e = heads.d, heads.e
    if x.cut is None or d is None or e is None:
        return False
    return x.cut.here == heads.h * d + heads.g * (d + e)


def _groups(
    cut: Sequence[_Parameter], every: Sequence[_Parameter], heads: Heads, start: int, of: int
) -> tuple[int | None, int | None]:
    """The first key head, and how many the whole has, by the projections of keys and values; None: not known."""
    h, g = heads.h, heads.g
    whole = [n for x in every if x.cut is None for n in {_heads_in(x, heads)} if n is not None]
    here = [x for x in cut if x.by_rows]
    told: tuple[int, int] | None = None
    if len(whole) >= 2 and len(set(whole)) == 1 and sum(_told(x, g, heads) is not None for x in here) < 2 + (g == h):
        # Keys and values that every process has: it takes all of them, or those that its heads read.
        groups = whole[0]
        per = of // groups if groups and of % groups == 0 else 0
        needed = sorted({i // per for i in range(start, start + h)}) if per else []
        if groups == g:
            told = 0, g
        elif len(needed) == g:
            told = needed[0], groups
    else:
        several = [found for x in here if (found := _told(x, g, heads)) is not None]
        # Of as many key heads as query heads three of them tell: one is the queries'.
        enough = len(several) >= 2 + (g == h) and len(set(several)) == 1
        told = several[0] if enough else None
    if told is None or of % told[1]:
        return None, None
    per = of // told[1]
    if h % g or any((start + i) // per != told[0] + i // (h // g) for i in range(h)):
        return None, None
    return told


def _heads_in(x: _Parameter, heads: Heads) -> int | None:
    """How many heads a matrix that nobody has cut gives, if it gives heads."""
    rows = x.shape[0]
    return next((rows // w for w in heads.widths if rows % w == 0), None) if len(x.shape) == 2 else None


def _is_whole(every: Sequence[_Parameter], heads: Heads) -> bool:
    """Whether projections, put together where they are cut, give just the heads that the call has."""
    d, e = heads.d, heads.e
    if d is None or e is None:
        return False
    h, g = heads.h, heads.g
    rows = [x.shape[0] for x in every if x.cut is None or x.cut.dim == 0]
    of_queries, of_values = rows.count(h * d), rows.count(g * e)
    if g == h and d == e:
        return of_queries >= 3
    return of_queries >= 1 and (of_values >= 2 if d == e else of_values >= 1 and g * d in rows)


def _is_whole_fused(every: Sequence[_Parameter], heads: Heads) -> bool:
    """The same of one projection that gives queries, keys and values together, or keys and values."""
    d, e = heads.d, heads.e
    if d is None or e is None:
        return False
    rows = [x.shape[0] for x in every if x.cut is None or x.cut.dim == 0]
    of_queries, of_both = heads.h * d, heads.g * (d + e)
    return of_queries + of_both in rows or (of_queries in rows and of_both in rows)
