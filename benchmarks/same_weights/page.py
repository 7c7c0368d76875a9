"""docs/comparison.md, of what was run: the weights of four tools, and the pages of three viewers."""

from __future__ import annotations

import ast
import textwrap
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from hookattn.version import __version__

from .cases import CASES, Case
from .meanwhile import as_loaded, attentions_of_the_fused_model, logits
from .readers import BY_HAND, READERS, Lacks, read
from .views import VIEWS, Seen

NAMES = {
    "hookattn": "hookattn",
    "output_attentions": "`output_attentions`",
    "transformer_lens": "TransformerLens",
    "nnsight": "nnsight",
}
TOLERANCE = 1e-5
_INTRODUCTION = """# Beside other tools

What other tools hand out of the same models, and what other viewers draw of the same trace. `make compare` installs
them into an environment of their own, runs `benchmarks/same_weights/` and writes this page of what it gave; an error of
a tool is its answer. What can be changed with them: [comparison-edits.md](comparison-edits.md). What they cost:
[speed.md](speed.md).
"""
_WEIGHTS = """## The weights of the last attention

Small models with drawn weights, two inputs, float32. Each number is the largest difference from the same weights in
float64, made by the model's own eager code or, for models that transformers does not have, by a softmax of q·k written
out. hookattn has the model as it is loaded; the others have it in eager where it is one of transformers, as their way
needs it. *By hand*: from what goes into the attention, by arithmetic that whoever asks has to write.
"""
_LAST = """## What to take

- **A model of transformers, the weights alone, and room for all of them**: `output_attentions=True` in eager needs
  nothing else.
- **Everything in a model, not attention alone** (residual streams, neurons, logits of every layer), under one set of
  names: TransformerLens, for the architectures that it knows.
- **Code of your own at any place of a forward**, also on a model that runs elsewhere: nnsight.
- **A view in a notebook with a network**: BertViz and CircuitsVis, which take a trace too ([figures.md](figures.md)).
- **Attention as the model ran it**, whatever its kernel, with q, k, v, scores and masks beside the weights, checked,
  and a list of what could not be recorded: hookattn. Weights are derived as they are read, so that a fused model stays
  fused, and [statistics of long contexts](statistics.md) never form T×S.
"""


def measured() -> dict[str, dict[str, Tensor | Exception]]:
    """Case → tool → what it answers."""
    return {case.name: {tool: read(tool, case) for tool in READERS} for case in CASES}


def gap(case: Case, found: Tensor, reference: Tensor) -> tuple[float, bool]:
    """How far it is from float64 at the most, and whether the mask is in it, whose entries are left out then."""
    if found.shape != reference.shape:
        raise ValueError(f"{case.name}: shape {tuple(found.shape)}, and {tuple(reference.shape)} was expected")
    off, masked = (found.double() - reference).abs(), found <= torch.finfo(found.dtype).min / 2
    return float(off[~masked].max()), bool(masked.any())


def page(answers: dict[str, dict[str, Tensor | Exception]], pages: dict[int, dict[str, Seen]]) -> str:
    """The page.

    Args:
        answers: of ``measured()``.
        pages: tokens → viewer → what its page is.
    """
    return "\n".join(
        [_INTRODUCTION, f"Run with {versions()}.\n", _WEIGHTS, *table(answers), *meanwhile(), *_pages(pages), _LAST]
    )


def versions() -> str:
    """Of what ran."""
    packages = ("torch", "transformers", "transformer-lens", "nnsight", "bertviz", "circuitsvis")
    return ", ".join([f"hookattn {__version__}", *(f"{name} {version(name).partition('+')[0]}" for name in packages)])


def table(answers: dict[str, dict[str, Tensor | Exception]]) -> list[str]:
    """Cases by tools, what their errors say, and the code that ran."""
    lines = ["| | " + " | ".join(NAMES.values()) + " |", "|---|" + "---|" * len(NAMES)]
    said: dict[tuple[str, str], list[str]] = {}
    for case in CASES:
        reference = case.reference()
        cells = []
        for tool, found in answers[case.name].items():
            if isinstance(found, Exception):
                cells.append("cannot")
                said.setdefault((tool, _message(found)), []).append(case.title)
            else:
                cells.append(cell(tool, case, found, reference))
        lines.append(f"| {case.title} | " + " | ".join(cells) + " |")
    lines += ["", "Why not, in a tool's own words where they are quoted:", ""]
    lines += [f"- {NAMES[tool]}: {text} ({'; '.join(titles)})" for (tool, text), titles in said.items()]
    lines += [
        "",
        "TransformerLens reads the last step of a generation by running the whole sequence again: with transformers "
        f"{version('transformers')}, its own cache is [not the model's](comparison-edits.md).",
        "",
        "The code that ran, where a case says how its model is called and where its last attention is:",
        "",
        *(line for tool in READERS for line in (f"**{NAMES[tool]}**", "", "```python", code(tool), "```", "")),
    ]
    return lines


def cell(tool: str, case: Case, found: Tensor, reference: Tensor) -> str:
    """What stands in the table for an answer."""
    off, masked = gap(case, found, reference)
    if off > TOLERANCE:
        raise ValueError(f"{case.name} of {tool} is {off:.1e} off, which is more than {TOLERANCE:.0e}")
    notes = [f"{off:.0e}"] + ["with the mask in them"] * masked + ["by hand"] * ((tool, case.name) in BY_HAND)
    again = ["by running all of it again"] * (tool == "transformer_lens" and case.new > 0)
    return ", ".join(notes + again)


def code(tool: str) -> str:
    """What was written for a tool: the body of its function, without its docstring."""
    text = (Path(__file__).parent / "readers.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == READERS[tool].__name__:
            return textwrap.dedent("\n".join(text.splitlines()[node.body[1].lineno - 1 : node.end_lineno])).strip()
    raise LookupError(tool)


def meanwhile() -> list[str]:
    """What the model itself returns while a tool reads."""
    own = as_loaded()
    gaps = {tool: float((logits(tool) - own).abs().max()) for tool in READERS}
    none = attentions_of_the_fused_model()
    if none:
        raise ValueError(f"output_attentions returns {none} tensors of a fused model now: write the page anew")
    return [
        "## What the model returns meanwhile",
        "",
        f"The logits of GPT-2 (up to {float(own.abs().max()):.0f}) while its weights are read, and those of the model "
        "as it is loaded, in sdpa, with nobody looking: the largest difference.",
        "",
        "| " + " | ".join(NAMES.values()) + " |",
        "|" + "---|" * len(NAMES),
        "| " + " | ".join(f"{one:.0e}" if one else "0, bit for bit" for one in gaps.values()) + " |",
        "",
        "The others read another kernel's weights, which are as good, as long as both kernels attend alike. Asked for "
        "`output_attentions=True` as it is loaded, the model returns an empty tuple.",
        "",
    ]


def _message(error: Exception) -> str:
    """An error in one line, as text of a page."""
    text = " ".join(str(error).split()).split(" — ")[0]
    return text if isinstance(error, Lacks) else f"`{type(error).__name__}`, “{text}”"


def _pages(pages: dict[int, dict[str, Seen]]) -> list[str]:
    lines = [
        "## The page of a viewer",
        "",
        "A GPT-2 of 12 layers and 12 heads with drawn weights, all of its weights in one page; in hookattn's also q "
        "and k, for Why and Neurons. Made on two cores that others used too, and opened in Chromium, where nobody "
        "answered: what a page fetches would come from these hosts.",
        "",
        "| tokens | viewer | MB | made in, s | asks | draws without a network |",
        "|---|---|---|---|---|---|",
    ]
    for tokens, seen in pages.items():
        for view in VIEWS:
            one = seen[view]
            lines.append(
                f"| {tokens} | {view} | {one.megabytes:.1f} | {one.seconds:.1f} | {', '.join(one.hosts) or 'nobody'} | "
                f"{'yes' if one.drawn else 'nothing'} |"
            )
    lines += [
        "",
        "hookattn's page says what it rounded: of 128 tokens the weights are 8-bit codes, off by 0.004 at the most "
        "([viewer.md](viewer.md)), where the others write decimal text. What their pages look like with a network was "
        "not looked at.",
        "",
    ]
    return lines
