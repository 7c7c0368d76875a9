"""Shards and requests in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
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


def altered(path: Path, change: dict[str, Any]) -> Path:
    """The file of a sharded trace whose one call says something else."""
    raw = Path(sharded().save(path)).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    document = json.loads(header["__metadata__"]["hookattn"])
    document["calls"][0].update(change)
    header["__metadata__"] = {"hookattn": json.dumps(document)}
    made = json.dumps(header).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + raw[8 + n :])
    return path


def entry(axis: str = "H", start: int | None = 4, of: int | None = 8, **more: Any) -> dict[str, Any]:
    empty = {"group_start": None, "groups_of": None, "mesh": "", "index": 0, "count": 1}
    return {"axis": axis, "start": start, "of": of, **empty, **more}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"requests": ["a"]}, "'requests' has 1 entries, and field 'q' has B = 2"),
    ({"shards": [entry(), entry()]}, "'shards' has axis 'H' twice"),
    ({"shards": [entry("T", 0, 9), entry()]}, "'shards' has heads behind another axis"),
    ({"heads": [4, 5, 6, 8], "kv_heads": [0, 1, 2, 3]}, "'heads' has 8, and its shard says that the model has 8"),
    ({"heads": [3, 5, 6, 7], "kv_heads": [0, 1, 2, 3]}, "'heads' has 3, and its shard begins at 4"),
    ({"shards": [entry(of=7)]}, "field 'q' has H = 4 from 4 on, and its shard says that the model has 7"),
    ({"shards": [entry(group_start=5, groups_of=8)]}, "has G = 4 from 5 on, and its shard says that the model has 8"),
    ({"shards": [entry("T", 3, 7)]}, "has T = 5 from 3 on, and its shard says that the model has 7"),
    (
        {"shards": [entry("T", 3, 9)], "queries": [3, 4, 5, 6, 9], "of_queries": 10},
        "'queries' has 9, and its shard says",
    ),
    ({"shards": [entry("B", None, 1)]}, "has B = 2, and its shard says that the model has 1"),
    ({"shards": [entry("S")]}, "'axis' is 'S', expected one of"),
    ({"shards": [entry(start=8)]}, "start=8 of of=8: numbers are from 0 to 7"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(hookattn.CorruptFileError, match=re.escape(words)):
        hookattn.load(altered(tmp_path / "x.safetensors", change))


def test_selected_heads_of_a_shard_are_sound(tmp_path: Path) -> None:
    trace = sharded()
    trace[0].heads = (4, 5, 6, 7)
    trace.calls[:] = [trace[0].at(heads=[-1, 4])]
    back = hookattn.load(trace.save(tmp_path / "x.safetensors"))[0]
    assert back.heads == (7, 4) and back.shards == trace[0].shards
    with pytest.raises(hookattn.SelectionError, match="there is none at -6"):
        back.at(heads=-6)
