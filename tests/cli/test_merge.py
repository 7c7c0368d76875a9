"""``hookattn merge``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import hookattn
from hookattn.cli.commands import app
from tests import tiny_models
from tests.merging.cuts import cut, same_trace


@pytest.fixture
def whole() -> hookattn.Trace:
    with torch.no_grad():
        return hookattn.trace(tiny_models.llama(), {"input_ids": tiny_models.ids()})


@pytest.fixture
def files(whole: hookattn.Trace, tmp_path: Path) -> list[str]:
    return [r.save(tmp_path / f"run.rank0{i}-of-02.safetensors") for i, r in enumerate(cut(whole, "H", [2, 2]))]


def test_it_writes_the_whole_and_lists_the_ranks(whole: hookattn.Trace, files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    said = CliRunner().invoke(app, ["merge", *files[::-1], "-o", str(out)])
    assert said.exit_code == 0, said.output
    same_trace(hookattn.load(out), whole)
    for text in ("heads from 2 of 4, rank 1 of 2 on tp", "wrote", "layers 0 to 1"):
        assert text in said.output
    assert "run.rank01-of-02.safetensors" in "".join(said.output.split())


def test_json(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    said = CliRunner().invoke(app, ["merge", *files, "-o", str(out), "--json"])
    data = json.loads(said.stdout)
    assert data["file"] == str(out) and data["bytes"] == out.stat().st_size and data["faithful"] is True
    assert [m["shards"] for m in data["merged"]] == [
        ["heads from 0 of 4, rank 0 of 2 on tp"],
        ["heads from 2 of 4, rank 1 of 2 on tp"],
    ]


def test_compact(files: list[str], tmp_path: Path) -> None:
    for name, more in (("full", []), ("compact", ["--compact"])):
        assert CliRunner().invoke(app, ["merge", *files, "-o", str(tmp_path / name), *more]).exit_code == 0
    assert (tmp_path / "compact").stat().st_size < (tmp_path / "full").stat().st_size


def test_steps_as_batches(tmp_path: Path) -> None:
    model = tiny_models.llama()
    with torch.no_grad(), hookattn.tracing(model) as trace:
        for half in tiny_models.ids(5, 4).chunk(2):
            model(half)
    file = trace.save(tmp_path / "steps.safetensors")
    said = CliRunner().invoke(app, ["merge", file, "--steps", "batches", "-o", str(tmp_path / "out.safetensors")])
    assert said.exit_code == 0, said.output
    found = hookattn.load(tmp_path / "out.safetensors")
    with torch.no_grad():
        same_trace(found, hookattn.trace(model, {"input_ids": tiny_models.ids(5, 4)}), 1e-5)


def test_nothing_is_written_over_another_file_or_of_a_part(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "there"
    out.write_text("mine")
    said = CliRunner().invoke(app, ["merge", *files, "-o", str(out)])
    assert said.exit_code == 1 and "there is such a file already" in said.stderr and out.read_text() == "mine"
    said = CliRunner().invoke(app, ["merge", files[1], "-o", str(tmp_path / "new")])
    assert said.exit_code == 1 and not (tmp_path / "new").exists()
    assert "rank 0 of 2 is missing: run.rank00-of-02.safetensors" in " ".join(said.stderr.split())
