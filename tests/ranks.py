"""Runs a function in several processes that form a group of ``torch.distributed`` (gloo, on this machine)."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# The server imports these once; the processes are forked from it and need not import them again.
_PRELOAD = ["torch.distributed.tensor.parallel", "transformers.models.llama.modeling_llama", "hookattn", "tests.ranks"]
_GRACE = 3.0  # Seconds that the others have to say something of their own after one has failed.


class RankError(AssertionError):
    """A rank raised, died, or did not end in time; the message has what each of them said."""


def run_ranks(count: int, function: Callable[..., Any], *args: Any, limit: float = 60.0) -> list[Any]:
    """What ``function(rank, *args)`` returns in each of ``count`` ranks of one group.

    Args:
        count: how many processes.
        function: a function of a module; what it is given and returns is pickled.
        args: what it is called with after the number of its rank.
        limit: seconds after which all of them are killed.

    Raises:
        RankError: one of them raised, died or was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    given = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, count, folder, given, theirs), daemon=True)
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        try:
            said = _answers(ends, limit)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for end in ends:
                end.close()
    if all(ok for ok, _ in said):
        return [value for _, value in said]
    raise RankError("\n".join(f"rank {rank}: {value}" for rank, (ok, value) in enumerate(said) if not ok))


def _answers(ends: list[Connection], limit: float) -> list[tuple[bool, Any]]:
    said: dict[int, tuple[bool, Any]] = {}
    until = time.monotonic() + limit
    while len(said) < len(ends):
        open_ends = [end for rank, end in enumerate(ends) if rank not in said]
        ready = wait(open_ends, max(0.0, until - time.monotonic()))
        if not ready:
            break
        for end in ready:
            rank = ends.index(end)  # type: ignore[arg-type]
            try:
                said[rank] = pickle.loads(ends[rank].recv_bytes())
            except EOFError:
                said[rank] = False, "died without a word"
            if not said[rank][0]:
                until = min(until, time.monotonic() + _GRACE)
    return [said.get(rank, (False, "had not ended in time, and was killed")) for rank in range(len(ends))]


def _rank(rank: int, count: int, folder: str, given: bytes, end: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        GLOO_SOCKET_IFNAME="lo",
        TOKENIZERS_PARALLELISM="false",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meeting'}", rank=rank, world_size=count)
        function, args = pickle.loads(given)
        answer = pickle.dumps((True, function(rank, *args)))
    except BaseException:  # noqa: BLE001 - told to who asked
        answer = pickle.dumps((False, traceback.format_exc()))
    end.send_bytes(answer)
    end.close()
    # Where another rank has failed the group cannot be left in order; nothing of this process is needed any more.
    os._exit(0)
