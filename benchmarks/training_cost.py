"""What a measurement of heads costs in a training, in steps of that training.

    python -m benchmarks.training_cost            # models of transformers with random weights, on one thread

Processor time, the least of some rounds, as other work on a machine only ever adds to it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hookattn.training import HeadMonitor, repeated_tokens
from hookattn.training.running import Running

# Layers, heads, width, tokens in a row of the training.
SIZES = {"2 × 4": (2, 4, 64, 64), "6 × 8": (6, 8, 256, 128), "12 × 12 (GPT-2)": (12, 12, 768, 128)}


class _Nowhere:
    """Takes numbers and pictures, and does nothing with them."""

    name = "nowhere"

    def scalars(self, values: dict[str, float], step: int) -> None:
        """See :class:`hookattn.training.running.Output`."""

    def picture(self, name: str, pixels: Any, step: int) -> bool:
        """See :class:`hookattn.training.running.Output`."""
        return True


def training_cost(layers: int, heads: int, width: int, tokens: int, rounds: int = 5) -> dict[str, float]:
    """Seconds of a training step of 8 rows, of the bare forward of the prompts, and of a measurement: alone, and with
    its curves, its picture and its file."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=1000, n_positions=tokens, n_embd=width, n_layer=layers, n_head=heads)
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    rows = torch.randint(0, 1000, (8, tokens))
    prompts = repeated_tokens(1000)

    def step() -> None:
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            model(prompts)

    with tempfile.TemporaryDirectory() as folder:
        bare = HeadMonitor(prompts)
        logged = Running(HeadMonitor(prompts, to=Path(folder) / "heads.parquet"))
        return {
            "step": _seconds(step, rounds),
            "forward": _seconds(forward, rounds),
            "measurement": _seconds(lambda: bare.measure(model, 1), rounds),
            "with picture and file": _seconds(lambda: logged.measure(model, 1, [_Nowhere()], None), rounds),
        }


def _seconds(run: Callable[[], Any], rounds: int) -> float:
    found = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return min(found[1:])


def main() -> None:
    """Measure, and print a table."""
    torch.set_num_threads(1)
    print("| layers × heads | training step | forward of the prompts | measurement | with picture and file |")
    print("|---|---|---|---|---|")
    for name, size in SIZES.items():
        found = training_cost(*size)
        step = found["step"]
        cells = [f"{found[k] * 1e3:.0f} ms, {found[k] / step:.2f} steps" for k in list(found)[1:]]
        print(f"| {name} | {step * 1e3:.0f} ms | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
