"""What statistics cost where their matrix would be far too large: beside the fused forward of the same attention."""

from __future__ import annotations

import torch

import hookattn

from .clock import Clock, clock_of
from .long_context import Attention, everything


def statistics_cost(
    device: torch.device,
    *,
    tokens: int = 131_072,
    heads: int = 32,
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 45.0,
    clock: Clock | None = None,
) -> dict[str, float]:
    """(A trace of all statistics but the top keys − the forward) ÷ the forward, causal; the least of a few rounds.

    Args:
        seconds: about how long it may take; one round is always measured.
    """
    clock = clock or clock_of(device)
    model, wanted = Attention(), everything(tokens)
    q, k, v = (torch.randn(1, heads, tokens, width, device=device, dtype=dtype) for _ in "qkv")
    small = tuple(x[:, :, : max(tokens // 32, 1)] for x in (q, k, v))
    with torch.no_grad():
        for note in hookattn.trace(model, small, capture=wanted)[0].notes:  # builds, or looks up, what is needed once
            print(f"statistics: {note}")  # so that no fallback is taken for the kernels
        model(q, k, v)
        ratios: list[float] = []
        spent = forward = 0.0
        while not ratios or spent < seconds / 2:
            forward = clock(lambda: model(q, k, v))
            traced = clock(lambda: hookattn.trace(model, (q, k, v), capture=wanted))
            ratios.append((traced - forward) / forward)
            spent += forward + traced
    return {"statistics, seconds of the forward": forward, "statistics ÷ forward": min(ratios)}
