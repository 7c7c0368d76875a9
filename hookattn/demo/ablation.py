"""The demo's experiment: the causal model runs without its previous-token head, and what is copied still is counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .. import api, edit
from ..analyze import Induction
from ..render import save_page
from ..traces import Trace
from .heads import Head, ranked_heads


@dataclass(frozen=True)
class Copying:
    """How well a model copies the second half of what it reads.

    Attributes:
        predicted: how many of the copied tokens are its first choice.
        log_probability: of the copied token, in nats, on average.
        induction: the score of the head that copies: its mean attention on what followed the token before.
    """

    predicted: int
    log_probability: float
    induction: float


@dataclass(frozen=True)
class Ablation:
    """The model as it is, without one head, and without each other head of the same layer.

    Attributes:
        ablated: the head that was taken out.
        reader: the head that copies.
        clean, edited: as the model is, and without the head.
        copied: how many tokens can be told by copying.
        others: without each of the other heads of that layer, head → what is left.
        trace: of the run without the head.
    """

    ablated: Head
    reader: Head
    clean: Copying
    edited: Copying
    copied: int
    others: dict[int, Copying]
    trace: Trace

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "ablated": {"layer": self.ablated.layer, "head": self.ablated.head},
            "reader": {"layer": self.reader.layer, "head": self.reader.head},
            "clean": asdict(self.clean),
            "edited": asdict(self.edited),
            "copied": self.copied,
            "others": {str(head): asdict(copying) for head, copying in self.others.items()},
            "faithful": self.trace.faithful,
        }


def ablate(model: nn.Module, ids: Tensor, clean: Trace, ablated: Head, reader: Head) -> Ablation:
    """Run a model without a head, and as a control without each other head of its layer.

    Args:
        model: a causal model that returns logits, B T V.
        ids: int64, 1 by T, T odd: a token, and a segment twice.
        clean: the trace of the model as it is.
        ablated: the head that is taken out.
        reader: the head whose induction score is told.
    """
    tokens = (clean.tokens or [[]])[0]

    def without(head: int) -> Trace:
        return api.edited(model, ids, edit.zero("output", path=ablated.path, heads=[head]), tokens=tokens)

    edited = without(ablated.head)
    heads = clean[ablated.path].weights.shape[1]
    others = {head: _copying(without(head), ids, reader) for head in range(heads) if head != ablated.head}
    before, after = _copying(clean, ids, reader), _copying(edited, ids, reader)
    return Ablation(ablated, reader, before, after, ids.shape[1] // 2 - 1, others, edited)


def _copying(trace: Trace, ids: Tensor, reader: Head) -> Copying:
    """Of the run of a trace, from its logits and the weights of the head that copies."""
    logits = trace.output
    assert isinstance(logits, Tensor)
    first = ids.shape[1] // 2 + 1  # the first token of the second copy, after which each one can be told
    wanted, said = ids[0, first + 1 :], logits[0, first:-1]
    likely = said.log_softmax(-1).gather(-1, wanted[:, None])
    place = reader.layer, reader.head
    scores = {(head.layer, head.head): head.score for head in ranked_heads(trace, Induction())}
    return Copying(int((said.argmax(-1) == wanted).sum()), float(likely.mean()), scores[place])


def print_ablation(console: Console, found: Ablation) -> None:
    """The numbers of the model as it is, without the head, and, as a control, without each other head of its layer."""
    rows = [
        (f"predicted, of {found.copied}", "predicted", "d"),
        ("log-probability, nats", "log_probability", ".3f"),
        ("induction score", "induction", ".3f"),
    ]
    grid = Table.grid(padding=(0, 2, 0, 0))
    columns = {"as it is": found.clean, f"no head {found.ablated.head}": found.edited}
    columns |= {f"no head {head}": copying for head, copying in found.others.items()}
    grid.add_row("", *(Text(name, "bold" if place < 2 else "dim") for place, name in enumerate(columns)))
    for text, name, spec in rows:
        styles = ["green", "red", *["dim"] * len(found.others)]
        numbers = [format(getattr(copying, name), spec) for copying in columns.values()]
        grid.add_row(text, *(Text(n, style, justify="right") for n, style in zip(numbers, styles, strict=True)))
    console.print(grid)


def save_comparison(clean: Trace, edited: Trace, found: Ablation, file: Path) -> str:
    """Write a page with the head that copies, clean and edited side by side; returns its path.

    Raises:
        TraceWriteError: it could not be written.
    """
    state = {"view": "compare", "layer": found.reader.layer, "heads": [found.reader.head], "field": "weights"}
    title = f"{found.reader.name}, with {found.ablated.name} and without"
    return save_page(clean, file, compare=edited, state=state, title=title)
