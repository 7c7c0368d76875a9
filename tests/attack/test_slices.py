"""A slice of every attack, small enough for every run of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import Attack, present

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("attack", present(), ids=lambda attack: attack.name)
def test_a_slice_of_each_holds(attack: Attack) -> None:
    if attack.name == "forks":
        # In a process of its own: a child of one whose matrix products have run on several threads can hang in the next
        # of these, traced or not, as their library's threads are not there in it.
        line = [sys.executable, "-m", "tests.attack", "--only", attack.name, "--rounds", str(attack.slice)]
        done = subprocess.run(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    through = [f for f in attack.run(attack.slice) if not f.held]
    assert not through, "\n".join(f"{f.what}: {f.measured:g}, at most {f.bar:g}\n  {f.examples}" for f in through)
