"""Files that several processes write at the same time: each has its own, and none takes the place of another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hookattn
from tests.ranks import run_ranks
from tests.sharding.models import Attention, by_columns, inputs, mesh


def _cut(rank: int, folder: Path) -> dict[str, Any]:
    model = by_columns(Attention(4, 2), mesh(tp=2), "q", "k", "v")
    found: dict[str, Any] = {}
    for time in (0, 1):  # the second run takes the place of the first
        trace = hookattn.trace(model, (1 + time) * inputs(), to=folder / "run.safetensors")
        back = hookattn.load(trace.path)
        assert back[0].heads == trace[0].heads and torch.equal(back[0].q, trace[0].q)
        found["path"], found["notes"], found["q"] = trace.path, back.notes, float(back[0].q.abs().sum())
        dist.barrier()
    none = hookattn.trace(model, inputs(), heads=[3], to=folder / "one.safetensors")
    found["none"] = Path(none.path).name, len(none)
    try:
        none.save(folder / "saved.safetensors")
        found["saved"] = True
    except hookattn.TraceWriteError as error:
        found["saved"] = str(error)
    return found


def test_each_rank_has_a_file(tmp_path: Path) -> None:
    said = run_ranks(2, _cut, tmp_path)
    names = [f"run.rank0{i}-of-02.safetensors" for i in (0, 1)]
    assert [Path(one["path"]).name for one in said] == names
    assert [one["none"] for one in said] == [("one.rank00-of-02.safetensors", 0), ("one.rank01-of-02.safetensors", 1)]
    several = "several processes have each written a part of the attention, to run.rank*-of-02.safetensors"
    assert all(several in one["notes"] for one in said)
    refused = [one["saved"] for one in said if one["saved"] is not True]
    assert len(refused) == 1 and "of the same group writes this file" in refused[0]
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(
        [*names, "one.rank00-of-02.safetensors", "one.rank01-of-02.safetensors", "saved.safetensors"]
    )


def _whole(rank: int, folder: Path) -> dict[str, Any]:
    """The same model on every rank, as with plain data parallelism."""
    ran = []

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(1)
            return self.inner(x)  # type: ignore[no-any-return]

    found: dict[str, Any] = {}
    if rank == 1:
        dist.barrier()
    for time in (1, 2):
        try:
            trace = hookattn.trace(Told(), (1 + rank) * time * inputs(), to=folder / "run.safetensors")
            found["path"] = trace.path
        except hookattn.TraceWriteError as error:
            found["error"] = str(error)
    if rank == 0:
        dist.barrier()
    found["ran"] = len(ran)
    own = hookattn.trace(Told(), inputs(), to=folder / f"own.{rank}.safetensors")
    found["own"] = own.path
    return found


def test_a_rank_does_not_take_the_place_of_anothers_file(tmp_path: Path) -> None:
    old = hookattn.trace(Attention(), 9 * inputs(), to=tmp_path / "run.safetensors")  # of an earlier run
    first, second = run_ranks(2, _whole, tmp_path)
    assert first["path"] == str(tmp_path / "run.safetensors") and "error" not in first and first["ran"] == 2
    assert "path" not in second and second["ran"] == 0  # it is told before its model runs
    for words in ("rank 0 of the same group writes this file", "run.rank01-of-02.safetensors", "rank 1 of 2"):
        assert words in second["error"]
    held = hookattn.trace(Attention(), 2 * inputs())
    assert torch.equal(hookattn.load(tmp_path / "run.safetensors")[0].q, held[0].q)
    assert old is not None and {first["own"], second["own"]} == {str(tmp_path / f"own.{i}.safetensors") for i in (0, 1)}
    assert not [x for x in tmp_path.iterdir() if x.name.endswith(".partial")]


def _sharded_for_memory(rank: int, folder: Path) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = Attention()
    fully_shard(model, mesh=mesh(dp=2))
    try:
        return hookattn.trace(model, inputs(), to=folder / "run.safetensors").path
    except hookattn.TraceWriteError as error:
        return error.args[0]


def test_what_was_traced_is_not_lost_for_its_name(tmp_path: Path) -> None:
    """That a process has all heads is known when its model has run."""
    said = run_ranks(2, _sharded_for_memory, tmp_path)
    (refused,) = [one for one in said if one != str(tmp_path / "run.safetensors")]
    rank = said.index(refused)
    assert f"rank {1 - rank} of the same group writes this file" in refused
    assert f"This trace is in {tmp_path / f'run.rank0{rank}-of-02.safetensors'}." in refused
    held = [hookattn.load(path)[0].output for path in sorted(tmp_path.iterdir())]
    assert len(held) == 2 and torch.equal(held[0], held[1])


def test_a_group_whose_store_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn.store import ranks
    from hookattn.torch_internals.process_group import World

    monkeypatch.setattr(ranks, "world", lambda: World(1, 2))
    monkeypatch.setattr(ranks, "first_to_claim", lambda key, rank: None)
    trace = hookattn.trace(Attention(), inputs(), to=tmp_path / "run.safetensors")
    with pytest.raises(hookattn.TraceWriteError, match="another process writes this file, and this is rank 1 of 2"):
        trace.save(tmp_path / "run.safetensors")
