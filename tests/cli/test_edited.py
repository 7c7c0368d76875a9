"""The commands say what was edited in a trace, and check an edited file as far as it holds still."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hookattn
from hookattn import edit
from tests import tiny_models as tiny
from tests.store.test_edits import document, flipped

pytest.importorskip("click")
pytest.importorskip("rich")

from click.testing import CliRunner

from hookattn.cli.commands import app


def said(*args: object, code: int = 0) -> str:
    """What is printed, as one line."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "240")
    inputs = {"input_ids": torch.arange(3, 10)[None]}
    made = edit.zero("weights", layer=0, heads=[1]), edit.scale("output", 0.5, layer=0, heads=[2])
    with torch.no_grad():
        trace = hookattn.edited(tiny.gpt2(), inputs, *made)
    return Path(trace.save(tmp_path / "run.safetensors"))


@pytest.mark.parametrize("command", ["info", "verify"])
def test_it_says_what_was_edited_and_where(command: str, run: Path) -> None:
    text = said(command, run)
    assert text.count("faithful, edited") == 1
    assert "edited: zero(weights) head 1; scale(output) head 2: 1 call (transformer.h.0.attn)" in text


@pytest.mark.parametrize("command", ["info", "verify"])
def test_json_has_it(command: str, run: Path) -> None:
    calls = json.loads(said(command, run, "--json"))["calls"]
    assert [e["edit"] for e in calls[0]["edits"]] == ["zero", "scale"] and calls[0]["edits"][0]["heads"] == [1]
    assert calls[1]["edits"] == []


def test_an_edited_file_passes_and_a_damaged_one_does_not(run: Path) -> None:
    assert "2 calls: all that the file holds agrees with itself" in said("verify", run)
    fields = document(run)["calls"][0]["fields"]
    for field, head in (("weights", 0), ("weights", 1), ("output", 1), ("q", 3)):
        broken = flipped(run, fields[field], (0, head, 5, 1))
        assert "1 of 2 calls failed" in said("verify", broken, code=1), (field, head)


def test_what_differs_from_call_to_call_is_listed_up_to_a_few(tmp_path: Path) -> None:
    inputs = {"input_ids": torch.arange(3, 10)[None]}
    made = [edit.scale("output", 0.5, layer=i, heads=[i % 4], queries=[i % 6]) for i in range(12)]
    with torch.no_grad():
        trace = hookattn.edited(tiny.gpt2(n_layer=12), inputs, *made)
    text = said("info", trace.save(tmp_path / "run.safetensors"))
    assert text.count("edited: scale(output)") == 8
    assert "edited in 4 more ways: 4 calls (transformer.h.8.attn, transformer.h.9.attn" in text
