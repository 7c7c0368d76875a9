"""Draw the picture of the README: three heads that two trained models use, from traces of their own kernels.

    pip install matplotlib
    python examples/readme_figure.py                     # writes docs/demo.png
    python examples/readme_figure.py --out heads.png

The two left panels are the causal model that ships with the package, which sees a random segment twice; the right one
is a sentence encoder, if its package is installed (`hookattn demo` says how). Which heads are drawn is found in the
traces. Frames: where the attention of such a head should go.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import hookattn
from hookattn.analyze import Induction, PreviousToken, SameWord
from hookattn.demo import encoder, heads
from hookattn.demo.induction import BOS, example_tokens, load_pretrained

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

OUT = Path(__file__).resolve().parents[1] / "docs" / "demo.png"
LENGTH = 10  # tokens in the repeated segment: few enough that every label can be read
INK, ACCENT, FAINT = "#1f2933", "#c2410c", "#9aa5b1"


@dataclass
class Panel:
    """One head to draw.

    Attributes:
        title: what it does.
        head: which one it is.
        weights: T S.
        tokens: their labels.
        marks: entries (query, key) to frame: where its attention is expected.
        bounds: positions in front of which a new part begins.
    """

    title: str
    head: heads.Head
    weights: Tensor
    tokens: Sequence[str]
    marks: Sequence[tuple[int, int]]
    bounds: Sequence[int]


def causal_panels() -> list[Panel]:
    """The previous-token head and the induction head of the model that copies."""
    ids = example_tokens(3, length=LENGTH)
    tokens = ["bos" if i == BOS else str(i) for i in ids[0].tolist()]
    trace = hookattn.trace(load_pretrained(), ids, tokens=tokens, capture="weights", verify="full")
    panels = []
    for title, measure, offset, begin in (
        ("previous-token head", PreviousToken(), 1, 2),
        ("induction head", Induction(), LENGTH - 1, LENGTH + 1),
    ):
        best = heads.ranked_heads(trace, measure)[0]
        marks = [(i, i - offset) for i in range(begin, 2 * LENGTH + 1)]
        panels.append(Panel(title, best, trace[best.path].weights[0, best.head], tokens, marks, [1, LENGTH + 1]))
    return panels


def encoder_panels() -> list[Panel]:
    """The encoder's head for the same word in the other sentence; nothing without its package."""
    path = encoder.directory()
    if path is None:
        print(f"left out: {encoder.PACKAGE} is not installed; {encoder.INSTALL}")
        return []
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = encoder.load(path)
    trace = hookattn.trace(model, tokenizer(*encoder.PAIR, return_tensors="pt"), capture="weights", verify="full")
    tokens = (trace.tokens or [[]])[0]
    best = heads.ranked_heads(trace, SameWord(across=True))[0]
    middle = tokens.index("[SEP]")
    marks = [
        (i, j)
        for i, a in enumerate(tokens)
        for j, b in enumerate(tokens)
        if a == b and a.isalpha() and (i < middle) != (j < middle)
    ]
    return [
        Panel("same word, other sentence", best, trace[best.path].weights[0, best.head], tokens, marks, [1, middle + 1])
    ]


def draw(axes: Axes, panel: Panel) -> None:
    """One heatmap, queries down and keys across."""
    axes.imshow(panel.weights, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    at = range(len(panel.tokens))
    labels = [t.strip("[]").lower() for t in panel.tokens]
    axes.set_xticks(at, labels, rotation=90, fontsize=7.5, color=INK)
    axes.set_yticks(at, labels, fontsize=7.5, color=INK)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
        spine.set_linewidth(0.6)
    for bound in panel.bounds:
        axes.axhline(bound - 0.5, color=FAINT, linewidth=0.5)
        axes.axvline(bound - 0.5, color=FAINT, linewidth=0.5)
    for query, key in panel.marks:
        axes.add_patch(Rectangle((key - 0.5, query - 0.5), 1, 1, fill=False, edgecolor=ACCENT, linewidth=0.7))
    where = f"layer {panel.head.layer}, head {panel.head.head}"
    axes.set_title(panel.title, fontsize=9.5, color=INK, fontweight="bold", pad=17)
    axes.text(
        0.5,
        1.025,
        f"{where} · {panel.head.score:.2f} within the frames",
        transform=axes.transAxes,
        ha="center",
        fontsize=7.5,
        color=INK,
    )


def main() -> None:
    """Trace, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with torch.no_grad():
        panels = causal_panels() + encoder_panels()
    figure, grid = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.72), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.04, wspace=0.0)
    for axes, panel in zip(grid[0], panels, strict=True):
        draw(axes, panel)
    grid[0, 0].set_ylabel("query", fontsize=8, color=INK)
    for axes in grid[0]:
        axes.set_xlabel("key", fontsize=8, color=INK)
    figure.savefig(out, dpi=188, facecolor="white", metadata={"Software": None})
    print(f"wrote {out} ({out.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
