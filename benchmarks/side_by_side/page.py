"""docs/comparison-edits.md, of the code of the experiments and of what running them gave."""

from __future__ import annotations

from importlib.metadata import version

from hookattn.version import __version__

from .experiments import LIBRARIES, OURS, TASKS, TOLERANCE, Library, Task, code

_INTRODUCTION = """# Ten experiments on heads, in three libraries

The same experiments with hookattn, TransformerLens (its bridge to models of transformers) and nnsight, on the same
weights: a small GPT-2 of transformers, drawn at random, 3 layers of 4 heads, 2 sequences of 8 tokens, float32. hookattn
has the model as transformers loads it, in sdpa; the others have it in eager, if nothing else is said. `model` is what
each library makes of it; `ids` and `other` are token ids, 2 by 8; `LAYERS`, `HEADS`, `WIDTH`, `PROMPT` and `NEW` are 3,
4, 8, 8 and 5.

`make compare` installs the other libraries into an environment of their own, runs `benchmarks/side_by_side/`, holds
the results against each other, and writes this page of the code that ran. A test holds the code on the page to that in
the modules. What else each edit can do: [edits.md](edits.md).
"""


def page(measured: dict[str, dict[str, float]], off_with_cache: float) -> str:
    """The page.

    Args:
        measured: library → experiment → how far its result is from hookattn's, at the most.
        off_with_cache: how far the plain generation of a bridge with its cache is from the model's.
    """
    peers = [library for library in LIBRARIES if library is not OURS]
    parts = [_INTRODUCTION, f"Run with {versions()}.\n", _summary(peers, measured)]
    for place, task in enumerate(TASKS, 1):
        parts.append(f"## {place}. {task.title}\n\nCompared: {task.result}.\n")
        parts += [_section(library, task, off_with_cache) for library in LIBRARIES]
    return "\n".join(parts)


def versions() -> str:
    """Of what ran."""
    packages = ("torch", "transformers", "transformer-lens", "nnsight")
    found = [f"hookattn {__version__}", *(f"{name} {version(name).partition('+')[0]}" for name in packages)]
    return ", ".join(found)


def _summary(peers: list[Library], measured: dict[str, dict[str, float]]) -> str:
    lines = [
        "The largest difference between a result and hookattn's, and lines of code; *by hand*: right, with something "
        "worked out by whoever writes it.\n",
        "| | " + " | ".join(library.name for library in LIBRARIES) + " |",
        "|---|" + "---|" * len(LIBRARIES),
    ]
    for place, task in enumerate(TASKS, 1):
        cells = [f"{_lines(OURS, task)} lines"]
        for library in peers:
            gap = measured[library.name].get(task.name)
            cells.append(
                "cannot" if gap is None else f"{_gap(gap)}{_how(library, task)}, {_lines(library, task)} lines"
            )
        lines.append(f"| {place}. {task.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _gap(gap: float) -> str:
    if gap > TOLERANCE:
        raise ValueError(f"results are {gap:.1e} apart, which is more than {TOLERANCE:.0e}")
    return f"{gap:.0e}" if gap else "0"


def _how(library: Library, task: Task) -> str:
    return f", {task.how[library.name]}" if library.name in task.how else ""


def _lines(library: Library, task: Task) -> int:
    return len([line for line in (code(library, task) or "").splitlines() if line.strip()])


def _section(library: Library, task: Task, off_with_cache: float) -> str:
    written, note = code(library, task), task.notes.get(library.name, "").format(lens_with_cache=off_with_cache)
    block = "" if written is None else f"\n```python\n{written}\n```\n"
    return f"**{library.name}**{'. ' + note if note else ''}\n{block}"
