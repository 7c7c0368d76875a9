"""Which lines of the core each test enters, and how long it takes: found once, and kept until a file changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from . import FOLDER, ROOT, TARGETS, UNSEEN, files
from .mutating import Mutant
from .running import run_tests


@dataclass(frozen=True)
class TestFile:
    """What a test file did with the core as it is.

    Attributes:
        name: relative to the root.
        seconds: by test, with the lines being watched, so somewhat more than otherwise.
        entered: the lines, by module and by test; `""` is what its import enters.
        failed: tests that fail with the core as it is, so that they can't tell anything.
    """

    name: str
    seconds: dict[str, float]
    entered: dict[str, dict[str, list[int]]]
    failed: list[str]

    __test__ = False


class _Contexts:
    """A plugin of pytest that tells coverage which test is running, its fixtures included."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.watch.switch_context(item.nodeid)
        return (yield)


def _watching() -> tuple[Sequence[object], Callable[[], Any]]:
    import coverage

    paths = [path for patterns in TARGETS.values() for path in files(patterns)]
    watch = coverage.Coverage(
        data_file=None, config_file=False, include=[str(ROOT / path) for path in paths], messages=False
    )
    watch.start()

    def last() -> dict[str, dict[str, list[int]]]:
        watch.stop()
        data, entered = watch.get_data(), {}
        for path in paths:
            by_test: dict[str, list[int]] = {}
            for line, tests in data.contexts_by_lineno(str(ROOT / path)).items():
                for test in tests:
                    by_test.setdefault(test, []).append(line)
            entered[path] = by_test
        return entered

    return [_Contexts(watch)], last


def _state(name: str) -> str:
    """Changes with the test file, and with the modules whose lines are watched."""
    digest = hashlib.sha256()
    for path in [name, *(path for patterns in TARGETS.values() for path in files(patterns))]:
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()


def watched(names: Iterable[str], tell: Callable[[str], None]) -> list[TestFile]:
    """The test files, run once each where what is kept of them no longer holds."""
    found = []
    for name in names:
        kept = FOLDER / "entered" / (name.replace("/", "+") + ".json")
        state = _state(name)
        known = json.loads(kept.read_text()) if kept.exists() else {}
        if known.get("state") != state:
            done = run_tests([name], around=_watching, limit=1200.0)
            if done is None or "died" in done:
                tell(f"  {name}: {'out of time' if done is None else done['died']}")
                continue
            known = {"state": state, "seconds": done["seconds"], "entered": done["more"], "failed": done["failed"]}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(known))
            tell(f"  {name}: {len(known['seconds'])} tests, {sum(known['seconds'].values()):.0f} s")
            for test, why in known["failed"].items():
                tell(f"    fails with the core as it is: {test}: {why}")
        found.append(TestFile(name, known["seconds"], known["entered"], list(known["failed"])))
    return found


def asked(mutant: Mutant, tests: Sequence[TestFile], budget: float) -> tuple[list[str], float]:
    """The tests that enter a mutant's lines, the fastest first and a file's together, and their seconds.

    A line that runs while the module is imported is entered by every test. What a fixture of a whole file enters
    counts for all tests of it, for it is entered in the first alone. Modules of :data:`.UNSEEN` have tests by name.

    Args:
        mutant: what they are asked about.
        tests: that were watched.
        budget: seconds; of the tests that would take longer in all, the slowest are left out.
    """
    lines = set(range(mutant.line, mutant.end + 1))
    first: list[tuple[float, str, str]] = []
    second: list[tuple[float, str, str]] = []
    of_unseen = next((near for start, near in UNSEEN.items() if mutant.path.startswith(start)), None)
    seen = any(lines.intersection(entered) for file in tests for entered in file.entered.get(mutant.path, {}).values())
    for file in tests:
        by_test = file.entered.get(mutant.path, {})
        if not seen and of_unseen is not None and file.name.startswith(of_unseen):
            second.extend((n, file.name, test) for test, n in file.seconds.items() if test not in file.failed)
        at_import = lines & set(by_test.get("", ()))
        within = any(lines.intersection(entered) for test, entered in by_test.items() if test)
        if not within and not at_import:
            continue
        uses = {test for test, entered in by_test.items() if test}
        for test, seconds in file.seconds.items():
            if test in file.failed:
                continue
            if lines.intersection(by_test.get(test, ())):
                first.append((seconds, file.name, test))
            elif at_import and not within and test in uses:
                second.append((seconds, file.name, test))
    left, chosen = budget, []
    for seconds, name, test in [*sorted(first), *sorted(second)]:
        if left < seconds and chosen:
            continue
        left -= seconds
        chosen.append((seconds, name, test))
    of_file: dict[str, float] = {}
    for seconds, name, _ in chosen:
        of_file[name] = of_file.get(name, 0.0) + seconds
    chosen.sort(key=lambda one: (of_file[one[1]], one[1], one[0]))
    return [test for _, _, test in chosen], budget - left
