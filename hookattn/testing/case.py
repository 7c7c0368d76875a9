"""One adapter, a model of it, inputs, and how the checks run them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..api import tracing
from ..errors import SkippedWarning, UnfaithfulWarning
from ..models.adapter import Adapter
from ..models.discovery import WatchPlan, make_watch_plan
from ..models.registry import using
from ..traces import Trace


class NotApplicable(Exception):
    """A check has nothing to check in this case; the message says why."""


@dataclass
class Case:
    """What a run of the checks is given; the attributes are the arguments of :func:`hookattn.testing.check_adapter`."""

    adapter: Adapter
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[], Any]
    beside: tuple[Adapter, ...] = ()
    complete: bool = True
    every_layer: bool = True
    formed: tuple[str, ...] = ("q", "k", "v", "output")
    weights: Callable[[nn.Module, Any], Mapping[str, Tensor]] | None = None
    padding: bool = True
    skipped: tuple[str, ...] = ()
    more_inputs: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    def model(self, training: bool = False) -> nn.Module:
        """A model; the same one every time."""
        torch.manual_seed(0)
        return self.make_model().train(training)

    def plan(self) -> tuple[nn.Module, WatchPlan]:
        """A model, and what the adapters say about it."""
        model = self.model()
        with using(self.adapter, *self.beside):
            return model, make_watch_plan(model)

    def run(self, model: nn.Module, inputs: Any = None) -> Any:
        """What the model returns."""
        given = self.make_inputs() if inputs is None else inputs
        torch.manual_seed(1)
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)

    def trace(self, model: nn.Module, inputs: Any = None, generic: bool = False) -> Trace:
        """The same under a trace, everything verified."""

        def once() -> Any:
            return self.run(model, inputs)

        return self.traced(model, once, generic)

    def traced(self, model: nn.Module, run: Callable[[], Any], generic: bool = False) -> Trace:
        """Any run under a trace; its result is ``trace.output``."""
        with using(*(() if generic else (self.adapter, *self.beside))), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfaithfulWarning)
            warnings.simplefilter("ignore", SkippedWarning)
            with tracing(model, verify="full") as made:
                made.output = run()
            return made


def same(a: Any, b: Any) -> bool:
    """Bit for bit, NaN included."""
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def tensors(x: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in what a model returns, caches included."""
    seen = set() if seen is None else seen
    if id(x) in seen:
        return
    seen.add(id(x))
    inner: Any = ()
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        inner = x.values()
    elif isinstance(x, (list, tuple)):
        inner = x
    elif is_dataclass(x) and not isinstance(x, type):
        inner = [getattr(x, f.name) for f in fields(x)]
    elif hasattr(x, "__dict__") and not isinstance(x, (type, nn.Module)) and not callable(x):
        inner = vars(x).values()
    for one in inner:
        yield from tensors(one, seen)
