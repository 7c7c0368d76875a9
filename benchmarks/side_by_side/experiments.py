"""The ten experiments: what each asks, who does it how, and how far the results are apart."""

from __future__ import annotations

import ast
import importlib
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import given

Experiment = Callable[[Any, Tensor, Tensor], Tensor]
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Library:
    """Whose code is run.

    Attributes:
        name: as the page writes it.
        package: what is imported; its distribution has the same name, with dashes.
        module: the experiments' module in this package.
        load: the model as the library takes it.
    """

    name: str
    package: str
    module: str
    load: Callable[[], Any]

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return find_spec(self.package) is not None

    def experiments(self) -> ModuleType:
        """The module with its experiments."""
        return importlib.import_module(f"{__package__}.{self.module}")


OURS = Library("hookattn", "hookattn", "with_hookattn", lambda: given.gpt2("sdpa"))
LENS = Library("TransformerLens", "transformer_lens", "with_transformer_lens", given.bridge)
NNSIGHT = Library("nnsight", "nnsight", "with_nnsight", given.wrapped)
LIBRARIES = (OURS, LENS, NNSIGHT)
FUSED = "fused"
"""The experiment for which nnsight has the model in sdpa, too."""


@dataclass(frozen=True)
class Task:
    """One experiment.

    Attributes:
        name: of its function in each module.
        title: what is done.
        result: what is compared.
        notes: library → what a reader has to know of its code.
        how: library → what its result is bought with.
    """

    name: str
    title: str
    result: str = "logits"
    notes: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)


_BY_HAND = {"nnsight": "by hand"}
_SLICE = (
    "There is no axis of heads where the output can be written to: head 2 of width 8 is columns 16 to 24 of what the "
    "last projection reads, in this model."
)
_FUSED = {
    "hookattn": "The same line as in the first experiment: on all of this page it runs the model in sdpa.",
    "TransformerLens": "Cannot: the bridge computes attention in its own math, and the kernel of the model never runs.",
    "nnsight": "Written where the values are mixed already: a head without a pattern returns 0. There is no pattern in "
    "sdpa that could be patched, frozen or renormalised; for the experiments above that do so, it has the model in "
    "eager.",
}
_GENERATION = {
    "TransformerLens": "Without the cache: the whole sequence is run again for each token. With it, and transformers "
    "5.24, which calls the cache by another name than the bridge does, a plain generation of the bridge without any "
    "hook is not the model's: its logits are off by up to {lens_with_cache:.1f} from the second new token on. With "
    "transformers 5.9 it is (3e-6).",
    "nnsight": "Every step is walked through, the first one too: `tracer.iter[1:]` counts the calls of an operation "
    "inside a function from the first one that was asked for.",
}
TASKS = (
    Task("zero_pattern", "A head's pattern is set to zero"),
    Task("mean_ablation", "A head's output becomes its mean over positions", "logits", {"nnsight": _SLICE}, _BY_HAND),
    Task("knockout", "The edge from the last query to key 2 is cut, and the row renormalises"),
    Task("patch_pattern", "A head gets its pattern of another input"),
    Task("freeze_patterns", "All patterns are those of a clean run, while the model reads something else"),
    Task("steer", "A vector is added to a head's output at the last position", "logits", {"nnsight": _SLICE}, _BY_HAND),
    Task(
        "gates",
        "A gate for each head, and its gradient: head importance (Michel et al. 2019)",
        "the gradient of the gates",
        {"nnsight": _SLICE},
        _BY_HAND,
    ),
    Task(
        "weight_gradients",
        "The gradient of the loss in every weight",
        "the gradient of all weights",
        {"hookattn": "The weights whose gradient this is were never formed: the kernel is fused."},
    ),
    Task(
        FUSED,
        "A head's pattern is set to zero in the fused model (sdpa), which stays fused",
        "logits",
        _FUSED,
        _BY_HAND,
    ),
    Task(
        "generation",
        "In a generation with a cache, no new token sees token 2 of the prompt",
        "the logits of each new token",
        _GENERATION,
        {"TransformerLens": "without the cache", **_BY_HAND},
    ),
)


def code(library: Library, task: Task) -> str | None:
    """What a library's users write: the body of its function, read from the file, as a library may be missing; None:
    it has none."""
    text = (Path(__file__).parent / f"{library.module}.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == task.name:
            lines = text.splitlines()[node.body[0].lineno - 1 : node.end_lineno]
            return textwrap.dedent("\n".join(lines)).strip()
    return None


def run(library: Library) -> dict[str, Tensor]:
    """The result of each experiment that a library can do."""
    model, found = library.load(), {}
    module = library.experiments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in TASKS:
            if (function := getattr(module, task.name, None)) is not None:
                there = given.wrapped("sdpa") if library is NNSIGHT and task.name == FUSED else model
                found[task.name] = function(there, given.tokens(1), given.tokens(2)).detach()
    return found


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """How far the results of a library are from others, at the most; infinite where their shapes differ."""
    return {
        name: float((x - ours[name]).abs().max()) if x.shape == ours[name].shape else float("inf")
        for name, x in theirs.items()
    }


def lens_with_cache() -> float:
    """How far a plain generation of the bridge, with its cache, is from the model's own."""
    ids, options = given.tokens(1), {"max_new_tokens": given.NEW, "do_sample": False, "output_logits": True}
    theirs = given.bridge().generate(ids, use_past_kv_cache=True, stop_at_eos=False, verbose=False, **options)
    model: Any = given.gpt2("sdpa")
    own = model.generate(ids, return_dict_in_generate=True, **options)
    return float((torch.stack(theirs.logits) - torch.stack(own.logits)).abs().max())
