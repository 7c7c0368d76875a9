"""Which of the model's heads each process has of a model that is cut, held against the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as Placed

import hookattn
from tests.ranks import run_ranks
from tests.sharding.models import (
    FIELDS,
    Attention,
    Block,
    PerHead,
    by_columns,
    everywhere,
    inputs,
    mesh,
    place,
    spread,
)

KEYS = ("k", "v")


def held_against(call: hookattn.Call, whole: hookattn.Call, rows: slice = slice(None)) -> None:
    """Whether a call is that part of the whole model's call that it says it is."""
    shard = next((s for s in call.shards if s.axis == "H"), None)
    heads = list(call.heads if call.heads is not None else range(whole.q.shape[1]))
    for name in FIELDS:
        expected = getattr(whole, name)
        if name in KEYS:
            per = whole.q.shape[1] // expected.shape[1]
            expected = expected[:, sorted({h // per for h in heads})]
            if shard is not None and shard.group_start is not None:
                assert shard.start is not None and shard.groups_of == whole.k.shape[1]
                assert shard.group_start == shard.start // per
        else:
            expected = expected[:, heads]
            if call.queries is not None:
                expected = expected[:, :, list(call.queries)]
        torch.testing.assert_close(getattr(call, name), expected[rows], atol=1e-5, rtol=1e-5)


def described(call: hookattn.Call) -> dict[str, Any]:
    return {"heads": call.heads, "shards": call.shards, "notes": call.notes, "status": call.certificate.status}


def ways(rank: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Each of some ways to cut a model, traced: what its call says, held against the whole model's."""
    return {name: WAYS[name](rank) for name in names}


def _plain(rank: int, eager: bool = False, local: bool = True) -> dict[str, Any]:
    whole = hookattn.trace(Attention(4, 2, eager=eager), inputs())
    model = by_columns(Attention(4, 2, eager=eager), mesh(tp=2), "q", "k", "v", local=local)
    trace = hookattn.trace(model, inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _many_heads(rank: int) -> dict[str, Any]:
    whole = hookattn.trace(Attention(8, 8), inputs())
    trace = hookattn.trace(by_columns(Attention(8, 8), mesh(tp=2), "q", "k", "v"), inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _replicated_keys(rank: int) -> dict[str, Any]:
    whole = hookattn.trace(Attention(4, 1), inputs())
    trace = hookattn.trace(by_columns(Attention(4, 1), mesh(tp=2), "q"), inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _taken_keys(rank: int) -> dict[str, Any]:
    """Each process makes all keys, and takes the one that its heads read."""
    whole = hookattn.trace(Attention(4, 2), inputs())
    model = by_columns(Attention(4, 2, taken=slice(rank, rank + 1)), mesh(tp=2), "q")
    trace = hookattn.trace(model, inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _uneven(rank: int) -> dict[str, Any]:
    along = mesh(tp=2)
    whole = hookattn.trace(PerHead(3), inputs())
    trace = hookattn.trace(place(PerHead(3), along, lambda name: [Placed(0)]), inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _fused(rank: int) -> dict[str, Any]:
    return described(hookattn.trace(by_columns(Attention(4, fused=True), mesh(tp=2), "qkv"), inputs())[0])


def _feed_forward_alone(rank: int) -> dict[str, Any]:
    """A site whose feed-forward layer is cut, and whose attention is whole."""
    along = mesh(tp=2)
    whole = hookattn.trace(Block(inner=60), inputs())
    trace = hookattn.trace(by_columns(Block(inner=60), along, "up", out="down"), inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _looks_like_both(rank: int) -> dict[str, Any]:
    """Of the feed-forward layer each process has as many rows as all heads together."""
    return described(hookattn.trace(by_columns(Block(inner=48), mesh(tp=2), "up", out="down"), inputs())[0])


def _gathered(rank: int) -> dict[str, Any]:
    """Fully sharded: parameters are cut, and whole while the site runs."""
    whole = hookattn.trace(Attention(4, 2), inputs())
    model = Attention(4, 2)
    fully_shard(model, mesh=mesh(dp=2))
    trace = hookattn.trace(model, inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _all_columns_gathered(rank: int) -> dict[str, Any]:
    """What projections make is put together again before the attention."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    whole = hookattn.trace(Attention(4, 2), inputs())
    styles = {name: ColwiseParallel(output_layouts=Replicate()) for name in "qkv"}
    trace = hookattn.trace(parallelize_module(Attention(4, 2), mesh(tp=2), styles), inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _batch(rank: int) -> dict[str, Any]:
    """Distributed tensors, cut along the batch."""
    along = mesh(dp=2)
    whole = hookattn.trace(Attention(4, 2, eager=True), inputs())
    model = place(Attention(4, 2, eager=True), along, everywhere(along))
    trace = hookattn.trace(model, spread(inputs(), along, 0))
    held_against(trace[0], whole[0], slice(rank, rank + 1))
    return described(trace[0])


def _sequence(rank: int) -> dict[str, Any]:
    """Queries and keys cut along the sequence: to read it, processes would have to send each other keys."""
    along = mesh(sp=2)
    model = place(Attention(4, 2, eager=True), along, everywhere(along))
    trace = hookattn.trace(model, spread(inputs(t=6), along, 1))
    return {"calls": len(trace), "reasons": [skipped.reason for skipped in trace.skipped]}


WAYS: dict[str, Any] = {
    "plain": _plain,
    "eager": lambda rank: _plain(rank, eager=True),
    "distributed": lambda rank: _plain(rank, eager=True, local=False),
    "many heads": _many_heads,
    "replicated keys": _replicated_keys,
    "taken keys": _taken_keys,
    "uneven": _uneven,
    "fused": _fused,
    "feed-forward alone": _feed_forward_alone,
    "both": _looks_like_both,
    "gathered": _gathered,
    "columns gathered": _all_columns_gathered,
    "batch": _batch,
    "sequence": _sequence,
}
NUMBERED = ["plain", "eager", "distributed", "many heads", "replicated keys", "taken keys", "uneven"]
WHOLE = ["feed-forward alone", "gathered", "columns gathered"]


def test_a_rank_says_which_heads_it_has() -> None:
    first, second = run_ranks(2, ways, NUMBERED)
    for name in NUMBERED:
        assert first[name]["status"] == second[name]["status"] == "faithful", name
        assert not first[name]["notes"], name
    for name in ("plain", "eager", "distributed"):
        assert (first[name]["heads"], second[name]["heads"]) == ((0, 1), (2, 3)), name
        shards = (first[name]["shards"], second[name]["shards"])
        assert shards == tuple((hookattn.Shard("H", 2 * i, 4, i, 2, "tp", i, 2),) for i in (0, 1)), name
    assert second["many heads"]["shards"] == (hookattn.Shard("H", 4, 8, 4, 8, "tp", 1, 2),)
    assert second["replicated keys"]["shards"] == (hookattn.Shard("H", 2, 4, 0, 1, "tp", 1, 2),)
    assert second["taken keys"]["shards"] == (hookattn.Shard("H", 2, 4, 1, 2, "tp", 1, 2),)
    assert (first["uneven"]["heads"], second["uneven"]["heads"]) == ((0, 1), (2,))
    assert second["uneven"]["shards"] == (hookattn.Shard("H", 2, 3, 2, 3, "tp", 1, 2),)


def test_a_rank_that_has_all_heads_says_nothing() -> None:
    for said in run_ranks(2, ways, WHOLE):
        for name in WHOLE:
            assert said[name] == {"heads": None, "shards": (), "notes": (), "status": "faithful"}, name


def test_what_placements_do_not_tell_is_not_told() -> None:
    for rank, said in enumerate(run_ranks(2, ways, ["fused", "both", "batch", "sequence"])):
        unknown = hookattn.Shard("H", None, None, None, None, "tp", rank, 2)
        for name, words in (("fused", "queries, keys and values together"), ("both", "cut and heads that are not")):
            assert said[name]["shards"] == (unknown,) and said[name]["heads"] is None, name
            (note,) = said[name]["notes"]
            assert words in note and "shard=hookattn.Shard" in note
        assert said["batch"]["shards"] == (hookattn.Shard("B", rank, 2, mesh="dp", index=rank, count=2),)
        assert said["sequence"]["calls"] == 0
        assert any("cut along T" in reason and "send each other" in reason for reason in said["sequence"]["reasons"])


def _two_dimensions(rank: int) -> dict[str, Any]:
    along = mesh(dp=2, tp=2)
    whole = hookattn.trace(Attention(4, 2), inputs())
    model = by_columns(Attention(4, 2), along["tp"], "q", "k", "v")
    fully_shard(model, mesh=along["dp"])
    trace = hookattn.trace(model, inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


def _spread_keys(rank: int) -> dict[str, Any]:
    """Four processes, two key heads: a mesh whose inner dimension has the same key head."""
    along = mesh(kv=2, rep=2)
    whole = hookattn.trace(Attention(4, 2), inputs())

    def placed(name: str) -> list[Any]:
        over = {"q": [Placed(0), Placed(0)], "o": [Replicate(), Replicate()]}
        return over.get(name[0], [Placed(0), Replicate()])

    model = _Own(place(Attention(4, 2), along, placed))
    trace = hookattn.trace(model, inputs())
    held_against(trace[0], whole[0])
    return described(trace[0])


class _Own(nn.Module):
    """Runs an attention on what this process has of its projections."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = []
        for name in "qkv":
            p: Any = getattr(self.inner, name)
            y = torch.nn.functional.linear(x, p.weight.to_local(), p.bias.to_local())
            made.append(y.unflatten(-1, (-1, 6)).transpose(1, 2))
        return torch.nn.functional.scaled_dot_product_attention(*made, enable_gqa=True)


@pytest.mark.slow
def test_meshes_of_two_dimensions() -> None:
    said = run_ranks(4, _two_dimensions)
    assert [one["heads"] for one in said] == [(0, 1), (2, 3), (0, 1), (2, 3)]
    assert said[3]["shards"] == (hookattn.Shard("H", 2, 4, 1, 2, "tp", 1, 2),)
    said = run_ranks(4, _spread_keys)
    assert [one["heads"] for one in said] == [(0,), (1,), (2,), (3,)]
    assert said[2]["shards"] == (hookattn.Shard("H", 2, 4, 1, 2, "kv, rep", 2, 4),)
