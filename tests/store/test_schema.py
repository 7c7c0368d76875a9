"""The tables of a document: all that a call, a site and a certificate have, written and read back the same."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn import Call, Certificate, Site, Skipped, Trace
from hookattn.calls.edits import AppliedEdit
from hookattn.calls.shard import Shard
from hookattn.errors import TraceWriteError
from hookattn.store import FORMAT_VERSION, LazyFile
from hookattn.store.schema import CALL, CERTIFICATE, EDIT, FIRST, SITE, SKIPPED, Scalar, from_entry, to_entry

# What others follow from or what was made of them is in no file, and nothing in one is in a graph; how fields go on is
# said in the table of fields, and where the gradient of the output is by the name of its tensor.
OF_TENSORS = {"continued", "output_grad"}
OWNERS = [
    (CALL, Call, {"index", "beside", "made", "gradient", "attached"}),
    (SITE, Site, set()),
    (CERTIFICATE, Certificate, set()),
    (SKIPPED, Skipped, set()),
    (EDIT, AppliedEdit, set()),
]


@pytest.mark.parametrize(("table", "kind", "without"), OWNERS, ids=["call", "site", "certificate", "skipped", "edit"])
def test_every_attribute_stands_in_its_table(table: tuple[Scalar, ...], kind: Any, without: set[str]) -> None:
    attributes = {field.name: field for field in dataclasses.fields(kind)}
    assert {scalar.name for scalar in table} - OF_TENSORS == set(attributes) - without
    later = [scalar for scalar in table if scalar.since != FIRST and scalar.name not in OF_TENSORS]
    # A file that does not have it yet is read with the default, which is what is left out.
    for scalar in later:
        field = attributes[scalar.name]
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert scalar.default == made and scalar.kind.endswith("?") is (made is None), scalar.name
    assert all(FIRST <= scalar.since <= FORMAT_VERSION for scalar in table)


def test_all_values_of_a_call_come_back(tmp_path: Path) -> None:
    given = Call(
        Site("a.b", 3, "decoder", "cross", "Attention", "windows", 9),
        step=2,
        index=0,
        tap="tap",
        dtype=torch.bfloat16,
        scale=None,
        softcap=30.0,
        causal=True,
        window=7,
        dropout=0.25,
        heads=(1, 5),
        kv_heads=(0, 0),
        queries=(2, 4),
        own_scores=True,
        mixed=True,
        notes=("one", "two"),
        certificate=Certificate("unfaithful", math.nan, math.inf, 0.5, 1e-3, 1e-5, 4, 8, "what"),
        derivable=("weights",),
        fields={"scores": torch.ones(1, 2, 2, 11), "mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "sinks": None},
        keys=11,
        of_queries=6,
        score="additive",
        normalizer="softmax1",
        basis={"B": "followed", "H": "guessed"},
        entry="encoder",
        edits=(AppliedEdit("scale", "scores", (1,), (4, 5), (10,), (0,), "by 3"), AppliedEdit("knockout", "mask")),
        own_by_edits=True,
        shards=(Shard("H", 1, 8, 0, 4, "tp", 1, 4),),
        requests=("a",),
        lengths=((2, 9),),
    )
    back = hookattn.load(Trace(calls=[given]).save(tmp_path / "run.safetensors"))[0]
    for field in dataclasses.fields(Call):
        if field.name != "fields":
            assert repr(getattr(back, field.name)) == repr(getattr(given, field.name)), field.name
        default = field.default if field.default is not dataclasses.MISSING else Ellipsis
        assert field.name in ("index", "fields", "gradient", "attached") or getattr(given, field.name) != default, (
            field.name
        )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_has_no_word_for_is_written_by_its_name(tmp_path: Path, value: float) -> None:
    given = Call(Site("a"), 0, 0, "tap", torch.float32, value)
    given.certificate = Certificate("unfaithful", abs(value), abs(value), abs(value), 1e-3, 1e-5, 4, 8, "what")
    path = Trace(calls=[given]).save(tmp_path / "run.safetensors")
    raw = Path(path).read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    document = json.loads(json.loads(header)["__metadata__"]["hookattn"], parse_constant=pytest.fail)
    assert document["calls"][0]["certificate"]["output_error"] == repr(abs(value))
    back = hookattn.load(path)[0]
    assert repr(back.certificate) == repr(given.certificate)
    # A scale is a tensor then, of which any number can be one.
    assert isinstance(back.scale, torch.Tensor) and repr(back.scale.item()) == repr(value)


@pytest.mark.parametrize(("name", "value"), [("softcap", math.inf), ("softcap", 0.0), ("dropout", math.nan)])
def test_what_nobody_could_read_back_is_not_written(tmp_path: Path, name: str, value: float) -> None:
    given = Call(Site("a"), 0, 0, "tap", torch.float32, 1.0)
    setattr(given, name, value)
    with pytest.raises(TraceWriteError, match=f"'{name}' is {value}, expected"):
        Trace(calls=[given]).save(tmp_path / "run.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_came_with_a_later_version_is_left_out_where_there_is_none_and_may_be_missing(tmp_path: Path) -> None:
    path = Trace(calls=[Call(Site("a"), 0, 0, "tap", torch.float32, 1.0)]).save(tmp_path / "run.safetensors")
    entry = LazyFile(path).document["calls"][0]
    assert [s.name for s in CALL if s.since == FIRST] == list(entry)
    assert {"keys", "of_queries", "score", "basis"}.isdisjoint(from_entry(CALL, "call 0", entry))
    assert from_entry(CALL, "call 0", {**entry, "keys": 3, "from_the_future": object()})["keys"] == 3


def test_what_is_missing_or_of_another_kind_is_named() -> None:
    entry = to_entry(SITE, Site("a", 1))
    with pytest.raises(TypeError, match="call 3, site has no 'stack'"):
        from_entry(SITE, "call 3, site", {k: v for k, v in entry.items() if k != "stack"})
    with pytest.raises(TypeError, match="call 3, site: 'layer' is True, expected an integer from 0 or null"):
        from_entry(SITE, "call 3, site", {**entry, "layer": True})
    assert Site(**from_entry(SITE, "", {**entry, "layer": None})) == Site("a")
