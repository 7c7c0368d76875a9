"""Taps: each knows one attention kernel and nothing of models. This list is their registry."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from typing import Any

from ..torch_internals.code_patching import Patch
from . import compiled, flash_attn, flex, hf_interface, nn_attention, script, sdpa, varlen, xformers
from .base import ActiveTrace, Change, Tap

TAPS: tuple[Tap, ...] = (
    compiled.TAP,
    flash_attn.TAP,
    flex.TAP,
    hf_interface.TAP,
    nn_attention.TAP,
    script.TAP,
    sdpa.TAP,
    varlen.TAP,
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
def kernels() -> dict[str, Any]:
    """Torch function name -> handler, of every tap."""
    return {name: handler for tap in TAPS for name, handler in (tap.kernels or {}).items()}


_COVERS = tuple(tap.covers for tap in TAPS if tap.covers is not None)


def covered(modules: Collection[Any]) -> set[int]:
    """By identity, the modules of which some tap sees every attention call without the function mode."""
    return set().union(*(covers(modules) for covers in _COVERS))


__all__ = ["TAPS", "ActiveTrace", "Change", "Tap", "covered", "kernels", "patches"]
