"""Files that several processes of one group write at the same time: each its own, and none the file of another.

A process that writes a name claims it in the store of the group (:mod:`hookattn.torch_internals.process_group`). The
claim holds as long as the group does: a later run, which is another group, may replace what an earlier one has left.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..calls.shard import Shard
from ..errors import TraceWriteError
from ..torch_internals.process_group import World, first_to_claim, world

_began = time.time()


def rank_path(path: str | os.PathLike[str], shards: Sequence[Sequence[Shard]]) -> Path | None:
    """The file of this process, ``run.rank01-of-02.safetensors``, where it has a part of the attention; None: of one
    name, as it was asked for.

    Args:
        path: what was asked for.
        shards: those of each call that has any.

    Returns:
        A path whose numbers are those of the shard where its processes are all there are, and else those of the world.
    """
    here = world()
    found = {(shard.index, shard.count) for several in shards for shard in several if shard.count > 1}
    if here is None or not shards:
        return None
    index, count = found.pop() if len(found) == 1 else here
    return _with_rank(Path(path), *((index, count) if count == here.size else here))


def _with_rank(path: Path, index: int, count: int) -> Path:
    digits = max(2, len(str(count)))
    return path.with_name(f"{path.stem}.rank{index:0{digits}}-of-{count:0{digits}}{path.suffix}")


class RankName(NamedTuple):
    """What the name of a file says of the rank that wrote it.

    Attributes:
        rank, of: which one, of how many.
        path: the name that was asked for, which all of them share.
    """

    rank: int
    of: int
    path: Path


def rank_in(path: str | os.PathLike[str]) -> RankName | None:
    """What a file's name, such as ``run.rank01-of-02.safetensors``, says of its rank; None: nothing."""
    path = Path(path)
    found = re.fullmatch(r"(.*)\.rank(\d+)-of-(\d+)", path.stem)
    return None if found is None else RankName(int(found[2]), int(found[3]), path.with_name(found[1] + path.suffix))


def rank_names(path: Path, count: int) -> list[str]:
    """The names of the files of all ranks."""
    return [_with_rank(path, index, count).name for index in range(count)]


def other_name(path: str | os.PathLike[str]) -> Path | None:
    """The name of this process for a file that another one writes; None: there is no other one."""
    here = world()
    return None if here is None else _with_rank(Path(path), *here)


def claim(path: str | os.PathLike[str]) -> None:
    """Say that this process writes a file, so that no other one of its group does.

    Raises:
        TraceWriteError: another one has said so.
    """
    here = world()
    if here is None:
        return
    first = _first(Path(path), here)
    if first != here.rank:
        raise TraceWriteError(refusal(path, here, first))


def refusal(path: str | os.PathLike[str], here: World, first: int | None) -> str:
    """That another process writes this file, and what to do."""
    name = _with_rank(Path(path), here.rank, here.size).name
    who = "another process" if first is None else f"rank {first} of the same group"
    return (
        f"{os.fspath(path)}: {who} writes this file, and this is rank {here.rank} of {here.size}, which would take its "
        f"place. Give each rank a name of its own ({name}, say), or write on one rank alone."
    )


def _first(path: Path, here: World) -> int | None:
    final = Path(os.path.realpath(path))
    found = first_to_claim(str(final), here.rank)
    if found is not None:
        return found
    # Without the store: what was written since this process began is not of an earlier run.
    try:
        return None if final.stat().st_mtime >= _began else here.rank
    except OSError:
        return here.rank
