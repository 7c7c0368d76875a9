"""The certificate of a call: the measured distance between what was rebuilt and what the model's kernel returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..printable import printable

# Allowed distance in units of the largest |v| (output) and of 1 (weights), by the dtype the kernel ran in: a few times
# the rounding of the longest sum that occurs; a wrong mask, scale or head order is off by orders of magnitude more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


STATUSES = ("unfaithful", "unverified", "faithful")
"""What a certificate can say, from what outweighs the others where calls are put together."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """How faithful one call is.

    Attributes:
        status: ``faithful``, ``unfaithful``, or ``unverified`` (verification was off).
        output_error: max abs error of weights·v against the kernel's own output, of the head that is furthest from it
            for the size of its values.
        weights_error: max abs error of the derived weights against the model's own; None where it forms none, or where
            nobody knows how they follow from scores (see :mod:`hookattn.attention.normalizers`).
        row_sum_error: max distance of a row sum from 1 (with sinks: above 1); 0 of a normalizer whose rows need not sum
            to 1.
        tolerance: the bound for ``output_error``.
        weights_tolerance: the bound for ``weights_error``; four times that is the bound for ``row_sum_error``.
        rows: query rows checked, of ``of_rows``, in every batch entry and head that was captured.
        basis: what the rebuilt output was compared with.
    """

    status: str
    output_error: float
    weights_error: float | None
    row_sum_error: float
    tolerance: float
    weights_tolerance: float
    rows: int
    of_rows: int
    basis: str = "output"

    @property
    def faithful(self) -> bool:
        """Whether everything that was measured is within tolerance."""
        return self.status == "faithful"

    @property
    def max_error(self) -> float:
        """The largest error that was measured."""
        errors = (self.output_error, self.weights_error or 0.0, self.row_sum_error)
        return max(errors, key=lambda e: (math.isnan(e), e))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        weights = "" if self.weights_error is None else f", weights {self.weights_error:.1e}"
        finite = all(map(math.isfinite, (self.output_error, self.weights_error or 0.0, self.row_sum_error)))
        return printable(
            f"{self.status}: {self.basis} {self.output_error:.1e} of {self.tolerance:.1e}{weights}, "
            f"{self.rows} of {self.of_rows} rows" + ("" if finite else "; some numbers of the call are not finite")
        )


UNVERIFIED = Certificate("unverified", 0.0, None, 0.0, 0.0, 0.0, 0, 0, "nothing")


def tolerance(dtype: torch.dtype) -> float:
    """The allowed distance per unit of what was computed in a dtype; one that has no bound here is taken for coarse."""
    return TOLERANCE.get(dtype, max(TOLERANCE.values()))


def joined(certificates: Sequence[Certificate]) -> Certificate:
    """What holds for all of several calls that were put together."""
    states = {c.status for c in certificates}
    status = next(s for s in STATUSES if s in states)
    worst = max(certificates, key=lambda c: (c.status == status, c.output_error / (c.tolerance or 1.0)))
    formed = [c.weights_error for c in certificates if c.weights_error is not None]
    return replace(
        worst,
        weights_error=max(formed) if formed else None,
        row_sum_error=max(c.row_sum_error for c in certificates),
        rows=sum(c.rows for c in certificates),
        of_rows=sum(c.of_rows for c in certificates),
    )
