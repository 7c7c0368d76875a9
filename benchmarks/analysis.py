"""What the analyzers cost: the report on every head, flow, and a survey, beside one softmax of the same scores.

In a shell:

    python -m benchmarks.analysis                                       # 12 layers of 12 heads, 512 tokens
    python -m benchmarks.analysis --layers 4 --tokens 1024 --json out.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import hookattn
from hookattn import analyze

from .clock import cpu_clock, median_of

WORDS = "the cat sat on a mat , and the dog ran to it . [SEP]".split()


class Layers(nn.Module):
    """Nothing but causal attention."""

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleList(nn.Linear(64 * heads, 3 * 64 * heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """B T C to B T C."""
        for layer in self.attention:
            q, k, v = (y.unflatten(-1, (self.heads, 64)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            x = nn.functional.scaled_dot_product_attention(3 * q, 3 * k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x / x.std()
        return x


def words(tokens: int) -> list[str]:
    """So many words and marks, as a tokenizer might give them."""
    return [WORDS[(7 * i + i // 5) % len(WORDS)] for i in range(tokens)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokens = [words(options.tokens)]
    with torch.no_grad():
        model, x = Layers(options.layers, options.heads), torch.randn(1, options.tokens, 64 * options.heads)
        trace = hookattn.trace(model, x, tokens=tokens)
        short = hookattn.trace(model, x[:, :64], tokens=[tokens[0][:64]])
    scores = [call.scores for call in trace]
    base = median_of(lambda: [torch.softmax(s, -1) for s in scores], cpu_clock, options.rounds)
    found = {"softmax of all scores": base}
    found["report, all measures"] = median_of(lambda: analyze.report(trace), cpu_clock, options.rounds)
    found["rollout"] = median_of(lambda: analyze.rollout(trace), cpu_clock, options.rounds)
    found["flow of 64 tokens to one token"] = median_of(lambda: analyze.flow(short, [-1]), cpu_clock, options.rounds)
    found["flow of 64 tokens, all pairs"] = median_of(lambda: analyze.flow(short), cpu_clock, 1)
    sizes = f"{options.layers} layers, {options.heads} heads, {options.tokens} tokens"
    print(f"{sizes}, {torch.get_num_threads()} threads\n")
    for name, took in found.items():
        print(f"{name:34} {took:8.3f} s {took / base:8.1f} ×")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
