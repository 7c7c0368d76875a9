"""The demo: two trained models traced, offline; their heads found, one of them taken out, their traces saved and read
back.

What it prints is what it measured. Models that come from elsewhere are found, never fetched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from .. import api
from ..analyze import Induction, PreviousToken, SameWord
from ..console.screen import decimal_size, quiet_transformers
from ..console.tables import print_calls, print_verdict
from ..errors import TraceWriteError
from ..traces import Trace, load
from . import encoder, heads
from .ablation import Ablation, ablate, print_ablation, save_comparison
from .induction import BOS, example_tokens, load_pretrained
from .show import heading, print_grid, print_ranking

Working = Callable[[str], AbstractContextManager[Any]]
LENGTH = 24
"""Tokens in the segment that the causal model sees twice."""


def run(out: str, console: Console, working: Working) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: the directory for the trace files; made if it is not there.
        console: where to print.
        working: progress while something takes long.

    Returns:
        All that was measured, as plain data.

    Raises:
        TraceWriteError: the directory cannot be made, or a file in it not be written.
    """
    began = time.perf_counter()
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceWriteError(f"{out}: the directory cannot be made: {error.strerror or error}.") from error
    report: dict[str, Any] = {"encoder": None, "induction": None, "files": [], "pages": []}
    with torch.no_grad():
        report["encoder"] = _run_encoder(folder / "encoder.safetensors", console, working)
        report["induction"] = _run_induction(folder / "induction.safetensors", console, working)
    report["files"] = [part["file"] for part in (report["encoder"], report["induction"]) if "file" in part]
    report["pages"] = [report["induction"]["ablation"]["page"]]
    report["seconds"] = round(time.perf_counter() - began, 2)
    _print_next_steps(console, report)
    return report


def _run_encoder(file: Path, console: Console, working: Working) -> dict[str, Any]:
    """The sentence encoder, on a pair of sentences."""
    heading(console, "1  A trained sentence encoder: 6 layers of 12 heads")
    path = encoder.directory()
    if path is None:
        return _left_out(console, f"{encoder.PACKAGE} is not installed", encoder.INSTALL)
    try:
        with working("loading the encoder"):
            quiet_transformers()
            model, tokenizer = encoder.load(path)
    except ModuleNotFoundError as error:
        return _left_out(console, f"{error.name} is not installed", 'pip install "hookattn[demo]"')
    inputs = tokenizer(*encoder.PAIR, return_tensors="pt")
    with working("tracing"):
        before = model(**inputs)
        trace = api.trace(model, inputs, verify="full")
        after = model(**inputs)
        # The same weights in the kernel that hands its attention out, as a witness that shares no code with ours.
        reference, _ = encoder.load(path, "eager")
        expected = reference(**inputs, output_attentions=True).attentions
    tokens = (trace.tokens or [[]])[0]
    console.print(Text(f"“{encoder.PAIR[0]}” + “{encoder.PAIR[1]}”\n", "italic"))
    print_calls(console, trace.calls)
    print_verdict(console, trace)
    same = _outputs_are_identical(console, [before, trace.output, after])
    gap = max(float((a - b).abs().max()) for a, b in zip(trace.attentions, expected, strict=True))
    console.print(f"eager mode's own weights (output_attentions=True) differ by at most {gap:.1e}")
    found = heads.ranked_heads(trace, SameWord(across=True))
    back = _save_and_reload(console, trace, file)
    heading(console, f"The head that looks for the same word in the other sentence is {found[0].name}")
    console.print("mean attention on it, and that of the runners-up\n")
    print_ranking(console, found)
    middle = tokens.index("[SEP]")
    keys = [0, *range(middle + 1, len(tokens) - 1)]
    weights = back[found[0].path].weights[0, found[0].head]
    console.print(f"\nits weights, from {file}: queries down, keys across\n", soft_wrap=True)
    print_grid(console, weights[1:middle, keys], tokens[1:middle], [tokens[i] for i in keys])
    return {
        "file": str(file),
        "tokens": tokens,
        "faithful": trace.faithful,
        "identical_outputs": same,
        "eager_difference": gap,
        "largest_error": _largest_error(trace),
        "same_word": [h.to_json() for h in found[:4]],
    }


def _run_induction(file: Path, console: Console, working: Working) -> dict[str, Any]:
    """The causal model that copies."""
    heading(console, "2  A causal model that has learned to copy: 2 layers of 4 heads, plain PyTorch")
    model, ids = load_pretrained(), example_tokens(0, length=LENGTH)
    tokens = ["bos" if i == BOS else str(i) for i in ids[0].tolist()]
    with working("tracing"):
        before = model(ids)
        trace = api.trace(model, ids, verify="full", tokens=tokens)
        after = model(ids)
    guessed = before[0, LENGTH + 1 : -1].argmax(-1) == ids[0, LENGTH + 2 :]
    score = f"{int(guessed.sum())} of {len(guessed)}"
    seen = f"bos, {LENGTH} random tokens, the same again"
    console.print(Text(f"{seen}: {score} predictable tokens predicted\n", "italic"))
    print_calls(console, trace.calls)
    print_verdict(console, trace)
    same = _outputs_are_identical(console, [before, trace.output, after])
    before_it, copying = heads.ranked_heads(trace, PreviousToken()), heads.ranked_heads(trace, Induction())
    back = _save_and_reload(console, trace, file)
    heading(console, f"The previous-token head is {before_it[0].name}")
    console.print("mean attention on the token before\n")
    print_ranking(console, before_it)
    heading(console, f"The induction head is {copying[0].name}")
    console.print("mean attention, in the second copy, on what followed the token in the first\n")
    print_ranking(console, copying, 5)
    console.print(f"\nits weights, from {file}: second copy down, first copy across\n", soft_wrap=True)
    _print_copying(console, back[copying[0].path].weights[0, copying[0].head], tokens)
    with working("ablating"):
        ablation = ablate(model, ids, trace, before_it[0], copying[0])
    after_it, page = _print_ablation(console, ablation, back, file, tokens)
    return {
        "file": str(file),
        "tokens": tokens,
        "faithful": trace.faithful,
        "identical_outputs": same,
        "largest_error": _largest_error(trace),
        "predicted": int(guessed.sum()),
        "predictable": len(guessed),
        "previous_token": [h.to_json() for h in before_it],
        "induction": [h.to_json() for h in copying],
        "ablation": {**ablation.to_json(), "file": after_it, "page": page},
    }


def _print_copying(console: Console, weights: Tensor, tokens: Sequence[str]) -> None:
    """Where a head looks that copies: the beginnings of the second copy, down, and of the first, across."""
    rows, keys = slice(LENGTH + 1, LENGTH + 10), slice(0, 12)
    print_grid(console, weights[rows, keys], tokens[rows], tokens[keys])


def _print_ablation(
    console: Console, found: Ablation, clean: Trace, file: Path, tokens: Sequence[str]
) -> tuple[str, str]:
    """What is left without the previous-token head; the paths of the trace of that run and of the page."""
    heading(console, f"3  The same model without {found.ablated.name}: what is still copied?")
    ablated, reader = found.ablated, found.reader
    console.print(f'    edit.zero("output", layer={ablated.layer}, heads={ablated.head})\n', highlight=False)
    console.print(f"the copied tokens, and how much {reader.name} looks at what it has to copy\n")
    print_ablation(console, found)
    console.print(f"\nthe weights of {reader.name} then: where it finds nothing, it rests on bos\n")
    _print_copying(console, found.trace[reader.path].weights[0, reader.head], tokens)
    console.print()
    ablated_file = file.with_stem(f"{file.stem}-ablated")
    back = _save_and_reload(console, found.trace, ablated_file)
    page = save_comparison(clean, back, found, file.with_name("ablation.html"))
    console.print(f"saved {page}: both runs side by side, to be opened in a browser", soft_wrap=True)
    return str(ablated_file), page


def _left_out(console: Console, why: str, command: str) -> dict[str, Any]:
    console.print(Text(f"left out: {why}; install it with\n\n    {command}", "yellow"))
    return {"left_out": why, "install": command}


def _outputs_are_identical(console: Console, outputs: Sequence[Any]) -> bool:
    """Whether the model returned the same bits before, during and after the trace."""
    flat = [_tensors(output) for output in outputs]
    same = all(len(x) == len(flat[0]) > 0 and all(map(torch.equal, x, flat[0])) for x in flat)
    numbers = sum(x.numel() for x in flat[0])
    console.print(
        Text(
            f"outputs before, during and after the trace: {'' if same else 'NOT '}bit-identical ({numbers} numbers)",
            "green" if same else "bold red",
        )
    )
    return same


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [x for x in (output.values() if isinstance(output, dict) else output) if isinstance(x, Tensor)]


def _save_and_reload(console: Console, trace: Trace, file: Path) -> Trace:
    """Write a trace, open it again, and make sure that it says the same."""
    trace.save(file)
    back = load(file)
    for a, b in zip(trace, back, strict=True):
        if not torch.equal(a.weights, b.weights):
            raise TraceWriteError(f"{file}: {a.site.label} did not come back as it was written.")
    console.print(f"saved {file} ({decimal_size(os.path.getsize(file))}), and read back the same bits", soft_wrap=True)
    return back


def _largest_error(trace: Trace) -> float:
    return max(call.certificate.max_error for call in trace)


def _print_next_steps(console: Console, report: dict[str, Any]) -> None:
    heading(console, f"Done in {report['seconds']:.1f} s. What to type next:")
    for file in report["files"]:
        console.print(f"    hookattn info {file}", soft_wrap=True)
    console.print(f"    hookattn heads {report['files'][-1]}", soft_wrap=True)
    console.print(f"    hookattn view {report['files'][-1]} --html heads.html", soft_wrap=True)
    console.print(f"    hookattn verify {report['files'][-1]}", soft_wrap=True)
    console.print(f"    xdg-open {report['pages'][-1]}", soft_wrap=True)
    console.print('    hookattn trace MODEL --text "your own sentence" -o out/mine.safetensors')


__all__ = ["LENGTH", "run"]
