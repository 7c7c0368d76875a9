"""How fast scores and weights are written, beside a copy on the same device."""

from __future__ import annotations

import torch

from hookattn.attention.derivation import derive
from hookattn.attention.masks import Diagonal, causal_mask

from .clock import Clock, clock_of, median_of


def derivation(
    device: torch.device,
    *,
    heads: int = 32,
    tokens: int = 4096,
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 20,
    clock: Clock | None = None,
) -> dict[str, float]:
    """Bytes of scores and weights ÷ time, as a share of what a copy on the device reads and writes in the same time."""
    clock = clock or clock_of(device)
    q, k = (torch.randn(1, heads, tokens, width, device=device, dtype=dtype) for _ in "qk")
    mask = causal_mask(tokens, tokens, device=device).contiguous()

    def derived() -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return derive(q, k, width**-0.5, mask=mask, empty=False, diagonal=Diagonal(True))

    written = sum(x.nbytes for x in derived() if x is not None)
    source = torch.empty(written // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = median_of(derived, clock, rounds)
    copied = median_of(lambda: target.copy_(source), clock, rounds)
    bandwidth = 2 * source.nbytes / copied
    return {
        "derive, bytes per second": written / spent,
        "copy, bytes read and written per second": bandwidth,
        "derive ÷ copy": written / spent / bandwidth,
    }
