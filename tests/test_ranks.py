"""Processes that form a group, as the tests of sharded models start them."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def _sum(rank: int, add: int) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor([rank + add])
    dist.all_reduce(total)
    return rank, dist.get_world_size(), total


def _fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("this rank fails")
    dist.barrier()


def _dies(rank: int) -> None:
    if rank == 1:
        os._exit(1)
    time.sleep(60)


def test_each_rank_answers() -> None:
    got = run_ranks(2, _sum, 10)
    assert [(rank, world) for rank, world, _ in got] == [(0, 2), (1, 2)]
    assert all(total.item() == 21 for _, _, total in got)


def test_a_rank_that_raises_ends_all() -> None:
    with pytest.raises(RankError, match=r"rank 1: (.|\n)*this rank fails"):
        run_ranks(2, _fails)


def test_a_rank_that_dies_or_hangs_ends_all() -> None:
    before = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0: had not ended in time(.|\n)*rank 1: died without a word"):
        run_ranks(2, _dies)
    assert time.monotonic() - before < 30
