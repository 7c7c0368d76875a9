"""``python -m tests.mutants``: a sample of mutants, and which of them no test notices."""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from . import FOLDER, NEAR, TARGETS, files
from .covered import TestFile, asked, watched
from .mutating import Mutant, sample
from .running import load, run_tests

EQUIVALENT = Path(__file__).with_name("equivalent.toml")


def equivalent(mutant: Mutant) -> str | None:
    """Why a mutant can't be told from the core, where that is known."""
    before, after = mutant.lines()
    for one in tomllib.loads(EQUIVALENT.read_text()).get("mutant", []):
        if one["file"] == mutant.path and one["is"] == before and one["becomes"] == after:
            return str(one["because"])
    return None


_ALONE: dict[str, bool] = {}


def passes_alone(test: str) -> bool:
    """Whether a test is green by itself with the core as it is: one that needs those before it can't tell anything."""
    if test not in _ALONE:
        done = run_tests([test.split("::")[0]], [test])
        _ALONE[test] = done is not None and done.get("code") == 0
    return _ALONE[test]


def judge(mutant: Mutant, tests: list[TestFile], budget: float) -> tuple[str, str]:
    """What became of a mutant: killed, timed out, survived, equivalent; and by which test, or why."""
    if because := equivalent(mutant):
        return "equivalent", because
    source = mutant.source()
    try:
        compile(source, mutant.path, "exec")
    except SyntaxError:
        return "equivalent", "it is not Python"
    order, seconds = asked(mutant, tests, budget)
    if not order:
        return "survived", "no test enters it"
    order = [test for test in order if _ALONE.get(test, True)]
    names = list(dict.fromkeys(name.split("::")[0] for name in order))
    done = run_tests(names, order, (mutant.path, source), limit=60 + 4 * seconds)
    if done is None:
        return "timed out", ""
    if "died" in done:
        return "killed", "the process died"
    if done["code"] == 0:
        return "survived", f"{len(done['seconds'])} tests, {seconds:.0f} s"
    test, why = next(iter(done["failed"].items()), ("collection", "?"))
    if test in order and not passes_alone(test):
        return judge(mutant, tests, budget)  # without this test
    return "killed", f"{why} in {test}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__)
    parser.add_argument("--number", type=int, default=200, help="of mutants, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help=f"of {', '.join(TARGETS)}; separated by commas")
    parser.add_argument("--file", default="*", help="only modules whose path is like this")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of tests that a mutant is shown to")
    parser.add_argument("--bar", type=float, default=0.85, help="the share that has to be killed")
    parser.add_argument("--again", default="", help="the file of an earlier run's results: its survivors alone")
    parser.add_argument("--out", default=str(FOLDER / "results.json"))
    options = parser.parse_args()
    groups = [name for name in options.only.split(",") if name] or list(TARGETS)
    if unknown := sorted(set(groups) - set(TARGETS)):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(TARGETS)}")

    def tell(line: str) -> None:
        print(line, flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the fork that runs now is ended, too
    of = {path: group for group in groups for path in files(TARGETS[group]) if fnmatch.fnmatch(path, options.file)}
    if options.again:
        earlier = json.loads(Path(options.again).read_text())
        todo = [Mutant(**one["mutant"]) for one in earlier if one["became"] == "survived"]
        todo = [mutant for mutant in todo if mutant.path in of]
    else:
        todo = sample(list(of), options.number, options.seed)
    load()
    near: dict[str, list[TestFile]] = {}
    for group in dict.fromkeys(of[mutant.path] for mutant in todo):
        tell(f"what the tests near {group} enter")
        near[group] = watched(files(NEAR[group], tests=True), tell)
    results: list[dict[str, Any]] = []
    for i, mutant in enumerate(todo):
        began = time.monotonic()
        became, by = judge(mutant, near[of[mutant.path]], options.budget)
        results.append({"mutant": vars(mutant), "became": became, "by": by})
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(results, indent=1))
        took = time.monotonic() - began
        tell(f"{i + 1}/{len(todo)} {became} ({took:.0f} s) {mutant.path}:{mutant.line} {mutant.operator}: {by}")
        if became in ("survived", "timed out"):
            tell("    " + mutant.diff().replace("\n", "\n    "))
    return table(results, options.bar)


def table(results: list[dict[str, Any]], bar: float) -> int:
    """Print what became of them by module; 1 where fewer were killed than the bar asks for."""
    kinds = ("killed", "timed out", "survived", "equivalent")
    rows: dict[str, Counter[str]] = {}
    for one in results:
        for row in (one["mutant"]["path"], "in all"):
            rows.setdefault(row, Counter())[one["became"]] += 1
    print(f"\n{'':<48}" + "".join(f"{kind:>12}" for kind in kinds))
    for name in sorted(rows, key=lambda row: (row == "in all", row)):
        print(f"{name:<48}" + "".join(f"{rows[name][kind]:>12}" for kind in kinds))
    whole = rows.get("in all", Counter())
    meant = sum(whole[kind] for kind in kinds[:3])
    share = (whole["killed"] + whole["timed out"]) / meant if meant else 1.0
    asserted = sum(one["became"] == "killed" and one["by"].startswith(("Assertion", "Failed")) for one in results)
    print(f"{share:.1%} killed, {bar:.0%} asked for; {asserted} of {whole['killed']} by an assertion, not a crash")
    return 0 if share >= bar else 1


if __name__ == "__main__":
    sys.exit(main())
