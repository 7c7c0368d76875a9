"""What is said where a library of an extra is missing: which, and how to install it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hookattn
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.optional import _BRINGS, extra_named, install

ROOT = Path(hookattn.__file__).parents[1]
MISSING = [name for names in _BRINGS.values() for name in names]
RUN = """
import json, sys
sys.modules.update(dict.fromkeys({missing!r}))
from click.testing import CliRunner
from hookattn.cli.commands import app
print(json.dumps([(r.exit_code, r.stderr) for r in (CliRunner().invoke(app, words) for words in {commands!r})]))
"""


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, names in _BRINGS.items():
        packages = {re.split(r"[>=\[]", line)[0] for line in extras[extra]}
        assert {"pillow" if name == "PIL" else name for name in names} - {"traitlets"} <= packages, extra


def test_a_missing_library_is_told() -> None:
    for name in ("pandas", "matplotlib.figure"):
        with pytest.raises(ModuleNotFoundError) as caught, extra_named():
            raise ModuleNotFoundError(name=name)
        assert caught.value.__notes__ == [f"hookattn: {install(caught.value)}"]
    with pytest.raises(ModuleNotFoundError) as caught, extra_named():
        raise ModuleNotFoundError(name="pandasx")
    assert install(caught.value) is None and not hasattr(caught.value, "__notes__")


def test_each_command_says_what_to_install(tmp_path: Path) -> None:
    pytest.importorskip("click")
    pytest.importorskip("rich")
    trace, model = tmp_path / "run.safetensors", tmp_path / "model"
    hookattn.trace(load_pretrained(), example_tokens(0, length=4), to=trace)
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "x.parquet").touch()
    expected = {
        ("heads", str(trace)): "pandas analyze",
        ("heads", str(trace), "--parquet", str(tmp_path / "heads.parquet")): "pyarrow analyze",
        ("view", str(trace), "--scores", "--html", str(tmp_path / "x.html")): "pandas analyze",
        ("view", str(trace), "--no-open"): "uvicorn view",
        ("render", str(trace), "--layer", "0", "-o", str(tmp_path / "x.svg")): "matplotlib render",
        ("survey", str(model), str(tmp_path / "x.parquet"), "-o", str(tmp_path / "y.parquet")): "pyarrow analyze",
        ("trace", str(model), "--text", "x"): "transformers transformers",
    }
    code = RUN.format(missing=MISSING, commands=list(expected))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for (words, said), (status, error) in zip(expected.items(), json.loads(done.stdout), strict=True):
        package, extra = said.split()
        assert status == 1 and error.count("\n") == 1, (words, error)
        assert package in error and f'pip install "hookattn[{extra}]"' in error, (words, error)


def test_a_page_needs_no_extra(tmp_path: Path) -> None:
    """One file with the viewer in it needs the command line alone."""
    pytest.importorskip("click")
    trace, out = tmp_path / "run.safetensors", tmp_path / "x.html"
    hookattn.trace(load_pretrained(), example_tokens(0, length=4), to=trace)
    commands = [["view", str(trace), "--html", str(out)], ["render", str(trace), "-o", str(tmp_path / "y.html")]]
    code = RUN.format(missing=MISSING, commands=commands)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0 and [status for status, _ in json.loads(done.stdout)] == [0, 0], done
