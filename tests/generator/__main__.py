"""``python -m tests.generator``: run cases, print counts and the failures grouped by their features."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch

from .check import self_check
from .judge import judge
from .runner import BAD, GROUPS, beside, grouped, one, run, summary, telling
from .source import build


def show(seed: int, fixed: dict[str, str]) -> None:
    """Print the source of a case and what is recorded of it."""
    import warnings

    import hookattn

    case = build(seed, fixed)
    print("features:", case.features)
    print("sizes:", case.sizes)
    for name, p in [*case.module.named_parameters(), *case.module.named_buffers()]:
        print(f"  {name}: {tuple(p.shape)}")
    print("inputs:", [tuple(x.shape) for x in case.inputs])
    print(case.source)
    print("generator:", self_check(case) or "the module computes the truth")
    print("verdict:", judge(case))
    print("in truth: weights B H T S", tuple(case.truth.weights.shape))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            trace = hookattn.trace(case.module, case.inputs)
        except Exception as e:  # noqa: BLE001 - shown
            print(f"{type(e).__name__}: {e}")
            return
    for call in trace:
        print(
            "call",
            call.site.path or "(root)",
            call.site.kind,
            "tap",
            call.tap,
            call.score,
            call.normalizer,
            dict(call.basis),
        )
        for name in ("q", "k", "v", "bias", "scores", "mask", "weights", "output"):
            try:
                value = call.get(name)
                print(f"  {name}: {None if value is None else tuple(value.shape)}")
            except Exception as e:  # noqa: BLE001 - shown
                print(f"  {name}: {type(e).__name__} {str(e)[:80]}")
        print(
            "  heads",
            call.heads,
            "queries",
            call.queries,
            "kv_heads",
            call.kv_heads,
            call.certificate.status,
            call.notes,
        )
    print("skipped:", trace.skipped)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.generator")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--beside", action="store_true", help="follow beside what is recognised, and judge that alone")
    parser.add_argument("--having", nargs="*", default=[], metavar="FEATURE=VALUE")
    parser.add_argument("--group", nargs="*", default=list(GROUPS))
    parser.add_argument("--outcomes", nargs="*", default=list(BAD), help="which outcomes are listed in groups")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fixed = dict(item.split("=", 1) for item in options.having)
    seeds = options.only if options.only else list(range(options.seed, options.seed + options.cases))
    if options.show:
        for seed in seeds[:20]:
            show(seed, fixed)
        return 0
    began = time.perf_counter()
    results = run(seeds, min(options.processes, len(seeds)), fixed, beside if options.beside else one)
    took = time.perf_counter() - began
    outcomes = tuple(options.outcomes)
    print(grouped(results, outcomes, tuple(options.group)))
    print("\nmore often than elsewhere:\n" + telling(results, outcomes))
    also = Counter(a for r in results for a in r.verdict.also)
    if also:
        what = "not recognised in the last trace, and why" if options.beside else "beside the fields"
        print(f"\n{what}: " + ", ".join(f"{n} × {a}" for a, n in also.most_common(12)))
    print(f"\n{len(results)} cases in {took:.0f} s ({len(results) / took:.0f} a second): {summary(results)}")
    return int(any(r.verdict.outcome in BAD for r in results))


if __name__ == "__main__":
    sys.exit(main())
