"""What statistics cost, as ratios to the sdpa forward of the same attention, measured in turn in one run.

    python benchmarks/long_context.py                               # 16k tokens, 4 heads of width 64
    python benchmarks/long_context.py --tokens 4096 --heads 8 --json out.json

Then the peak of memory above that of the forward, for growing lengths: it doubles with the tokens at the most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.statistics import FirstMass, LocalMass, SegmentMass

Run = tuple[str, Any]


class Attention(nn.Module):
    """One causal sdpa."""

    def __init__(self, causal: bool = True):
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """B H T D each."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


def everything(tokens: int) -> tuple[Any, ...]:
    """All statistics but the top keys."""
    sets = SegmentMass({"system": range(tokens // 8), "user": range(tokens // 8, tokens // 2)})
    return (
        *("entropy", "lse", "max_score", FirstMass(4), LocalMass(128), "previous_mass", sets, "mean_distance"),
        "received",
    )


def times(runs: list[Run], rounds: int) -> list[dict[str, Any]]:
    """Seconds and ratios to the first run of the same round."""
    spent: list[list[float]] = [[] for _ in runs]
    runs[0][1]()
    for _ in range(rounds):
        for one, (_, go) in zip(spent, runs, strict=True):
            start = time.perf_counter()
            go()
            one.append(time.perf_counter() - start)
    rows = []
    for one, (name, _) in zip(spent, runs, strict=True):
        ratios = [a / b for a, b in zip(one, spent[0], strict=True)]
        rows.append(
            {
                "variant": name,
                "seconds": statistics.median(one),
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
        )
    return rows


def peak(heads: int, width: int, tokens: int) -> int:
    """Bytes at the peak of a trace above those before it, and above those of the forward alone; Linux only."""
    x, model = torch.randn(1, heads, tokens, width), Attention()

    def most(go: Any) -> int:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # forgets the peak
        before = _memory("VmRSS")
        kept = go()
        del kept
        return _memory("VmHWM") - before

    forward = most(lambda: model(x, x, x))
    return most(lambda: hookattn.trace(model, (x, x, x), capture=everything(tokens))) - forward


def _memory(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write the numbers to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, options.heads, options.tokens, options.width) for _ in range(3))
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(options)}
    wanted = everything(options.tokens)
    with torch.no_grad():
        for name, causal in (("causal", True), ("not causal", False)):
            model = Attention(causal)

            def traced(capture: Any, model: nn.Module = model) -> Any:
                return lambda: hookattn.trace(model, (q, k, v), capture=capture)

            def timed(model: nn.Module = model) -> Any:
                return model(q, k, v)

            # A trace runs the forward, too: what it adds is its ratio less 1.
            runs: list[Run] = [("sdpa forward", timed), ("trace: all but top_k", traced(wanted))]
            if causal:
                runs += [("trace: entropy, lse", traced(("entropy", "lse"))), ("trace: received", traced("received"))]
                runs += [("trace: everything and top_k", traced((*wanted, "top_k")))]
            rows = times(runs, options.rounds)
            report[name] = rows
            print(f"\n{options.tokens} tokens, {options.heads} heads of {options.width}, {name}")
            print(f"{'variant':<30}{'seconds':>9}{'ratio':>8}{'added':>8}   range")
            for row in rows:
                spread = f"{row['low']:.2f} – {row['high']:.2f}"
                print(
                    f"{row['variant']:<30}{row['seconds']:>9.2f}{row['ratio']:>8.2f}{row['ratio'] - 1:>8.2f}   {spread}"
                )
    report["peak"] = {}
    print(f"\n{'tokens':>8}{'peak, MiB':>12}{'of the matrix':>16}")
    for tokens in (options.tokens // 2, options.tokens, 2 * options.tokens, 4 * options.tokens):
        found = report["peak"][tokens] = peak(options.heads, options.width, tokens)
        print(f"{tokens:>8}{found / 2**20:>12.1f}{found / (4 * options.heads * tokens**2):>16.2%}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
