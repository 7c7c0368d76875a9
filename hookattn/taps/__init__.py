"""Taps: each knows one attention kernel and nothing of models. :data:`TAPS` is their registry.

===============  =====================================================================================================
checkpointing    ``torch.utils.checkpoint``: the second run of a part of a model is given the changes of its first
compiled         ``torch.compile``: runs what was compiled as plain Python where a trace watches
flash_attn       flash-attn 2, 3 and 4, batched, packed and with a cache
flex             ``torch.nn.attention.flex_attention``
hf_interface     the attention interface of transformers, whatever runs in it
nn_attention     ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, fast path included (native_layers)
script           code of ``torch.jit``: what it was made from is followed beside it, or it is one operation
sdpa             ``scaled_dot_product_attention``, and the kernels that it chooses from
varlen           ``torch.nn.attention.varlen``
vllm             vLLM's kernels: that of its CPU backend, and the one in Triton
vllm_engine      vLLM's layers and batches: which layer attends, whose requests, and what no kernel has said
xformers         ``memory_efficient_attention``
foreign          operators of other libraries that attend by their names: said not to be read
eager/           attention written out by hand: the function mode that runs the other taps' handlers, too
===============  =====================================================================================================

A new kernel gets a file with a ``TAP``, and a line in :data:`TAPS`. What the file holds depends on how torch sees it:

- A function that dispatches to function modes: ``Tap(name, kernels={"its_name": handle})``, as in sdpa.py. ``handle``
  runs it, makes a KernelCall of its arguments and result, and gives that to ``watch.recorder.record``.
- A Python function of another package that dispatches to nothing: a reader ``(arguments by name, output) ->
  KernelCall`` and the arguments it understands, as in xformers.py. packed_kernels.py does the rest: it finds, exchanges
  and runs the function.
- Anything else: ``patches`` of its own, as in flex.py, which ask :func:`~hookattn.taps.active.current` for the trace.

What cannot be read is listed by ``skip`` with its reason, never guessed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from typing import Any

from ..torch_internals.code_patching import Patch
from . import (
    checkpointing,
    compiled,
    flash_attn,
    flex,
    hf_interface,
    nn_attention,
    script,
    sdpa,
    varlen,
    vllm,
    vllm_engine,
    xformers,
)
from .base import ActiveTrace, Change, Tap

TAPS: tuple[Tap, ...] = (
    checkpointing.TAP,
    compiled.TAP,
    flash_attn.TAP,
    flex.TAP,
    hf_interface.TAP,
    nn_attention.TAP,
    script.TAP,
    sdpa.TAP,
    varlen.TAP,
    vllm.TAP,
    vllm_engine.TAP,
    xformers.TAP,
)


_found: tuple[int, Any, tuple[Patch, ...]] = (0, None, ())


def patches() -> tuple[Patch, ...]:
    """What has to be exchanged while a trace runs; looked for again only after another module was loaded."""
    global _found
    loaded = sys.modules
    count, newest = len(loaded), loaded[next(reversed(loaded))]
    if (count, newest) != _found[:2]:
        _found = count, newest, tuple(patch for tap in TAPS if tap.patches is not None for patch in tap.patches())
    return _found[2]


@functools.cache
def mode_patches() -> tuple[Patch, ...]:
    """What has to be exchanged, too, while a trace has its function mode open: all of it of torch."""
    return tuple(patch for tap in TAPS if tap.mode_patches is not None for patch in tap.mode_patches())


@functools.cache
def kernels() -> dict[str, Any]:
    """Torch function name -> handler, of every tap."""
    return {name: handler for tap in TAPS for name, handler in (tap.kernels or {}).items()}


_COVERS = tuple(tap.covers for tap in TAPS if tap.covers is not None)


def covered(modules: Collection[Any]) -> set[int]:
    """By identity, the modules of which some tap sees every attention call without the function mode."""
    return set().union(*(covers(modules) for covers in _COVERS))


__all__ = ["TAPS", "ActiveTrace", "Change", "Tap", "covered", "kernels", "mode_patches", "patches"]
