"""Train the demo model, `hookattn.demo.induction`, from nothing, in a few minutes on a CPU.

    python examples/train_induction.py                       # rewrites the weights that ship with the package
    python examples/train_induction.py --seed 1 --out my.safetensors

The data is made here: BOS, then random tokens in which one segment occurs twice. While it trains, the script prints the
loss and two scores on fresh sequences (BOS, segment, segment), each for the best head of its layers:

previous   mean attention from a position to the one before it, over positions 2 and later, in the first layer;
induction  mean attention, over the second copy, from a token to the one after its earlier occurrence, in a later layer.

Both come from plain softmax arithmetic in this file. The same seed, thread count, machine and torch give the same file,
byte for byte.

Shapes: B batch, T positions, C model width, H heads.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from hookattn.demo.induction import BOS, WEIGHTS_FILE, Block, InductionConfig, InductionTransformer, example_tokens

SHIPPED = Path(__file__).resolve().parents[1] / "hookattn" / "demo" / WEIGHTS_FILE
BATCH = 64
LEARNING_RATE = 3e-3
SHORTEST = 4  # tokens in a repeated segment
# Weight, in the loss, of the tokens that nothing predicts, against 1 for the repeated ones. At 1 their noise slows the
# heads' forming; at 0 nothing tells an induction head what to do when there is no match, and it would copy at random.
UNPREDICTABLE = 0.3
PREVIOUS_GOAL, INDUCTION_GOAL = 0.9, 0.8
EVALUATION = [(10_000 + seed, 24) for seed in range(32)]  # seed and length for example_tokens


class Score(NamedTuple):
    """How well the best head does its task: its layer, its index, its mean attention on the right key."""

    layer: int
    head: int
    value: float

    def __str__(self) -> str:
        return f"{self.value:.3f} (layer {self.layer} head {self.head})"


def make_batch(config: InductionConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make training sequences, and mark what can be predicted in them.

    Each is BOS and distinct random tokens, in which a segment of random length, at a random place, comes again after a
    gap of random length. All three vary so that only the tokens themselves, and no distance, tell what to copy.

    Returns:
        tokens (B T, int64) and predictable (B T, bool), true at each token whose predecessor was seen before.
    """
    length = config.context

    def uniform(low: Tensor, high: Tensor) -> Tensor:  # both ends included
        return low + (torch.rand(BATCH, 1, generator=generator) * (high - low + 1)).long()

    one = torch.ones(BATCH, 1, dtype=torch.long)
    size = uniform(SHORTEST * one, (length - 1) // 2 * one)
    first = uniform(one, length - 2 * size)
    second = uniform(first + size, length - size)

    words = 1 + torch.rand(BATCH, config.vocab_size - 1, generator=generator).argsort(dim=1)[:, : length - 1]
    tokens = torch.cat([torch.full((BATCH, 1), BOS), words], dim=1)
    position = torch.arange(length).expand(BATCH, length)
    repeated = (position >= second) & (position < second + size)
    tokens = tokens.gather(1, torch.where(repeated, position - (second - first), position))
    return tokens, repeated & (position > second)


def attention_weights(model: InductionTransformer, tokens: Tensor) -> list[Tensor]:
    """Return each layer's attention weights (B H T T) on `tokens` (B T): the softmax of masked, scaled q k^T."""
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = []
    x = model.embed(tokens)
    for block in model.blocks:
        assert isinstance(block, Block)
        q, k, _ = block.attn.project(block.norm(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights.append(scores.masked_fill(future, -math.inf).softmax(dim=-1))
        x = block(x)
    return weights


def best_head(attention: dict[int, Tensor]) -> Score:
    """Return the best of the heads whose attention on the right key is given: for each layer B H T."""
    means = {layer: value.mean(dim=(0, 2)) for layer, value in attention.items()}
    layer = max(means, key=lambda layer: means[layer].max().item())
    return Score(layer, int(means[layer].argmax()), round(means[layer].max().item(), 4))


@torch.no_grad()
def evaluate(model: InductionTransformer) -> tuple[float, Score, Score]:
    """Return the accuracy on second copies, the previous-token score and the induction score, on fresh sequences."""
    tokens = torch.cat([example_tokens(seed, length=length) for seed, length in EVALUATION])
    size = (tokens.shape[1] - 1) // 2
    guesses = model(tokens)[:, size + 1 : -1].argmax(dim=-1)
    accuracy = (guesses == tokens[:, size + 2 :]).float().mean().item()

    weights = attention_weights(model, tokens)
    query = torch.arange(tokens.shape[1])
    everywhere, copy = query[2:], query[size + 1 :]
    previous = best_head({0: weights[0][:, :, everywhere, everywhere - 1]})
    induction = best_head({n: weights[n][:, :, copy, copy - size + 1] for n in range(1, len(weights))})
    return accuracy, previous, induction


def train(model: InductionTransformer, steps: int, generator: torch.Generator) -> None:
    """Train `model` in place for `steps` steps, printing as it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    # Up over the first hundred steps, flat, then down to nothing over the last 30 %: that takes noise out of the heads.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, (steps - step) / max(1.0, 0.3 * steps))
    )
    start = time.perf_counter()
    for step in range(1, steps + 1):
        tokens, predictable = make_batch(model.config, generator)
        logits = model(tokens)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        copied = predictable[:, 1:].flatten()
        weight = torch.where(copied, 1.0, UNPREDICTABLE)
        loss = (weight * losses).sum() / weight.sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            accuracy, previous, induction = evaluate(model)
            print(
                f"step {step:5d}  {time.perf_counter() - start:4.0f} s  loss {loss.item():.3f}  "
                f"on copies {losses[copied].mean().item():.3f}  accuracy {accuracy:.3f}  "
                f"previous {previous}  induction {induction}",
                flush=True,
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, report, and write the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the data (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write (default: the one that ships)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    model = InductionTransformer()
    train(model, options.steps, torch.Generator().manual_seed(options.seed))

    accuracy, previous, induction = evaluate(model)
    training = {
        "script": f"examples/{Path(__file__).name}",
        "config": asdict(model.config),
        "seed": options.seed,
        "steps": options.steps,
        "batch": BATCH,
        "threads": options.threads,
        "torch": torch.__version__,
        "accuracy": round(accuracy, 4),
        "previous_token_head": previous._asdict(),
        "induction_head": induction._asdict(),
    }
    # One document under one key: safetensors does not keep the order of several, and the file is to be reproducible.
    save_file(model.state_dict(), options.out, metadata={"training": json.dumps(training)})
    print(f"wrote {options.out} ({options.out.stat().st_size / 1000:.0f} kB)")
    if previous.value <= PREVIOUS_GOAL or induction.value <= INDUCTION_GOAL:
        print(f"the heads are not clear yet (goals {PREVIOUS_GOAL} and {INDUCTION_GOAL}): train for more steps")


if __name__ == "__main__":
    main()
