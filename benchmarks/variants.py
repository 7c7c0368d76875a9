"""What hookattn does with a forward, from the least to the most."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hookattn
from hookattn.taps.active import paused

from .clock import Variant
from .models import sibling
from .peers import peers

BASE = "untraced, sdpa"
EAGER = "untraced, eager"
IDLE = "hooks installed, idle"
TAP = "tap only, in a block"
TAP_ONCE = "tap only"
QKV_BLOCK = "q k v, in a block"
QKV_OFF = "q k v, no certificate"
QKV = "q k v, certificate"
WEIGHTS = "weights"
FULL = "everything"
HOST = "everything, to the host"
DISK = "everything, to disk"
AFTER = "untraced, after all of these"
OUTPUT_ATTENTIONS = "eager, output_attentions=True (weights)"
_QKV = ("q", "k", "v")


def variants(model: nn.Module, x: Tensor) -> list[Variant]:
    """Every row of a case. The first runs a model of the same weights that is never traced; the last the traced one.

    *Idle* is a forward inside an open ``tracing()`` block whose hooks and patches are all in place and find, each, that
    nothing is traced. *Tap only* sees every kernel's arguments and makes a call of them that keeps nothing (``sinks``,
    which these models have none of). *In a block* leaves out what it costs to begin and end a trace.
    """
    fresh = sibling(model)
    rows = [Variant(BASE, lambda: fresh(x))]
    eager = sibling(model, "eager") if hasattr(model, "set_attn_implementation") else None
    if eager is not None:
        rows.append(Variant(EAGER, lambda: eager(x)))
    rows += [
        Variant(IDLE, lambda: model(x), lambda: _idle(model)),
        Variant(TAP, lambda: model(x), lambda: _block(model, x, capture="sinks", verify="off"), kept=0),
        Variant(QKV_BLOCK, lambda: model(x), lambda: _block(model, x, capture=_QKV)),
        _traced(TAP_ONCE, model, x, capture="sinks", verify="off"),
        _traced(QKV_OFF, model, x, capture=_QKV, verify="off"),
        _traced(QKV, model, x, capture=_QKV),
        _traced(WEIGHTS, model, x, capture="weights"),
        _traced(FULL, model, x),
    ]
    if x.is_cuda:
        rows.append(_traced(HOST, model, x, device="cpu"))
    rows += [_streamed(model, x), Variant(AFTER, lambda: model(x))]
    if eager is not None:
        rows += peers(eager, x)
    return rows


def _traced(name: str, model: nn.Module, x: Tensor, **options: Any) -> Variant:
    kept = hookattn.plan(model, x, **{k: v for k, v in options.items() if k != "verify"}).total
    there = x.is_cuda and options.get("device") == "cpu"
    return Variant(name, lambda: hookattn.trace(model, x, **options), kept=0 if there else kept, host=there * kept)


def _streamed(model: nn.Module, x: Tensor) -> Variant:
    folder = tempfile.TemporaryDirectory()  # goes with the variant
    path = Path(folder.name, "trace.safetensors")

    def gone() -> None:
        assert folder.name
        path.unlink(missing_ok=True)

    return Variant(
        DISK,
        lambda: hookattn.trace(model, x, to=os.fspath(path)),
        after=gone,
        kept=0,
        disk=hookattn.plan(model, x).total,
    )


@contextmanager
def _block(model: nn.Module, x: Tensor, **options: Any) -> Iterator[None]:
    with hookattn.tracing(model, **options):
        model(x)  # the first forward of a block looks things up
        if x.is_cuda:
            torch.cuda.synchronize()
        yield


@contextmanager
def _idle(model: nn.Module) -> Iterator[None]:
    with warnings.catch_warnings(), suppress(hookattn.NoAttentionError):  # what a block says that saw nothing
        warnings.simplefilter("ignore", hookattn.SkippedWarning)
        with hookattn.tracing(model, capture="sinks", verify="off"), paused():
            yield
