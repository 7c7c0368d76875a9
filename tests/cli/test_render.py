"""``hookattn render``: every kind of file from a trace, without a display, and every way to hold it wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("click")
pytest.importorskip("rich")

from click.testing import CliRunner, Result

import hookattn
from hookattn.cli.commands import app
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.render.figures import VIEWS

HEADS = {"svg": b"<?xml", "pdf": b"%PDF-", "png": b"\x89PNG"}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("render") / "run.safetensors"
    ids = example_tokens(0, length=8)
    hookattn.trace(load_pretrained(), ids, tokens=[str(i) for i in ids[0].tolist()], to=path)
    return path


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["render", *(str(a) for a in args)])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", HEADS)
def test_a_figure(view: str, kind: str, trace: Path, tmp_path: Path) -> None:
    one = () if view in ("model", "distance") else ("--layer", -1, "--heads", "1", "--queries", "-1")
    out = tmp_path / f"x.{kind}"
    result = run(trace, "--view", view, *one, "-o", out, "--json")
    assert json.loads(result.stdout) == {"file": str(out), "bytes": out.stat().st_size, "view": view}
    assert out.read_bytes().startswith(HEADS[kind])


def test_a_png_has_the_pixels_asked_for(trace: Path, tmp_path: Path) -> None:
    sizes = []
    for dpi in (50, 100):
        run(trace, "--layer", 0, "-o", tmp_path / "x.png", "--dpi", dpi)
        sizes.append(int.from_bytes((tmp_path / "x.png").read_bytes()[16:20]))
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=2)


def test_a_character_that_no_font_has_is_told(trace: Path, tmp_path: Path) -> None:
    other = hookattn.load(trace)
    other.tokens = [["\U00012000", *(other.tokens or [[]])[0][1:]]]
    other.save(tmp_path / "other.safetensors")
    said = run(tmp_path / "other.safetensors", "--layer", 0, "-o", tmp_path / "x.png").stderr
    assert said.count("\n") == 1 and "no installed font has \U00012000" in said
    assert not run(tmp_path / "other.safetensors", "--layer", 0, "-o", tmp_path / "x.svg").stderr


def test_without_a_display(trace: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    code = "import sys; from hookattn.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "render", str(trace), "--layer", "0", "-o", str(tmp_path / "x.svg")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("wrote "), done.stderr


def test_a_page(trace: Path, tmp_path: Path) -> None:
    """The selection is that of the options, with what they leave open made definite."""
    out = tmp_path / "x.html"
    run(trace, "--view", "matrix", "--layer", -1, "--heads", "1", "--queries", "-1", "--scale", "log", "-o", out)
    text = out.read_text()
    start = text.index('id="options">') + len('id="options">')
    state = json.JSONDecoder().raw_decode(text, start)[0]["state"]
    last = hookattn.load(trace)[-1].site
    assert state == {
        "view": "matrix", "layer": last.layer, "heads": [1], "query": 16, "scale": "log", "step": 0, "batch": 0,
        "stack": last.stack, "kind": "self",
    }  # fmt: skip


@pytest.mark.parametrize(("args", "code", "message"), [
    (("-o", "x.gif"), 2, ".svg, .pdf, .png, .html"),
    (("-o", "x.svg", "--view", "pie"), 2, "'pie' is not one of"),
    (("-o", "x.svg"), 1, "heads draws one call"),
    (("-o", "x.svg", "--layer", "99"), 1, "no call fits {'layer': 99}"),
    (("-o", "x.svg", "--layer", "0", "--scale", "log"), 1, "--scale has no meaning in the head view"),
    (("-o", "none/x.svg", "--layer", "0"), 1, "Create the directory first"),
    (("-o", "x.html", "--view", "distance"), 2, "a page has no such thing"),
    (("-o", "x.html", "--dpi", "100"), 2, "a page has no such thing"),
    (("-o", "x.html", "--heads", "9"), 1, "there is none at 9"),
])  # fmt: skip
def test_errors(
    args: tuple[str, ...], code: int, message: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(trace, *args, code=code)
    assert message in " ".join(result.stderr.split()) and result.stdout == ""
    assert not list(tmp_path.iterdir())
