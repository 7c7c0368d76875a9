"""``python -m benchmarks``: measure, print one table a case and one of the bars, write JSON.

On the CPU all is measured with the allocator as it is, and what bars are about once more with freed memory kept.

python -m benchmarks                                  # the CPU's cases
python -m benchmarks --device cuda --json out.json    # the GPU's
python -m benchmarks --cases toy --rounds 50
python -m benchmarks --only hand --once               # attention written out by hand, in some minutes
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from . import allocator
from .bars import Verdict, verdicts
from .cases import GENERATION, GROUPS, LARGE, LLAMA, LONG, SMALL, SMALL_EAGER_128, Case, cases
from .checkout import register_adapters
from .clock import Clock, Variant, clock_of
from .derivation import derivation
from .disk import streaming
from .first import first_traces
from .held import held_bytes, long_generation
from .measure import Row, measure
from .models import llama
from .reading import one_head, report
from .statistics_cost import statistics_cost
from .table import bar_table, case_table

# Seconds after which no further case of a GPU begins: those that bars are about come first.
_LATEST = 300
_SECONDS = {"cpu": 10.0, "cuda": 8.0}  # for a case of weight 1
_KEEPING = 0.4  # of the time, once more with freed memory kept
_LIBRARIES = (
    *("torch", "transformers", "triton", "transformer-lens", "nnsight", "torchlens", "attnread"),
    *("timm", "open_clip_torch", "diffusers", "x-transformers", "vit-pytorch"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.bars |= options.again
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: no CUDA device is here; the rows of the GPU were not run.")
        return 0
    warnings.simplefilter("ignore", FutureWarning)
    device = torch.device(options.device)
    clock = clock_of(device, options.busy)
    if options.busy:
        torch.set_num_threads(1)
    asked = [c for c in cases() if _chosen(c, options, device)]
    if not asked:
        parser.error(
            f"no case has {options.cases or ''!r} in its name; there are: {'; '.join(c.name for c in cases())}"
        )
    chosen = [c for c in asked if c.missing is None]
    about = {**_about(device), "adapters": register_adapters(), "clock": clock.__name__}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    if not options.again and (names := [f"{c.name} ({c.missing})" for c in asked if c.missing is not None]):
        print(f"left out, since their library is not installed: {'; '.join(names)}")
    start = time.perf_counter()
    seconds = options.seconds or _SECONDS[device.type] * sum(c.weight for c in chosen)
    rows, extra = _measured(chosen, device, clock, seconds, options)
    for name, value in extra.items():
        print(f"{name}: {value:.4g}")
    bars = verdicts(rows, extra, device.type)
    found: dict[str, Any] = {
        "about": about,
        "cases": {name: [r.to_json() for r in several] for name, several in rows.items()},
        "extra": extra,
        "bars": [{"name": b.name, "sign": b.sign, "limit": b.limit, "measured": b.measured} for b in bars],
    }
    if (
        not (options.once or options.again)
        and device.type == "cpu"
        and allocator.can_keep()
        and any(c.has_bars for c in chosen)
    ):
        print(f"\nOnce more with freed memory kept, {_KEEPING:g} of the time: the rows that bars are about.")
        found["freed memory kept"] = allocator.run_keeping(_once_more(options, _KEEPING * seconds))
    if not options.again:
        told = [bar for bar in bars if bar.measured is not None or not options.only]
        if told:
            print(_bar_table(told, found.get("freed memory kept")))
        print(f"took {time.perf_counter() - start:.0f} s")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return 0


def _once_more(options: argparse.Namespace, seconds: float) -> list[str]:
    """The arguments of the run that measures the rows that bars are about once more."""
    given = ["--again", "--seconds", str(seconds), "--rounds", str(options.rounds), "--rows", options.rows]
    if options.cases:
        given += ["--cases", options.cases]
    if options.only:
        given += ["--only", ",".join(options.only)]
    return [*given, *(("--busy",) if options.busy else ())]


def _bar_table(bars: list[Verdict], kept: dict[str, Any] | None) -> str:
    if kept is None:
        return bar_table(bars)
    return bar_table(bars, {bar["name"]: bar["measured"] for bar in kept["bars"]}, "freed memory kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", help="only cases whose name contains this, wherever they are measured by default")
    parser.add_argument(
        "--only", type=_groups, default=(), help=f"only cases of these groups, separated by commas: {', '.join(GROUPS)}"
    )
    parser.add_argument(
        "--seconds", type=float, help="about how long the rounds take in all (default: 10 a case of weight 1; cuda: 8)"
    )
    parser.add_argument("--rounds", type=int, default=0, help="exactly so many rounds of each case")
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these, separated by commas")
    parser.add_argument(
        "--busy", action="store_true", help="count the time of this process on one core, not the wall's"
    )
    parser.add_argument("--once", action="store_true", help="with the allocator as it is alone")
    parser.add_argument("--bars", action="store_true", help="only cases and rows that bars are about, and nothing else")
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)  # the second part of a run
    parser.add_argument("--json", help="write the numbers to this file")
    return parser


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := sorted(set(names) - set(GROUPS)):
        raise argparse.ArgumentTypeError(f"no such group: {', '.join(unknown)}; there are: {', '.join(GROUPS)}")
    return names


def _measured(
    chosen: list[Case], device: torch.device, clock: Clock, seconds: float, options: argparse.Namespace
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """The rows of each case, printed as they come, and what is measured beside the cases."""
    names = [name for name in options.rows.split(",") if name]
    share = seconds / sum(c.weight for c in chosen)
    start = time.perf_counter()
    rows: dict[str, list[Row]] = {}
    extra: dict[str, float] = {}

    def wanted(variant: Variant) -> bool:
        return not (options.bars and variant.context) and (not names or any(n in variant.name for n in names))

    if device.type == "cuda":
        chosen.sort(key=lambda case: case.name not in (LARGE, SMALL))
        extra.update(derivation(device))
        extra.update(statistics_cost(device))
    for case in chosen:
        if device.type == "cuda" and time.perf_counter() - start > _LATEST:
            print(f"\n{case.name}\nleft out: there was no time for it")
            continue
        rows[case.name] = measure(case, device, share * case.weight, options.rounds, clock, wanted=wanted)
        print(case_table(f"{case.name}; {allocator.name()}", rows[case.name]), flush=True)
        if not (names or options.bars):
            extra.update(_beside(case, device, clock))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, extra


def _beside(case: Case, device: torch.device, clock: Clock) -> dict[str, float]:
    """What is measured with a case and is no ratio to its untraced forward."""
    found: dict[str, float] = {}
    if case.name == SMALL_EAGER_128:
        found.update(first_traces(case.make(device), case.inputs(device), clock))
    if case.name == SMALL:
        found.update(streaming(case.make(device), case.inputs(device), clock, rounds=5))
    if case.name == LLAMA:
        found.update(held_bytes(case.make(device), case.inputs(device)))
    if case.name == LONG:
        found.update(one_head(clock=clock))
        found.update(report(clock=clock))
    if case.name == GENERATION:
        toy = llama(12, 128, 4, 2, 512, 344, 1000, device, torch.float32)
        prompt = torch.arange(64, device=device)[None]
        found.update(long_generation(toy, prompt))
    return found


def _chosen(case: Case, options: argparse.Namespace, device: torch.device) -> bool:
    named = device.type in case.places if options.cases is None else options.cases in case.name
    return named and (not options.only or case.group in options.only) and (case.has_bars or not options.bars)


def _about(device: torch.device) -> dict[str, str]:
    found = {"machine": platform.machine(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    found["memory"] = allocator.name()
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    raise SystemExit(main())
