"""The weights of a head: what its queries, keys and values are projected with, and what its output is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from ... import checks
from ...calls.site import Site
from ...errors import MeasureError
from ...printable import printable
from ..call_view import View

PROJECTIONS = ("q", "k", "v", "o")


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """One projection of a site, a matrix for each head.

    Attributes:
        weight: H C D, G C D or G C E for q, k, v: ``q = x W + b``; H E C for o, ``Σ_h output_h W_h + b``. The model's
            own numbers, times a factor where one was found between the product and the kernel.
        bias: heads by width for q, k, v, and C for o; None: the product has none.
        basis: how it was found: ``equal``: the product's result is the kernel's argument (for o: its input is the
            kernel's output), bit for bit; ``affine``: so but for a constant factor and offset of each column, to
            rounding; ``norms``: each head's columns have its norm at every token, as rotary positions leave it.
        name: the parameter it is in; empty if it is none (cast, tied through a computation, …).
    """

    weight: Tensor
    bias: Tensor | None
    basis: str
    name: str = ""


@dataclass(frozen=True, eq=False)
class Circuit:
    """The weights of one attention call, as far as they are proven; C is what a projection reads, or o writes.

    What q, k and v read is often the residual stream after a norm: the norm's gain is in none of these. Where ``basis``
    is ``norms``, ``W_Q W_Kᵀ`` is that of two tokens in one place: rotary positions, which turn queries and keys apart,
    are not in it. (That the kernel's own q and k have this product in one place is checked.)

    Attributes:
        site: where it is.
        index: the index of the call it was found by.
        heads: H.
        kv_heads: G; head h reads ``k`` and ``v`` of ``h // (H / G)``.
        q, k, v, o: the projections that were found.
        missing: ``"q"``, … → why one was not.
    """

    site: Site
    index: int
    heads: int
    kv_heads: int
    q: Projection | None = None
    k: Projection | None = None
    v: Projection | None = None
    o: Projection | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def projection(self, name: str) -> Projection:
        """``q``, ``k``, ``v`` or ``o``.

        Raises:
            MeasureError: it was not found; says why.
            SelectionError: another name.
        """
        found: Projection | None = getattr(self, checks.word("name", name, PROJECTIONS))
        if found is None:
            why = self.missing.get(name, "it was not given")
            raise MeasureError(f"{self.site.label}: W_{name.upper()} is not known: {why}.")
        return found

    def _per_head(self, name: str) -> Tensor:
        weight: Tensor = repeat(
            self.projection(name).weight, "g c d -> (g group) c d", group=self.heads // self.kv_heads
        )
        return weight

    @property
    def W_Q(self) -> Tensor:
        """H C D. Raises MeasureError where it is not known, as do the others."""
        return self.projection("q").weight

    @property
    def W_K(self) -> Tensor:
        """H C D, repeated for grouped heads."""
        return self._per_head("k")

    @property
    def W_V(self) -> Tensor:
        """H C E, repeated for grouped heads."""
        return self._per_head("v")

    @property
    def W_O(self) -> Tensor:
        """H E C."""
        return self.projection("o").weight

    def __repr__(self) -> str:
        parts = []
        for name in "qkvo":
            p: Projection | None = getattr(self, name)
            said = "unknown" if p is None else f"{tuple(p.weight.shape)} {p.basis} {p.name}".rstrip()
            parts.append(f"{name} {said}")
        return printable(f"Circuit({self.site.label}, layer {self.site.layer}: {'; '.join(parts)})")


def checked_circuits(circuits: Any, name: str = "circuits") -> tuple[Circuit, ...]:
    """What a function was given for the circuits of a model.

    Raises:
        InputError: it is something else.
    """
    what = "circuits, as hookattn.analyze.circuit(model, inputs) makes them"
    return tuple(checks.several(name, circuits, Circuit, what))


def circuit_of(view: View, circuits: Sequence[Circuit]) -> Circuit:
    """The circuit of a call: that of its site.

    Args:
        view: the call.
        circuits: of the same model.

    Raises:
        MeasureError: there is none, or it has other heads.
    """
    site = view.call.site
    found = next((c for c in circuits if (c.site.path, c.site.kind) == (site.path, site.kind)), None)
    if found is None:
        raise MeasureError(
            f"{view.where} has no circuit among the {len(circuits)} given; they have to be of the same model, as "
            "hookattn.analyze.circuit(model, inputs) makes them."
        )
    if (view.call.heads is None and view.shape[1] != found.heads) or max(view.heads) >= found.heads:
        raise MeasureError(f"{view.where} has heads {list(view.heads)}, and its circuit has {found.heads}.")
    return found


def triangular_factor(matrices: Tensor) -> Tensor:
    """R of ``M = Q R``: as small as it gets, and ``‖M x‖ = ‖R x‖`` for every x.

    Args:
        matrices: … m n.

    Returns:
        … min(m, n) n, float32 (float64 for matrices in that).
    """
    wide = matrices if matrices.dtype == torch.float64 else matrices.float()
    made: Tensor = torch.linalg.qr(wide, mode="r").R
    return made
