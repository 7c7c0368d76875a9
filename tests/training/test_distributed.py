"""Heads of a model that several processes train: who measures, and that nobody waits for a process that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from hookattn.calls.shard import Shard
from hookattn.errors import MeasureError
from hookattn.training import HeadMonitor, ranks, repeated_tokens
from tests.ranks import run_ranks
from tests.training import small
from tests.training.small import Small, equal, explicit

PROMPTS = repeated_tokens(small.VOCABULARY, length=6, batch=3)


def expected() -> pd.DataFrame:
    return HeadMonitor(PROMPTS).measure(Small(), 0)  # type: ignore[return-value]


def _step(model: nn.Module, rank: int) -> None:
    ids = small.data()[rank * 4 :][:4]
    model(ids, labels=ids)["loss"].backward()


def replicated(rank: int, file: str) -> Any:
    model = nn.parallel.DistributedDataParallel(Small())
    monitor = HeadMonitor(PROMPTS, to=file)
    begun = monitor.begin(model, 0)
    _step(model, rank)
    table = monitor.measure(model, 1)
    _step(model, rank)  # hangs, or fails, where one rank had run what all have to
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert (begun is None) == (table is None) == (rank == 1)
    return table, gradients


def test_where_each_has_the_model_the_first_measures_alone(tmp_path: Path) -> None:
    file = tmp_path / "heads.parquet"
    (table, own), (nothing, others) = run_ranks(2, replicated, str(file))
    assert nothing is None and equal(own, others) and len(own) > 5
    assert pd.read_parquet(file)["step"].unique().tolist() == [0, 1]
    torch.testing.assert_close(
        torch.tensor(table["entropy"].to_numpy()).view(small.LAYERS, small.HEADS),
        explicit(Small(), PROMPTS)["entropy"], rtol=0, atol=0.1,
    )  # fmt: skip


def sharded(rank: int, way: str, file: str) -> Any:
    if way == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model: Any = Small()
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(Small(), device_id=torch.device("cpu"), use_orig_params=True)
    monitor = HeadMonitor(PROMPTS, to=file)
    assert ranks.is_sharded(model)
    first = monitor.begin(model, 0)
    _step(model, rank)
    monitor.measure(model, 1)
    _step(model, rank)
    return first


@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_where_each_has_a_part_all_run_the_forward(way: str, tmp_path: Path) -> None:
    file = tmp_path / "heads.parquet"
    tables = run_ranks(2, sharded, way, str(file))
    whole = expected()
    for table in tables:
        for name in ("entropy", "induction", "first_token", "sink"):
            assert abs(table[name] - whole[name]).max() < 2e-6, name
        assert table["head"].tolist() == whole["head"].tolist()
    assert pd.read_parquet(file)["step"].unique().tolist() == [0, 1]


def parts(rank: int, fails: bool) -> Any:
    """Each rank has two of four heads, as a table says that was measured of its part."""
    found = pd.DataFrame({
        "call": [0, 0, 1, 1], "stack": "main", "kind": "self", "layer": [0, 0, 1, 1], "path": ["a", "a", "b", "b"],
        "head": [2 * rank, 2 * rank + 1] * 2, "entropy": [rank + 0.1, rank + 0.2, rank + 0.3, rank + 0.4],
    })  # fmt: skip
    try:
        return ranks.gathered(ZeroDivisionError("broke") if fails and rank == 1 else found, True)
    except (ZeroDivisionError, MeasureError) as error:
        return f"{type(error).__name__}: {error}"


def test_heads_of_all_ranks_are_put_together() -> None:
    for table in run_ranks(2, parts, False):
        assert table["head"].tolist() == [0, 1, 2, 3] * 2 and table["layer"].tolist() == [0] * 4 + [1] * 4
        assert table["entropy"].tolist() == [0.1, 0.2, 1.1, 1.2, 0.3, 0.4, 1.3, 1.4]


def test_a_rank_that_fails_is_named_and_the_others_do_not_wait() -> None:
    first, second = run_ranks(2, parts, True)
    assert second == "ZeroDivisionError: broke"
    assert first.startswith("MeasureError") and "rank 1: ZeroDivisionError: broke" in first


def test_what_cannot_be_put_together_is_told() -> None:
    import hookattn

    trace = hookattn.trace(Small(), PROMPTS)
    assert not ranks.shards_of(trace)
    trace.calls[0].shards = (Shard("H", 2, 4, index=1, count=2),)
    assert ranks.shards_of(trace)
    for shard in (Shard("T", 0, 8, count=2), Shard("B", 0, 2, count=2), Shard("H", None, None, count=2)):
        trace.calls[0].shards = (shard,)
        with pytest.raises(MeasureError, match="call 0"):
            ranks.shards_of(trace)


def test_alone_all_is_here() -> None:
    model = torch.compile(nn.DataParallel(Small()), backend="eager")
    assert isinstance(ranks.unwrapped(model), Small)
    assert ranks.takes_part(ranks.unwrapped(model)) and not ranks.is_sharded(model) and ranks.rank() == 0


def tensor_parallel(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from tests import tiny_models

    model = tiny_models.llama()
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan["self_attn.o_proj"] = RowwiseParallel()
    for layer in model.model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), plan)
    monitor = HeadMonitor(tiny_models.ids(), measures=["entropy", "first_token"], follow=[(1, 3)])
    return monitor.begin(model, 0)


def test_tensor_parallel_ranks_have_the_heads_of_the_whole_model() -> None:
    pytest.importorskip("hookattn.models.sharding", reason="calls do not say yet which heads a rank has")
    from tests import tiny_models

    whole = HeadMonitor(tiny_models.ids(), measures=["entropy", "first_token"]).measure(tiny_models.llama(), 0)
    assert whole is not None
    for table in run_ranks(2, tensor_parallel):
        assert table["head"].tolist() == whole["head"].tolist() == [0, 1, 2, 3] * 2
        for name in ("entropy", "first_token"):
            assert abs(table[name] - whole[name]).max() < 2e-6, name
