"""Scenes that a model goes through while it is traced, played with recipes and without: nothing may be told apart.

A scene is a generator: it is given a model and ``trace``, and gives each trace that it makes. It is played four times,
each time with a model of its own, built of the same seed: untraced, followed without recipes, with recipes, and with
recipes and following beside them (:mod:`tests.beside`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.recording import session
from hookattn.taps.eager.recogniser import Recogniser
from hookattn.taps.eager.replay import Run
from tests.beside import checked_replays
from tests.reference import FIELDS, assert_close, masked_softmax, repeat_heads, same_bits

Scene = Callable[[Any, Callable[..., Any]], Iterator[Any]]
# What is told of a call beside its tensors.
_TOLD = (
    *("step", "index", "entry", "tap", "dtype", "softcap", "causal", "window", "dropout", "queries", "own_scores"),
    *("mixed", "notes", "score", "normalizer", "basis"),
)


class Counts(NamedTuple):
    """What became of the operations of one trace.

    Attributes:
        recognised: how many were, with following beside.
        followed: how many were not.
        paid: how many were followed without anything beside, those that had been recognised before included.
    """

    recognised: int
    followed: int
    paid: int


@contextmanager
def _paid() -> Iterator[Counter[str]]:
    """In the block it is counted what is followed."""
    count = Counter[str]()
    watch, catch_up = Recogniser.watch, Recogniser._catch_up

    def watched(self: Recogniser, *args: Any) -> Any:
        count["paid"] += 1
        return watch(self, *args)

    def caught_up(self: Recogniser, run: Run) -> Any:
        count["paid"] += len(run.path)
        return catch_up(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recogniser, "watch", watched)
        patch.setattr(Recogniser, "_catch_up", caught_up)
        yield count


@contextmanager
def without_recipes() -> Iterator[None]:
    """In the block nothing is learned and nothing recognised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "recipes_of", lambda model: None)
        yield


def traced(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """A trace in which random numbers begin anew, and warnings are nothing."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hookattn.trace(model, inputs, **options)


def _untraced(model: nn.Module, inputs: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    args = (inputs,) if isinstance(inputs, Tensor) else inputs
    out = model(**args) if isinstance(args, Mapping) else model(*args)
    return SimpleNamespace(output=out)


class Seen(NamedTuple):
    """All that one trace says."""

    output: Any
    told: list[dict[str, Any]]
    tensors: list[dict[str, Tensor]]
    skipped: list[Any]


def seen(trace: Any) -> Seen:
    """All that a trace says now."""
    told, tensors = list[dict[str, Any]](), list[dict[str, Tensor]]()
    for call in trace:
        told.append({"path": call.site.path, "kind": call.site.kind} | {name: getattr(call, name) for name in _TOLD})
        told[-1]["scale"] = call.scale if not isinstance(call.scale, Tensor) else "a tensor"
        told[-1]["faithful"] = call.certificate.faithful
        given = {name: call.get(name) for name in (*FIELDS, "applied") if call.has(name)}
        found = {name: x.detach().clone() for name, x in given.items() if x is not None}
        if isinstance(call.scale, Tensor):
            found["scale"] = call.scale.detach().clone()
        tensors.append(found)
    skipped = sorted((one.path, one.reason, one.steps) for one in trace.skipped)
    return Seen(getattr(trace, "output", None), told, tensors, skipped)


def explicit(call: Mapping[str, Tensor], scale: float | Tensor | None, tol: float) -> None:
    """A call of a softmax over q·k is what float64 makes of its q, k, v, bias and mask."""
    heads = call["q"].shape[1]
    k, v = (repeat_heads(call[name].double(), heads) for name in "kv")
    scores = (call["q"].double().unsqueeze(3) * k.unsqueeze(2)).sum(-1) * (1.0 if scale is None else scale)
    scores = scores + (call["bias"].double() if "bias" in call else 0.0)
    weights = masked_softmax(scores, call["mask"].expand(scores.shape), None)
    rows = call["mask"].expand(scores.shape).any(-1)
    assert_close(call["weights"][rows], weights[rows], tol, "weights")
    if "applied" not in call:
        assert_close(call["output"][rows], (weights @ v)[rows], tol, "output")


def alike(mine: Seen, theirs: Seen, what: str) -> None:
    """Two traces say the same, bit for bit."""
    assert same_bits(mine.output, theirs.output), f"{what}: another output of the model"
    assert mine.skipped == theirs.skipped, f"{what}: skipped {mine.skipped} in place of {theirs.skipped}"
    assert mine.told == theirs.told, f"{what}: {_different(mine.told, theirs.told)}"
    for i, (one, other) in enumerate(zip(mine.tensors, theirs.tensors, strict=True)):
        assert one.keys() == other.keys(), f"{what}: fields of call {i}"
        for name in one:
            assert same_bits(one[name], other[name]), f"{what}: {name} of call {i}"


def _different(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    if len(mine) != len(theirs):
        return f"{len(mine)} calls in place of {len(theirs)}"
    first = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
    return f"{ {k: (first[0][k], first[1].get(k)) for k in first[0] if first[0][k] != first[1].get(k)} }"


def play(build: Callable[[], nn.Module], scene: Scene, *, math: bool = True, calls: int | None = None) -> list[Counts]:
    """Play a scene in every way, and compare.

    Args:
        build: makes the model.
        scene: what happens to it.
        math: whether each softmax over q·k is compared with float64 as well.
        calls: how many calls each trace has; None: any number but none.

    Returns:
        For each trace of the scene what became of the operations.
    """

    def model() -> nn.Module:
        torch.manual_seed(0)
        return build()

    plain = [trace.output for trace in scene(model(), _untraced)]
    with without_recipes():
        followed = [seen(trace) for trace in scene(model(), traced)]
    for i, one in enumerate(followed):
        assert same_bits(one.output, plain[i]), f"trace {i}: tracing changes the output"
        assert len(one.tensors) == calls if calls is not None else one.tensors, f"trace {i}: {len(one.tensors)} calls"
        for told, tensors in zip(one.told, one.tensors, strict=True):
            dot = told["score"] == "dot" and told["normalizer"] == "softmax" and not told["own_scores"]
            if math and dot and not told["softcap"] and "sinks" not in tensors and not told["mixed"]:
                tol = 1e-9 if tensors["q"].dtype is torch.float64 else 1e-5
                tol = tol if tensors["q"].dtype in (torch.float32, torch.float64) else 2e-2
                explicit(tensors, tensors.get("scale", told["scale"]), tol)
    counts, paid, kept = list[Counts](), list[int](), list[Any]()
    with _paid() as count:
        for i, trace in enumerate(scene(model(), traced)):
            paid.append(count.pop("paid", 0))
            alike(seen(trace), followed[i], f"trace {i} with recipes")
            del trace  # memory that is free again may be that of another tensor
    with checked_replays() as count:
        for i, trace in enumerate(scene(model(), traced)):
            counts.append(Counts(count["recognised"], count["followed"], paid[i]))
            count.clear()
            alike(seen(trace), followed[i], f"trace {i} beside following")
            kept.append(trace)
    for i, trace in enumerate(kept):
        alike(seen(trace), followed[i], f"trace {i}, read at the end")
    return counts


def again(inputs: Any, times: int = 3, **options: Any) -> Scene:
    """The scene of one model that is traced several times."""

    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for _ in range(times):
            yield trace(model, inputs, **options)

    return scene
