"""The demo, end to end: what it finds, what it writes, what it does without the encoder's package."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.analyze import PreviousToken

pytest.importorskip("click")
pytest.importorskip("rich")

from click.testing import CliRunner

from hookattn.cli.commands import app
from hookattn.demo import encoder, heads
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.demo.show import shaded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any) -> None:
        raise AssertionError("the demo reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "directory", lambda: None)


def run(*args: object) -> str:
    result = CliRunner().invoke(app, ["demo", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_causal_model(tmp_path: Path, without_encoder: None) -> None:
    report = json.loads(run("--out", tmp_path / "out", "--json"))
    assert encoder.PACKAGE in report["encoder"]["left_out"] and report["encoder"]["install"] == encoder.INSTALL
    found = report["induction"]
    assert found["faithful"] and found["identical_outputs"] and found["predicted"] == found["predictable"] == 23
    first, second = found["previous_token"][:2]
    assert (first["layer"], first["head"]) == (0, 0) and first["score"] > 0.95 and first["score"] > second["score"]
    best = found["induction"][0]
    assert (best["layer"], best["head"]) == (1, 2) and best["score"] > 0.95
    assert all(head["score"] < 0.05 for head in found["induction"] if head["layer"] == 0)
    assert report["files"] == [str(tmp_path / "out" / "induction.safetensors")]
    trace = hookattn.load(report["files"][0])
    assert trace.faithful and trace.tokens is not None and trace.tokens[0] == found["tokens"]


def test_the_head_that_the_copying_rests_on_is_taken_out(tmp_path: Path, without_encoder: None) -> None:
    found = json.loads(run("--out", tmp_path, "--json"))["induction"]
    ablation, best = found["ablation"], found["previous_token"][0]
    assert ablation["ablated"] == {"layer": best["layer"], "head": best["head"]} and ablation["faithful"]
    clean, edited = ablation["clean"], ablation["edited"]
    assert clean["predicted"] == ablation["copied"] == found["predictable"] == 23
    assert clean["induction"] == found["induction"][0]["score"]
    assert edited["predicted"] < 23 and edited["log_probability"] < clean["log_probability"] - 2
    assert edited["induction"] < clean["induction"] - 0.3
    assert set(ablation["others"]) == {"1", "2", "3"}
    for other in ablation["others"].values():  # no other head of that layer is worth as much
        assert other["predicted"] == 23 and other["log_probability"] > edited["log_probability"] + 1
        assert other["induction"] > edited["induction"] + 0.1
    # The same without the demo's code: the output of a head is the part of what the last projection reads.
    model, ids = load_pretrained(), example_tokens(0)
    width = model.config.d_model // model.config.n_heads
    head = slice(best["head"] * width, (best["head"] + 1) * width)
    with torch.no_grad():
        model.get_submodule(best["path"]).out.weight[:, head] = 0  # type: ignore[operator, union-attr]
        logits = model(ids)[0, 25:-1]
    assert int((logits.argmax(-1) == ids[0, 26:]).sum()) == edited["predicted"]
    likely = logits.log_softmax(-1).gather(-1, ids[0, 26:, None]).mean()
    assert edited["log_probability"] == pytest.approx(float(likely), abs=1e-5)
    # Both runs are kept, and shown side by side.
    kept = hookattn.load(ablation["file"])
    assert (kept[best["path"]].output[:, best["head"]] == 0).all()
    page = Path(ablation["page"]).read_text(encoding="utf-8")
    assert '"view":"compare"' in page.replace(" ", "") and 'id="compare"' in page


def test_it_prints_what_the_ablation_does(tmp_path: Path, without_encoder: None) -> None:
    lines = run("--out", tmp_path).splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("3  The same model without layer 0 head 0")]
    assert lines[at + 2] == '    edit.zero("output", layer=0, heads=0)'
    rows = {line.rsplit(maxsplit=5)[0]: line.split()[-5:] for line in lines[at + 6 : at + 10] if line[0] != " "}
    assert rows["predicted, of 23"] == ["23", "20", "23", "23", "23"]
    assert rows["log-probability, nats"][:2] == ["-0.007", "-2.663"]
    assert rows["induction score"][:2] == ["0.999", "0.582"]
    assert (tmp_path / "ablation.html").is_file() and (tmp_path / "induction-ablated.safetensors").is_file()


def test_it_prints_for_a_narrow_terminal_and_without_control_codes(tmp_path: Path, without_encoder: None) -> None:
    out = run("--out", tmp_path)
    assert f"    {encoder.INSTALL}" in out and "\x1b" not in out
    assert "The previous-token head is layer 0 head 0" in out and "The induction head is layer 1 head 2" in out
    assert "before, during and after the trace: bit-identical" in out and "2 calls faithful" in out
    lines = [line.replace(str(tmp_path), "out") for line in out.splitlines()]
    assert max(map(len, lines)) <= 80
    grid, ablated = [i for i, line in enumerate(lines) if line.split()[:1] == ["bos"]]
    shades = [line.count("█") for line in lines[grid + 1 : grid + 10]]
    assert shades == [1] * 9  # one key for each query
    assert sum(line.count("█") for line in lines[ablated + 1 : ablated + 10]) < 9


def test_the_sentence_encoder(tmp_path: Path) -> None:
    if encoder.directory() is None:
        pytest.skip(f"{encoder.PACKAGE} is not installed: {encoder.INSTALL}")
    pytest.importorskip("transformers")
    report = json.loads(run("--out", tmp_path, "--json"))
    found = report["encoder"]
    assert found["faithful"] and found["identical_outputs"] and found["eager_difference"] < 1e-5
    best = found["same_word"][0]
    assert (best["layer"], best["head"]) == (2, 9) and best["score"] > 1.5 * found["same_word"][1]["score"]
    trace = hookattn.load(tmp_path / "encoder.safetensors")
    tokens = trace.tokens[0] if trace.tokens else []
    weights = trace[best["path"]].weights[0, best["head"]]
    for word in ("cat", "on"):  # each looks mostly at itself in the other sentence
        first, second = (i for i, token in enumerate(tokens) if token == word)
        assert weights[first].argmax() == second and weights[second].argmax() == first
    assert "The head that looks for the same word" in run("--out", tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and "cannot be made" in result.stderr


def test_the_encoder_is_found_without_being_imported() -> None:
    encoder.directory()
    assert encoder.PACKAGE.replace("-", "_") not in sys.modules


@torch.no_grad()
def test_ranked_by_a_measure() -> None:
    trace = hookattn.trace(load_pretrained(), example_tokens(2, length=9), capture="weights")
    ranking = heads.ranked_heads(trace, PreviousToken())
    assert len(ranking) == 8 and ranking == sorted(ranking, key=lambda head: -head.score)
    best = ranking[0]
    weights = trace[best.path].weights[0, best.head]
    assert best.score == pytest.approx(float(weights.diagonal(-1).sum()) / 19)


@pytest.mark.parametrize(
    ("weight", "text"), [(0.0, "   · "), (0.004, "   · "), (0.1, " .10░"), (0.5, " .50▒"), (1.0, " 1.0█")]
)
def test_cells_are_five_characters(weight: float, text: str) -> None:
    assert shaded(weight, colours=False).plain == text
    assert shaded(weight, colours=True).cell_len == 5


@pytest.mark.slow
def test_the_readme_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "demo.png"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "readme_figure.py"), "--out", str(path)],
        capture_output=True,
        text=True,
        env=_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size <= 150_000


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
