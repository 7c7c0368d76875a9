"""Mutants: the core with one operator, number or order changed, and whether the tests nearest to it notice.

``python -m tests.mutants`` takes a sample and prints what survived (``make test-mutants``, long). A test that runs a
line and looks at nothing lets its mutants live, so this measures what line coverage can't.

cosmic-ray changes the code, for it names each change that it can make and makes the one that is asked for. Its own
runner isn't used: it writes mutants over the working tree, and starts Python anew for each of them, which takes longer
than most tests here do. :mod:`.running` forks a process that has torch loaded, and lets the mutant be imported in place
of the module. Which tests are asked is :mod:`.covered`'s matter: those that enter the changed line, the fastest first.

What the tests start as processes of their own imports the module as it is.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "mutants"

TARGETS = {
    "taps": ("hookattn/taps/*.py",),
    "taps/eager": ("hookattn/taps/eager/*.py",),
    "attention": ("hookattn/attention/*.py", "hookattn/attention/kernels/*.py"),
    "certificate": (
        "hookattn/calls/certificate.py",
        "hookattn/recording/certifying.py",
        "hookattn/recording/verification.py",
    ),
    "generation": ("hookattn/generation/stitch.py", "hookattn/generation/lineage.py"),
    "file": ("hookattn/store/validate.py", "hookattn/store/schema.py"),
}
"""What is changed, by the names under which results are told."""

NEAR = {
    "taps": (
        "tests/taps/*.py",
        "tests/recording/test_other_attention.py",
        "tests/planning/test_plan_flex.py",
        "tests/recording/test_kinds.py",
    ),
    "taps/eager": (
        "tests/taps/eager/*.py",
        "tests/taps/test_operators.py",
        "tests/taps/test_hf_interface.py",
        "tests/generator/*.py",
        "tests/zoo/*.py",
        "tests/recording/test_kinds.py",
        "tests/recording/test_pieces.py",
    ),
    "attention": (
        "tests/attention/*.py",
        "tests/statistics/test_statistics.py",
        "tests/analyze/test_positions.py",
        "tests/recording/test_pieces.py",
        "tests/taps/test_flash_attn.py",
    ),
    "certificate": (
        "tests/recording/test_certif*.py",
        "tests/calls/test_tolerance.py",
        "tests/calls/test_joined_certificates.py",
        "tests/recording/test_measurement.py",
        "tests/recording/test_kinds.py",
        "tests/recording/test_pieces.py",
    ),
    "generation": (
        "tests/generation/test_stitch.py",
        "tests/generation/test_lineage.py",
        "tests/recording/test_generation_keys.py",
        "tests/store/test_continued_fields.py",
    ),
    "file": ("tests/store/test_*.py",),
}
"""The test files that are asked about each of them; of these, a mutant is shown to the tests that enter its line."""

UNSEEN = {"hookattn/attention/kernels/": "tests/attention/test_kernels"}
"""Modules whose lines nobody sees being entered, for Triton's interpreter compiles them anew; and the tests of them."""


def files(patterns: tuple[str, ...], tests: bool = False) -> list[str]:
    """The files of some patterns, relative to the root; with `tests`, those that pytest collects."""
    found = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(name for name in found if not tests or Path(name).name.startswith("test_"))
