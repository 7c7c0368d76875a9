"""The locks of what the set-up installs: they hold what pyproject.toml asks for, and say where they don't fit."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from requirements import lock

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("build", "demo", "dev", "mutants", "cluster", "docs", "notebooks", "field", "serving")
FILES = {name: ROOT / f"requirements/{name}.txt" for name in NAMES}
MACHINE = lock.Machine((3, 11, 7), "cpython", "linux", "x86_64", (2, 36), ())
MAC = lock.Machine((3, 13, 0), "cpython", "darwin", "arm64", (), (15, 1))
TORCH = next(pin for pin in lock.pins(FILES["dev"]) if pin.startswith("torch=="))


def locked(name: str) -> dict[str, set[str]]:
    """The pins of a lock file by package."""
    found: dict[str, set[str]] = {}
    for pin in lock.pins(FILES[name]):
        found.setdefault(str(canonicalize_name(Requirement(pin).name)), set()).add(pin)
    return found


def asked(extras: list[str]) -> list[Requirement]:
    """What pyproject.toml asks for under extras, those that extras name themselves included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, todo = [Requirement(one) for one in project["dependencies"]], list(extras)
    while todo:
        for one in map(Requirement, project["optional-dependencies"][todo.pop()]):
            if one.name == project["name"]:
                todo.extend(one.extras)
            else:
                found.append(one)
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_an_exact_version_and_names_no_place(name):
    assert len(lock.pins(FILES[name])) > 5
    for pin in lock.pins(FILES[name]):
        assert re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.!]+( ; .+)?", pin), pin  # no option, no address, no local build
    assert not re.search(r"://|/work|/root|/home|/tmp|--", FILES[name].read_text().replace("#    ", ""))


@pytest.mark.parametrize("name", ["demo", "mutants", "cluster", "docs", "notebooks", "field", "build"])
def test_two_locks_never_hold_two_versions_of_a_package(name):
    whole, part = locked("dev"), locked(name)
    for package in whole.keys() & part.keys():
        assert {pin.split(" ")[0] for pin in part[package]} <= {pin.split(" ")[0] for pin in whole[package]}, package
    if name == "demo":
        assert part.keys() <= whole.keys()


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("demo", ["demo"]),
        ("dev", ["demo", "dev"]),
        ("mutants", ["demo", "dev", "mutants"]),
        ("cluster", ["demo", "dev", "ray"]),
        ("docs", ["demo", "dev", "site", "release"]),
        ("notebooks", ["notebooks"]),
    ],
)
def test_a_lock_holds_what_pyproject_asks_for(name, extras):
    held = locked(name)
    for one in asked(extras):
        pins = held[str(canonicalize_name(one.name))]
        for pin in pins:
            (specifier,) = Requirement(pin).specifier
            assert one.specifier.contains(specifier.version), f"{pin} isn't {one}: `make lock`"


def test_a_lock_holds_what_is_installed_alone_and_what_builds():
    alone = [str(canonicalize_name(pin)) for pin in lock.pins(lock.ALONE)]
    assert alone
    assert set(alone) <= locked("demo").keys() & locked("dev").keys()
    assert "sentence-transformers" not in locked("demo")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {Requirement(one).name for one in build} | {"pip", "setuptools", "editables"} <= locked("build").keys()
    listed = [pin for file in lock.FIELD for pin in lock.pins(file)]
    assert {str(canonicalize_name(Requirement(one).name)) for one in listed} == locked("field").keys()


def test_the_makefile_asks_for_the_torch_that_is_locked():
    (default,) = re.findall(r"^TORCH +\?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert default == TORCH


def test_the_readme_claims_the_versions_that_are_locked():
    readme = " ".join((ROOT / "README.md").read_text().split())
    claimed = re.search(
        r"run with Python (\S+) and what `requirements/` locks: PyTorch (\S+), transformers (\S+)\.", readme
    )
    assert claimed is not None
    python, torch, transformers = claimed.groups()
    assert re.search(rf"^PYTHON +\?= python{re.escape(python)}$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"torch=={torch}" in locked("dev")["torch"]
    assert f"transformers=={transformers}" in locked("dev")["transformers"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "machine",
    [
        MACHINE,
        MAC,
        replace(MACHINE, python=(3, 13, 0)),
        replace(MACHINE, processor="aarch64", glibc=(2, 28)),
        replace(MAC, macos=(14, 0)),
    ],
    ids=str,
)
def test_a_machine_that_a_lock_fits(machine, name):
    assert lock.misfit(FILES[name], TORCH, machine) is None


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (replace(MACHINE, python=(3, 10, 13)), ["cpython 3.10.13", "make PYTHON=python3.11"]),
        (replace(MACHINE, python=(3, 14, 0)), ["cpython 3.14.0", "make PYTHON=python3.11", "make LOCK=none"]),
        (replace(MACHINE, implementation="pypy"), ["pypy 3.11.7", "make PYTHON=python3.11"]),
        (replace(MACHINE, processor="riscv64"), ["linux riscv64", "make LOCK=none"]),
        (replace(MACHINE, system="win32", processor="AMD64", glibc=()), ["win32 AMD64", "make LOCK=none"]),
        (replace(MACHINE, glibc=()), ["no glibc", "make LOCK=none"]),
        (replace(MACHINE, glibc=(2, 17)), ["glibc 2.17", "make LOCK=none"]),
        (replace(MAC, processor="x86_64"), ["darwin x86_64", "make LOCK=none"]),
        (replace(MAC, macos=(13, 6)), ["macOS 13.6", "make LOCK=none"]),
    ],
    ids=str,
)
def test_a_machine_that_no_lock_fits_is_told_the_cure_in_one_line(machine, words):
    told = lock.misfit(FILES["dev"], TORCH, machine)
    assert told is not None
    assert "\n" not in told
    assert all(word in told for word in [str(FILES["dev"]), *words])
    assert "rm -r" not in told
    if "make PYTHON" in told:
        assert "`rm -r .venv`" in str(lock.misfit(FILES["dev"], TORCH, machine, venv=".venv"))
    if machine.python < (3, 11):
        assert "LOCK=none" not in told  # no release of hookattn runs there either


def test_another_torch_than_the_locked_one_is_told():
    told = lock.misfit(FILES["dev"], "torch==2.8.0", MACHINE)
    assert told is not None
    assert TORCH in told
    assert "make LOCK=none TORCH=torch==2.8.0" in told


def test_a_folder_without_locks_is_told():
    told = lock.misfit(Path("nowhere/dev.txt"), TORCH, MACHINE)
    assert told == "there is no nowhere/dev.txt: LOCK is the folder of the lock files, or `none`"


@pytest.mark.parametrize(
    ("text", "expected"), [("3.12.1", (3, 12, 1)), ("2.28-rc1", (2, 28)), ("2.36", (2, 36)), ("", ()), ("x", ())]
)
def test_numbers_of_a_version(text, expected):
    assert lock.numbers(text) == expected


def test_make_stops_before_pip_where_the_lock_does_not_fit(tmp_path):
    """The whole way: make asks an interpreter that a lock doesn't fit, and pip is never started."""
    python, venv = tmp_path / "python", tmp_path / "venv"
    python.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.version_info = (3, 10, 13)\n"
        "from requirements.lock import main\n"
        "assert sys.argv[1] == 'requirements/lock.py', sys.argv\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    python.chmod(0o755)
    # `make LOCK=none test` hands on what it was called with, which is not what this make is called with.
    given = {"LOCK", "PYTHON", "TORCH", "VENV", "UNLOCKED"}
    environment = {name: x for name, x in os.environ.items() if not name.startswith("MAKE") and name not in given}
    command = ["make", "demo", f"PYTHON={python}", f"VENV={venv}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert "make PYTHON=python3.11" in said[0]
    assert not venv.exists()
