"""What activation patching of all heads costs, beside as many forwards of what comes after each patched layer.

In a shell:

    python -m benchmarks.patching                                       # 12 layers of 12 heads, width 768, 512 tokens
    python -m benchmarks.patching --tokens 64 --batch 4 --json out.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookattn import analyze

from .clock import cpu_clock, median_of
from .models import gpt2

BAR = 1.10
"""Patching of all heads ÷ so many forwards of the patched suffix, at most."""


def suffix(model: Any, x: Tensor, layer: int) -> Tensor:
    """What a GPT-2 computes from the input of a layer on."""
    for block in model.transformer.h[layer:]:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    found: Tensor = model.lm_head(model.transformer.ln_f(x))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, help="runs in one forward; by default as many as pay")
    parser.add_argument("--rounds", type=int, default=3, help="of each suffix")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model = gpt2(options.layers, 64 * options.heads, options.heads, options.tokens, 50257, device, torch.float32)
    made = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(0, 50257, (2, 1, options.tokens), generator=made)
    with torch.no_grad():
        hidden = model.transformer.wte(clean) + model.transformer.wpe.weight[: options.tokens]
        whole = median_of(lambda: model(clean), cpu_clock, options.rounds)
        each = [
            median_of(lambda layer=layer: suffix(model, hidden, layer), cpu_clock, options.rounds)  # type: ignore[misc]
            for layer in range(options.layers)
        ]
    tables: list[Any] = []

    def patch() -> None:
        tables.append(
            analyze.activation_patching(model, clean, corrupted, analyze.log_probability(5), batch=options.batch)
        )

    took = median_of(patch, cpu_clock, 1)
    runs = options.layers * options.heads
    found = {
        "whole forward": whole,
        "suffixes": sum(each) * options.heads,
        "patching": took,
        "patching ÷ suffixes": took / (sum(each) * options.heads),
        "patching ÷ whole forwards": took / (whole * runs),
    }
    print(f"{options.layers} layers, {options.heads} heads, {options.tokens} tokens: {runs} runs")
    print(f"{tables[0].attrs['runs']}\n")
    for name, value in found.items():
        print(f"{name:28} {value:8.3f}{'' if '÷' in name else ' s'}")
    reached = found["patching ÷ suffixes"] <= BAR
    print(f"\nbar: patching ÷ suffixes ≤ {BAR}: {'reached' if reached else 'missed'}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
