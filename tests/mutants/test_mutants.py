"""The driver of ``make test-mutants``: it makes each change that it lists, and ends what doesn't end by itself."""

from __future__ import annotations

import os
import signal
import time
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="`make test-mutants` installs it")

from tests import mutants
from tests.mutants import covered, mutating, running
from tests.mutants.mutating import Mutant

MODULE = """
def last(x: int | None, y: int = 0) -> int:
    while y:
        y = y - 1
    return x.permute(0, 1).dim() < 2 if x else rearrange(x, "b h -> h b")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "module.py").write_text(MODULE)
    monkeypatch.setattr(mutating, "ROOT", tmp_path)
    return "module.py"


def test_what_can_be_changed_is_changed_and_nothing_else(module):
    found = {mutant.operator: mutant for place in mutating.sites(module) for mutant in place}
    assert not [name for name in found if "_BitOr_" in name], "an annotation was changed"
    assert "y + 1" in found["ReplaceBinaryOperator_Sub_Add"].source()
    assert "x.permute(1, 0)" in found["SwapArguments"].source()
    assert '"b h -> b h"' in found["SwapAxes"].source()
    assert {name.split("_", 1)[1] for name in found if "Comparison" in name} == {"Lt_LtE", "Lt_Gt", "Lt_GtE"}
    for mutant in found.values():
        before, after = mutant.lines()
        assert before in MODULE and after not in MODULE
        assert MODULE.splitlines()[mutant.line - 1].strip() in before


def test_a_sample_holds_the_smaller_one_of_its_seed(module):
    few, many = (mutating.sample([module], number, 3) for number in (4, 8))
    assert many[:4] == few
    assert len(set(many)) == 8
    assert mutating.sample([module], 4, 4) != few


def test_a_mutant_is_shown_to_the_tests_that_enter_it_the_fastest_first():
    file = covered.TestFile(
        "tests/test_a.py",
        {"a::slow": 9.0, "a::fast": 0.1, "a::red": 0.1, "a::elsewhere": 0.1},
        {"m.py": {"": [1], "a::slow": [5], "a::fast": [5, 6], "a::red": [5], "a::elsewhere": [7]}},
        ["a::red"],
    )

    def asked(line: int, budget: float = 40.0) -> list[str]:
        return covered.asked(Mutant("m.py", "AddNot", 0, line, line), [file], budget)[0]

    assert asked(5) == ["a::fast", "a::slow"]
    assert asked(5, budget=5.0) == ["a::fast"]
    assert asked(7) == ["a::elsewhere"]
    assert set(asked(1)) == {"a::fast", "a::slow", "a::elsewhere"}  # what runs at import may show anywhere
    assert asked(99) == []


def test_a_mutant_is_imported_in_place_of_its_module_and_only_in_the_fork():
    """The module is one that nothing else imports."""
    path = "tests/mutants/equivalents_of_nothing.py"

    def work(folder: Path) -> str:
        running.put_in_place(path, "def said():\n    return __file__\n", folder)
        return import_module("tests.mutants.equivalents_of_nothing").said()

    assert running.in_fork(work, 30.0).endswith("/equivalents_of_nothing.py")
    with pytest.raises(ModuleNotFoundError):
        import_module("tests.mutants.equivalents_of_nothing")


def test_what_does_not_end_is_ended_and_what_dies_is_told():
    began = time.monotonic()
    assert running.in_fork(lambda folder: time.sleep(600), 0.2) is None
    assert time.monotonic() - began < 60
    assert "died" in running.in_fork(lambda folder: os.kill(os.getpid(), signal.SIGKILL), 30.0)


def test_what_is_named_is_there():
    assert mutants.TARGETS.keys() == mutants.NEAR.keys()
    for group in mutants.TARGETS:
        for pattern in mutants.TARGETS[group] + mutants.NEAR[group]:
            assert mutants.files((pattern,)), pattern
