"""Attacks: what hits a trace, a file, a reader or a server in the field, many times over, and how often it got through.

``python -m tests.attack`` runs them whole and prints a figure for each bar (``make test-attack``, minutes);
``test_slices.py`` runs a slice of each in ``make test``. An attack is a module in this folder with a function
``attack``; :data:`ATTACKS` is the one list of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec


@dataclass(frozen=True)
class Figure:
    """One number that an attack measured.

    Attributes:
        what: is counted or measured, with its unit.
        measured: the number.
        bar: it may be at most this; None: it is told and not judged (how often it was tried, say).
        examples: of what got through, a few lines.
    """

    what: str
    measured: float
    bar: float | None = None
    examples: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether it is not over its bar."""
        return self.bar is None or self.measured <= self.bar


@dataclass(frozen=True)
class Attack:
    """One attack: ``attack(rounds, seed)`` of its module returns figures.

    Attributes:
        name: of the module in this folder.
        about: what it does, for the table.
        whole: rounds of ``make test-attack``.
        slice: rounds of ``make test``, some seconds.
    """

    name: str
    about: str
    whole: int
    slice: int

    def run(self, rounds: int, seed: int = 0) -> Sequence[Figure]:
        """Its figures."""
        figures: Sequence[Figure] = import_module(f"{__name__}.{self.name}").attack(rounds, seed)
        return figures


ATTACKS = (
    Attack("interrupts", "an exception at a random moment, and at each line of set-up and take-down", 2000, 40),
    Attack("raises", "a forward that raises in a random module", 2000, 60),
    Attack("forks", "fork() beside a thread that traces", 500, 6),
    Attack("tasks", "asyncio tasks and threads on one model", 200, 10),
    Attack("files", "damaged trace files, nine kinds of damage", 200_000, 1500),
    Attack("kills", "SIGKILL in save, stream and survey", 600, 6),
    Attack("arguments", "wrong calls of the public functions", 60_000, 1000),
    Attack("server", "requests to the viewer that are not for it", 400, 60),
    Attack("soak", "traces of changing models for so many seconds", 120, 6),
    Attack("terminals", "control characters and formulas in what a file says", 200, 5),
)
"""In the order in which they are run."""


def present() -> Iterator[Attack]:
    """The attacks whose module is there."""
    for attack in ATTACKS:
        if find_spec(f"{__name__}.{attack.name}") is not None:
            yield attack
