"""What every test of a library does: build it with random weights that matter, trace it, check what is promised."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import hookattn
from hookattn.testing import check_clean, check_trace
from hookattn.testing.case import same, tensors
from hookattn.testing.clean import state_of


def seeded(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    """Normal numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def ids(batch: int = 2, length: int = 7, vocabulary: int = 30, low: int = 3, seed: int = 0) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(low, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def drawn(model: nn.Module, gain: float = 1.5, seed: int = 0) -> nn.Module:
    """The model in eval mode, every parameter drawn anew: as libraries start, each row of attention is nearly flat.

    What starts at zero (gates, the last projection of a branch) is drawn too, so that no path is switched off.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not p.is_floating_point() or not p.numel():
                continue
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float32)
            if p.dim() > 1:
                p.copy_(noise * gain / p[0].numel() ** 0.5)
            elif "bias" in name:
                p.copy_(0.2 * noise)
            else:
                p.copy_(1 + 0.2 * noise)
    return model.eval()


def examine(
    model: nn.Module,
    inputs: Any,
    *,
    calls: int,
    kinds: Mapping[str, int] | None = None,
    skipped: int = 0,
    sharp: float = 1.5,
) -> hookattn.Trace:
    """Run a model with and without a trace, and check all that can be checked without knowing it.

    Args:
        model: the model.
        inputs: as :func:`hookattn.trace` takes them.
        calls: how many calls there have to be.
        kinds: how many of each kind; by default all are self-attention.
        skipped: how many sites have to be listed as not read.
        sharp: the mean of the largest weight of a row, as a multiple of what a uniform row has, that has to be passed;
            a record of near uniform attention would prove nothing.
    """
    plain = run(model, inputs)
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hookattn.UnfaithfulWarning)
        warnings.simplefilter("ignore" if skipped else "error", hookattn.SkippedWarning)
        torch.manual_seed(1)
        trace = hookattn.trace(model, inputs, verify="full")
    assert before == state_of(model), f"changed by the trace: {before ^ state_of(model)}"
    check_clean(model)
    pairs = list(zip(tensors(plain), tensors(trace.output), strict=True))
    assert pairs, "the model returns no tensor"
    assert all(same(a, b) for a, b in pairs), "the output is not bit-identical when traced"
    assert len(trace) == calls, [call.site.path for call in trace]
    assert Counter(call.site.kind for call in trace) == Counter(kinds or {"self": calls})
    assert [c for c in trace if c.certificate.status != "faithful"] == []
    assert len(trace.skipped) == skipped, trace.skipped
    check_trace(trace)
    peaks = [(c.weights.double().amax(-1) * c.mask.expand_as(c.weights).sum(-1)).mean().item() for c in trace]
    assert min(peaks) > sharp, f"near uniform attention proves nothing: {peaks}"
    return trace


def run(model: nn.Module, inputs: Any) -> Any:
    """The untraced forward, from the same state of the random generator."""
    torch.manual_seed(1)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def gap(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in float64."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return (actual.detach().double() - expected.detach().double()).abs().max().item()


@contextlib.contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """While a library is imported: something to import for torchvision, where there is none.

    timm, open_clip and vit-pytorch import its transforms of pictures at the top of modules whose models never call
    them, and torchvision has to match torch's build to the letter. Where it is installed, nothing happens here.
    Otherwise any name can be imported from it, as a class that raises when it is called; all of it is gone after the
    block, so that other libraries go on finding no torchvision. It stands in for names alone: no code of it ever runs.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    with contextlib.suppress(ImportError):  # it asks once, and remembers the answer
        from transformers.utils import is_torchvision_available

        is_torchvision_available()
    finder = _StandIn()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]


class _StandIn:
    """A finder and loader of empty packages in which every name is a class."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]

        def absent(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Names(name, (nn.Module,), {"__init__": _refuse})

        module.__getattr__ = absent  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _Names(type):
    """Attributes of a stand-in class (members of an enumeration, say) are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


def _refuse(self: Any, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"torchvision is not installed; {type(self).__name__} is a stand-in that cannot run.")
