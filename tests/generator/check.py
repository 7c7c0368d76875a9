"""Whether a module computes what its truth says: a case that does not is the generator's own fault."""

from __future__ import annotations

import torch
from einops import rearrange

from .source import Case
from .writer import pattern


def self_check(case: Case) -> str:
    """Whether the module computes what the truth says it does; empty: it does."""
    with torch.no_grad():
        got = case.module(*case.inputs)
    atoms = [a for g in case.out_axes for a in g]
    tokens = " ".join(a for a in case.features.get("window order", "t").split())
    width = " ".join(a for a in atoms if a in "hgref")
    lengths = {a: case.sizes[a] for g in case.out_axes if len(g) > 1 for a in g}
    got = rearrange(got, f"{pattern(case.out_axes)} -> {'b' if 'b' in atoms else '1'} ({tokens}) ({width})", **lengths)
    want = case.truth.output.flatten(2)
    if got.shape != want.shape:
        return f"output {tuple(got.shape)}, in truth {tuple(want.shape)}"
    gap = (got.double() - want).abs().max().item()
    return "" if gap < 1e-3 * max(1.0, want.abs().max().item()) else f"output off by {gap:.2g}"
