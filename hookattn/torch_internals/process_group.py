"""The process group that this process is in, and a word with the others that needs none of them to answer.

Processes of a group share a store of keys and values, by which they have met. Setting a key in it is no collective: a
process that says something there waits for nobody.

Private of torch: the store of the default group has no public name.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from .private import private


class World(NamedTuple):
    """This process among those of its group.

    Attributes:
        rank: its number, from 0.
        size: how many they are.
    """

    rank: int
    size: int


def world() -> World | None:
    """The default group of ``torch.distributed``; None: it is not initialised, or has one process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    size: int = distributed.get_world_size()
    return World(distributed.get_rank(), size) if size > 1 else None


def first_to_claim(key: str, rank: int) -> int | None:
    """The first process that has claimed a key, which is this one if nobody has before.

    Args:
        key: any text.
        rank: of this process.

    Returns:
        Its rank; None: the store of the group does not answer.
    """
    try:
        store = private("torch.distributed.distributed_c10d", "_get_default_store", "process_group")()
        return int(store.compare_set(f"hookattn/{key}", "", str(rank)))
    except Exception:  # noqa: BLE001 - a store on the network can fail in any way, and there is no group left then
        return None
