"""Which heads read what an earlier head wrote: composition, from the weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from einops import einsum, reduce
from torch import Tensor

from ... import checks
from ...errors import MeasureError, SelectionError
from ..frame import ranked_table, table_of
from .circuit import Circuit, checked_circuits, triangular_factor

if TYPE_CHECKING:
    from pandas import DataFrame

KINDS = ("q", "k", "v")


def composition(circuits: Sequence[Circuit], kinds: Sequence[str] = KINDS, *, baseline: bool = False) -> DataFrame:
    """How much of what an earlier head writes a later head reads as its query, key or value (Elhage et al. 2021).

    With ``W_OV = W_V W_O`` and ``W_QK = W_Q W_Kᵀ`` (vectors are rows, norms those of Frobenius), for an earlier head a
    and a later head b: ``q``: ``‖W_OV^a W_QK^b‖ / (‖W_OV^a‖ ‖W_QK^b‖)``; ``k``: the same with ``W_QK^bᵀ``; ``v``: with
    ``W_OV^b``. 0 to 1, and near ``1/√C`` for matrices that have nothing to do with each other. No matrix is formed that
    is wider than the heads together. Norms between the heads are not in it; of rotary positions see :class:`Circuit`.

    Args:
        circuits: of one model, in the order in which they run. Heads of one stack are compared, each with those of
            every call before; a cross-attention reads its keys and values elsewhere, and composes by ``q`` alone.
        kinds: which of ``q``, ``k``, ``v``.
        baseline: subtract ``1/√C``, the root mean square for matrices whose directions are random to each other.

    Returns:
        A pandas DataFrame, the largest first: ``kind``, the earlier head's ``from_layer``, ``from_head``,
        ``from_path``, the later one's ``layer``, ``head``, ``path``, and ``value``.

    Raises:
        MeasureError: there are no two calls to compare, a projection that is needed is not known, or what one writes is
            of another width than what the other reads.
        SelectionError: an unknown kind.
    """

    circuits = checked_circuits(circuits)
    kinds = checks.several("kinds", (kinds,) if isinstance(kinds, str) else kinds, str, f"some of {', '.join(KINDS)}")
    if not kinds:
        raise SelectionError(f"kinds is empty: expected some of {', '.join(KINDS)}.")
    for kind in kinds:
        checks.word("kinds", kind, KINDS)
    checks.flag("baseline", baseline)
    written = {id(c): _writing_factor(c) for c in circuits}
    read = {
        (id(c), kind): _reading_factor(c, kind) for c in circuits for kind in kinds if kind == "q" or not c.site.crosses
    }
    frames = []
    for a, b in combinations(circuits, 2):
        for kind in kinds:
            if a.site.stack == b.site.stack and (id(b), kind) in read:
                frames.append(table_of(_pair_columns(a, b, kind, written[id(a)], read[id(b), kind], baseline)))
    if not frames:
        raise MeasureError(f"composition needs two calls of one stack that can be compared by {', '.join(kinds)}.")
    return ranked_table(frames, "value")


def _writing_factor(c: Circuit) -> Tensor:
    """H E C: what has the products of ``W_V W_O`` with whatever comes after it."""
    # W_V = Q R with orthonormal columns in Q, which change no norm: R W_O stands for W_V W_O, E rows in place of C.
    return triangular_factor(c.W_V) @ c.W_O.to(_dtype(c.W_V))


def _reading_factor(c: Circuit, kind: str) -> Tensor:
    """H C D: what has the products of ``W_QK``, ``W_QKᵀ`` or ``W_OV`` with whatever comes before it."""
    first, second = {
        "q": lambda: (c.W_Q, c.W_K),
        "k": lambda: (c.W_K, c.W_Q),
        "v": lambda: (c.W_V, c.W_O.transpose(1, 2)),
    }[kind]()
    small = triangular_factor(second)
    product: Tensor = einsum(first.to(small.dtype), small, "h c d, h r d -> h c r")
    return product


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pair_columns(a: Circuit, b: Circuit, kind: str, wrote: Tensor, reads: Tensor, baseline: bool) -> dict[str, object]:
    (h, _, c), (heads, width, _) = wrote.shape, reads.shape
    if c != width:
        raise MeasureError(
            f"{a.site.label} writes {c} wide, and what {b.site.label} makes its {kind} of is {width} wide: there is "
            "something between them, and these weights alone do not tell whether they compose."
        )
    products = einsum(wrote, reads.to(wrote.dtype), "h1 e c, h2 c d -> h1 h2 e d")
    size = reduce(products.double().square(), "h1 h2 e d -> h1 h2", "sum").sqrt()
    norms = [torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64) for x in (wrote, reads)]
    value = size / (norms[0][:, None] * norms[1]) - (c**-0.5 if baseline else 0.0)
    source, target = (
        x.flatten().cpu().numpy() for x in torch.meshgrid(torch.arange(h), torch.arange(heads), indexing="ij")
    )
    return {
        "kind": kind,
        "from_layer": a.site.layer,
        "from_head": source,
        "from_path": a.site.path,
        "layer": b.site.layer,
        "head": target,
        "path": b.site.path,
        "value": value.flatten().cpu().numpy(),
    }
