"""``hookattn compare``, and ``hookattn render --stitch``: two traces side by side, a generation in one picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("pandas")

from click.testing import CliRunner, Result

import hookattn
from hookattn import analyze
from hookattn.cli.commands import app
from hookattn.demo.induction import example_tokens, load_pretrained
from tests import tiny_models as tiny


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compare")
    for n in (0, 1):
        hookattn.trace(load_pretrained(), example_tokens(n, length=8), to=folder / f"{n}.safetensors")
    return folder / "0.safetensors", folder / "1.safetensors"


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generation") / "run.safetensors"
    model, prompt = tiny.gpt2(), tiny.ids(4, 1)
    with hookattn.tracing(model, to=path):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False, pad_token_id=0
        )
    return path


def test_compare_has_the_numbers_of_the_library(files: tuple[Path, Path], tmp_path: Path) -> None:
    expected = analyze.compare(*files)
    found = json.loads(run("compare", *files, "--json").stdout)
    assert [(h["layer"], h["head"]) for h in found["heads"]] == list(zip(expected.layer, expected["head"], strict=True))
    assert [h["total_variation"] for h in found["heads"]] == pytest.approx(list(expected.total_variation))
    assert found["units"] == expected.attrs["units"]
    run("compare", *files, "--csv", tmp_path / "x.csv", "--top", 3)
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4
    by = json.loads(run("compare", *files, "--sort", "-max_difference", "--json").stdout)["heads"]
    assert [h["max_difference"] for h in by] == sorted(h["max_difference"] for h in by)


def test_compare_shows_what_changed_most_first(files: tuple[Path, Path]) -> None:
    said = run("compare", *files, "--top", 2).output
    first = analyze.compare(*files).iloc[0]
    row = next(line for line in said.splitlines() if line.strip()[:1].isdigit())
    assert row.split()[:3] == [str(first["layer"]), str(first["head"]), f"{first['total_variation']:.3f}"]
    assert "2 of 8 heads" in said


def test_compare_of_what_does_not_fit(files: tuple[Path, Path], generation: Path) -> None:
    assert "do not fit" in run("compare", files[0], generation, code=1).output
    assert "there are total_variation" in run("compare", *files, "--sort", "entropy", code=1).output


def test_a_generation_is_stitched(generation: Path, tmp_path: Path) -> None:
    said = run("render", generation, "--layer", 1, "-o", tmp_path / "x.svg", code=1).output
    assert "has 3 steps; give --stitch" in said and "trace.stitch" not in said and not (tmp_path / "x.svg").exists()
    run("render", generation, "--layer", 1, "--stitch", "--view", "matrix", "-o", tmp_path / "x.svg")
    run("render", generation, "--layer", 1, "--step", 2, "--view", "matrix", "-o", tmp_path / "y.svg")
    run("render", generation, "--stitch", "-o", tmp_path / "x.html")
    assert "leave out --step" in run("render", generation, "--stitch", "--step", 1, "-o", "x.svg", code=2).output


def test_widths_and_titles(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "x.svg"
    run("render", files[0], "--layer", 1, "--width", "column", "--title", "Mine", "-o", out)
    assert 'width="237.6pt"' in out.read_text("utf-8") and "Mine" in out.read_text("utf-8")
    run("render", files[0], "--layer", 1, "--width", 5, "--no-title", "-o", out)
    assert 'width="360pt"' in out.read_text("utf-8") and "layer 1" not in out.read_text("utf-8")
    assert "'column' (3.3 in)" in run("render", files[0], "--layer", 1, "--width", "wide", "-o", out, code=1).output
    assert "--width is for" in run("render", files[0], "--width", "page", "-o", tmp_path / "x.html", code=2).output
    assert "give --layer of" in run("render", files[0], "-o", out, code=1).output
