"""``python -m benchmarks``: measure, print one table a case and one of the bars, write JSON.

python -m benchmarks                                  # the CPU's cases
python -m benchmarks --device cuda --json out.json    # the GPU's
python -m benchmarks --cases toy --rounds 50
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from .bars import verdicts
from .cases import LARGE, SMALL, Case, cases
from .checkout import register_adapters
from .clock import Clock, clock_of
from .derivation import derivation
from .disk import streaming
from .measure import Row, measure
from .statistics_cost import statistics_cost
from .table import bar_table, case_table

# Seconds after which no further case of a GPU begins: those that bars are about come first.
_LATEST = 300
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
_LIBRARIES = ("torch", "transformers", "triton", "transformer-lens", "nnsight", "torchlens")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: no CUDA device is here; the rows of the GPU were not run.")
        return 0
    warnings.simplefilter("ignore", FutureWarning)
    device = torch.device(options.device)
    clock = clock_of(device, options.busy)
    if options.busy:
        torch.set_num_threads(1)
    chosen = [c for c in cases() if _chosen(c, options.cases, device)]
    if not chosen:
        parser.error(f"no case has {options.cases!r} in its name; there are: {'; '.join(c.name for c in cases())}")
    about = {**_about(device), "adapters": register_adapters(), "clock": clock.__name__}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    start = time.perf_counter()
    rows, extra = _measured(chosen, device, clock, options)
    for name, value in extra.items():
        print(f"{name}: {value:.4g}")
    bars = verdicts(rows, extra, device.type)
    print(bar_table(bars))
    print(f"took {time.perf_counter() - start:.0f} s")
    if options.json:
        report: dict[str, Any] = {
            "about": about,
            "cases": {name: [r.to_json() for r in several] for name, several in rows.items()},
            "extra": extra,
            "bars": [{"name": b.name, "sign": b.sign, "limit": b.limit, "measured": b.measured} for b in bars],
        }
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", help="only cases whose name contains this, wherever they are measured by default")
    parser.add_argument("--seconds", type=float, help="about how long the rounds take in all (default: 180; cuda: 150)")
    parser.add_argument("--rounds", type=int, default=0, help="exactly so many rounds of each case")
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these, separated by commas")
    parser.add_argument(
        "--busy", action="store_true", help="count the time of this process on one core, not the wall's"
    )
    parser.add_argument("--json", help="write the numbers to this file")
    return parser


def _measured(
    chosen: list[Case], device: torch.device, clock: Clock, options: argparse.Namespace
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """The rows of each case, printed as they come, and what is measured beside the cases."""
    names = [name for name in options.rows.split(",") if name]
    share = (options.seconds or (150 if device.type == "cuda" else 180)) / sum(c.weight for c in chosen)
    start = time.perf_counter()
    rows: dict[str, list[Row]] = {}
    extra: dict[str, float] = {}
    if device.type == "cuda":
        chosen.sort(key=lambda case: case.name not in (LARGE, SMALL))
        extra.update(derivation(device))
        extra.update(statistics_cost(device))
    for case in chosen:
        if device.type == "cuda" and time.perf_counter() - start > _LATEST:
            print(f"\n{case.name}\nleft out: there was no time for it")
            continue
        rows[case.name] = measure(case, device, share * case.weight, options.rounds, clock, names=names)
        print(case_table(case.name, rows[case.name]), flush=True)
        if case.name == SMALL and not names:
            extra.update(streaming(case.make(device), case.inputs(device), clock))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, extra


def _chosen(case: Case, name: str | None, device: torch.device) -> bool:
    return device.type in case.places if name is None else name in case.name


def _about(device: torch.device) -> dict[str, str]:
    found = {"machine": platform.machine(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    kept = _ALLOCATOR.items() <= os.environ.items()
    found["freed memory"] = "kept by the process" if kept else "given back to the system"
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _keep_freed_memory() -> None:
    """Begin again with an allocator (glibc's) that keeps what is freed for what is allocated next, for everybody here.

    Else most of what is measured is the system handing out pages: whether a run gets those of the one before or new
    ones is chance, and new ones take from nothing to more than the forward, most of all on virtual machines.
    """
    if sys.platform == "linux" and not _ALLOCATOR.keys() <= os.environ.keys():
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, command, {**_ALLOCATOR, **os.environ})


if __name__ == "__main__":
    _keep_freed_memory()
    raise SystemExit(main())
