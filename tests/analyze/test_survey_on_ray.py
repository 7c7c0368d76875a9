"""What of a survey on Ray is decided before Ray is needed, or without it."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hookattn.analyze.survey import survey_on_ray
from hookattn.analyze.survey.on_ray_workers import Place, portable
from hookattn.cli.commands import app
from hookattn.errors import HookattnError, InputError, MeasureError

GOOD: dict[str, Any] = {
    "build": "a:b", "examples": [[1, 2]], "measures": "sink", "actors": 1, "gpus_per_actor": 0, "cpus_per_actor": 1,
    "batch": 1, "retries": 0,
}  # fmt: skip


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("without_ray")
def test_an_engine_that_is_not_installed_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError) as told:
        survey_on_ray(out=tmp_path / "t.parquet", **GOOD)
    assert told.value.name == "ray" and 'pip install "hookattn[ray]"' in told.value.__notes__[0]
    assert os.listdir(tmp_path) == []
    (tmp_path / "p.txt").write_text("a b c\n")
    command = ["survey", "a:b", str(tmp_path / "p.txt"), "-o", str(tmp_path / "t.parquet"), "--engine", "ray"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert 'needs the package ray, which is not installed: pip install "hookattn[ray]"' in done.stderr
    assert os.listdir(tmp_path) == ["p.txt"]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("actors", 0, "actors"),
        ("actors", True, "actors"),
        ("gpus_per_actor", -1, "gpus_per_actor"),
        ("gpus_per_actor", float("nan"), "gpus_per_actor"),
        ("cpus_per_actor", 0, "cpus_per_actor"),
        ("cpus_per_actor", float("inf"), "cpus_per_actor"),
        ("retries", -1, "retries"),
        ("batch", 0, "batch"),
        ("examples", "one text", "examples"),
        ("examples", 3, "examples"),
        ("build", 3, "build"),
        ("about", [1], "about"),
        ("about", {"found": 1}, "found"),
        ("address", 6379, "address"),
        ("progress", 1, "progress"),
        ("say", 1, "say"),
        ("on_error", "ignore", "on_error"),
        ("measures", "no such measure", "no such measure"),
    ],
)
def test_a_wrong_argument_is_told_and_nothing_is_written(option: str, value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(HookattnError, match=words):
        survey_on_ray(**{"out": tmp_path / "t.parquet", **GOOD, option: value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--actors", "2"], "--actors is for --engine ray"),
        (["--gpus-per-actor", "1"], "--gpus-per-actor is for --engine ray"),
        (["--address", "auto"], "--address is for --engine ray"),
        (["--engine", "ray", "--jobs", "2"], "excludes"),
        (["--engine", "ray", "--shard", "0/2"], "excludes"),
        (["--engine", "ray", "--finish"], "excludes"),
        (["--engine", "spark"], "spark"),
        (["--engine", "ray", "--cpus-per-actor", "0"], "0"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(given: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a b c\n")
    done = CliRunner().invoke(app, ["survey", "a:b", str(tmp_path / "p.txt"), "-o", str(tmp_path / "t"), *given])
    assert done.exit_code == 2
    assert words in done.stderr
    assert os.listdir(tmp_path) == ["p.txt"]


def test_a_place_names_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    place = Place.here()
    assert place.modules[0] == str(tmp_path) and str(tmp_path / "mine") in place.modules
    assert not any("site-packages" in path or path == os.path.dirname(os.__file__) for path in place.modules)
    assert place.environment()["PYTHONPATH"].split(os.pathsep)[-1] == "/theirs"
    before, there = os.getcwd(), Place(str(tmp_path / "gone"), ())
    with there.entered():
        assert os.getcwd() == before
    (tmp_path / "other").mkdir()
    with Place(str(tmp_path / "other"), ()).entered():
        assert os.getcwd() == str(tmp_path / "other")
    assert os.getcwd() == before and sys.path[0] == str(tmp_path / "mine")


class Picky(Exception):
    """One that cannot be made again of its message."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def test_errors_of_another_process_keep_their_kind_where_they_can() -> None:
    for given, kind in ((InputError("x"), InputError), (MeasureError("y"), MeasureError), (Picky(1, 2), HookattnError)):
        try:
            raise given
        except Exception as error:  # noqa: BLE001
            made = portable(error)
        assert type(made) is kind
        assert str(given) in str(made)
        assert "in a process of Ray" in made.__notes__[0] and "Traceback" in made.__notes__[0]
