"""What a trace costs, as ratios to the untraced forward of the same run.

Every variant runs once in each round, in turn, so that a drift of the machine hits all of them; a row shows the median
of the rounds' ratios to the untraced sdpa forward, and their quartiles. Peers run beside ours on the same weights:
transformers' eager ``output_attentions``, each as its documentation advises.

    python benchmarks/overhead.py                     # toy, small and plain, on the CPU
    python benchmarks/overhead.py --cases toy --rounds 100 --json out.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Variant = tuple[str, Callable[[], Any]]


class PlainBlock(nn.Module):
    """A pre-norm block as a researcher writes it; no adapter knows it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """B T C -> B T C."""
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


def gpt2(
    layers: int, width: int, heads: int, tokens: int, vocabulary: int = 1000
) -> tuple[nn.Module, nn.Module, Tensor]:
    """The same random weights twice, in sdpa and in eager, and an input."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_positions=tokens,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    fused = GPT2LMHeadModel(config).eval()
    fused.set_attn_implementation("sdpa")
    eager = copy.deepcopy(fused)
    eager.set_attn_implementation("eager")
    return fused, eager, torch.randint(0, vocabulary, (1, tokens))


def gpt2_variants(*shape: int) -> list[Variant]:
    """A transformers model, whose attention an adapter names."""
    fused, eager, x = gpt2(*shape)
    return [
        ("untraced, sdpa", lambda: fused(x)),
        ("untraced, eager", lambda: eager(x)),
        ("eager output_attentions", lambda: eager(x, output_attentions=True)),
        *ours(fused, x),
    ]


def plain_variants(layers: int, width: int, heads: int, tokens: int) -> list[Variant]:
    """A model that nobody has seen."""
    torch.manual_seed(0)
    model = nn.Sequential(*(PlainBlock(width, heads) for _ in range(layers))).eval()
    x = torch.randn(1, tokens, width)
    return [("untraced, sdpa", lambda: model(x)), *ours(model, x)]


def ours(model: nn.Module, x: Tensor) -> list[Variant]:
    """What hookattn does, from the least to the most."""
    qkv = ("q", "k", "v")
    return [
        ("trace q k v, verify off", lambda: hookattn.trace(model, x, capture=qkv, verify="off")),
        ("trace q k v", lambda: hookattn.trace(model, x, capture=qkv)),
        ("trace weights", lambda: hookattn.trace(model, x, capture=("weights",))),
        ("trace everything", lambda: hookattn.trace(model, x)),
        ("untraced again", lambda: model(x)),
    ]


CASES: dict[str, Callable[[], list[Variant]]] = {
    "toy (4 layers, width 64, 32 tokens)": lambda: gpt2_variants(4, 64, 4, 32),
    "plain toy, no adapter (4 layers, width 64, 32 tokens)": lambda: plain_variants(4, 64, 4, 32),
    "small (12 layers, width 768, 512 tokens)": lambda: gpt2_variants(12, 768, 12, 512, 50257),
}


def run(variants: list[Variant], rounds: int) -> list[dict[str, Any]]:
    """Time every variant in turn, several rounds."""
    for _ in range(2):
        for _, forward in variants:
            forward()
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds):
        for spent, (_, forward) in zip(times, variants, strict=True):
            start = time.perf_counter()
            forward()
            spent.append(time.perf_counter() - start)
    rows = []
    for (name, _), spent in zip(variants, times, strict=True):
        ratios = sorted(a / b for a, b in zip(spent, times[0], strict=True))
        quarter = len(ratios) // 4
        rows.append(
            {
                "variant": name,
                "median_ms": 1e3 * statistics.median(spent),
                "ratio": statistics.median(ratios),
                "low": ratios[quarter],
                "high": ratios[-1 - quarter],
            }
        )
    return rows


def main() -> None:
    """Parse, measure, print one table a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=0, help="rounds a case (default: 100, or 12 for the small one)")
    parser.add_argument("--json", help="also write the numbers to this file")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cases": {},
    }
    with torch.no_grad():
        for name, make in CASES.items():
            if options.cases not in name:
                continue
            rows = run(make(), options.rounds or (12 if name.startswith("small") else 100))
            report["cases"][name] = rows
            print(f"\n{name}\n{'variant':<28}{'median ms':>10}{'ratio':>9}   quartiles")
            for row in rows:
                spread = f"{row['low']:.3f} – {row['high']:.3f}"
                print(f"{row['variant']:<28}{row['median_ms']:>10.2f}{row['ratio']:>9.3f}   {spread}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
