"""``python -m tests.sweep``: run the cases and write docs/coverage.md; with ``--beside`` check replays instead."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

from .beside import little_recognised
from .classes import model_types
from .pool import ROOT, run_all
from .report import write
from .results import Results

IMPLEMENTATIONS = ("eager", "sdpa")


def main() -> int:
    """Run; 1 if any row is red."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types alone; their rows are printed")
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, help="this implementation alone")
    parser.add_argument(
        "--beside", action="store_true", help="follow beside what is recognised instead; what is not is told at the end"
    )
    parser.add_argument("--resume", action="store_true", help="keep rows of the same versions and sources")
    parser.add_argument(
        "--redo", nargs="+", metavar="TYPE", help="keep the rows of the results file, whatever it is of, but for these"
    )
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=90, help="seconds for one case")
    parser.add_argument("--results", help="rows, one JSON document a line (default: in out/)")
    parser.add_argument("--report", default=str(ROOT / "docs" / "coverage.md"), help="the page that is written")
    args = parser.parse_args()
    known = model_types()
    types = args.only or known
    unknown = sorted(set(types) - set(known))
    if unknown:
        parser.error(f"transformers has no model type {', '.join(unknown)}")
    wanted = IMPLEMENTATIONS[:1] if args.beside else IMPLEMENTATIONS
    cases = [(t, i) for t in types for i in wanted if args.impl in (None, i)]
    file = args.results or ROOT / "out" / ("beside.jsonl" if args.beside else "sweep.jsonl")
    results = Results(None if args.only else file, resume=args.resume, without=args.redo)
    waiting = [c for c in cases if c not in results]
    started, total = time.monotonic(), len(waiting)

    def done(row: dict[str, Any]) -> None:
        results.add(row)
        if args.only:
            for key, value in row.items():
                if value not in ("", [], {}, None):
                    print(f"  {key}: {value}" if key != "model_type" else value)
        elif len(results.rows) % 50 == 0 or row["status"] == "red":
            red = (
                f" {row['model_type']} {row['implementation']}: {row['problems'][0]}" if row["status"] == "red" else ""
            )
            print(
                f"{len(results.rows)}/{total} {time.monotonic() - started:.0f} s{red[:200]}",
                file=sys.stderr,
                flush=True,
            )

    run_all(waiting, 1 if args.only else args.jobs, args.timeout, done, *(["--beside"] if args.beside else []))
    if args.beside:
        print(little_recognised(results.rows.values()))
    elif not args.only and args.impl is None:
        write(args.report, results.ordered(cases), time.monotonic() - started)
    counts = Counter(row["status"] for row in results.rows.values())
    print(", ".join(f"{n} {status}" for status, n in counts.most_common()), f"in {time.monotonic() - started:.0f} s")
    return 1 if counts["red"] else 0


if __name__ == "__main__":
    sys.exit(main())
