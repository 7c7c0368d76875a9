"""Taps: each knows one attention kernel and nothing of models. This list is their registry."""

from __future__ import annotations

from typing import Any

from . import compiled, flash, flex, interface, mha, script, sdpa, varlen, xformers
from .base import Recorder, Tap

TAPS: tuple[Tap, ...] = (
    compiled.TAP,
    flash.TAP,
    flex.TAP,
    interface.TAP,
    mha.TAP,
    script.TAP,
    sdpa.TAP,
    varlen.TAP,
    xformers.TAP,
)


def kernels() -> dict[str, Any]:
    """Torch function name -> handler, of every tap."""
    return {name: handler for tap in TAPS for name, handler in (tap.kernels or {}).items()}


def covered(module: Any) -> bool:
    """Whether some tap sees every attention call of a module without the function mode."""
    return any(tap.covers is not None and tap.covers(module) for tap in TAPS)


__all__ = ["TAPS", "Recorder", "Tap", "covered", "kernels"]
