"""The file that a viewer reads: the trace's own where it is as it was written, else one that has all keys whole."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.render.trace_files import trace_file
from tests import tiny_models as tiny

pytest.importorskip("transformers")


def document(path: str) -> Any:
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["hookattn"])


def generation() -> hookattn.Trace:
    model = tiny.gpt2()
    with torch.no_grad(), hookattn.tracing(model) as trace:
        model.generate(tiny.ids(4), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return trace


def test_its_own_file_where_that_says_all(tmp_path: Path) -> None:
    path = hookattn.trace(tiny.gpt2(), tiny.ids(5)).save(tmp_path / "x.safetensors")
    for given in (path, hookattn.load(path)):
        with trace_file(given) as found:
            assert found == path
    changed = hookattn.load(path)
    changed.calls.pop()
    with trace_file(changed) as found:
        assert found != path and len(hookattn.load(found)) == len(changed)
    assert not Path(found).exists()


@pytest.mark.parametrize("where", ["memory", "loaded", "path"])
def test_keys_of_a_generation_are_whole_in_what_the_viewer_reads(where: str, tmp_path: Path) -> None:
    trace = generation()
    path = trace.save(tmp_path / "x.safetensors")
    assert any(call.get("continued") for call in document(path)["calls"])
    given = {"memory": trace, "loaded": hookattn.load(path), "path": path}[where]
    with trace_file(given) as found:
        assert not any(call.get("continued") for call in document(found)["calls"])
        for a, b in zip(trace, hookattn.load(found), strict=True):
            assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v) and torch.equal(a.weights, b.weights)


def test_a_temporary_file_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a private trace is in a directory that only this user may enter, and goes with the block."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0)
    try:
        model = torch.nn.MultiheadAttention(8, 2).eval()
        trace = hookattn.trace(model, (torch.randn(3, 1, 8),) * 3)
        with trace_file(trace) as made:
            folder = Path(made).parent
            assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
            assert Path(made).stat().st_uid == os.getuid()
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == []
