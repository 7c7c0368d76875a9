"""What no certificate says stands beside it: guessed axes, other scores and normalizers, weights that were changed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hookattn

pytest.importorskip("click")
pytest.importorskip("rich")

from click.testing import CliRunner, Result

from hookattn.cli.commands import app

BASIS = {"B": "followed", "H": "guessed", "T": "guessed", "S": "followed", "G": "kernel"}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        self.second = torch.nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x, x, x, need_weights=False)[0]
        out: torch.Tensor = self.second(x, x, x, need_weights=False)[0]
        return out


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def said(*args: object, code: int = 0) -> str:
    """What is printed, as one line, so that no line break parts what is looked for."""
    return " ".join(run(*args, code=code).output.split())


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture
def plain() -> hookattn.Trace:
    torch.manual_seed(0)
    with torch.no_grad():
        return hookattn.trace(Net().eval(), torch.randn(2, 6, 16))


@pytest.fixture
def guessed(plain: hookattn.Trace, tmp_path: Path) -> Path:
    """The second call was guessed, began in a part of the model, and changed its weights."""
    first, second = plain.calls
    applied = second.weights * 2
    fields = {**second.fields, "applied": applied, "output": second.output * 2}
    plain.calls[1] = replace(second, basis=BASIS, entry="inner.decoder", mixed=True, fields=fields)
    plain.calls[1].certificate = second.certificate
    assert first.basis["H"] == "kernel"
    return Path(plain.save(tmp_path / "guessed.safetensors"))


def test_a_guess_stands_beside_the_certificate_in_every_table(guessed: Path) -> None:
    for command in ("info", "verify"):
        out = said(command, guessed)
        assert "faithful, axes guessed: H T" in out, command
        assert "axes guessed: H T in 1 of 2 calls" in out and "--layout PATH=BTHD" in out, command
        assert "`applied` is what met the values" in out, command


def test_a_page_is_written_with_what_was_guessed_said(guessed: Path, tmp_path: Path) -> None:
    result = run("view", guessed, "--html", tmp_path / "page.html")
    assert "axes guessed: H T in 1 of 2 calls" in result.stderr


def test_nothing_is_said_of_what_a_kernel_documents(plain: hookattn.Trace, tmp_path: Path) -> None:
    path = plain.save(tmp_path / "plain.safetensors")
    for command in ("info", "verify"):
        out = said(command, path)
        assert "guessed" not in out and "applied" not in out, command
    table = said("info", path)
    assert "entry" not in table and "normalizer" not in table and "score " not in table


def test_the_table_names_the_entry_and_what_is_no_softmax_of_products(guessed: Path) -> None:
    trace = hookattn.load(guessed)
    trace.calls[0] = replace(trace.calls[0], score="additive", normalizer="sigmoid")
    path = trace.save(guessed.parent / "more.safetensors")
    out = said("info", path)
    for word in ("entry", "inner.decoder", "score", "additive", "normalizer", "sigmoid"):
        assert word in out, word


def test_json_has_all_of_it(guessed: Path) -> None:
    call = json.loads(run("info", guessed, "--json").stdout)["calls"][1]
    assert (call["basis"], call["entry"], call["score"], call["normalizer"]) == (
        BASIS,
        "inner.decoder",
        "dot",
        "softmax",
    )
    assert "applied" in call["fields"]
    assert json.loads(run("verify", guessed, "--json").stdout)["calls"][1]["basis"] == BASIS


def test_heads_say_what_they_are_measured_of(guessed: Path) -> None:
    assert "of `weights`; 1 call changed the weights after the softmax: --of applied" in said("heads", guessed)
    out = json.loads(run("heads", guessed, "--of", "applied", "--json").stdout)
    assert out["of"] == "applied" and out["heads"]


def test_heads_without_shares_are_told_apart(guessed: Path) -> None:
    trace = hookattn.load(guessed)
    first = trace.calls[0]
    trace.calls[0] = replace(first, normalizer="sigmoid", fields={**first.fields, "weights": first.weights * 3})
    trace.calls[0].certificate = first.certificate
    path = trace.save(guessed.parent / "more.safetensors")
    assert "no shares in 1 call (normalizer sigmoid)" in said("heads", path)
    assert "no shares" not in said("heads", path, "--of", "applied")
    assert "no shares" not in said("heads", guessed)


def test_a_call_without_q_and_k_has_its_extents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "additive_of_test_beside.py").write_text(ADDITIVE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = said("trace", "additive_of_test_beside:build")
    assert "T6 S6" in out and "additive" in out


ADDITIVE = """
import torch
from torch import nn

class Additive(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.e = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1)
    def forward(self, x):
        return torch.softmax(self.e(torch.tanh(self.q(x)[:, :, None] + self.k(x)[:, None]))[..., 0], -1) @ x

def build(): return nn.Sequential(Additive()), torch.randn(2, 6, 16)
"""
FACTORY = """
import torch
from torch import nn

class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)

def build(): return nn.Sequential(Attend()), torch.randn(2, 5, 8)
"""


def test_a_layout_settles_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factories_of_test_beside.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "factories_of_test_beside", raising=False)
    name = "factories_of_test_beside:build"
    made = json.loads(run("trace", name, "--layout", "0=BHTD", "--json").stdout)["calls"][0]
    assert made["extents"]["H"] == 2 and "guessed" not in made["basis"].values()
    assert "no module at" in said("trace", name, "--layout", "nowhere=BHTD", code=1)
    assert "expected PATH=AXES" in said("trace", name, "--layout", "BHTD", code=2)
