"""How many bytes a trace holds, in memory and in its file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import hookattn
from hookattn import Trace

from .memory import growth

_KEPT = ("q", "k", "v", "output")


def held_bytes(model: nn.Module, x: Tensor) -> dict[str, float]:
    """``held ÷ q k v output``: what the process takes more while it holds a default trace ÷ bytes of these fields."""

    def made() -> Trace:
        trace = hookattn.trace(model, x)
        trace.output = None
        return trace

    with torch.no_grad():
        model(x)  # what the model's first forward leaves is no trace's
        trace, more = growth(made)
    if more is None:
        return {}
    fields = sum(tensor.nbytes for call in trace for name in _KEPT if (tensor := call.get(name)) is not None)
    return {"held by a default trace, bytes": more, "held ÷ q k v output": more / fields}


def long_generation(model: nn.Module, prompt: Tensor, tokens: int = 300) -> dict[str, float]:
    """``generated, bytes of the file`` and ``generated, bytes in memory`` of a default trace of a long generation."""

    def generate(new: int) -> None:
        model.generate(  # type: ignore[operator]
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True
        )

    def made() -> Trace:
        with hookattn.tracing(model) as trace:
            generate(tokens)
        trace.output = None
        return trace

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        generate(2)
        trace, more = growth(made)
        path = Path(folder, "trace.safetensors")
        trace.save(path)
        found = {"generated, bytes of the file": float(os.path.getsize(path))}
    if more is not None:
        found["generated, bytes in memory"] = more
    return found
