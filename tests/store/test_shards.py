"""Shards and requests in a file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import hookattn


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def sharded() -> hookattn.Trace:
    trace = hookattn.trace(Attention(), torch.randn(2, 4, 5, 8))
    trace[0].shards = (hookattn.Shard("H", 4, 8, 4, 8, "tp", 1, 2), hookattn.Shard("T", None, None))
    trace[0].requests = ("a", "b")
    return trace


def test_a_file_keeps_them(tmp_path: Path) -> None:
    trace = sharded()
    call = hookattn.load(trace.save(tmp_path / "x.safetensors"))[0]
    assert call.shards == trace[0].shards and call.shard == trace[0].shards[0]
    assert call.requests == ("a", "b")


def test_a_part_has_the_requests_of_its_entries() -> None:
    call = sharded()[0]
    assert call.at(batch=1).requests == ("b",) and call.at(batch=[1, 0]).requests == ("b", "a")
    assert call.at(heads=2).shards == call.shards


def test_a_file_of_a_whole_says_nothing_of_them(tmp_path: Path) -> None:
    trace = hookattn.trace(Attention(), torch.randn(2, 4, 5, 8))
    with safe_open(trace.save(tmp_path / "x.safetensors"), "pt") as file:
        entry = json.loads(file.metadata()["hookattn"])["calls"][0]
    assert not {"shards", "requests"} & entry.keys()
    assert hookattn.load(tmp_path / "x.safetensors")[0].shards == ()
