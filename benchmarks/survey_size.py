"""What a survey costs: seconds an example beside those of the forward alone, and bytes a row of its table; and what
that makes for a corpus and a model of any size.

In a shell:

    python -m benchmarks.survey_size                                    # measured on 12 layers of 12 heads, width 768
    python -m benchmarks.survey_size --for-layers 32 --for-heads 32 --for-tokens 512 --for-prompts 1e6 --json out.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hookattn.analyze.registry import MEASURES, capture
from hookattn.analyze.survey import Batch, survey

from .clock import cpu_clock
from .models import gpt2

LEAN = ("normalised_entropy", "mean_distance", "first_token", "previous_token", "local_mass")
"""Measures that statistics are enough for: no weights are formed."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--for-layers", type=int, default=32)
    parser.add_argument("--for-heads", type=int, default=32)
    parser.add_argument("--for-tokens", type=int, default=512)
    parser.add_argument("--for-prompts", type=float, default=1e6)
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = gpt2(
        options.layers, 64 * options.heads, options.heads, options.tokens, 50257, torch.device("cpu"), torch.float32
    )
    made = torch.Generator().manual_seed(0)
    examples = torch.randint(0, 50257, (options.examples, options.tokens), generator=made).tolist()

    def forwards() -> None:
        with torch.no_grad():
            for first in range(0, len(examples), options.batch):
                model(torch.tensor(examples[first : first + options.batch]))

    found = [
        measured(options, name, chosen, model, examples, forwards)
        for name, chosen in (("statistics alone", LEAN), ("all measures", tuple(MEASURES)))
    ]
    print(f"measured: {options.layers} layers, {options.heads} heads, {options.tokens} tokens, one CPU thread")
    for one in found:
        print(
            f"  {one['what']:17} {one['measures']:2} measures: {one['survey ÷ forward']:.2f} of the forward, "
            f"{one['bytes a row']:.2f} bytes a row"
        )
    heads = options.for_layers * options.for_heads
    prompts, matrices = options.for_prompts, 2 * heads * options.for_tokens**2
    print(
        f"\n{prompts:,.0f} prompts of {options.for_tokens} tokens, {options.for_layers} layers of "
        f"{options.for_heads} heads:"
    )
    print(f"  weights in 2 bytes each: {matrices / 1e6:,.1f} MB a prompt, {matrices * prompts / 1e12:,.2f} TB")
    for one in found:
        rows = heads * one["measures"]
        size = rows * one["bytes a row"]
        one |= {"rows a prompt": rows, "table bytes": size * prompts}
        print(
            f"  {one['what']:17} {rows:,} rows, {size / 1e3:,.1f} kB a prompt; {size * prompts / 1e9:,.1f} GB; "
            f"{one['survey ÷ forward']:.2f} × the seconds of its forwards"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


def measured(
    options: argparse.Namespace, what: str, names: tuple[str, ...], model: Any, examples: list[list[int]], forwards: Any
) -> dict[str, Any]:
    """One choice of measures: CPU time beside that of the forwards, turn by turn, and the size of the table."""

    def encode(values: Any) -> Any:
        yield Batch({"input_ids": torch.tensor(values)}, len(values))

    ratios, size = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.rounds + 1):  # the first does not count
            out = Path(folder, f"{i}.parquet")
            run = partial(survey, model, examples, encode, out, measures=names, batch=options.batch)
            ratios.append(cpu_clock(run) / cpu_clock(forwards))
            size = out.stat().st_size
    rows = options.layers * options.heads * len(names) * len(examples)
    return {
        "what": what,
        "measures": len(names),
        "weights formed": "weights" in capture(*names),
        "survey ÷ forward": median(ratios[1:]),
        "bytes a row": size / rows,
    }


if __name__ == "__main__":
    main()
