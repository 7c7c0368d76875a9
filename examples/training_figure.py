"""Train the demo's copying model and draw what its heads come to do: docs/training.png.

    python examples/training_figure.py                # half a minute on a CPU
    python examples/training_figure.py --steps 400 --out copying.png

The loss, measured by the script, and the scores, measured by a :class:`hookattn.training.HeadMonitor` in the loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from train_induction import LEARNING_RATE, UNPREDICTABLE, make_batch

from hookattn.demo.induction import BOS, InductionTransformer
from hookattn.render.figures.base import axes_at, empty_sheet, in_own_style, text_at
from hookattn.render.palette import FAINT, HEADS
from hookattn.training import HeadMonitor, repeated_tokens

OUT = Path(__file__).resolve().parents[1] / "docs" / "training.png"


def train(steps: int, every: int) -> tuple[list[float], Any]:
    """The loss of each step on the tokens that can be predicted, and the history of the heads."""
    torch.manual_seed(0)
    model = InductionTransformer().train()
    monitor = HeadMonitor(
        repeated_tokens(model.config.vocab_size, first=BOS),
        measures=("induction", "previous_token", "first_token"),
        every=every,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    generator, losses = torch.Generator().manual_seed(0), []
    monitor.begin(model, 0)
    for step in range(1, steps + 1):
        tokens, predictable = make_batch(model.config, generator)
        each = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        copied = predictable[:, 1:].flatten()
        weight = torch.where(copied, 1.0, UNPREDICTABLE)
        optimizer.zero_grad()
        torch.autograd.backward((weight * each).sum() / weight.sum())
        optimizer.step()
        losses.append(each[copied].mean().item())
        if monitor.due(step):
            monitor.measure(model, step)
    return losses, monitor.history


@in_own_style
def draw(losses: Sequence[float], history: Any) -> Any:
    """The loss above, and below it a panel for each measure with a line for each head, coloured by its layer."""
    panels = {"induction": "induction", "previous_token": "previous token", "first_token": "first token"}
    figure = empty_sheet(6.0, 4.9)
    text_at(
        figure,
        0.05,
        0.03,
        "A model learns to copy: loss, and what its eight heads look at",
        fontsize=8,
        fontweight="bold",
    )
    top = 0.3
    axes = axes_at(figure, 0.6, top, 5.2, 1.0)
    axes.plot(range(1, len(losses) + 1), losses, color=FAINT, linewidth=0.7)
    axes.set(ylabel="loss on\nrepeated tokens", xlim=(0, len(losses)), ylim=(0, None))
    axes.tick_params(labelbottom=False)
    for n, (name, title) in enumerate(panels.items(), 1):
        own = axes_at(figure, 0.6, top + n * 1.12, 5.2, 1.0)
        for (layer, head), rows in history.groupby(["layer", "head"]):
            label = f"layer {layer}" if head == 0 else None
            own.plot(rows["step"], rows[name], color=HEADS[int(layer)], linewidth=0.9, label=label)
        own.set(ylabel=title, xlim=(0, len(losses)), ylim=(0, 1))
        own.tick_params(labelbottom=n == len(panels))
        own.grid(True, axis="y")
    own.set_xlabel("training step")
    figure.axes[1].legend(loc="center right", frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: %(default)s)")
    parser.add_argument("--every", type=int, default=20, help="measure after so many (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="the picture (default: that of docs/training.md)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    losses, history = train(options.steps, options.every)
    draw(losses, history).savefig(options.out, dpi=160)
    last = history[history["step"] == history["step"].max()]
    print(f"{options.out}: loss {losses[-1]:.3f}, best induction head {last['induction'].max():.3f}")


if __name__ == "__main__":
    main()
