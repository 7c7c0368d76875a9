"""The heads of a trace, ranked by a measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..analyze import Measure
from ..traces import Trace


@dataclass(frozen=True)
class Head:
    """One head, and how much of its attention goes where the measure looks.

    Attributes:
        layer: its layer.
        head: its index in the layer.
        path: the module path of its call.
        score: mean attention on the keys that count, between 0 and 1.
    """

    layer: int
    head: int
    path: str
    score: float

    @property
    def name(self) -> str:
        """``layer 1 head 2``."""
        return f"layer {self.layer} head {self.head}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def ranked_heads(trace: Trace, measure: Measure) -> list[Head]:
    """All heads of a trace, the one with the highest score first."""
    table = measure(trace).sort_values(measure.key, ascending=False, kind="stable")
    return [Head(*row) for row in table[["layer", "head", "path", measure.key]].itertuples(index=False)]
