"""What was edited in a call goes into its file and comes back, is checked, and is held to what has to hold still."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import Call, CorruptFileError, Trace, TraceWriteError, edit
from hookattn.calls.edits import AppliedEdit
from hookattn.testing import check_trace
from hookattn.testing.recheck import recheck
from tests.reference import draw

B, H, G, T, D = 2, 4, 2, 6, 4


class Attend(nn.Module):
    """Causal attention of grouped heads, through the fused kernel."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


INPUTS = draw(B, H, T, D), draw(B, G, T, D), draw(B, G, T, D)

EDITS: dict[str, hookattn.edit.Edit] = {
    "weights of a head": edit.zero("weights", heads=[1]),
    "some weights": edit.set("weights", 0.9, heads=[1], queries=[4, 5], keys=[0]),
    "weights below 0, of an entry": edit.scale("weights", -7.0, heads=[1], batch=[1]),
    "all weights": edit.zero("weights"),
    "scores": edit.scale("scores", 3.0, heads=[1], queries=[3]),
    "a bias": edit.add("scores", 1.0, heads=[1], queries=[3], keys=[2]),
    "an edge": edit.knockout(heads=[1], queries=[3], keys=[0]),
    "output": edit.zero("output", heads=[1]),
    "queries": edit.set("q", 0.5, heads=[1], queries=[2]),
    "keys": edit.set("k", 0.5, heads=[0], keys=[1]),
    "values": edit.zero("v", heads=[0], keys=[2]),
}


def edited(name: str, **options: Any) -> Trace:
    return hookattn.edited(Attend(), INPUTS, EDITS[name], **options)


def same(a: Call, b: Call) -> None:
    """The edits and every field, bit for bit."""
    assert a.edits == b.edits and a.edits
    assert (a.own_scores, a.own_by_edits, a.derivable) == (b.own_scores, b.own_by_edits, b.derivable)
    for name in a.fields:
        x, y = a.get(name), b.get(name)
        assert (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)), name


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_a_file_gives_back_what_was_edited(name: str, compact: bool, tmp_path: Path) -> None:
    trace = edited(name)
    path = trace.save(tmp_path / "run.safetensors", compact=compact)
    same(trace[0], hookattn.load(path)[0])
    again = hookattn.load(hookattn.load(path).save(tmp_path / "again.safetensors", compact=compact))
    same(trace[0], again[0])
    same(trace[0].at(batch=1, heads=1), again[0].at(batch=1, heads=1))


@pytest.mark.parametrize("name", EDITS)
def test_so_does_a_stream_and_a_copy(name: str, tmp_path: Path) -> None:
    trace = edited(name)
    same(trace[0], edited(name, to=tmp_path / "run.safetensors")[0])
    same(trace[0], hookattn.load(tmp_path / "run.safetensors")[0])
    same(trace[0], pickle.loads(pickle.dumps(trace))[0])
    same(trace[0], copy.deepcopy(trace)[0])
    same(trace[0], trace.select(step=0)[0])


def test_a_compact_file_keeps_what_follows_from_nothing(tmp_path: Path) -> None:
    def stored(name: str) -> set[str]:
        path = edited(name).save(tmp_path / "run.safetensors", compact=True)
        return {field for field, tensor in document(Path(path))["calls"][0]["fields"].items() if tensor}

    assert {"weights"} == stored("weights of a head") - {"q", "k", "v", "mask", "output"}
    assert {"scores", "weights"} == stored("scores") - {"q", "k", "v", "mask", "output"}
    assert {"bias"} == stored("a bias") - {"q", "k", "v", "mask", "output"}
    assert not stored("an edge") - {"q", "k", "v", "mask", "output"}


def test_weights_that_were_not_kept_are_not_derived(tmp_path: Path) -> None:
    trace = edited("weights of a head", capture=("q", "k", "v", "mask", "bias", "sinks", "output"))
    loaded = hookattn.load(trace.save(tmp_path / "run.safetensors"))
    for call in (trace[0], loaded[0]):
        assert not call.has("weights") and call.has("scores")
        with pytest.raises(hookattn.FieldNotCaptured, match=r"edited: zero\(weights\) head 1"):
            _ = call.weights


def test_a_part_has_the_edits_of_its_entries() -> None:
    call = edited("weights below 0, of an entry")[0]
    assert call.at(batch=0).edits == () and call.at(batch=[1, 0]).edits[0].batch == (0,)
    assert call.at(heads=1).edits == call.edits


def test_a_call_says_what_was_edited() -> None:
    assert "faithful, edited: zero(weights) head 1)" in repr(edited("weights of a head")[0])
    several = [edit.scale("output", 2.0, heads=[h]) for h in range(4)]
    call = hookattn.edited(Attend(), INPUTS, *several)[0]
    assert call.verdict.endswith("scale(output) head 2 and 1 more")


# Checked again from the file


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_a_sound_file_passes(name: str, compact: bool, tmp_path: Path) -> None:
    trace = edited(name)
    check_trace(trace)
    found = recheck(hookattn.load(trace.save(tmp_path / "run.safetensors", compact=compact))[0])
    assert False not in [check.passed for check in found.values()]
    unchecked = {x for x, check in found.items() if check.passed is None}
    if name == "all weights":
        assert unchecked == {"weights", "masked", "rows"} | ({"scores"} if compact else set())
    elif not compact:
        assert not unchecked


# Of each edit, the heads and fields whose numbers are of no account, as what an edit has set meets nothing.
UNSEEN = {
    "weights of a head": {(1, "v"), (1, "q"), (1, "k")},
    "all weights": {(h, x) for h in (0, 1, 3) for x in "qkv"},
    "output": {(1, x) for x in ("v", "q", "k", "output")},
    "values": set(),
}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_a_flipped_number_is_found(name: str, compact: bool, tmp_path: Path) -> None:
    """In every head that was not edited, and in the edited one wherever it is still held to something."""
    path = Path(edited(name).save(tmp_path / "run.safetensors", compact=compact))
    fields = document(path)["calls"][0]["fields"]
    for field in ("q", "k", "v", "scores", "weights", "output"):
        for head in (0, 1, 3):
            if fields.get(field) is None:
                continue
            place = head // (H // G) if field in ("k", "v") else head
            # In the last row, which sees all keys, and of a key that no edit above is of.
            at = (0, place, 3 if field in ("k", "v") else T - 1, 1 if field != "weights" else 3)
            broken = flipped(path, fields[field], at)
            found = recheck(hookattn.load(broken)[0])
            failed = {x for x, check in found.items() if check.passed is False} - {"stored"}
            readers = [h for h in (0, 1, 3) if h // (H // G) == place] if field in ("k", "v") else [head]
            hidden = all((h, field) in UNSEEN.get(name, set()) for h in readers)
            if hidden and (compact or field in ("v", "output")):
                assert not failed, (field, head)
            else:
                assert failed, (field, head)
            assert found["stored"].passed is False


def test_weights_that_an_edit_has_set_are_still_held_against_the_output(tmp_path: Path) -> None:
    path = Path(edited("weights of a head").save(tmp_path / "run.safetensors"))
    broken = flipped(path, document(path)["calls"][0]["fields"]["weights"], (0, 1, 5, 2))
    failed = {x for x, check in recheck(hookattn.load(broken)[0]).items() if check.passed is False}
    assert failed == {"output", "stored"}


# Bad files


def of(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda call: call["edits"][0].update(changed)


def call(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda call: call.update(changed)


WRONG: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (of(edit=""), "'edit' is '', expected a printable string"),
    (of(edit="ze\x1bro"), "expected a printable string"),
    (of(edit=3), "expected a printable string"),
    (of(field="sinks"), "'field' is 'sinks', expected one of q, k, v"),
    (of(field=None), "'field' is None"),
    (of(heads=[]), "expected a list of different integers from 0 or null"),
    (of(heads=[1, 1]), "different integers"),
    (of(heads=[-1]), "different integers"),
    (of(heads=[True]), "different integers"),
    (of(heads=[1.0]), "different integers"),
    (of(heads="1"), "different integers"),
    (of(heads=[H]), "edit 0 names 4 among its heads, and H is 4"),
    (of(queries=[T]), "edit 0 names 6 among its queries, and T is 6"),
    (of(keys=[2**63 - 1]), "among its keys, and S is 6"),
    (of(keys=[2**63]), "different integers"),
    (of(batch=[B]), "edit 0 names 2 among its batch, and B is 2"),
    (of(field="k", heads=[G], keys=None), "edit 0 names 2 among its heads, and G is 2"),
    (of(field="output", keys=[0]), "edit 0 names keys, and 'output' has no such axis"),
    (of(field="v", heads=None, queries=[0]), "edit 0 names queries, and 'v' has no such axis"),
    (of(note=None), "'note' is None"),
    (lambda call: call["edits"][0].pop("note"), "call 0, edit 0 has no 'note'"),
    (call(edits=[1]), "'edits' is .*expected a list of objects"),
    (call(edits={}), "expected a list of objects"),
    (call(derivable=["scores", "weights"]), "'derivable' has 'weights', and an edit set some of them"),
    (call(own_by_edits=True), "'own_by_edits' is true"),
    (call(own_by_edits=1), "'own_by_edits' is 1, expected true or false"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_is_refused(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    path = Path(edited("weights of a head").save(tmp_path / "run.safetensors"))
    data, header = opened(path)
    told = json.loads(header["__metadata__"]["hookattn"])
    change(told["calls"][0])
    header["__metadata__"] = {"hookattn": json.dumps(told)}
    written(path, header, data)
    with pytest.raises(CorruptFileError, match=message):
        hookattn.load(path)


def test_numbers_of_what_was_not_kept_are_no_fault(tmp_path: Path) -> None:
    """Heads and queries are the model's; a call that has kept some of them does not tell how many there are."""
    trace = edited("some weights", heads=[0, 1], queries=[0, 4])
    loaded = hookattn.load(trace.save(tmp_path / "run.safetensors"))
    assert loaded[0].edits == trace[0].edits and loaded[0].edits[0].queries == (4, 5)
    assert False not in [check.passed for check in recheck(loaded[0]).values()]


@pytest.mark.parametrize(
    "wrong", [AppliedEdit("", "weights"), AppliedEdit("zero", "sinks"), AppliedEdit("zero", "q", heads=(1, 1))]
)
def test_what_nobody_could_read_is_not_written(wrong: AppliedEdit, tmp_path: Path) -> None:
    trace = edited("weights of a head")
    trace[0].edits = (wrong,)
    with pytest.raises(TraceWriteError, match="AppliedEdit"):
        trace.save(tmp_path / "run.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_without_edits_says_nothing_of_them(tmp_path: Path) -> None:
    path = hookattn.trace(Attend(), INPUTS).save(tmp_path / "run.safetensors")
    assert not {"edits", "own_by_edits"} & document(Path(path))["calls"][0].keys()
    assert hookattn.load(path)[0].edits == ()


# Files by hand


def opened(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The data of a file, and its header."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return raw[8 + n :], json.loads(raw[8 : 8 + n])


def written(path: Path, header: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def document(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(opened(path)[1]["__metadata__"]["hookattn"])
    return told


def flipped(path: Path, tensor: str, at: tuple[int, ...]) -> Path:
    """The file with one float32 changed."""
    data, header = opened(path)
    entry, offset = header[tensor], 0
    for i, n in zip(at, entry["shape"], strict=True):
        offset = offset * n + i
    place = entry["data_offsets"][0] + 4 * offset
    (number,) = struct.unpack_from("<f", data, place)
    changed = bytearray(data)
    struct.pack_into("<f", changed, place, number + 0.5)
    broken = path.with_name("broken.safetensors")
    written(broken, header, bytes(changed))
    return broken
